"""What README and docs say of the results: tables and sentences, written between markers.

    <!-- table: NAME -->

    (what `TABLES[NAME]` returns)

    <!-- end -->

No figure of a results.json is typed by hand, so none can be out of date: a test compares.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from support.command_line import UsageError

from comparison.against import against
from comparison.candidates import (
    ABLATED,
    ABLATIONS,
    CALIBRATED,
    CANDIDATES,
    FORMER,
    HEAD_FIRST,
    NAMES,
    PLUS,
    STUDIED,
    trained_as,
)
from comparison.plots import Column
from comparison.results import Cell, Comparison
from comparison.tables import (
    SMALLEST_LOSS,
    STANDS,
    Beside,
    beside_sweep,
    counted,
    markdown,
    ranks,
    seeds_of,
)
from comparison.tasks import PRESETS
from hf_salsa import OPTIMIZERS, SLSSGD, SaLSaAdam, SaLSaSGD, SLSAdam

SALSA = NAMES[SaLSaAdam]
FOLK = "adamw_folk"  # a column where it has runs
DEFAULT_RATE = "adamw_default"  # AdamW as Trainer has it, a column where it has runs
SWEEP = HEAD_FIRST  # the strongest baseline; without a new head it is the plain sweep
COLUMNS = (SALSA, SWEEP, DEFAULT_RATE, "schedule_free", "prodigy")
PAPERS = tuple(NAMES[kind] for kind in (SaLSaAdam, SaLSaSGD, SLSAdam, SLSSGD))
RIVALS = (CALIBRATED, "schedule_free", "prodigy", "authors")
METRICS = {
    "accuracy": "accuracy",
    "matthews_correlation": "Matthews",
    "loss_per_character": "held-out loss",
    "spearmanr": "Spearman",
    "macro_f1": "macro F1",
}
NEAR = 0.01  # a metric this close to that of the best constant answer has learnt nothing
KINDS = {
    "from scratch": ("shakespeare", "python_prose", "digits", "sst2_scratch", "vit_digits"),
    "an encoder fine-tuned to classify": ("mrpc", "sst2", "cola", "rte", "chunks"),
    "an encoder fine-tuned for regression": ("stsb",),
    "an image model fine-tuned": ("efficientnet",),
    "a language model trained further": ("shakespeare_tuned", "lora_lm"),
}
PLACES = (0.01, 0.1, 0.5, 0.9, 1.0)  # of a run
# The picture of the README: tasks that want rates hundreds of times apart.
DRAWN = (("digits", "from scratch"), ("shakespeare", "from scratch"), ("sst2", "fine-tuned"))
MARKED = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


class Evidence:
    """All results: of preset `cpu`, on which methods are compared, and of `study`.

    Attributes:
        plus: The method that the documents show: `salsa_adam_plus`, or its former rule as long as
            there are results of that one only.

    Args:
        folder: `model_cards`.
    """

    def __init__(self, folder: Path) -> None:
        self.cpu, self.study = (_results(folder, preset) for preset in ("cpu", "study"))
        found = [name for name in (PLUS, FORMER) if name in self.cpu.labels]
        if not found:
            raise UsageError(f"{folder / 'cpu'} holds no results of {PLUS}")
        self.plus = found[0]

    @property
    def columns(self) -> list[str]:
        """The candidates of the README's table."""
        return [self.plus, *(name for name in COLUMNS if name in self.cpu.labels)]


def _results(folder: Path, preset: str) -> Comparison:
    tasks = PRESETS[preset]
    return Comparison(
        folder / preset,
        labels={name: name_of(name) for name in CANDIDATES if name not in ABLATIONS},
        tasks=tuple(tasks),
        ablations=[
            {name: name_of(name) for name in (whole, *parts)} for whole, parts in ABLATED.items()
        ],
        same_runs={(task, n): trained_as(n, tasks[task]) for task in tasks for n in CANDIDATES},
        chances={n: task.chance for n, task in tasks.items() if task.chance is not None},
    )


def name_of(candidate: str) -> str:
    """Return what readers call a candidate: a line search by the name that `--optim` has."""
    return f"`{candidate}`" if candidate in OPTIMIZERS else CANDIDATES[candidate].label


