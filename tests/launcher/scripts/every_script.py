"""Runs the scripts beside one after the other, each as the main module.

FOLDER FLAGS...: each into FOLDER/NAME. One process imports once what all of them import.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    folder, *flags = sys.argv[1:]
    for script in sorted(Path(__file__).parent.glob("run_*.py")):
        output = Path(folder, script.stem, "out")
        sys.argv = [str(script), "--output_dir", str(output), *flags]
        if script.stem == "run_glue":
            sys.argv += ["--model_name_or_path", "tiny", "--task_name", "mrpc"]
        runpy.run_path(str(script), run_name="__main__")
