"""The model card of a line-search run: what was trained, how well it went, what the search cost.

Trainer's own card would claim a learning rate, a schedule and an AdamW that were never used.
"""

import bisect
import importlib.metadata
import inspect
import math
import numbers
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
    TrainingArguments,
)
from transformers.modelcard import (
    METRIC_TAGS,
    TASK_MAPPING,
    TASK_TAG_TO_NAME_MAPPING,
    TrainingSummary,
    is_hf_dataset,
)
from transformers.trainer_utils import unwrap_peft_model

_PLOT = "step_size_and_loss.png"
_TEMPLATE = Path(__file__).with_name("model_card_template.md")

# What Trainer logs beside the metrics of an evaluation.
_SPEED = ("runtime", "_per_second", "model_preparation_time", "jit_compilation_time")

# datasets names the builder, which for data from files or memory is not the name of a data set.
_FILE_BUILDERS = {
    "arrow",
    "audiofolder",
    "csv",
    "generator",
    "imagefolder",
    "json",
    "pandas",
    "parquet",
    "sql",
    "text",
    "videofolder",
    "webdataset",
    "xml",
}


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation: its data set, if there are several, and the step whose weights it saw."""

    dataset: str | None
    step: int
    epoch: float | None
    metrics: dict[str, Any]


@dataclass(frozen=True)
class _DataSet:
    """A data set as the hub describes it: its identifier, a name for readers, and the rest."""

    tag: str | None
    name: str
    args: Any = None
    config: str | None = None
    split: str | None = None


def write_model_card(
    output_dir: Path,
    *,
    state: TrainerState,
    arguments: TrainingArguments,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    processing_class: object | None = None,
    data: object | None = None,
    model_name: str | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> None:
    """Write `README.md`, the model card of a line-search run, and its plot into `output_dir`.

    The plot of training loss and step size, `step_size_and_loss.png`, needs matplotlib and at least
    two logged training losses; without them the card has none. A card that is there already is
    replaced, but its tags are kept. Several processes: call it in one.

    Args:
        output_dir: The folder of the model. Made if it is missing.
        state: The trainer's state: log history, steps taken, best checkpoint.
        arguments: The training arguments.
        optimizer: The line-search optimizer that was used, not wrapped by accelerate.
        model: The model that was trained, without the wrappers of distributed training.
        processing_class: The tokenizer or processor that is saved with the model.
        data: The evaluation (else the training) data. If it is a data set of the hub, it gives the
            defaults of `dataset_tags` and `dataset_args`.
        model_name: Title of the card; by default the name of `output_dir`.
        language: Language codes, for the metadata.
        license: License, for the metadata; by default that of the base model on the hub.
        tags: Tags for the metadata, beside `generated_from_trainer` and `hf_salsa`.
        finetuned_from: The base model on the hub, or a folder; by default where the model was
            loaded from. An empty string says that it was trained from scratch.
        tasks: Task identifiers of the hub; by default that of the model's class.
        dataset_tags: Identifiers of the data sets on the hub.
        dataset: Names of the data sets, for readers; by default `dataset_tags`.
        dataset_args: One entry per data set of `dataset_tags`, for the metadata.

    Warns:
        UserWarning: matplotlib is not installed.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    readme = output_dir / "README.md"
    bare_model = unwrap_peft_model(model)  # type: ignore[no-untyped-call]
    base_id, base_folder = _base_model(bare_model, finetuned_from)
    title = model_name or output_dir.resolve().name
    data_sets = _data_sets(dataset_tags, dataset, dataset_args, data)

    training = [e for e in state.log_history if "loss" in e and "learning_rate" in e]
    best_step = _best_step(state, arguments)
    evaluations = _evaluations(state.log_history, best_step)
    results = _results(evaluations, best_step)

    eval_results = _eval_results(results, _listed(tasks) or _tasks_of(bare_model), data_sets)
    card_data = ModelCardData(
        library_name=_library(model, bare_model),
        # Without one, transformers asks the hub for that of the base model.
        license=TrainingSummary(title, license=license, finetuned_from=base_id).license,
        language=_listed(language) or None,
        base_model=base_id,
        tags=[*_listed(tags), *_existing_tags(readme), "generated_from_trainer", "hf_salsa"],
        datasets=[entry.tag for entry in data_sets if entry.tag is not None] or None,
        metrics=_metric_tags(results) or None,
        model_name=title,
        eval_results=eval_results or None,
    )
    if not eval_results:
        card_data.pop("model_name")  # only the name of the results

    settings = optimizer.param_groups[0]
    card = ModelCard.from_template(
        card_data,
        template_path=str(_TEMPLATE),
        title=title,
        base_id=base_id,
        base_folder=base_folder,
        data=_names(data_sets),
        steps=state.global_step,
        best_step=best_step,
        results=[
            {
                "dataset": result.dataset,
                "step": result.step,
                "lines": [(_label(key), _text(value)) for key, value in result.metrics.items()],
            }
            for result in results
        ],
        plot=_PLOT if _plot(output_dir / _PLOT, training, evaluations) else None,
        loading=_loading(
            model,
            bare_model,
            processing_class,
            path=arguments.hub_model_id or title,
            base=base_id or base_folder or "base_model",
        ),
        optimizer=type(optimizer).__name__,
        settings=settings,
        adam="betas" in settings,
        plus="first_share" in settings,
        hyperparameters=_hyperparameters(state, arguments, optimizer),
        report=_search_report(state.log_history),
        table=_table(training, evaluations),
        versions=_versions(is_adapter=bare_model is not model),
    )
    readme.write_text(f"{str(card).strip()}\n", encoding="utf-8", newline="\n")


