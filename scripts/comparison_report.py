"""Tables, plots and model cards from the results of `compare.py`.

`write_report` reads every `results.json` below a folder; nothing here trains or loads a model.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from script_utils import PLOT_NAME, UsageError

RESULTS = "results.json"
PLOTS = {
    "loss": "loss_curves.png",
    "metric": "metric_curves.png",
    "step_size": "step_sizes.png",
    "chosen_step_size": "chosen_step_sizes.png",
    "seconds": "wall_clock.png",
}
METRIC_NAMES = {
    "accuracy": "accuracy",
    "matthews_correlation": "Matthews correlation",
    "loss_per_character": "held-out loss per character",
    "spearmanr": "Spearman correlation",
}
STANDS = 1.05  # a run stands beside a sweep with at most this ratio of the final training losses
SMOOTHING = 20  # curves of the loss are averaged over this fraction of the run, 1/20
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
        ablations: Likewise, a method and what is left of it without one part: empty if no part
            was left out.
        swept: The candidate whose rate was searched, if one was.
        compared: The tasks with runs of `labels`.
    """

    def __init__(
        self,
        output_dir: Path,
        labels: Mapping[str, str],
        tasks: Sequence[str],
        ablations: Mapping[str, str],
    ) -> None:
        found = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(output_dir.glob(f"*/*/seed_*/{RESULTS}"))
        ]
        if not found:
            raise UsageError(f"{output_dir} holds no results of compare.py")
        self.output_dir = output_dir
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
        parts = {name: label for name, label in ablations.items() if name in present}
        self.ablations = parts if set(parts) - set(labels) else {}
        self.swept = next((run["candidate"] for run in self.calibrations), None)
        compared = {run["task"] for run in self.runs if run["candidate"] in labels}
        self.compared = [task for task in self.tasks if task in compared]

    def of(self, task: str, candidate: str) -> list[Results]:
        """Return the runs of a candidate on a task."""
        return [r for r in self.runs if (r["task"], r["candidate"]) == (task, candidate)]

    def settings(self, task: str) -> Results:
        """Return the configuration of a task."""
        return next(run["configuration"]["task"] for run in self.all if run["task"] == task)

    def title(self, task: str) -> str:
        return next(run["title"] for run in self.all if run["task"] == task)

    def lower_is_better(self, task: str) -> bool:
        return self.settings(task)["metric"].startswith("loss")

    def cells(
        self, task: str, name: str, candidates: Mapping[str, str] | None = None
    ) -> dict[str, Cell]:
        """Return the cell of each candidate, of `labels` by default, that has runs on a task."""
        names = self.labels if candidates is None else candidates
        runs = {candidate: self.of(task, candidate) for candidate in names}
        return {candidate: Cell.of(found, name) for candidate, found in runs.items() if found}


