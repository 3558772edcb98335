"""What the benchmarks share: clocks, turns, ratios, memory, tables and their command line."""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RIVALS = ("SaLSa-Optimizer", "schedulefree", "prodigyopt")

Row = dict[str, Any]  # column -> value: what a table shows and the JSON file keeps


class Clock:
    """Seconds from start to stop, the accelerator's work included."""

    def __init__(self, kind: str) -> None:
        self._now = time.process_time if kind == "cpu" else time.perf_counter
        self._started = 0.0

    def start(self) -> None:
        _synchronise()
        self._started = self._now()

    def stop(self) -> float:
        _synchronise()
        return self._now() - self._started


def _synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], Any]) -> int:
    """Return how many bytes of tensors `run` needs at its peak, beyond those there before."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    present = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            present += event.nbytes()
            peak = max(peak, present)
    return peak


def host_waits(run: Callable[[], Any]) -> int | None:
    """Return how often the host waits for the GPU in `run`, or None without a GPU."""
    if DEVICE.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def in_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each contender in each round."""
    order = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    shuffler = random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            seconds[name].append(contenders[name]())
    return seconds


class Ratio(NamedTuple):
    """Median and quartiles, of the ratios of two contenders within each round or of one figure."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float], baseline: Sequence[float]) -> "Ratio":
        return cls.spread([mine / its for mine, its in zip(seconds, baseline, strict=True)])

    @classmethod
    def spread(cls, values: Sequence[float]) -> "Ratio":
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def verdict(value: float, limit: float, text: str | None = None, *, at_least: bool = False) -> str:
    """Return whether a figure is good enough; `text` is what is shown of it, the limit without."""
    met = value >= limit if at_least else value <= limit
    return f"{'met' if met else 'MISSED'}: {limit if text is None else text}"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- command line and output --------------------------------------------------------------------


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return the parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    return parser


def add_model_flags(
    parser: argparse.ArgumentParser, known: Sequence[str], models: Sequence[str]
) -> None:
    """Add the flags of the benchmarks that measure models."""
    parser.add_argument("--models", nargs="+", choices=known, default=list(models))
    parser.add_argument("--quick", action="store_true", help="MiniLM and 3 rounds only")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: time on the processor"
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags, those that every benchmark has checked."""
    args = parser.parse_args(argv)
    if getattr(args, "quick", False):
        args.models, args.repeats = ["minilm"], 3
    if args.repeats < 2:
        parser.error(f"--repeats {args.repeats} is too few: quartiles need at least 2")
    if getattr(args, "clock", "wall") == "cpu" and DEVICE.type != "cpu":
        parser.error("--clock cpu does not see the work of a GPU")
    return args


class Report:
    """Prints what the figures depend on and then each table; keeps all of it in a JSON file."""

    def __init__(self, args: argparse.Namespace) -> None:
        cpu = f"CPU ({platform.machine()})"
        about = {
            "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu,
            "threads": torch.get_num_threads(),
            "clock": getattr(args, "clock", "both"),
            "repeats": args.repeats,
            "load average": os.getloadavg()[0],
            **{name: version(name) for name in ("hf_salsa", "torch", "transformers", *RIVALS)},
        }
        shown = (f"{name} {value or 'not installed: left out'}" for name, value in about.items())
        print(", ".join(shown))
        self._output = args.output
        self._found: dict[str, Any] = {"environment": about}

    def add(self, title: str, rows: Sequence[Row]) -> None:
        """Print a table, and write the file anew."""
        print_table(title, rows)
        self._found[title] = rows
        if self._output:
            self._output.write_text(json.dumps(self._found, indent=2) + "\n", encoding="utf-8")


def print_table(title: str, rows: Sequence[Row]) -> None:
    table = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    print(f"\n{title}\n")
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(f"| {' | '.join(cells)} |", flush=True)


def _shown(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