def _listed(value: str | list[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


# --- What was trained, on what


def _base_model(model: nn.Module, finetuned_from: str | None) -> tuple[str | None, str | None]:
    """Return the base model as (identifier on the hub, None) or (None, name of a folder)."""
    if finetuned_from is None and isinstance(model, PreTrainedModel):
        finetuned_from = model.config.name_or_path
    if not finetuned_from:
        return None, None
    if not Path(finetuned_from).is_dir():
        try:
            validate_repo_id(finetuned_from)
        except HFValidationError:
            pass  # the path of a folder that is not here
        else:
            return finetuned_from, None
    # Where a folder lies on somebody's disk is nobody's business.
    return None, Path(finetuned_from).resolve().name


def _tasks_of(model: nn.Module) -> list[str]:
    """Return the task that the model's class was made for; as in Trainer, the last that fits."""
    mappings: dict[str, dict[str, Any]] = TASK_MAPPING  # type: ignore[assignment]
    tasks = [
        task
        for task, mapping in mappings.items()
        for names in mapping.values()
        if type(model).__name__ in ([names] if isinstance(names, str) else names)
    ]
    return tasks[-1:]


def _library(model: nn.Module, bare_model: nn.Module) -> str | None:
    if bare_model is not model:
        return "peft"
    if _is_sentence_transformer(bare_model):
        return "sentence-transformers"
    return "transformers" if isinstance(model, PreTrainedModel) else None


def _is_sentence_transformer(model: nn.Module) -> bool:
    return type(model).__module__.startswith("sentence_transformers.")


def _existing_tags(readme: Path) -> list[str]:
    if not readme.exists():
        return []
    return _listed(ModelCard.load(readme, ignore_metadata_errors=True).data.get("tags"))


def _data_sets(
    tags: str | list[str] | None,
    names: str | list[str] | None,
    args: str | list[str] | None,
    data: Any,
) -> list[_DataSet]:
    """Return the data sets that the user named, or else that `data` knows of itself."""
    tags, names, args = _listed(tags), _listed(names), _listed(args)
    if tags:
        names += tags[len(names) :]
        padded: list[str | None] = [*args, *[None] * len(tags)]
        return [_DataSet(*entry) for entry in zip(tags, names, padded, strict=False)]
    if names:
        return [_DataSet(None, name) for name in names]
    if not is_hf_dataset(data):  # type: ignore[no-untyped-call]
        return []
    tag = data.builder_name
    if tag is None or tag in _FILE_BUILDERS:
        return []
    split = None if data.split is None else str(data.split)
    return [_DataSet(tag, tag, data.config_name, data.config_name, split)]


def _names(data_sets: list[_DataSet]) -> str:
    *others, last = [f"the {entry.name}" for entry in data_sets] or ["an unknown"]
    if not others:
        return f"{last} dataset"
    return f"{', '.join(others)} and {last} datasets"


def _loading(
    model: nn.Module,
    bare_model: nn.Module,
    processing_class: object | None,
    *,
    path: str,
    base: str,
) -> str:
    """Return the Python code that loads the model, as its class asks for."""
    name = type(bare_model).__name__
    if _is_sentence_transformer(bare_model):  # loads its tokenizer itself
        return f'from sentence_transformers import {name}\n\nmodel = {name}("{path}")'
    module = type(bare_model).__module__
    imports = []
    of_transformers = []
    if module.startswith("transformers."):
        of_transformers.append(name)
    else:
        imports.append(f"from {'your_script' if module == '__main__' else module} import {name}")

    pretrained = isinstance(bare_model, PreTrainedModel)
    labels = bare_model.config.num_labels if isinstance(bare_model, PreTrainedModel) else 2
    is_adapter = bare_model is not model
    if pretrained and is_adapter:
        # Two labels are the default; any other number is not written in the base model.
        options = f", num_labels={labels}" if labels != 2 else ""
        code = [f'model = {name}.from_pretrained("{base}"{options})']
    elif pretrained:
        code = [f'model = {name}.from_pretrained("{path}")']
    else:
        code = [f"model = {name}(...)  # as it was made for training"]
    if is_adapter:
        imports.append("from peft import PeftModel")
        code.append(f'model = PeftModel.from_pretrained(model, "{path}")')
    elif not pretrained:
        imports.append("from safetensors.torch import load_file")
        code.append(f'model.load_state_dict(load_file("{path}/model.safetensors"))')

    if isinstance(processing_class, PreTrainedTokenizerBase):
        of_transformers.append("AutoTokenizer")
        code.append(f'tokenizer = AutoTokenizer.from_pretrained("{path}")')
    elif processing_class is not None:
        of_transformers.append("AutoProcessor")
        code.append(f'processor = AutoProcessor.from_pretrained("{path}")')
    if of_transformers:
        imports.append(f"from transformers import {', '.join(sorted(of_transformers))}")
    return "\n".join([*sorted(imports), "", *code])


# --- How well it went


def _best_step(state: TrainerState, arguments: TrainingArguments) -> int | None:
    """Return the step of the best checkpoint, if its weights are those of the finished model."""
    finished = any("train_runtime" in entry for entry in state.log_history)
    if finished and arguments.load_best_model_at_end and state.best_model_checkpoint is not None:
        return state.best_global_step
    return None


def _evaluations(log_history: list[dict[str, Any]], best_step: int | None) -> list[_Evaluation]:
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
        evaluations.append(_Evaluation(name or None, step, epoch, metrics))
    return evaluations


def _results(evaluations: list[_Evaluation], best_step: int | None) -> list[_Evaluation]:
    """Return for each data set the latest evaluation of the weights that the run ended with."""
    latest = {evaluation.dataset: evaluation for evaluation in evaluations}
    of_best = {e.dataset: e for e in evaluations if e.step == best_step}
    return [of_best.get(name, evaluation) for name, evaluation in latest.items()]


def _is_finite_number(value: Any) -> bool:
    # Real covers NumPy's scalars; a bool is a number to Python, but not to a reader.
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _metric_tags(results: list[_Evaluation]) -> list[str]:
    types = [_metric_type(key) for result in results for key in result.metrics]
    return [name for name in dict.fromkeys(types) if name in METRIC_TAGS]


def _metric_type(key: str) -> str:
    return "rouge" if key.lower() == "rouge1" else key.lower()


def _eval_results(
    results: list[_Evaluation], tasks: list[str], data_sets: list[_DataSet]
) -> list[EvalResult]:
    """Return the results as the hub shows them; it takes none without a task."""
    on_hub = [entry for entry in data_sets if entry.tag is not None]
    names = ", ".join(entry.name for entry in data_sets)
    described = on_hub or [_DataSet("unknown", names or "unknown")]
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
            metric_name=_label(key),
            # YAML knows no NumPy.
            metric_value=int(value) if isinstance(value, numbers.Integral) else float(value),
        )
        for task in tasks
        for entry in described
        for result in results
        for key, value in result.metrics.items()
        if _is_finite_number(value)
    ]


