"""The grid of runs: which there are, and carrying out those that are missing, several at a time."""

import importlib.metadata
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import transformers
from support.command_line import UsageError
from support.glue import load_glue_files
from tqdm import tqdm

from comparison.candidates import CANDIDATES, SWEPT, trained_as
from comparison.loaders import Sources
from comparison.results import RESULTS
from comparison.runs import Run, execute
from comparison.tasks import Task


def calibrations(task_name: str, task: Task, candidate: str, output_dir: Path) -> list[Run]:
    """Return the runs that find the best rate of a candidate on a task."""
    return [
        Run(task_name, task, candidate, rate, seed, output_dir)
        for seed in task.calibration_seeds
        for rate in task.rates
    ]


def best_rate(runs: Sequence[Run]) -> float:
    """Return the rate with the best mean peak metric, of equals that with the lower loss.

    Raises:
        UsageError: No rate has finished on every seed.
    """
    scores: dict[float, list[tuple[float, float]]] = {}
    for run in runs:
        results = json.loads((run.folder / RESULTS).read_text(encoding="utf-8"))
        metric, loss = results.get("peak_metric"), results.get("final_training_loss")
        scores.setdefault(run.rate, [])
        if metric is not None and loss is not None:
            sign = 1 if run.task.lower_is_better else -1
            scores[run.rate].append((sign * metric, loss))
    seeds = len(runs[0].task.calibration_seeds)
    complete = {rate: found for rate, found in scores.items() if len(found) == seeds}
    if not complete:
        raise UsageError(f"{runs[0].task_name}: no rate of {runs[0].task.rates} trains AdamW")
    return min(
        complete, key=lambda rate: [sum(column) for column in zip(*complete[rate], strict=True)]
    )


def comparison(
    tasks: Mapping[str, Task],
    names: Sequence[str],
    rates: Mapping[tuple[str, str], float],
    output_dir: Path,
) -> list[Run]:
    """Return the runs of the comparison: all first seeds, then all second ones, ...

    Args:
        tasks: Name -> task.
        names: The candidates.
        rates: Task and candidate of `SWEPT` -> the best rate.
        output_dir: Where the results are.
    """
    runs = []
    for number in range(max(len(task.seeds) for task in tasks.values())):
        for task_name, task in tasks.items():
            as_trained = dict.fromkeys(trained_as(name, task) for name in names)
            for name in as_trained if number < len(task.seeds) else ():
                rate = CANDIDATES[name].rate
                peak = rates[task_name, name] if name in SWEPT else rate(task) if rate else None
                runs.append(Run(task_name, task, name, peak, task.seeds[number], output_dir))
    return runs


def missing(runs: Sequence[Run]) -> list[Run]:
    """Return the runs without results.

    Raises:
        UsageError: There are results of another configuration.
    """
    left = []
    for run in runs:
        file = run.folder / RESULTS
        if not file.is_file():
            left.append(run)
        elif json.loads(file.read_text(encoding="utf-8"))["configuration"] != run.configuration:
            raise UsageError(
                f"{run.folder} holds a run with other settings: delete it, or choose another "
                "--output_dir"
            )
    return left


def fill(
    runs: Sequence[Run], sources: Sources, pool: ProcessPoolExecutor, jobs: int, description: str
) -> None:
    """Carry out the runs that have no results yet, `jobs` at a time."""
    left = missing(runs)
    waiting = iter(left)
    running: dict[Future[str], Run] = {}
    with tqdm(total=len(runs), initial=len(runs) - len(left), desc=description) as bar:
        while True:
            # No more than can run: what a pool has in its queue, Ctrl-C does not take back.
            for run in itertools.islice(waiting, jobs - len(running)):
                run.folder.mkdir(parents=True, exist_ok=True)
                running[pool.submit(execute, run, sources)] = run
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(done)
                # Raises what is not a run's own fault: data that is missing, a killed process.
                if done.result() == "failed":
                    bar.write(f"failed: {run.folder}")
                bar.update()


@contextmanager
def open_pool(jobs: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """Yield the processes that carry out runs; they end with the block, whatever ends it."""
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    with ProcessPoolExecutor(jobs, context, initializer=start_worker, initargs=(threads,)) as pool:
        try:
            yield pool
        except BaseException:
            for worker in multiprocessing.active_children():  # each has its checkpoint
                worker.terminate()
            raise


def start_worker(threads: int) -> None:
    """Prepare a process that carries out runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends it
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(threads)
    be_quiet()


def _end_with_the_parent() -> None:
    """End this process, in the middle of a run, once its parent is gone: killed, it ends nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def be_quiet() -> None:
    """Leave the screen to the progress of the grid."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def check(tasks: Mapping[str, Task], names: Sequence[str], sources: Sources) -> None:
    """Refuse before the first run what would end the grid later.

    Raises:
        UsageError: A package or a file is missing.
    """
    needed = [
        (name, package, "candidates") for name in names if (package := CANDIDATES[name].package)
    ]
    needed += [
        (name, package, "tasks") for name, task in tasks.items() for package in task.packages
    ]
    for name, package, flag in needed:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise UsageError(
                f"{name} needs {package}: pip install -c constraints.txt -e '.[compare]', or leave "
                f"it out of --{flag}"
            ) from error
    for task_name, task in tasks.items():
        if task.settings.get("file") and not sources.text_file:
            raise UsageError(f"{task_name} needs --text_file, or leave it out of --tasks")
    if sources.text_file and not Path(sources.text_file).is_file():
        raise UsageError(f"text_file {sources.text_file}: no such file")
    if sources.glue_dir:
        for task in tasks.values():
            if task.settings.get("task"):
                load_glue_files(task.settings["task"], sources.glue_dir)


def run_grid(
    tasks: Mapping[str, Task],
    names: Sequence[str],
    output_dir: Path,
    sources: Sources,
    jobs: int,
    threads: int,
) -> None:
    """Fill the grid: calibrate AdamW, then compare."""
    try:
        with open_pool(jobs, threads) as pool:
            found = {
                (task_name, candidate): calibrations(task_name, task, candidate, output_dir)
                for task_name, task in tasks.items()
                for candidate in {trained_as(name, task): None for name in names if name in SWEPT}
            }
            every = [run for runs in found.values() for run in runs]
            if every:
                fill(every, sources, pool, jobs, "Rates")
            rates = {key: best_rate(runs) for key, runs in found.items()}
            runs = comparison(tasks, names, rates, output_dir)
            fill(runs, sources, pool, jobs, "Comparison")
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None
