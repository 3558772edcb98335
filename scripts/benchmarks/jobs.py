"""Whole short jobs, as a user runs them: the scripts from their flags to their model card."""

import contextlib
import importlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import measuring
from measuring import Clock, Ratio, Row

SCRIPTS = {"prose": "run_clm", "probe": "run_glue"}  # job -> the script, with its own data
BASELINE = "adamw_torch_fused"
PLAIN = ("--disable_tqdm", "true", "--report_to", "none", "--overwrite_output_dir", "true")


class Job(NamedTuple):
    """What one job took."""

    wall: float  # seconds
    cpu: float  # of all threads
    updates: int
    trials: int  # forward passes of whole updates, beyond the one of each


def run(script: str, optim: str, updates: int) -> Job:
    """Run a script in this process, imports aside, and return what it took.

    Args:
        script: Its module.
        optim: The optimizer.
        updates: How many; 0 for as many as the script makes by itself.
    """
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main = importlib.import_module(script).main
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flags = ["--output_dir", folder, "--optim", optim, *PLAIN]
        flags += ["--max_steps", str(updates)] if updates else []
        wall, cpu = Clock("wall"), Clock("cpu")
        with contextlib.redirect_stdout(io.StringIO()):
            wall.start()
            cpu.start()
            main(flags)
            seconds = wall.stop(), cpu.stop()
        state = json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))
    logged = (entry["salsa/trials"] for entry in state["log_history"] if "salsa/trials" in entry)
    return Job(*seconds, state["global_step"], int(max(logged, default=0)))


def benchmark(job: str, optims: Sequence[str], updates: int, rounds: int) -> list[Row]:
    """Return the cost of a whole job with each line search beside the baseline's.

    Args:
        job: A key of `SCRIPTS`.
        optims: The line searches.
        updates: As in `run`.
        rounds: How often each runs, in turns.
    """
    found: dict[str, list[Job]] = {optim: [] for optim in (BASELINE, *optims)}

    def take(optim: str) -> float:
        found[optim].append(run(SCRIPTS[job], optim, updates))
        return found[optim][-1].wall

    run(SCRIPTS[job], BASELINE, 2)  # what is loaded and made once
    measuring.in_turns({optim: partial(take, optim) for optim in found}, rounds)
    rows = []
    for optim, taken in found.items():
        rivals = found[BASELINE]
        trials = sum(t.trials for t in taken) / len(taken)
        rows.append(
            {
                "run": optim,
                "updates": taken[0].updates,
                "s": Ratio.spread([t.wall for t in taken]).median,
                "wall (quartiles)": Ratio.of([t.wall for t in taken], [t.wall for t in rivals]),
                "processor (quartiles)": Ratio.of([t.cpu for t in taken], [t.cpu for t in rivals]),
                "extra forwards": trials,
                "of all": trials / (trials + taken[0].updates),
            }
        )
    return rows
