"""What importing hf_salsa costs over what it is built on.

    OMP_NUM_THREADS=1 python scripts/benchmarks/import_time.py

Two fresh interpreters take turns: one imports torch and then the optimizers, the other Trainer and
then its subclass. Each import is timed where it happens, so that what an interpreter needs to start
does not count, nor do the modules that are there already. Medians and quartiles over the rounds; an
uncounted round before them fills the caches of bytecode and disk.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from measuring import Ratio, Report, Row, make_parser, parse, verdict

HEAVY = ("transformers", "accelerate", "torch.distributed.tensor")


class Case(NamedTuple):
    """An import of ours, the one it comes on top of, and the seconds that it may take."""

    base: str
    ours: str
    target: float


CASES = (
    Case("import torch", "from hf_salsa import SaLSaAdam, BatchObjective", 0.3),
    Case(
        "from transformers import Trainer",
        "from hf_salsa import SaLSaTrainer, SaLSaTrainingArguments",
        0.2,
    ),
)
# Run in the interpreter that is measured: the imports are its arguments, then the modules to watch.
PROGRAM = """
import json, sys, time
*statements, watched = map(json.loads, sys.argv[1:])
found = []
for statement in statements:
    wall, processor = time.perf_counter(), time.process_time()
    exec(statement)
    seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    found.append(seconds | {"loaded": [name for name in watched if name in sys.modules]})
print(json.dumps(found))
"""


def measure(case: Case) -> list[dict[str, Any]]:
    """Return, for the base and for ours, seconds by both clocks and what is loaded after it."""
    arguments = map(json.dumps, (case.base, case.ours, HEAVY))
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def benchmark_imports(args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Return the table of seconds, and that of what the first import of ours loads."""
    for case in CASES:
        measure(case)
    rounds = [[measure(case) for case in CASES] for _ in range(args.repeats)]
    rows: list[Row] = []
    for number, case in enumerate(CASES):
        for place, statement in enumerate((case.base, case.ours)):
            clocks = {
                name: Ratio.spread([found[number][place][name] for found in rounds])
                for name in ("processor", "wall")
            }
            median = clocks["processor"].median
            rows.append(
                {
                    "import": f"{'then ' * place}{statement}",
                    "processor s (quartiles)": clocks["processor"],
                    "wall s (quartiles)": clocks["wall"],
                    "target, processor s": verdict(median, case.target) if place else "",
                }
            )
    torch_alone, ours = rounds[0][0]
    loaded: list[Row] = []
    for name in HEAVY:
        by_ours = "yes" if name in ours["loaded"] else "no"
        by = "by torch itself" if name in torch_alone["loaded"] else by_ours
        loaded.append({"module": name, "loaded": by})
    return rows, loaded


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(make_parser(__doc__), argv)
    report = Report(args)
    seconds, loaded = benchmark_imports(args)
    report.add("Importing", seconds)
    report.add(f"Loaded by {CASES[0].ours}", loaded)


if __name__ == "__main__":
    main()
