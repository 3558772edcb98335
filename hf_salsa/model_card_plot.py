"""The model card's plot: training loss and step size over the steps."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .model_card_markdown import one_line
from .model_card_results import Evaluation, is_finite_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Curve: TypeAlias = list[tuple[int, float]]  # (step, value)


def plot(path: Path, training: list[dict[str, Any]], evaluations: list[Evaluation]) -> bool:
    """Plot training loss and step size over the steps; return whether there is a plot."""
    losses = [(e["step"], e["loss"]) for e in training if is_finite_number(e["loss"])]
    rates = [
        (e["step"], e["learning_rate"])
        for e in training
        if is_finite_number(e["learning_rate"]) and e["learning_rate"] > 0
    ]
    path.unlink(missing_ok=True)  # of an earlier run
    if min(len(losses), len(rates)) < 2:
        return False
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        warnings.warn(
            "The model card has no plot of loss and step size: matplotlib is not installed. "
            "pip install hf_salsa[plots]",
            stacklevel=3,
        )
        return False
    figure = _draw(losses, rates, evaluations)
    figure.savefig(path, dpi=150)
    return True


def _draw(losses: _Curve, rates: _Curve, evaluations: list[Evaluation]) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it keeps global state, and may open a window.
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    top.plot(*zip(*losses, strict=True), linewidth=1, label="training")
    for name in dict.fromkeys(evaluation.dataset for evaluation in evaluations):
        points = [
            (evaluation.step, evaluation.metrics["loss"])
            for evaluation in evaluations
            if evaluation.dataset == name and is_finite_number(evaluation.metrics.get("loss"))
        ]
        if points:
            label = "evaluation" if name is None else f"evaluation, {one_line(name)}"
            label = label.replace("$", r"\$")  # a pair of them would be mathematics
            top.plot(*zip(*points, strict=True), "o", markersize=5, label=label)
            top.legend(frameon=False)
    top.set_ylabel("loss")
    bottom.plot(*zip(*rates, strict=True), color="black", linewidth=1)
    bottom.set_yscale("log")
    # A narrower range has no labelled ticks, and makes much of nothing.
    bottom.set_ylim(min(rate for _, rate in rates) / 2, max(rate for _, rate in rates) * 2)
    bottom.set_ylabel("step size (log scale)")
    bottom.set_xlabel("training step (updates of the weights)")
    bottom.locator_params(axis="x", integer=True)
    for panel in (top, bottom):
        panel.grid(alpha=0.3, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    return figure