def written(text: str, evidence: Evidence) -> str:
    """Return a document with all of its tables as they are now.

    Raises:
        UsageError: It asks for a table that there is not.
    """

    def table(found: re.Match[str]) -> str:
        name = found[1]
        if name not in TABLES:
            raise UsageError(f"no table {name!r}, only {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n\n{TABLES[name](evidence)}\n\n<!-- end -->"

    return MARKED.sub(table, text)


def drawn(evidence: Evidence) -> list[Column]:
    """Return the columns of the README's picture: runs of the first seed."""
    cpu, names = evidence.cpu, (evidence.plus, CALIBRATED, DEFAULT_RATE)
    return [
        (
            f"{cpu.title(task)}, {how}",
            {name_of(name).strip("`"): cpu.of(task, name)[0] for name in names},
        )
        for task, how in DRAWN
    ]


def value(cell: Cell, metric: str, *, error: bool = False) -> str:
    """Return a mean as readers see it: accuracy in per cent, anything else with three digits."""
    if math.isnan(cell.mean):
        return "failed"
    factor, digits, unit = (100, 1, " %") if metric == "accuracy" else (1, 3, "")
    spread = ""
    if error and cell.error is not None:
        spread = f" ± {factor * cell.error:.{digits}f}"
    return f"{factor * cell.mean:.{digits}f}{spread}{unit}"


def pairs(
    comparison: Comparison,
    task: str,
    names: Iterable[str],
    *,
    error: bool = False,
    paired: bool = False,
) -> dict[str, str]:
    """Return "final training loss / peak metric" of each of the candidates that has runs.

    Args:
        comparison: The results.
        task: The task.
        names: The candidates.
        error: With standard errors.
        paired: Of the seeds that all of them have.
    """
    labels = dict.fromkeys(names, "")
    losses = comparison.cells(task, "final_training_loss", labels, paired=paired)
    metrics = comparison.cells(task, "peak_metric", labels, paired=paired)
    metric = comparison.settings(task)["metric"]
    return {
        name: f"{value(losses[name], 'loss', error=error)} / "
        f"{value(metrics[name], metric, error=error)}"
        for name in losses
    }


def title_of(comparison: Comparison, task: str) -> str:
    """Return the title of a row: of the task and its metric."""
    return f"{comparison.title(task)}, {METRICS[comparison.settings(task)['metric']]}"


def at_chance(comparison: Comparison, task: str, candidate: str) -> bool:
    """Return whether a candidate has learnt nothing on a task, if that can be told."""
    if task not in comparison.chances:
        return False
    metric = comparison.cells(task, "peak_metric")[candidate].mean
    return bool(metric <= comparison.chances[task] + NEAR)


def short(number: float, digits: int) -> str:
    """Return a step size as readers see it, 1.2e-4."""
    return f"{number:.{digits}e}".replace("e-0", "e-")


def swept_rate(comparison: Comparison, task: str, candidate: str = SWEEP) -> str:
    """Return the peak rate that the sweep has found on a task."""
    return short(comparison.of(task, candidate)[0]["rate"], 0)


def of_plus(evidence: Evidence) -> dict[str, dict[str, Beside]]:
    """Return how all candidates stand beside the sweep on each task that plus has runs of."""
    cpu = evidence.cpu
    found = {task: beside_sweep(cpu, task) for task in cpu.compared}
    return {task: beside for task, beside in found.items() if evidence.plus in beside}


def listed(words: Sequence[str]) -> str:
    comma = "; " if any("," in word for word in words) else ", "
    return " and ".join([comma.join(words[:-1]), words[-1]] if len(words) > 1 else words)


def summary(evidence: Evidence) -> str:
    """Return the README's table: plus and what else needs no tuning beside the sweep."""
    cpu = evidence.cpu
    names = evidence.columns
    beside = of_plus(evidence)
    rows = []
    for task in beside:
        cells = pairs(cpu, task, names)
        row = [title_of(cpu, task)]
        for name in names:
            text = cells.get(name, "")
            stands = name in beside[task] and beside[task][name].stands
            rate = f" ({swept_rate(cpu, task)})" if name == SWEEP else ""
            row.append((f"**{text}**" if stands else text) + rate)
        rows.append(row)
    counts = [stand_count(beside, name) for name in names]
    rows.append(["stands", *("" if of == 0 else f"{n} of {of}" for n, of in counts)])
    return markdown(["", *(name_of(name) for name in names)], rows)


def caption(evidence: Evidence) -> str:
    cpu = evidence.cpu
    rates = [f"{cpu.title(task)} {swept_rate(cpu, task, CALIBRATED)}" for task, _ in DRAWN]
    return (
        f"Three tasks that want rates hundreds of times apart: the best of five was "
        f"{listed(rates)}. {name_of(evidence.plus)} ran on all of them as it is. Where it is "
        "fine-tuned, it trains the new head alone at first. The ticks at the bottom are the "
        "updates at which it searched."
    )


def stand_count(beside: Mapping[str, Mapping[str, Beside]], name: str) -> tuple[int, int]:
    """Return on how many tasks a candidate stands beside the sweep, and of how many."""
    found = [of_task[name].stands for of_task in beside.values() if name in of_task]
    return sum(found), len(found)


def summary_sentence(evidence: Evidence) -> str:
    cpu, beside = evidence.cpu, of_plus(evidence)
    stands = [cpu.title(task) for task in beside if beside[task][evidence.plus].stands]
    sentences = [
        against_sentence(evidence),
        "With no setting changed, it stands beside the best of five learning rates on "
        f"{len(stands)} of {len(beside)} tasks" + (f": {listed(stands)}." if stands else "."),
    ]
    if evidence.plus == FORMER:
        sentences.append(
            f"It is the rule that `{PLUS}` had in 0.1.0. The present one has no results yet."
        )
    others = []
    for name in (SALSA, DEFAULT_RATE, "schedule_free", "prodigy", FORMER):
        if name == evidence.plus:
            continue
        count, of_tasks = stand_count(beside, name)
        if of_tasks:
            label = "the rule of 0.1.0" if name == FORMER else name_of(name)
            others.append(f"{label} on {count} of {of_tasks}")
    sentences.append(f"Others that need no tuning: {', '.join(others)}.")
    sentences.append(
        f"To stand beside it is to end with at most {STANDS} times its training loss (losses below "
        f"{SMALLEST_LOSS} count as that), and a metric no worse than its mean by more than its "
        "standard error."
    )
    chance = [cpu.title(task) for task in beside if at_chance(cpu, task, SWEEP)]
    if chance:
        sentences.append(f"On {listed(chance)} AdamW itself is near chance.")
    return " ".join(sentences)


def behind(evidence: Evidence) -> str:
    """Return the tasks on which plus does not stand beside the sweep, the worst ones first."""
    cpu, beside = evidence.cpu, of_plus(evidence)
    found = [task for task in beside if not beside[task][evidence.plus].stands]
    if not found:
        return "- **Where AdamW at its best rate was better, by loss or by metric**: nowhere here."
    found.sort(key=lambda task: -beside[task][evidence.plus].ratio)
    titles = listed([*map(cpu.title, found)])
    return f"- **Where AdamW at its best rate was better, by loss or by metric**: {titles}."


def against_sentence(evidence: Evidence) -> str:
    """Return what plus comes to against the sweep, over all tasks and the seeds that both have."""
    cpu, title = evidence.cpu, evidence.cpu.title
    found = {task: against(cpu, task, evidence.plus, SWEEP) for task in cpu.compared}
    ratios = {task: of_task.ratio for task, of_task in found.items() if of_task is not None}
    worst, best = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
    above = [task for task, ratio in ratios.items() if ratio > STANDS]
    mean = statistics.geometric_mean(ratios.values())
    text = (
        f"Over all {len(ratios)} tasks the final training loss of {name_of(evidence.plus)} is "
        f"{mean:.2f} times the sweep's (geometric mean over tasks and seeds), from "
        f"{ratios[best]:.2f} ({title(best)}) to {ratios[worst]:.2f} ({title(worst)})."
    )
    if above and len(above) < len(ratios):
        rest = statistics.geometric_mean(r for task, r in ratios.items() if task not in above)
        text += (
            f" It is above {STANDS} on {len(above)}: {listed([*map(title, above)])}. On the other "
            f"{len(ratios) - len(above)} it is {rest:.2f}."
        )
    return text


def passes_per_update(comparison: Comparison, task: str, candidate: str) -> float:
    runs = comparison.of(task, candidate)
    return statistics.fmean(run["extra_forward_passes"] / run["updates"] for run in runs)


def cost_sentence(evidence: Evidence) -> str:
    cpu = evidence.cpu
    found = {task: passes_per_update(cpu, task, evidence.plus) for task in of_plus(evidence)}
    least, most = min(found, key=found.__getitem__), max(found, key=found.__getitem__)

    def of(task: str) -> str:
        updates = cpu.of(task, evidence.plus)[0]["updates"]
        return f"{found[task]:.2f} ({cpu.title(task)}, {updates} updates)"

    return (
        f"On these tasks, {name_of(evidence.plus)} added {of(least)} to {of(most)} forward "
        "passes per update. A training step is about three forward passes long."
    )


def cost(evidence: Evidence) -> str:
    """Return what the searches added, in forward passes.

    The runs shared their cores with other work, so their times are no comparison.
    """
    cpu = evidence.cpu
    names = (evidence.plus, SALSA)
    rows = []
    for task in of_plus(evidence):
        row = [cpu.title(task), str(cpu.of(task, evidence.plus)[0]["updates"])]
        for name in names:
            has_run = bool(cpu.of(task, name))
            row.append(f"{passes_per_update(cpu, task, name):.2f}" if has_run else "")
        rows.append(row)
    return markdown(["", "updates", *(name_of(name) for name in names)], rows)


def kinds(evidence: Evidence) -> str:
    """Return the training loss of each method beside the sweep's, averaged by kind of task.

    Methods are compared on the tasks that all have run on; the last column has all tasks of plus.
    """
    beside = of_plus(evidence)
    names = [name for name in evidence.columns if name != SWEEP]

    def mean(name: str, tasks: Iterable[str]) -> float:
        ratios = [beside[task][name].ratio for task in tasks]
        return statistics.geometric_mean(ratios) if ratios else math.nan

    rows = []
    for kind, of_kind in KINDS.items():
        tasks = [task for task in of_kind if task in beside]
        common = [task for task in tasks if all(name in beside[task] for name in names)]
        means = {name: mean(name, common) for name in names}
        least = min((value for value in means.values() if not math.isnan(value)), default=None)
        cells = ["" if math.isnan(value) else f"{value:.2f}" for value in means.values()]
        cells = [
            f"**{c}**" if v == least else c for c, v in zip(cells, means.values(), strict=True)
        ]
        everywhere = f"{mean(evidence.plus, tasks):.2f} ({len(tasks)})" if tasks else ""
        rows.append([kind, str(len(common)), *cells, everywhere])
    head = ["", "tasks", *(name_of(name) for name in names)]
    return markdown([*head, f"{name_of(evidence.plus)}, all tasks"], rows)


def with_errors(evidence: Evidence, names: Sequence[str], tasks: Sequence[str]) -> str:
    """Return means ± standard errors, the best loss and the best metric in bold."""
    cpu = evidence.cpu
    names = [name for name in names if name in cpu.labels]
    rows = []
    for task in tasks:
        losses = cpu.cells(task, "final_training_loss")
        metrics = cpu.cells(task, "peak_metric")
        metric = cpu.settings(task)["metric"]
        best = max if not cpu.lower_is_better(task) else min
        of_names = [name for name in names if name in losses]
        least = min(c for n in of_names if not math.isnan(c := losses[n].mean))
        peak = best(c for n in of_names if not math.isnan(c := metrics[n].mean))
        row = [title_of(cpu, task), seeds_of({name: losses[name] for name in of_names})]
        for name in names:
            if name not in losses:
                row.append("")
                continue
            loss = value(losses[name], "loss", error=True)
            peaked = value(metrics[name], metric, error=True)
            loss = f"**{loss}**" if losses[name].mean == least else loss
            peaked = f"**{peaked}**" if metrics[name].mean == peak else peaked
            row.append(f"{loss} / {peaked}")
        rows.append(row)
    return markdown(["", "seeds", *(name_of(name) for name in names)], rows)


def plus(evidence: Evidence) -> str:
    names = dict.fromkeys([*evidence.columns, CALIBRATED, FOLK, FORMER])
    return with_errors(evidence, list(names), list(of_plus(evidence)))


def paper(evidence: Evidence) -> str:
    tasks = [task for task in evidence.cpu.compared if evidence.cpu.of(task, PAPERS[-1])]
    return with_errors(evidence, (*PAPERS, *RIVALS), tasks)


def step_sizes(evidence: Evidence) -> str:
    """Return the step sizes at some places of a run, the medians over the seeds."""
    cpu = evidence.cpu
    names = [name for name in (evidence.plus, SALSA, NAMES[SLSAdam], SWEEP) if name in cpu.labels]
    rows = []
    for task in of_plus(evidence):
        row = [cpu.title(task)]
        for name in names:
            runs = [run["step_sizes"] for run in cpu.of(task, name) if "step_sizes" in run]
            medians = [
                statistics.median(sizes[max(0, round(place * len(sizes)) - 1)] for sizes in runs)
                for place in PLACES
                if runs
            ]
            row.append(" / ".join(short(size, 1) for size in medians))
        rows.append(row)
    return markdown(["", *(name_of(name) for name in names)], rows)


def findings(evidence: Evidence) -> str:
    """Return for each task who stands beside the sweep and who has learnt nothing."""
    cpu = evidence.cpu
    lines = []
    for task in cpu.compared:
        beside = beside_sweep(cpu, task)
        if not beside:
            continue
        run = cpu.of(task, SWEEP)[0]
        names = [name for name in cpu.labels if name in beside]
        stands = [name_of(name) for name in names if beside[name].stands]
        stuck = [name_of(name) for name in names if at_chance(cpu, task, name)]
        line = (
            f"- **{cpu.title(task)}** ({run['updates']} updates of "
            f"{cpu.settings(task)['batch_size']}): the sweep's rate is {swept_rate(cpu, task)}. "
            f"Beside the sweep: {listed(stands) if stands else 'nobody'}."
        )
        if at_chance(cpu, task, SWEEP):
            line += " AdamW itself is at the majority class: every figure is chance."
        elif stuck:
            line += f" At chance: {listed(stuck)}."
        lines.append(line)
    return "\n".join(lines)


def undershoots(evidence: Evidence) -> str:
    """Return how far below the swept rate the paper's rule settles in training from scratch."""
    cpu = evidence.cpu
    rate: float = cpu.of("shakespeare", CALIBRATED)[0]["rate"]
    cells = pairs(cpu, "shakespeare", (SALSA, CALIBRATED))
    sizes = [statistics.median(run["step_sizes"]) for run in cpu.of("shakespeare", SALSA)]
    median = statistics.median(sizes)
    return (
        f"On Shakespeare, from scratch, the median step size of `{SALSA}` is {short(median, 1)}. "
        f"The sweep's peak rate is {short(rate, 0)}, {rate / median:.0f} times as much. The runs "
        f"end at {cells[SALSA]} and, AdamW's, at {cells[CALIBRATED]}."
    )


def ablations(evidence: Evidence) -> str:
    """Return each method beside what is left of it without one of its parts, a part a row."""
    cpu = evidence.cpu
    tables = []
    for names in cpu.ablations:
        tasks = [task for task in cpu.tasks if sum(bool(cpu.of(task, n)) for n in names) > 1]
        cells = {task: pairs(cpu, task, names, paired=True) for task in tasks}
        rows = [[name_of(name), *(cells[task].get(name, "") for task in tasks)] for name in names]
        tables.append(markdown(["", *(title_of(cpu, task) for task in tasks)], rows))
    return "\n\n".join(tables)


def ablations_sentences(evidence: Evidence) -> str:
    """Return on which tasks each part helps or harms by more than `STANDS`."""
    cpu = evidence.cpu
    lines = []
    for names in cpu.ablations:
        whole, *parts = names
        for part in parts:
            better, worse = [], []
            for task in cpu.tasks:
                losses = cpu.cells(task, "final_training_loss", names, paired=True)
                if part not in losses or whole not in losses:
                    continue
                ratio = counted(losses[part].mean) / counted(losses[whole].mean)
                if not ratio <= STANDS:  # a run that failed too
                    worse.append(cpu.title(task))
                elif ratio < 1 / STANDS:
                    better.append(cpu.title(task))
            line = f"- {name_of(whole)} {name_of(part)}: "
            line += f"worse on {listed(worse)}" if worse else "worse nowhere"
            line += f"; better on {listed(better)}." if better else "; better nowhere."
            lines.append(line)
    return "\n".join(lines)


def studied(evidence: Evidence) -> list[str]:
    """Return the candidates that have runs on every task of the study."""
    tasks = evidence.study.compared
    return [name for name in STUDIED if all(evidence.study.of(task, name) for task in tasks)]


def study(evidence: Evidence) -> str:
    """Return the rules that were tried, with their average ranks by loss and by metric."""
    of_study, names = evidence.study, studied(evidence)
    tasks = of_study.compared
    cells = {task: pairs(of_study, task, names) for task in tasks}
    averages = average_ranks(of_study, names)
    rows = [
        [
            name_of(name),
            *(cells[task].get(name, "") for task in tasks),
            " / ".join(f"{rank:.2f}" for rank in averages[name]),
        ]
        for name in names
    ]
    head = ["", *(title_of(of_study, task) for task in tasks), f"average rank of {len(names)}"]
    return markdown(head, rows)


def average_ranks(comparison: Comparison, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return each candidate's average rank by loss and by metric over all tasks."""
    by_loss, by_metric = [], []
    for task in comparison.compared:
        losses = comparison.cells(task, "final_training_loss", dict.fromkeys(names, ""))
        metrics = comparison.cells(task, "peak_metric", dict.fromkeys(names, ""))
        by_loss.append(ranks(losses, lower=True))
        by_metric.append(ranks(metrics, lower=comparison.lower_is_better(task)))
    return {
        name: (
            statistics.fmean(rank[name] for rank in by_loss),
            statistics.fmean(rank[name] for rank in by_metric),
        )
        for name in names
    }


def study_sentence(evidence: Evidence) -> str:
    of_study, names = evidence.study, studied(evidence)
    averages = average_ranks(of_study, names)
    rules = [name for name in names if name != CALIBRATED]
    first = [min(rules, key=lambda name: averages[name][i]) for i in (0, 1)]
    everywhere = [
        name_of(name)
        for name in rules
        if all(beside_sweep(of_study, task)[name].stands for task in of_study.compared)
    ]
    stands = f"{listed(everywhere)} stands" if everywhere else "No rule stands"
    return (
        f"{stands} beside the sweep on all of them. The best average rank but the sweep's own is "
        f"{name_of(first[0])}'s by the training loss and {name_of(first[1])}'s by the metric."
    )


def index(evidence: Evidence) -> str:
    """Return the results that there are: a row for each task, with its model card."""
    rows = []
    for preset, comparison in (("cpu", evidence.cpu), ("study", evidence.study)):
        for task in comparison.tasks:
            runs = [run for run in comparison.all if run["task"] == task]
            candidates = {run["candidate"] for run in runs}
            title = comparison.title(task)
            card = comparison.output_dir / task / "README.md"
            rows.append(
                [
                    f"[{title}]({preset}/{task}/README.md)" if card.is_file() else title,
                    f"[{preset}]({preset}/README.md)",
                    METRICS[comparison.settings(task)["metric"]],
                    str(len(candidates)),
                    str(len(runs)),
                ]
            )
    return markdown(["task", "preset", "metric", "candidates", "runs"], rows)


TABLES: dict[str, Callable[[Evidence], str]] = {
    "caption": caption,
    "summary": summary,
    "summary-sentence": summary_sentence,
    "behind": behind,
    "cost-sentence": cost_sentence,
    "cost": cost,
    "kinds": kinds,
    "plus": plus,
    "paper": paper,
    "step-sizes": step_sizes,
    "findings": findings,
    "undershoots": undershoots,
    "ablations": ablations,
    "ablations-sentences": ablations_sentences,
    "study": study,
    "study-sentence": study_sentence,
    "index": index,
}
