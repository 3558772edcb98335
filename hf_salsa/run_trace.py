"""RunTrace: what the searches of one training run found and cost, for log, plot and card."""

import time
from dataclasses import asdict
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .accelerated import unwrap_optimizer
from .optimizers import LineSearchOptimizer
from .phases import phases_of
from .rules import SearchRecord

_MOST_POINTS = 500


class RunTrace(TrainerCallback, ExportableState):
    """Keeps a bounded trace of the searches of the current run, in its checkpoints too.

    Attributes:
        before: The optimizer's counters when the run began: what earlier runs did.
        points: (step, step size applied, f_k(w_k)) of searches, evenly thinned out to at most 500.
        latest: What the log shows of the latest search; nothing before the first one.
    """

    def __init__(self) -> None:
        self.before: dict[str, int] = {}
        self.points: list[tuple[int, float, float]] = []
        self.latest: dict[str, float] = {}
        self._every = 1  # search is kept
        self._searches = 0
        self._seen: SearchRecord | None = None
        self._reset_clock()

    def _reset_clock(self) -> None:
        self._started, self._searching = 0.0, False
        # Of optimizer.step() with and without a search, and how many there were.
        self._seconds, self._steps = {True: 0.0, False: 0.0}, {True: 0, False: 0}

    @property
    def search_seconds(self) -> float:
        """Seconds that the searches took; as Trainer's `train_runtime`, since a resume."""
        plain = self._seconds[False] / max(1, self._steps[False])  # an update alone
        return max(0.0, self._seconds[True] - plain * self._steps[True])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        kept = {"before": self.before, "points": self.points, "latest": self.latest}
        return {
            "args": {},
            "attributes": kept | {"_every": self._every, "_searches": self._searches},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start anew, or go on where the checkpoint was written."""
        kept: Any = state.stateful_callbacks
        saved = kept.get(type(self).__name__)
        kept.setdefault(type(self).__name__, self.state())  # stock Trainer's checkpoint has none
        line_search = unwrap_optimizer(kwargs.get("optimizer"))
        if line_search is None:
            return
        counted = asdict(line_search.counters)
        if state.global_step and isinstance(saved, dict):
            vars(self).update(saved["attributes"])
            # A checkpoint of the weights alone has no counters: they begin anew.
            self.before = {name: min(n, counted[name]) for name, n in self.before.items()}
            self.points = [tuple(point) for point in self.points]  # type: ignore[misc]
        else:
            self.before = counted
            self.points, self._every, self._searches = [], 1, 0
            self.latest = _shown(line_search.last_search)
        self._seen = line_search.last_search
        self._reset_clock()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        line_search = unwrap_optimizer(kwargs.get("optimizer"))
        self._searching = line_search is not None and line_search.search_due
        if self._searching and args.device.type != "cpu":
            torch.accelerator.synchronize()  # a search begins by waiting for backward
        self._started = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note how long the step took, and what it found if it searched."""
        self._seconds[self._searching] += time.perf_counter() - self._started
        self._steps[self._searching] += 1
        line_search = unwrap_optimizer(kwargs.get("optimizer"))
        record = None if line_search is None else line_search.last_search
        if line_search is None or record is None or record is self._seen:
            return
        self._seen, self.latest = record, _shown(record)
        if self._searches % self._every == 0:
            self.points.append((state.global_step + 1, line_search.step_size, record.loss))
            if len(self.points) > _MOST_POINTS:
                self.points, self._every = self.points[::2], 2 * self._every
        self._searches += 1

    def report(self, line_search: LineSearchOptimizer, state: TrainerState) -> dict[str, float]:
        """Return what the searches of the run cost and found, for the log at its end.

        Args:
            line_search: The optimizer.
            state: Trainer's.
        """
        totals = asdict(line_search.counters)
        of_run = {name: total - self.before.get(name, 0) for name, total in totals.items()}
        # Each evaluation repeats the forward passes of one update.
        forward_passes = of_run["trials"] + state.global_step
        head = phases_of(line_search, state.max_steps).head
        median = self.median_step_size(state.global_step, after=head)
        # Of the searches, which go on at the full step size while a tail brings it down.
        settled = line_search.param_groups[0]["step_size"]
        return {
            "salsa/searches": of_run["searches"],
            "salsa/trials": of_run["trials"],
            "salsa/extra_forward_share": of_run["trials"] / max(forward_passes, 1),
            "salsa/search_runtime": round(self.search_seconds, 4),
            "salsa/failed_searches": of_run["failed_searches"],
            "salsa/skipped_steps": of_run["skipped_steps"],
            "salsa/settled_step_size": 0.0 if median is None else settled,
            "salsa/median_step_size": 0.0 if median is None else median,
            "salsa/final_step_size": line_search.step_size,
        }

    def median_step_size(self, last_step: int, after: int = 0) -> float | None:
        """Return the median over steps of the run of the step size applied; None without any.

        Between two searches the step size is that of the first of them.

        Args:
            last_step: The last step that counts.
            after: The first steps, so many, do not: they trained a new head alone.
        """
        points = [point for point in self.points if point[0] > after]
        ends = [*(step for step, _, _ in points[1:]), last_step + 1]
        spans = [
            (size, end - step)
            for (step, size, _), end in zip(points, ends, strict=False)
            if size > 0
        ]
        half, covered = sum(span for _, span in spans) / 2, 0
        for size, span in sorted(spans):
            covered += span
            if covered >= half:
                return size
        return None


def _shown(record: SearchRecord | None) -> dict[str, float]:
    """Return what the log shows of a search."""
    if record is None:
        return {}
    return {
        "salsa/interval": record.interval,
        "salsa/decrease": record.decrease,
        "salsa/slope": record.slope,
    }
