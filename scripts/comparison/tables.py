"""Results as Markdown."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from comparison.results import METRIC_NAMES, Cell, Comparison

STANDS = 1.05  # a run stands beside a sweep with at most this ratio of the final training losses
SMALLEST_LOSS = 0.02  # in a ratio smaller ones count as this: the digits are learnt by then


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seeds_of(cells: Mapping[str, Cell]) -> str:
    numbers = sorted({cell.seeds for cell in cells.values()})
    return "-".join(map(str, sorted({numbers[0], numbers[-1]})))


def grid_row(
    comparison: Comparison, task: str, cells: Mapping[str, Cell], digits: int, lower: bool
) -> list[str]:
    means = [cell.mean for cell in cells.values() if not math.isnan(cell.mean)]
    best = (min if lower else max)(means, default=None)
    row = [f"{comparison.title(task)}{' ↓' if lower else ''}", seeds_of(cells)]
    for candidate in comparison.labels:
        cell = cells.get(candidate)
        text = "" if cell is None else cell.show(digits)
        row.append(f"**{text}**" if cell is not None and cell.mean == best else text)
    return row


def ranks(cells: Mapping[str, Cell], lower: bool) -> dict[str, float]:
    """Return the rank of each candidate, 1 for the best; equals share theirs, failures are last."""
    sign = 1 if lower else -1
    keys = {c: math.inf if math.isnan(v.mean) else sign * v.mean for c, v in cells.items()}
    return {
        candidate: 0.5
        + sum(other < key for other in keys.values())
        + sum(other == key for other in keys.values()) / 2
        for candidate, key in keys.items()
    }


def rank_row(comparison: Comparison, rows: Sequence[tuple[Mapping[str, Cell], bool]]) -> list[str]:
    """Return the average rank over the tasks on which every candidate has run."""
    complete = [ranks(cells, low) for cells, low in rows if len(cells) == len(comparison.labels)]
    if not complete:
        return []
    averages = [
        f"{statistics.fmean(rank[candidate] for rank in complete):.2f}"
        for candidate in comparison.labels
    ]
    return [f"average rank ({len(complete)} tasks)", "", *averages]


def rank_row_of_all_tasks(
    comparison: Comparison, rows: Sequence[tuple[Mapping[str, Cell], bool]]
) -> list[str]:
    """Return the average rank over all tasks, among the candidates that have run on each."""
    everywhere = [name for name in comparison.labels if all(name in cells for cells, _ in rows)]
    if len(everywhere) < 2 or len(everywhere) == len(comparison.labels):
        return []
    among = [ranks({name: cells[name] for name in everywhere}, low) for cells, low in rows]
    averages = [
        f"{statistics.fmean(rank[name] for rank in among):.2f}" if name in everywhere else ""
        for name in comparison.labels
    ]
    return [f"average rank of {len(everywhere)} ({len(rows)} tasks)", "", *averages]


def average_row(
    comparison: Comparison,
    name: str,
    rows: Sequence[Mapping[str, Cell]],
    average: Callable[[Sequence[float]], float],
) -> list[str]:
    """Return an average of the means over the tasks on which every candidate has run."""
    complete = [cells for cells in rows if len(cells) == len(comparison.labels)]
    if not complete:
        return []
    values = []
    for candidate in comparison.labels:
        means = [cells[candidate].mean for cells in complete]
        values.append("failed" if any(map(math.isnan, means)) else f"{average(means):.4f}")
    return [f"{name} ({len(complete)} tasks)", "", *values]


def log_average(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(max(value, 1e-12)) for value in values))


def metric_table(comparison: Comparison) -> list[str]:
    found = {task: comparison.cells(task, "peak_metric") for task in comparison.compared}
    lower = {task: comparison.lower_is_better(task) for task in comparison.compared}
    rows = [grid_row(comparison, t, cells, 4, lower[t]) for t, cells in found.items()]
    higher = [cells for task, cells in found.items() if not lower[task]]
    rows.append(average_row(comparison, "average, losses left out", higher, statistics.fmean))
    ranked = [(cells, lower[task]) for task, cells in found.items()]
    rows += [rank_row(comparison, ranked), rank_row_of_all_tasks(comparison, ranked)]
    head = ["", "seeds", *comparison.labels.values()]
    return [markdown(head, [row for row in rows if row])]


def loss_table(comparison: Comparison) -> list[str]:
    found = [(task, comparison.cells(task, "final_training_loss")) for task in comparison.compared]
    rows = [grid_row(comparison, task, cells, 4, True) for task, cells in found]
    rows.append(average_row(comparison, "log-average", [c for _, c in found], log_average))
    ranked = [(cells, True) for _, cells in found]
    rows += [rank_row(comparison, ranked), rank_row_of_all_tasks(comparison, ranked)]
    head = ["", "seeds", *comparison.labels.values()]
    return [markdown(head, [row for row in rows if row])]


def seconds_table(comparison: Comparison) -> list[str]:
    rows = []
    for task in comparison.compared:
        seconds = comparison.cells(task, "seconds")
        processor = comparison.cells(task, "cpu_seconds")
        extra = comparison.cells(task, "extra_forward_passes")
        row = [comparison.title(task), seeds_of(seconds)]
        for candidate in comparison.labels:
            text = ""
            if candidate in seconds:
                text = f"{seconds[candidate].show(0)} / {processor[candidate].show(0)}"
            passes = extra[candidate].mean if candidate in extra else 0
            row.append(f"{text} ({passes:.0f})" if passes > 0 else text)
        rows.append(row)
    return [markdown(["", "seeds", *comparison.labels.values()], rows)]


class Beside(NamedTuple):
    """A candidate beside the one whose rate was searched, on one task and the seeds of both.

    Attributes:
        ratio: Of the final training losses, those below `SMALLEST_LOSS` counted as that.
        ahead: Difference of the peak metrics.
        stands: The ratio is at most `STANDS`, and the metric no worse than the other's mean by more
            than its standard error, that over all of its seeds.
    """

    ratio: float
    ahead: float
    stands: bool


def counted(loss: float) -> float:
    """Return a final training loss as ratios count it; NaN stays NaN."""
    return max(loss, SMALLEST_LOSS)


def beside_sweep(comparison: Comparison, task: str) -> dict[str, Beside]:
    """Return how each candidate stands beside a sweep; empty where none was made or it failed."""
    swept = comparison.swept
    all_losses = comparison.cells(task, "final_training_loss")
    all_metrics = comparison.cells(task, "peak_metric")
    if swept not in all_losses or math.isnan(all_losses[swept].mean + all_metrics[swept].mean):
        return {}
    error = all_metrics[swept].error or 0.0
    found = {}
    for name in all_losses.keys() - {swept}:
        both = {candidate: comparison.labels[candidate] for candidate in (name, swept)}
        losses = comparison.cells(task, "final_training_loss", both, paired=True)
        metrics = comparison.cells(task, "peak_metric", both, paired=True)
        if not losses:
            continue
        ratio = counted(losses[name].mean) / counted(losses[swept].mean)
        ahead = metrics[name].mean - metrics[swept].mean
        behind = ahead if comparison.lower_is_better(task) else -ahead
        stands = ratio <= STANDS and behind <= error
        found[name] = Beside(ratio, ahead, stands)
    return found


def sweep_section(comparison: Comparison) -> list[str]:
    """Return how each candidate stands beside the one whose rate was searched."""
    swept = comparison.swept
    others = {name: label for name, label in comparison.labels.items() if name != swept}
    found = {task: beside_sweep(comparison, task) for task in comparison.compared}
    found = {task: beside for task, beside in found.items() if beside}
    if not found or not others:
        return []
    rows = []
    for task, beside in found.items():
        row = [comparison.title(task)]
        for name in others:
            if name not in beside:
                row.append("")
                continue
            ratio, ahead, stands = beside[name]
            text = "failed" if math.isnan(ratio + ahead) else f"{ratio:.2f} / {ahead:+.4f}"
            row.append(f"**{text}**" if stands else text)
        rows.append(row)
    counts = []
    for name in others:
        of_name = [beside[name].stands for beside in found.values() if name in beside]
        counts.append(f"{sum(of_name)} of {len(of_name)}")
    rows.append(["stands", *counts])
    return [
        "## Beside a sweep",
        f"Each candidate beside {comparison.labels[swept]}, on the seeds of both: its final "
        "training loss as a ratio / the difference of the peak metrics. **Bold**: it stands beside "
        f"the sweep, with at most {STANDS} times its loss (below {SMALLEST_LOSS} both count as "
        "that) and a metric no worse than its mean by more than its standard error.",
        markdown(["", *others.values()], rows),
    ]


def ablation_section(comparison: Comparison) -> list[str]:
    """Return methods beside what is left of them without one of their parts."""
    found = []
    for names in comparison.ablations:
        rows = []
        for task in comparison.tasks:
            losses = comparison.cells(task, "final_training_loss", names, paired=True)
            metrics = comparison.cells(task, "peak_metric", names, paired=True)
            if len(losses) > 1:
                cells = {n: f"{losses[n].show(4)} / {metrics[n].show(4)}" for n in losses}
                row = [comparison.title(task), seeds_of(losses)]
                rows.append([*row, *(cells.get(name, "") for name in names)])
        if rows:
            found.append(markdown(["", "seeds", *names.values()], rows))
    if not found:
        return []
    return [
        "## Without one of its parts",
        "Final training loss / peak metric, on the seeds that all of a row have.",
        *found,
    ]


def calibration_table(comparison: Comparison) -> list[str]:
    tables = []
    for task in comparison.tasks:
        of_task = [run for run in comparison.calibrations if run["task"] == task]
        rates = sorted({run["rate"] for run in of_task})
        rows = []
        for candidate in sorted({run["candidate"] for run in of_task}):
            label = "" if candidate == comparison.swept else f": {comparison.labels[candidate]}"
            rows.append([f"{comparison.title(task)}{label}"])
            for rate in rates:
                at_rate = [
                    run for run in of_task if (run["candidate"], run["rate"]) == (candidate, rate)
                ]
                metric = Cell.of(at_rate, "peak_metric").show(4)
                loss = Cell.of(at_rate, "final_training_loss").show(4)
                rows[-1].append(f"{metric} / {loss}")
        if rows:
            tables.append(markdown(["", *(f"{rate:g}" for rate in rates)], rows))
    return tables or ["Not searched here."]


def budget_table(comparison: Comparison) -> list[str]:
    rows = []
    for task in comparison.tasks:
        settings = comparison.settings(task)
        some = next(run for run in comparison.all if run["task"] == task)
        rows.append(
            [
                comparison.title(task),
                METRIC_NAMES[settings["metric"]],
                str(some.get("updates", "")),
                str(settings["batch_size"]),
                ", ".join(f"{k}={v}" for k, v in settings["settings"].items())
                + (", group_by_length" if settings["group_by_length"] else ""),
            ]
        )
    devices = sorted({run["device"] for run in comparison.all})
    versions: dict[str, set[str]] = {}
    for run in comparison.all:
        for name, version in run["versions"].items():
            versions.setdefault(name, set()).add(version)
    return [
        markdown(["", "metric", "updates", "batch", "data and model"], rows),
        f"Device: {'; '.join(devices)}. "
        + ", ".join(f"{name} {' and '.join(sorted(v))}" for name, v in versions.items())
        + ".",
    ]


def failure_list(comparison: Comparison) -> list[str]:
    failures = [
        f"- {comparison.title(r['task'])}, {r['candidate']}, rate {r['rate']}, seed {r['seed']}: "
        f"{r['error']}"
        for r in comparison.all
        if r["status"] == "failed"
    ]
    return ["## Failed runs", "\n".join(failures)] if failures else []
