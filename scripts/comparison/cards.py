"""The model card of each task's best line search."""

import math
from pathlib import Path

from support.runs import PLOT_NAME

from comparison.plots import draw_run
from comparison.results import METRIC_NAMES, RESULTS, Comparison, Results
from comparison.tables import markdown


def write_cards(comparison: Comparison) -> list[str]:
    """Write the card of each task's best line search; return the tasks that have one."""
    written = []
    for task in comparison.compared:
        sign = 1 if comparison.lower_is_better(task) else -1
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
        write_card(comparison, best, folder / "README.md")
        written.append(task)
    return written


def write_card(comparison: Comparison, run: Results, path: Path) -> None:
    """Write the card of a run, with all candidates on its task below it."""
    task, candidate = run["task"], run["candidate"]
    metric = comparison.settings(task)["metric"]
    metrics = comparison.cells(task, "peak_metric")
    losses = comparison.cells(task, "final_training_loss")
    rows = [
        [comparison.labels[name], metrics[name].show(4), losses[name].show(4)] for name in metrics
    ]
    seeds = ", ".join(str(other["seed"]) for other in comparison.of(task, candidate))
    results = f"{candidate}/seed_{run['seed']}/{RESULTS}"
    section = [
        "## In the comparison",
        f"This is seed {run['seed']} of the seeds {seeds}, whose figures are in "
        f"[{results}]({results}). Its weights are not published; the command in "
        "[the report](../README.md) trains them again. All candidates on this task, mean ± "
        "standard error:",
        markdown(["", f"peak {METRIC_NAMES[metric]}", "final training loss"], rows),
    ]
    card = run["card"].rstrip() + "\n\n" + "\n\n".join(section) + "\n"
    path.write_text(card, encoding="utf-8")
