"""The results below a folder: reading them, their means and standard errors."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.command_line import UsageError

RESULTS = "results.json"
METRIC_NAMES = {
    "accuracy": "accuracy",
    "matthews_correlation": "Matthews correlation",
    "loss_per_character": "held-out loss per character",
    "spearmanr": "Spearman correlation",
    "macro_f1": "macro F1",
}
Results = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What the seeds of one candidate came to on one task; the mean is NaN if one of them failed.

    Attributes:
        mean: The mean over the seeds.
        error: Its standard error, None of a single seed.
        seeds: How many runs there are.
    """

    mean: float
    error: float | None
    seeds: int

    @classmethod
    def of(cls, runs: Sequence[Results], name: str) -> "Cell":
        values = [run.get(name) for run in runs]
        if any(value is None for value in values):  # a run that failed, or a loss not finite
            return cls(math.nan, None, len(values))
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))

    def show(self, digits: int) -> str:
        if math.isnan(self.mean):
            return "failed"
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"


class Comparison:
    """The results below a folder, by task and candidate.

    Attributes:
        labels: Candidate that has runs -> what readers call it.
        ablations: Likewise, methods and what is left of them without one part; those of which a
            part was left out.
        swept: The first of `labels` whose rate was searched, if one's was.
        compared: The tasks with runs of `labels`.
        chances: Task -> the metric of the best answer that is always the same.

    Args:
        output_dir: Where the results are.
        labels: Candidate -> what readers call it.
        tasks: The tasks that there may be.
        ablations: For each such method, itself and what is left of it without one part -> what
            readers call it.
        same_runs: Task and candidate -> the candidate whose runs are its runs too.
        chances: As above.
    """

    def __init__(
        self,
        output_dir: Path,
        labels: Mapping[str, str],
        tasks: Sequence[str],
        ablations: Sequence[Mapping[str, str]],
        same_runs: Mapping[tuple[str, str], str] | None = None,
        chances: Mapping[str, float] | None = None,
    ) -> None:
        found = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(output_dir.glob(f"*/*/seed_*/{RESULTS}"))
        ]
        if not found:
            raise UsageError(f"{output_dir} holds no results of compare.py")
        self.output_dir = output_dir
        self.same_runs = same_runs or {}
        self.chances = chances or {}
        self.all = found
        self.runs = [run for run in found if not run["calibration"]]
        self.calibrations = [run for run in found if run["calibration"]]
        of_tasks = {run["task"] for run in found}
        if not of_tasks <= set(tasks):
            others = ", ".join(sorted(of_tasks - set(tasks)))
            raise UsageError(f"{output_dir} holds results of another preset's tasks: {others}")
        self.tasks = [task for task in tasks if task in of_tasks]
        present = {run["candidate"] for run in self.runs}
        self.labels = {name: label for name, label in labels.items() if name in present}
        parts = [{n: label for n, label in some.items() if n in present} for some in ablations]
        self.ablations = [some for some in parts if set(some) - set(labels)]
        calibrated = {run["candidate"] for run in self.calibrations}
        self.swept = next((name for name in labels if name in calibrated), None)
        compared = {run["task"] for run in self.runs if run["candidate"] in labels}
        self.compared = [task for task in self.tasks if task in compared]

    def of(self, task: str, candidate: str) -> list[Results]:
        """Return the runs of a candidate on a task."""
        wanted = task, self.same_runs.get((task, candidate), candidate)
        return [run for run in self.runs if (run["task"], run["candidate"]) == wanted]

    def settings(self, task: str) -> Results:
        """Return the configuration of a task."""
        return next(run["configuration"]["task"] for run in self.all if run["task"] == task)

    def title(self, task: str) -> str:
        return next(run["title"] for run in self.all if run["task"] == task)

    def lower_is_better(self, task: str) -> bool:
        return self.settings(task)["metric"].startswith("loss")

    def cells(
        self,
        task: str,
        name: str,
        candidates: Mapping[str, str] | None = None,
        *,
        paired: bool = False,
    ) -> dict[str, Cell]:
        """Return the cell of each candidate, of `labels` by default, that has runs on a task.

        Args:
            task: The task.
            name: Of the value.
            candidates: As above.
            paired: Only of the seeds that all who have runs have.
        """
        names = self.labels if candidates is None else candidates
        runs = {candidate: self.of(task, candidate) for candidate in names}
        if paired:
            seeds = [{run["seed"] for run in found} for found in runs.values() if found]
            common = set.intersection(*seeds) if seeds else set()
            runs = {n: [run for run in found if run["seed"] in common] for n, found in runs.items()}
        return {candidate: Cell.of(found, name) for candidate, found in runs.items() if found}
