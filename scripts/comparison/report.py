"""The report: tables, plots and model cards of the results below a folder.

Nothing here trains or loads a model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from comparison import tables
from comparison.against import against_section
from comparison.cards import write_cards
from comparison.plots import PLOTS, draw_curves, draw_seconds, draw_step_sizes
from comparison.results import Comparison


def write_report(
    output_dir: Path,
    labels: Mapping[str, str],
    tasks: Sequence[str],
    command: str,
    ablations: Sequence[Mapping[str, str]],
    chosen: Sequence[str],
    references: Sequence[str] = (),
    same_runs: Mapping[tuple[str, str], str] | None = None,
    chances: Mapping[str, float] | None = None,
) -> None:
    """Write `README.md`, its plots and the model cards into `output_dir`.

    Args:
        output_dir: Where the results are.
        labels: Candidate -> what readers call it, in the order of the columns.
        tasks: The tasks in the order of the rows.
        command: What repeats the comparison.
        ablations: For each such method of `labels`, itself and what is left of it without one part
            -> what readers call it.
        chosen: Candidates whose step sizes are drawn apart from the others'.
        references: All are compared with the first of these that has runs.
        same_runs: As in `Comparison`, like `chances`.
        chances: Task -> the metric of the best answer that is always the same.

    Raises:
        UsageError: There are no results, or some of other tasks.
    """
    comparison = Comparison(output_dir, labels, tasks, ablations, same_runs, chances)
    plots = draw_plots(comparison, chosen)
    sections = sections_of(comparison, command, plots, references)
    if cards := write_cards(comparison):
        links = [f"[{comparison.title(task)}]({task}/README.md)" for task in cards]
        sections += [
            "## Model cards",
            "Of the line search with the best mean on each task, its best seed: "
            f"{', '.join(links)}.",
        ]
    (output_dir / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def draw_plots(comparison: Comparison, chosen: Sequence[str]) -> dict[str, str]:
    """Draw what there is to draw; return the name of each picture and its file."""
    if not comparison.compared:
        return {}
    plots = dict(PLOTS)
    draw_curves(comparison, "loss")
    draw_curves(comparison, "metric")
    draw_step_sizes(comparison, "step_size", tuple(comparison.labels))
    draw_seconds(comparison)
    if found := [name for name in chosen if name in comparison.labels]:
        draw_step_sizes(comparison, "chosen_step_size", found)
    else:
        del plots["chosen_step_size"]
    return plots


def sections_of(
    comparison: Comparison, command: str, plots: Mapping[str, str], references: Sequence[str]
) -> list[str]:
    """Return the paragraphs of the report, but for the model cards."""
    return [
        "# Comparison",
        "Written by `scripts/compare.py report` from the `results.json` of each run below this "
        "folder. Means over the seeds ± their standard error; **bold** is the best mean of a row; "
        "*failed*: a run ended in an error or a loss that is not finite.",
        f"```bash\n{command}\n```",
        "## Peak metric",
        "The best of the evaluations in a run, of held-out data. ↓: lower is better.",
        *tables.metric_table(comparison),
        "## Final training loss",
        "The mean over the last tenth of the updates. Of language models it is the sum over the "
        "predicted tokens of a block divided by all of its tokens, as `Trainer` counts them.",
        *tables.loss_table(comparison),
        "## Time",
        "Seconds inside training steps, evaluations left out: by the clock / of the processor, "
        "without what else the machine did. In parentheses the forward passes that the line search "
        "added.",
        *tables.seconds_table(comparison),
        *(f"![{name.replace('_', ' ')}]({file})" for name, file in plots.items()),
        *against_section(comparison, references),
        *tables.sweep_section(comparison),
        *tables.ablation_section(comparison),
        "## AdamW's peak rate",
        "Warm-up over a tenth of the run, then cosine. Found on seeds that the tables above do not "
        "use: peak metric / final training loss. The best metric is chosen.",
        *tables.calibration_table(comparison),
        "## Budgets",
        *tables.budget_table(comparison),
        *tables.failure_list(comparison),
    ]
