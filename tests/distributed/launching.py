"""Starts the worker in one process or several, and what the tests have it train."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def launch(folder, processes, configurations):
    """Run the worker in `processes` processes and return its results, a list per rank."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    worker = [str(HERE / "worker.py"), str(folder), json.dumps(configurations)]
    done = subprocess.run(
        [*launcher, *worker],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(processes)]
    assert {result["world_size"] for rank in ranks for result in rank} == {processes}
    return ranks


def configuration(model, optim, batch, accumulation=1):
    """Ten steps without dropout, which draws other masks on every rank."""
    return {
        "model": model,
        "optim": optim,
        "batch": batch,
        "accumulation": accumulation,
        "dropout": 0.0,
        "steps": 10,
    }
