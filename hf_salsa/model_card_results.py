"""What a log history says of how well the model does: its evaluations, their results, a table."""

import bisect
import math
import numbers
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from huggingface_hub import EvalResult
from transformers import TrainerState, TrainingArguments
from transformers.modelcard import METRIC_TAGS, TASK_TAG_TO_NAME_MAPPING

from .model_card_markdown import Markdown, table
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
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return isinstance(value, numbers.Integral) or math.isfinite(value)  # which is for floats


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


def results_table(training: list[dict[str, Any]], evaluations: list[Evaluation]) -> Markdown | None:
    """Return a table with a row for each step at which the model was evaluated."""
    evaluations = sorted(evaluations, key=lambda evaluation: evaluation.step)
    # Not by their names: a metric may be called "step".
    columns = {(e.dataset, key): _column(e.dataset, key) for e in evaluations for key in e.metrics}
    rows = [["Epoch", "Step", "Training Loss", "Step Size", *columns.values()]]
    logged = [entry["step"] for entry in training]
    for step, group in groupby(evaluations, key=lambda evaluation: evaluation.step):
        here = list(group)
        epochs = [f"{e.epoch:.4g}" for e in here if e.epoch is not None]
        losses = bisect.bisect_right(logged, step)
        latest = training[losses - 1] if losses else {}
        values = {(e.dataset, key): metric_text(e.metrics[key]) for e in here for key in e.metrics}
        rows.append(
            [
                epochs[-1] if epochs else "",
                str(step),
                metric_text(latest.get("loss", "No log")),
                step_size_text(latest["learning_rate"]) if latest else "No log",
                *(values.get(column, "") for column in columns),
            ]
        )
    return table(rows) if evaluations else None


def _column(dataset: str | None, key: str) -> str:
    if dataset is not None:
        return f"{metric_label(key)} ({dataset})"
    return "Validation Loss" if key == "loss" else metric_label(key)
