"""The model card's plot: training loss and step size over the steps, searches and phases marked.

Drawn for a phone: 360 pixels wide, its letters are still ten pixels high.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .model_card_markdown import one_line
from .model_card_results import Evaluation, is_finite_number
from .phases import Phases

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Curve: TypeAlias = list[tuple[int, float]]  # (step, value)

_INCHES = (4.8, 5.8)
_DPI = 200
_TITLE_WIDTH = 40  # characters
_DEEPEST = 30  # the tail is shown down to this fraction of the smallest step size before it
_FEW = 30  # between the ends of the axis of step sizes: one label a power of ten is too few
_COLOURS = {"head": "tab:orange", "tail": "tab:green", "search": "tab:red"}


def plot(
    path: Path,
    training: list[dict[str, Any]],
    evaluations: list[Evaluation],
    *,
    title: str,
    searches: Sequence[tuple[int, float, float]],
    phases: Phases,
) -> bool:
    """Plot training loss and step size over the steps; return whether there is a plot.

    Args:
        path: The image to write.
        training: Log entries of training.
        evaluations: All evaluations.
        title: Of the plot.
        searches: (step, step size, loss) of searches.
        phases: Of the run. The step sizes of a head that is trained alone are a thousand times the
            others': they are told, not drawn.
    """
    losses = [(e["step"], e["loss"]) for e in training if is_finite_number(e["loss"])]
    rates = _positive([(e["step"], e["learning_rate"]) for e in training])
    path.unlink(missing_ok=True)  # of an earlier run
    if min(len(losses), len(rates)) < 2:
        return False
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        warnings.warn(
            "The model card has no plot of loss and step size: matplotlib is not installed. "
            "pip install matplotlib",
            stacklevel=3,
        )
        return False
    found = _positive([(step, size) for step, size, _ in searches])
    figure = _draw(losses, rates, evaluations, title, found, phases)
    figure.savefig(path, dpi=_DPI)
    return True


def _positive(curve: list[tuple[int, Any]]) -> _Curve:
    return [(step, value) for step, value in curve if is_finite_number(value) and value > 0]


def _draw(
    losses: _Curve,
    rates: _Curve,
    evaluations: list[Evaluation],
    title: str,
    found: _Curve,
    phases: Phases,
) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it keeps global state, and may open a window.
    figure = Figure(figsize=_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 3))
    name = one_line(title)
    if len(name) > _TITLE_WIDTH:
        name = f"{name[: _TITLE_WIDTH - 3]}..."
    figure.suptitle(f"{_plain(name)}\nloss and step size")
    _draw_losses(top, losses, evaluations)
    _draw_step_sizes(bottom, rates, found, phases)
    bottom.set_xlabel("training step (updates of the weights)")
    bottom.locator_params(axis="x", integer=True, nbins=6)
    last = max(step for step, _ in losses + rates + found)
    last = max([last, *(evaluation.step for evaluation in evaluations)])
    for panel in (top, bottom):
        _mark_phases(panel, phases, last)
        panel.grid(alpha=0.3, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = bottom.get_legend_handles_labels()
    if phases.head:
        labels[labels.index("head first")] = f"head first{_sizes_of_head(rates, found, phases)}"
    figure.legend(handles, labels, loc="outside lower center", frameon=False)
    return figure


def _draw_losses(panel: Any, losses: _Curve, evaluations: list[Evaluation]) -> None:
    panel.plot(*zip(*losses, strict=True), linewidth=1, label="training")
    for name in dict.fromkeys(evaluation.dataset for evaluation in evaluations):
        points = [
            (evaluation.step, evaluation.metrics["loss"])
            for evaluation in evaluations
            if evaluation.dataset == name and is_finite_number(evaluation.metrics.get("loss"))
        ]
        if points:
            label = "evaluation" if name is None else f"evaluation, {one_line(name)}"
            panel.plot(*zip(*points, strict=True), "o", markersize=5, label=_plain(label))
            panel.legend(frameon=False)
    panel.set_ylabel("loss")


def _draw_step_sizes(panel: Any, rates: _Curve, found: _Curve, phases: Phases) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    shown = _after(rates, phases.head) or rates
    panel.plot(*zip(*shown, strict=True), color="black", linewidth=1)
    marks = _after(found, phases.head) if shown != rates else found
    if marks:
        options = {"color": _COLOURS["search"], "markersize": 2.5, "label": "a search"}
        panel.plot(*zip(*marks, strict=True), "o", **options)
    sizes = [size for _, size in shown + marks]
    before_tail = [size for step, size in shown + marks if step <= phases.search] or sizes
    low, high = max(min(sizes) / 2, min(before_tail) / _DEEPEST), max(sizes) * 2
    panel.set_yscale("log", subs=range(2, 10))
    panel.set_ylim(low, high)  # a narrower range would make much of nothing
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < _FEW else (1,)))
    panel.yaxis.set_major_formatter(lambda size, position: f"{size:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_ylabel("step size (log scale)")


def _mark_phases(panel: Any, phases: Phases, last: int) -> None:
    if phases.head:
        panel.axvspan(0.5, phases.head + 0.5, color=_COLOURS["head"], alpha=0.3, label="head first")
    if phases.search < last:
        label = "tail: the step size falls to 0"
        panel.axvspan(
            phases.search + 0.5, last + 0.5, color=_COLOURS["tail"], alpha=0.15, label=label
        )


def _sizes_of_head(rates: _Curve, found: _Curve, phases: Phases) -> str:
    """Return the step sizes of the head that are not drawn, in words."""
    if not _after(rates, phases.head):
        return ""  # all there is, and drawn
    sizes = [size for step, size in rates + found if step <= phases.head]
    if not sizes:
        return ""
    return f", at step sizes of {min(sizes):.2g} to {max(sizes):.2g} (not drawn)"


def _after(curve: _Curve, step: int) -> _Curve:
    return [point for point in curve if point[0] > step]


def _plain(text: str) -> str:
    """Return text without mathematics, which a pair of dollar signs would be."""
    return text.replace("$", r"\$")