def write_report(
    output_dir: Path,
    labels: Mapping[str, str],
    tasks: Sequence[str],
    command: str,
    ablations: Mapping[str, str],
    chosen: Sequence[str],
) -> None:
    """Write `README.md`, its plots and the model cards into `output_dir`.

    Args:
        output_dir: Where the results are.
        labels: Candidate -> what readers call it, in the order of the columns.
        tasks: The tasks in the order of the rows.
        command: What repeats the comparison.
        ablations: A method of `labels`, and what is left of it without one part -> what readers
            call it.
        chosen: Candidates whose step sizes are drawn apart from the others'.

    Raises:
        UsageError: There are no results, or some of other tasks.
    """
    comparison = Comparison(output_dir, labels, tasks, ablations)
    plots = dict(PLOTS) if comparison.compared else {}
    if plots:
        draw_curves(comparison, "loss")
        draw_curves(comparison, "metric")
        draw_step_sizes(comparison, "step_size", tuple(comparison.labels))
        draw_seconds(comparison)
        if found := [name for name in chosen if name in comparison.labels]:
            draw_step_sizes(comparison, "chosen_step_size", found)
        else:
            del plots["chosen_step_size"]
    cards = write_cards(comparison)
    sections = [
        "# Comparison",
        "Written by `scripts/compare.py report` from the `results.json` of each run below this "
        "folder. Means over the seeds ± their standard error; **bold** is the best mean of a row; "
        "*failed*: a run ended in an error or a loss that is not finite.",
        f"```bash\n{command}\n```",
        "## Peak metric",
        "The best of the evaluations in a run, of held-out data. ↓: lower is better.",
        *metric_table(comparison),
        "## Final training loss",
        "The mean over the last tenth of the updates. Of language models it is the sum over the "
        "predicted tokens of a block divided by all of its tokens, as `Trainer` counts them.",
        *loss_table(comparison),
        "## Time",
        "Seconds inside training steps, evaluations left out: by the clock / of the processor, "
        "without what else the machine did. In parentheses the forward passes that the line search "
        "added.",
        *seconds_table(comparison),
        *(f"![{name.replace('_', ' ')}]({file})" for name, file in plots.items()),
        *sweep_section(comparison),
        *ablation_section(comparison),
        "## AdamW's peak rate",
        "Warm-up over a tenth of the run, then cosine. Found on seeds that the tables above do not "
        "use: peak metric / final training loss. The best metric is chosen.",
        *calibration_table(comparison),
        "## Budgets",
        *budget_table(comparison),
        *failure_list(comparison),
    ]
    if cards:
        links = [f"[{comparison.title(task)}]({task}/README.md)" for task in cards]
        sections += [
            "## Model cards",
            "Of the line search with the best mean on each task, its best seed: "
            f"{', '.join(links)}.",
        ]
    (output_dir / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


# --- tables -------------------------------------------------------------------------------------


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


def sweep_section(comparison: Comparison) -> list[str]:
    """Return how each candidate stands beside the one whose rate was searched."""
    swept = comparison.swept
    others = {name: label for name, label in comparison.labels.items() if name != swept}
    rows = []
    stands = dict.fromkeys(others, 0)
    of_tasks = dict.fromkeys(others, 0)
    for task in comparison.compared:
        losses = comparison.cells(task, "final_training_loss")
        metrics = comparison.cells(task, "peak_metric")
        if swept not in losses or math.isnan(losses[swept].mean + metrics[swept].mean):
            continue
        row = [comparison.title(task)]
        for name in others:
            if name not in losses:
                row.append("")
                continue
            ratio = losses[name].mean / losses[swept].mean
            ahead = metrics[name].mean - metrics[swept].mean
            behind = ahead if comparison.lower_is_better(task) else -ahead
            holds = ratio <= STANDS and behind <= (metrics[swept].error or 0.0)
            text = "failed" if math.isnan(ratio + ahead) else f"{ratio:.2f} / {ahead:+.4f}"
            row.append(f"**{text}**" if holds else text)
            stands[name] += holds
            of_tasks[name] += 1
        rows.append(row)
    if not rows or not others:
        return []
    rows.append(["stands", *(f"{stands[name]} of {of_tasks[name]}" for name in others)])
    return [
        "## Beside a sweep",
        f"One run of each candidate beside {comparison.labels[swept]}: its final training loss as "
        "a ratio / the difference of the peak metrics. **Bold**: it stands beside the sweep, with "
        f"at most {STANDS} times its loss and a metric no worse than its mean by more than its "
        "standard error.",
        markdown(["", *others.values()], rows),
    ]


def ablation_section(comparison: Comparison) -> list[str]:
    """Return a method beside what is left of it without one of its parts."""
    names = comparison.ablations
    rows = []
    for task in comparison.tasks:
        losses = comparison.cells(task, "final_training_loss", names)
        metrics = comparison.cells(task, "peak_metric", names)
        if len(losses) > 1:
            cells = {name: f"{losses[name].show(4)} / {metrics[name].show(4)}" for name in losses}
            row = [comparison.title(task), seeds_of(losses)]
            rows.append([*row, *(cells.get(name, "") for name in names)])
    if not rows:
        return []
    return [
        "## Without one of its parts",
        "Final training loss / peak metric.",
        markdown(["", "seeds", *names.values()], rows),
    ]


def calibration_table(comparison: Comparison) -> list[str]:
    tables = []
    for task in comparison.tasks:
        runs = [run for run in comparison.calibrations if run["task"] == task]
        row = [comparison.title(task)]
        rates = sorted({run["rate"] for run in runs})
        for rate in rates:
            at_rate = [run for run in runs if run["rate"] == rate]
            metric = Cell.of(at_rate, "peak_metric").show(4)
            loss = Cell.of(at_rate, "final_training_loss").show(4)
            row.append(f"{metric} / {loss}")
        if rates:
            tables.append(markdown(["", *(f"{rate:g}" for rate in rates)], [row]))
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


# --- plots --------------------------------------------------------------------------------------


def smoothed(values: Sequence[float | None]) -> np.ndarray:
    """Return the mean over a sliding window, shorter at the ends; NaN where a value is missing."""
    window = max(1, len(values) // SMOOTHING)
    array = np.array(values, dtype=float)
    weights = np.convolve(np.ones(len(array)), np.ones(window), mode="same")
    return np.convolve(array, np.ones(window), mode="same") / weights


def panels(comparison: Comparison) -> tuple[Any, dict[str, Any]]:
    """Return a figure with one axis for each task that was compared."""
    columns = min(3, len(comparison.compared))
    rows = math.ceil(len(comparison.compared) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(9.2, 4.6 * columns), 3.6 * rows + 0.9), squeeze=False
    )
    by_task = dict(zip(comparison.compared, axes.flat, strict=False))
    for axis in axes.flat[len(by_task) :]:
        axis.remove()
    for task, axis in by_task.items():
        axis.set_title(comparison.title(task))
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    return figure, by_task


def colours(comparison: Comparison) -> dict[str, Any]:
    shades = plt.get_cmap("tab20").colors  # in pairs, dark and light
    return dict(zip(comparison.labels, (*shades[::2], *shades[1::2]), strict=False))


def save(figure: Any, comparison: Comparison, name: str) -> None:
    """Save a figure with one legend, below, for all of its panels."""
    lines = {}
    for axis in figure.axes:
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, line)
    figure.tight_layout(rect=(0, 0.9 / figure.get_figheight(), 1, 1))
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=5, fontsize=8)
    figure.savefig(comparison.output_dir / PLOTS[name], dpi=110)
    plt.close(figure)


