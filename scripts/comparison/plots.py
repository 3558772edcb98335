"""Results as pictures."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from comparison.results import METRIC_NAMES, Comparison, Results

PLOTS = {
    "loss": "loss_curves.png",
    "metric": "metric_curves.png",
    "step_size": "step_sizes.png",
    "chosen_step_size": "chosen_step_sizes.png",
    "seconds": "wall_clock.png",
}
SMOOTHING = 20  # curves of the loss are averaged over this fraction of the run, 1/20


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
    return dict(zip(comparison.labels, cycle([*shades[::2], *shades[1::2]]), strict=False))


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


# Title, and name -> run of each method. The first one's searches are marked.
Column = tuple[str, Mapping[str, Results]]


def fingerprint(columns: Sequence[Column]) -> str:
    """Return what tells a picture of these runs from one of others."""
    data = [
        (title, [(n, r["losses"], r["step_sizes"], r.get("searched_at")) for n, r in runs.items()])
        for title, runs in columns
    ]
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def draw_beside_each_other(columns: Sequence[Column], path: Path) -> None:
    """Draw loss and step size of the same methods on some tasks, a column each.

    Args:
        columns: The tasks.
        path: The file, which holds the `fingerprint` of the runs as its description.
    """
    styles = (("tab:blue", "-"), ("tab:orange", "--"), ("tab:grey", ":"))
    with plt.rc_context({"font.size": 12}):
        figure, axes = plt.subplots(
            2, len(columns), sharex="col", sharey="row", figsize=(9.2, 6.2), squeeze=False
        )
        for (title, runs), (above, below) in zip(columns, axes.T, strict=True):
            above.set_title(title.replace(", ", ",\n"), fontsize=13)
            for (name, run), (colour, line) in zip(runs.items(), styles, strict=True):
                x = np.arange(1, run["updates"] + 1)
                style = {"color": colour, "linestyle": line, "linewidth": 2, "label": name}
                above.plot(x, smoothed(run["losses"]), **style)
                sizes = np.array(run["step_sizes"], dtype=float)
                sizes[sizes <= 0] = np.nan  # the ends of a schedule, on a logarithmic axis
                below.plot(x, sizes, **style)
            for axis in (above, below):
                axis.set_yscale("log")
                axis.grid(alpha=0.3)
            below.set_xlabel("update")
        ends = [
            np.quantile(run["step_sizes"], 0.02) for _, runs in columns for run in runs.values()
        ]
        low = min(end for end in ends if end > 0)  # the last updates of a schedule are left out
        axes[1][0].set_ylim(bottom=low / 3)
        for (_, runs), axis in zip(columns, axes[1], strict=True):
            marked = next(iter(runs.values()))["searched_at"]
            axis.vlines(marked, low / 3, low, color=styles[0][0], linewidth=0.4)
        axes[0][0].set_ylabel("training loss")
        axes[1][0].set_ylabel("step size\n(ticks: searches)")
        figure.align_ylabels()
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=3)
        figure.savefig(path, dpi=160, metadata={"Description": fingerprint(columns)})
    plt.close(figure)
