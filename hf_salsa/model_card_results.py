"""What a log history says of how well the model does: its evaluations, their results, a table."""

import bisect
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult
from transformers import TrainerState, TrainingArguments
from transformers.modelcard import METRIC_TAGS, TASK_TAG_TO_NAME_MAPPING

from .model_card_subject import DataSet

# What Trainer logs beside the metrics of an evaluation.
_SPEED = ("runtime", "_per_second", "model_preparation_time", "jit_compilation_time")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: its data set, if there are several, and the step whose weights it saw."""

    dataset: str | None
    step: int
    epoch: float | None
    metrics: dict[str, Any]


def best_step_of(state: TrainerState, arguments: TrainingArguments) -> int | None:
    """Return the step of the best checkpoint, if its weights are those of the finished model."""
    finished = any("train_runtime" in entry for entry in state.log_history)
    if finished and arguments.load_best_model_at_end and state.best_model_checkpoint is not None:
        return state.best_global_step
    return None


def evaluations_of(log_history: list[dict[str, Any]], best_step: int | None) -> list[Evaluation]:
    """Return all evaluations of the log history, in the order in which they happened."""
    evaluations = []
    finished = False
    for entry in log_history:
        if "loss" in entry or "train_runtime" in entry:
            finished = "train_runtime" in entry
            continue
        # "eval" or, with several data sets, "eval_NAME"; a user's metric may end in _runtime too.
        prefixes = [key.removesuffix("_runtime") for key in entry if key.endswith("_runtime")]
        prefix = min(prefixes, key=len, default="eval")
        metrics = {
            key.removeprefix(f"{prefix}_"): value
            for key, value in entry.items()
            if key.startswith(f"{prefix}_") and not key.endswith(_SPEED)
        }
        if not metrics:
            continue
        step, epoch = entry["step"], entry.get("epoch")
        if finished and best_step is not None:
            step, epoch = best_step, None  # its weights have been loaded
        name = prefix.removeprefix("eval").removeprefix("_")
        evaluations.append(Evaluation(name or None, step, epoch, metrics))
    return evaluations


def results_of(evaluations: list[Evaluation], best_step: int | None) -> list[Evaluation]:
    """Return for each data set the latest evaluation of the weights that the run ended with."""
    latest = {evaluation.dataset: evaluation for evaluation in evaluations}
    of_best = {e.dataset: e for e in evaluations if e.step == best_step}
    return [of_best.get(name, evaluation) for name, evaluation in latest.items()]


def is_finite_number(value: Any) -> bool:
    """Return whether a reader would call `value` a number, and one that can be shown."""
    # Real covers NumPy's scalars; a bool is a number to Python, but not to a reader.
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def metric_tags(results: list[Evaluation]) -> list[str]:
    """Return the hub's names of the metrics that it knows."""
    types = [_metric_type(key) for result in results for key in result.metrics]
    return [name for name in dict.fromkeys(types) if name in METRIC_TAGS]


def _metric_type(key: str) -> str:
    return "rouge" if key.lower() == "rouge1" else key.lower()


def eval_results_of(
    results: list[Evaluation], tasks: list[str], data_sets: list[DataSet]
) -> list[EvalResult]:
    """Return the results as the hub shows them; it takes none without a task."""
    on_hub = [entry for entry in data_sets if entry.tag is not None]
    names = ", ".join(entry.name for entry in data_sets)
    described = on_hub or [DataSet("unknown", names or "unknown")]
    return [
        EvalResult(
            task_type=task,
            task_name=TASK_TAG_TO_NAME_MAPPING.get(task),
            dataset_type=str(entry.tag),
            dataset_name=entry.name,
            dataset_args=entry.args,
            dataset_config=entry.config,
            dataset_split=result.dataset or entry.split,
            metric_type=_metric_type(key),
            metric_name=metric_label(key),
            # YAML knows no NumPy.
            metric_value=int(value) if isinstance(value, numbers.Integral) else float(value),
        )
        for task in tasks
        for entry in described
        for result in results
        for key, value in result.metrics.items()
        if is_finite_number(value)
    ]


def metric_label(key: str) -> str:
    """Return the name of a metric for readers."""
    return " ".join(part.capitalize() for part in key.split("_"))


def metric_text(value: Any) -> str:
    """Return a metric for readers, on one line."""
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        value = float(value)
        # Fixed digits are easier to compare, as long as they show anything.
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def step_size_text(value: Any) -> str:
    """Return a step size for readers; None where none was logged."""
    return "not logged" if value is None else f"{value:.3g}"


def results_table(training: list[dict[str, Any]], evaluations: list[Evaluation]) -> str:
    """Return a Markdown table with a row for each step at which the model was evaluated."""
    steps = [entry["step"] for entry in training]
    rows: dict[int, dict[str, str]] = {}
    for evaluation in sorted(evaluations, key=lambda evaluation: evaluation.step):
        logged = bisect.bisect_right(steps, evaluation.step)
        latest = training[logged - 1] if logged else {}
        row = rows.setdefault(evaluation.step, {})
        if evaluation.epoch is not None:
            row["Epoch"] = f"{evaluation.epoch:.4g}"
        row["Step"] = str(evaluation.step)
        row["Training Loss"] = metric_text(latest.get("loss", "No log"))
        row["Step Size"] = step_size_text(latest["learning_rate"]) if latest else "No log"
        for key, value in evaluation.metrics.items():
            name = metric_label(key)
            if evaluation.dataset is not None:
                name = f"{name} ({evaluation.dataset})"
            elif key == "loss":
                name = "Validation Loss"
            row[name] = metric_text(value).replace("|", r"\|")
    columns = list(dict.fromkeys(["Epoch", *(name for row in rows.values() for name in row)]))
    cells = [columns, *([row.get(column, "") for column in columns] for row in rows.values())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_table_line(line, widths) for line in cells]
    lines.insert(1, "|".join(["", *(f"{'-' * (width + 1)}:" for width in widths), ""]))
    return "\n".join(lines) if rows else ""


def _table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (f" {cell:>{width}} " for cell, width in zip(cells, widths, strict=True))
    return "|".join(["", *padded, ""])
