"""All candidates against one of them, over all tasks, on the seeds that both have."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from comparison.results import Cell, Comparison, Results
from comparison.tables import SMALLEST_LOSS, counted, markdown, ranks

CLEARLY_ABOVE = 0.02  # metric by which the reference must be above chance
AT_CHANCE = 0.1  # share of the reference's way from chance, below which a run is at chance


class Against(NamedTuple):
    """A candidate against the reference on one task.

    Attributes:
        ratio: Geometric mean over the seeds of the ratio of the final training losses; NaN if a run
            failed.
        ahead: Difference of the mean peak metrics in pooled standard errors, above 0 where the
            candidate is better; None where they show none.
        seconds: Ratio of the seconds of an update, by the clock.
        cpu_seconds: The same of the processor.
        passes: Extra forward passes of an update.
        at_chance: How many runs are at chance where the reference is not.
        runs: How many runs there are.
    """

    ratio: float
    ahead: float | None
    seconds: float
    cpu_seconds: float
    passes: float
    at_chance: int
    runs: int


def pairs(
    comparison: Comparison, task: str, candidate: str, reference: str
) -> list[tuple[Results, Results]]:
    """Return the runs of a candidate and of the reference on a task, by common seeds."""
    of_reference = {run["seed"]: run for run in comparison.of(task, reference)}
    found = comparison.of(task, candidate)
    return [(run, of_reference[run["seed"]]) for run in found if run["seed"] in of_reference]


def against(comparison: Comparison, task: str, candidate: str, reference: str) -> Against | None:
    """Return how a candidate does against the reference, None where they have no common seed."""
    found = pairs(comparison, task, candidate, reference)
    if not found:
        return None
    ours, theirs = (list(runs) for runs in zip(*found, strict=True))
    finished = [(run, other) for run, other in found if "seconds" in run and "seconds" in other]
    return Against(
        ratio=_geometric_mean([_loss(run) / _loss(other) for run, other in found]),
        ahead=_ahead(comparison, task, ours, theirs),
        seconds=_time(finished, "seconds"),
        cpu_seconds=_time(finished, "cpu_seconds"),
        passes=_mean([run["extra_forward_passes"] / run["updates"] for run, _ in finished]),
        at_chance=sum(_at_chance(comparison, task, run, theirs) for run in ours),
        runs=len(found),
    )


def _loss(run: Results) -> float:
    loss = run.get("final_training_loss")
    return math.nan if loss is None else counted(loss)


def _time(finished: Sequence[tuple[Results, Results]], name: str) -> float:
    ratios = [
        (run[name] / run["updates"]) / (other[name] / other["updates"]) for run, other in finished
    ]
    return _geometric_mean(ratios)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(_mean([math.log(value) for value in values]))


def _ahead(
    comparison: Comparison, task: str, ours: Sequence[Results], theirs: Sequence[Results]
) -> float | None:
    a, b = Cell.of(ours, "peak_metric"), Cell.of(theirs, "peak_metric")
    difference = a.mean - b.mean
    pooled = math.hypot(a.error or 0.0, b.error or 0.0)
    if difference == 0:
        return 0.0
    if math.isnan(difference) or pooled == 0:
        return None
    return (-difference if comparison.lower_is_better(task) else difference) / pooled


def _at_chance(comparison: Comparison, task: str, run: Results, theirs: Sequence[Results]) -> bool:
    chance = comparison.chances.get(task)
    way = Cell.of(theirs, "peak_metric").mean - (chance or 0.0)
    if chance is None or not way > CLEARLY_ABOVE:  # NaN is not above
        return False
    metric = run.get("peak_metric")
    return metric is None or metric - chance < AT_CHANCE * way


def average_ranks(comparison: Comparison, name: str) -> dict[str, float]:
    """Return the average rank of the candidates with runs on every task, by their common seeds.

    Args:
        comparison: The results.
        name: Of the value that is compared: `final_training_loss` or `peak_metric`.
    """
    everywhere = [
        candidate
        for candidate in comparison.labels
        if all(comparison.of(task, candidate) for task in comparison.compared)
    ]
    found: dict[str, list[float]] = {candidate: [] for candidate in everywhere}
    for task in comparison.compared:
        runs = {candidate: comparison.of(task, candidate) for candidate in everywhere}
        seeds = [{run["seed"] for run in of_candidate} for of_candidate in runs.values()]
        common = set.intersection(*seeds) if seeds else set()
        if not common:
            continue
        cells = {
            candidate: Cell.of([run for run in of_candidate if run["seed"] in common], name)
            for candidate, of_candidate in runs.items()
        }
        lower = name == "final_training_loss" or comparison.lower_is_better(task)
        for candidate, rank in ranks(cells, lower).items():
            found[candidate].append(rank)
    return {candidate: statistics.fmean(of_all) for candidate, of_all in found.items() if of_all}


def against_section(comparison: Comparison, references: Sequence[str]) -> list[str]:
    """Return every candidate against the first of `references` that has runs."""
    reference = next((name for name in references if name in comparison.labels), None)
    if reference is None:
        return []
    rank_of = [average_ranks(comparison, name) for name in ("final_training_loss", "peak_metric")]
    rows = []
    for candidate, label in comparison.labels.items():
        on_task = {
            task: found
            for task in comparison.compared
            if (found := against(comparison, task, candidate, reference)) is not None
        }
        if on_task:
            ranked = [f"{rank[candidate]:.2f}" if candidate in rank else "" for rank in rank_of]
            rows.append([label, *_row(comparison, on_task, ranked)])
    head = ["", "tasks", "loss", "worst task", "metric", "rank by loss", "rank by metric"]
    return [
        f"## Against {comparison.labels[reference]}",
        "On the tasks and seeds that both have. **Loss**: the ratio of the final training losses, "
        f"geometric means over seeds and tasks; losses below {SMALLEST_LOSS} count as that. "
        "**Metric**: the difference of the peak metrics in pooled standard errors, the mean over "
        "the tasks; above 0 is better. **Ranks**: averages over all tasks, among the candidates "
        "that have run on each. **Time**: of an update, as a ratio, by the clock / of the "
        "processor. **Passes**: extra forward passes of an update. **At chance**: runs that came "
        f"less than {100 * AT_CHANCE:g} % of the way from the best constant answer to the mean "
        "that they are compared with, where that is above the constant answer by more than "
        f"{CLEARLY_ABOVE}.",
        markdown([*head, "time", "passes", "at chance"], rows),
    ]


def _row(
    comparison: Comparison, on_task: Mapping[str, Against], ranked: Sequence[str]
) -> list[str]:
    """Return what a candidate came to over its tasks."""
    ratios = {task: found.ratio for task, found in on_task.items()}
    ahead = [found.ahead for found in on_task.values() if found.ahead is not None]
    times = [
        _geometric_mean([getattr(found, name) for found in on_task.values()])
        for name in ("seconds", "cpu_seconds")
    ]
    failed = [task for task, ratio in ratios.items() if math.isnan(ratio)]
    worst = failed[0] if failed else max(ratios, key=ratios.__getitem__)
    of_worst = "failed" if failed else f"{ratios[worst]:.2f}"
    return [
        str(len(on_task)),
        "failed" if failed else f"{_geometric_mean(list(ratios.values())):.3f}",
        f"{of_worst} ({comparison.title(worst)})",
        f"{_mean(ahead):+.1f}" if ahead else "",
        *ranked,
        " / ".join(f"{time:.2f}" for time in times),
        f"{_mean([found.passes for found in on_task.values()]):.2f}",
        f"{sum(f.at_chance for f in on_task.values())} of {sum(f.runs for f in on_task.values())}",
    ]