# --- How it was trained


def _hyperparameters(
    state: TrainerState, arguments: TrainingArguments, optimizer: torch.optim.Optimizer
) -> list[tuple[str, Any]]:
    """Return (name, value) of all that had an effect on the run."""
    # With auto_find_batch_size only the state knows the batch size.
    batch_size = state.train_batch_size or arguments.train_batch_size
    accumulated = arguments.gradient_accumulation_steps
    processes = arguments.world_size
    steps = str(state.global_step)
    if state.max_steps > state.global_step:
        steps += f" of {state.max_steps} planned"
    # On a CPU fp16 runs in float32.
    mixed_precision = arguments.mixed_precision
    if mixed_precision == "fp16" and arguments.device.type == "cpu":
        mixed_precision = "no"
    hyperparameters: list[tuple[str, Any]] = [
        ("optimizer", f"{type(optimizer).__name__} with {_settings(optimizer)}"),
        ("train_batch_size (per device)", batch_size),
        ("gradient_accumulation_steps", accumulated),
        ("processes", processes),
        ("total_train_batch_size", batch_size * accumulated * processes),
        ("eval_batch_size (per device)", arguments.eval_batch_size),
        ("training steps", f"{steps} ({state.epoch or 0:.4g} epochs)"),
        ("seed", arguments.seed),
        ("mixed_precision", mixed_precision),
    ]
    if arguments.max_grad_norm:
        hyperparameters.append(("max_grad_norm", arguments.max_grad_norm))
    if arguments.label_smoothing_factor:
        hyperparameters.append(("label_smoothing_factor", arguments.label_smoothing_factor))
    return hyperparameters