def draw_curves(comparison: Comparison, name: str) -> None:
    """Draw the training loss, or the metric at each evaluation: mean and standard error."""
    figure, axes = panels(comparison)
    colour = colours(comparison)
    for task, axis in axes.items():
        settings = comparison.settings(task)
        axis.set_ylabel("training loss" if name == "loss" else METRIC_NAMES[settings["metric"]])
        if name == "loss":
            axis.set_yscale("log")
        for candidate, label in comparison.labels.items():
            finished = [r for r in comparison.of(task, candidate) if r["status"] == "finished"]
            if not finished:
                continue
            if name == "loss":
                x = np.arange(1, finished[0]["updates"] + 1)
                curves = np.array([smoothed(run["losses"]) for run in finished])
            else:
                x = np.array([entry["step"] for entry in finished[0]["evaluations"]])
                curves = np.array(
                    [[e["metric"] for e in run["evaluations"]] for run in finished], dtype=float
                )
            mean = curves.mean(axis=0)
            axis.plot(x, mean, label=label, color=colour[candidate], linewidth=1.3)
            if len(curves) > 1:
                error = curves.std(axis=0, ddof=1) / math.sqrt(len(curves))
                axis.fill_between(
                    x, mean - error, mean + error, color=colour[candidate], alpha=0.2, linewidth=0
                )
    save(figure, comparison, name)