def _settings(optimizer: torch.optim.Optimizer) -> str:
    """Return the arguments of the optimizer as `name=value, ...`."""
    settings = []
    for name in inspect.signature(type(optimizer)).parameters:
        if name != "params" and name in optimizer.param_groups[0]:
            values = dict.fromkeys(str(group[name]) for group in optimizer.param_groups)
            first, *others = values
            note = f" ({', '.join(others)} in other parameter groups)" if others else ""
            settings.append(f"{name}={first}{note}")
    return ", ".join(settings)


def _search_report(log_history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what the searches cost; an interrupted run logged only a part of it."""
    reports = [entry for entry in log_history if "salsa/trials" in entry]
    if not reports:
        return None
    report = reports[-1]
    share = report.get("salsa/extra_forward_share")
    return {
        "searches": report["salsa/searches"],
        "trials": report["salsa/trials"],
        "share": None if share is None else f"{100 * share:.1f} %",
        "failed_searches": report.get("salsa/failed_searches"),
        "skipped_steps": report.get("salsa/skipped_steps"),
        "median": _step_size(report.get("salsa/median_step_size")),
        "final": _step_size(report.get("salsa/final_step_size")),
    }


def _versions(is_adapter: bool) -> dict[str, str]:
    """Return name -> version of the libraries that the run depended on."""
    from . import __version__  # the package imports this module before it knows its version

    versions = {"hf_salsa": __version__}
    used = ["transformers", "torch", "accelerate", "datasets", "tokenizers"]
    for name in [*used, "peft"] if is_adapter else used:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # datasets and tokenizers are optional
    return versions


# --- Text, table, plot


def _label(key: str) -> str:
    return " ".join(part.capitalize() for part in key.split("_"))


def _text(value: Any) -> str:
    """Return a metric for readers, on one line."""
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        value = float(value)
        # Fixed digits are easier to compare, as long as they show anything.
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _step_size(value: Any) -> str:
    return "not logged" if value is None else f"{value:.3g}"


def _table(training: list[dict[str, Any]], evaluations: list[_Evaluation]) -> str:
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
        row["Training Loss"] = _text(latest.get("loss", "No log"))
        row["Step Size"] = _step_size(latest["learning_rate"]) if latest else "No log"
        for key, value in evaluation.metrics.items():
            label = _label(key)
            if evaluation.dataset is not None:
                label = f"{label} ({evaluation.dataset})"
            elif key == "loss":
                label = "Validation Loss"
            row[label] = _text(value).replace("|", r"\|")
    columns = list(dict.fromkeys(["Epoch", *(name for row in rows.values() for name in row)]))
    cells = [columns, *([row.get(name, "") for name in columns] for row in rows.values())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_table_line(line, widths) for line in cells]
    lines.insert(1, "|".join(["", *(f"{'-' * (width + 1)}:" for width in widths), ""]))
    return "\n".join(lines) if rows else ""


def _table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (f" {cell:>{width}} " for cell, width in zip(cells, widths, strict=True))
    return "|".join(["", *padded, ""])


def _plot(path: Path, training: list[dict[str, Any]], evaluations: list[_Evaluation]) -> bool:
    """Plot training loss and step size over the steps; return whether there is a plot."""
    losses = [(e["step"], e["loss"]) for e in training if _is_finite_number(e["loss"])]
    rates = [
        (e["step"], e["learning_rate"])
        for e in training
        if _is_finite_number(e["learning_rate"]) and e["learning_rate"] > 0
    ]
    path.unlink(missing_ok=True)  # of an earlier run
    if min(len(losses), len(rates)) < 2:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn(
            "The model card has no plot of loss and step size: matplotlib is not installed. "
            "pip install hf_salsa[plots]",
            stacklevel=3,
        )
        return False
    # Not pyplot: it keeps global state, and may open a window.
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    top.plot(*zip(*losses, strict=True), linewidth=1, label="training")
    for name in dict.fromkeys(evaluation.dataset for evaluation in evaluations):
        points = [
            (evaluation.step, evaluation.metrics["loss"])
            for evaluation in evaluations
            if evaluation.dataset == name and _is_finite_number(evaluation.metrics.get("loss"))
        ]
        if points:
            label = "evaluation" if name is None else f"evaluation, {name}"
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
    figure.savefig(path, dpi=150)
    return True