def draw_step_sizes(comparison: Comparison, name: str, candidates: Sequence[str]) -> None:
    """Draw the step size, or rate, of every run of some candidates."""
    figure, axes = panels(comparison)
    colour = colours(comparison)
    for task, axis in axes.items():
        axis.set_ylabel("step size")
        axis.set_yscale("log")
        for candidate in candidates:
            for run in comparison.of(task, candidate):
                if run["status"] == "finished":
                    sizes = np.array(run["step_sizes"], dtype=float)
                    sizes[sizes <= 0] = np.nan  # the ends of a schedule, on a logarithmic axis
                    x = np.arange(1, len(sizes) + 1)
                    label, shade = comparison.labels[candidate], colour[candidate]
                    axis.plot(x, sizes, label=label, color=shade, linewidth=0.8)
    save(figure, comparison, name)


def draw_seconds(comparison: Comparison) -> None:
    """Draw the seconds of each candidate as bars.

    On a CPU those of the processor: the clock's hold what else the machine did.
    """
    on_cpu = all(run["device"].startswith("CPU") for run in comparison.runs)
    name = "cpu_seconds" if on_cpu else "seconds"
    figure, axes = panels(comparison)
    colour = colours(comparison)
    for task, axis in axes.items():
        axis.set_ylabel("processor seconds of training" if on_cpu else "seconds of training")
        axis.set_xlabel("")
        axis.set_xticks([])
        cells = comparison.cells(task, name)
        for position, (candidate, label) in enumerate(comparison.labels.items()):
            cell = cells.get(candidate)
            if cell is not None and not math.isnan(cell.mean):
                axis.bar(position, cell.mean, yerr=cell.error, label=label, color=colour[candidate])
    save(figure, comparison, "seconds")


# --- cards --------------------------------------------------------------------------------------


def write_cards(comparison: Comparison) -> list[str]:
    """Write the card of each task's best line search; return the tasks that have one."""
    written = []
    for task in comparison.compared:
        lower = comparison.lower_is_better(task)
        sign = 1 if lower else -1
        cells = {
            candidate: cell
            for candidate, cell in comparison.cells(task, "peak_metric").items()
            if not math.isnan(cell.mean) and "card" in comparison.of(task, candidate)[0]
        }
        if not cells:
            continue
        candidate = min(cells, key=lambda name: sign * cells[name].mean)
        runs = comparison.of(task, candidate)
        best = min(runs, key=lambda run: sign * run["peak_metric"])
        folder = comparison.output_dir / task
        draw_run(best, folder / PLOT_NAME)
        metric = comparison.settings(task)["metric"]
        rows = [
            [
                label,
                found.show(4),
                Cell.of(comparison.of(task, name), "final_training_loss").show(4),
            ]
            for name, label in comparison.labels.items()
            if (found := comparison.cells(task, "peak_metric").get(name)) is not None
        ]
        seeds = ", ".join(str(run["seed"]) for run in runs)
        section = [
            "## In the comparison",
            f"This is seed {best['seed']} of the seeds {seeds}, whose figures are in "
            f"[{candidate}/seed_{best['seed']}/{RESULTS}]({candidate}/seed_{best['seed']}/{RESULTS})"
            ". Its weights are not published; the command in [the report](../README.md) trains "
            "them again. All candidates on this task, mean ± standard error:",
            markdown(["", f"peak {METRIC_NAMES[metric]}", "final training loss"], rows),
        ]
        card = best["card"].rstrip() + "\n\n" + "\n\n".join(section) + "\n"
        (folder / "README.md").write_text(card, encoding="utf-8")
        written.append(task)
    return written


def draw_run(run: Results, path: Path) -> None:
    """Draw loss and step size of one run."""
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5))
    x = np.arange(1, run["updates"] + 1)
    losses = np.array(run["losses"], dtype=float)
    above.plot(x, losses, linewidth=0.5, alpha=0.4, label="training loss")
    above.plot(x, smoothed(run["losses"]), color="tab:blue", label="smoothed")
    evaluations = run["evaluations"]
    steps = [entry["step"] for entry in evaluations]
    above.plot(steps, [e["loss"] for e in evaluations], "o", color="tab:orange", label="held out")
    above.set_ylabel("loss")
    above.legend()
    below.plot(x, np.array(run["step_sizes"], dtype=float), color="tab:green")
    below.set_yscale("log")
    below.set_ylabel("step size")
    below.set_xlabel("update")
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
