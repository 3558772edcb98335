"""The model card of a line-search run: what was trained, how well it went, what the search cost.

Trainer's own card would claim a learning rate, a schedule and an AdamW that were never used.
"""

import importlib.metadata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import unwrap_peft_model

from .model_card_front_matter import front_matter, keep_aside, tags_of
from .model_card_markdown import Markdown, code_block, code_span, escape, render
from .model_card_plot import plot
from .model_card_procedure import procedure
from .model_card_results import (
    Evaluation,
    best_step_of,
    eval_results_of,
    evaluations_of,
    is_finite_number,
    metric_label,
    metric_tags,
    metric_text,
    results_of,
    results_table,
    step_size_text,
)
from .model_card_subject import (
    DataSet,
    adapters_of,
    base_card,
    base_model,
    data_set_names,
    data_sets_of,
    library,
    listed,
    loading_code,
    tasks_of,
)
from .optimizers import OPTIMIZERS, LineSearchOptimizer
from .phases import phases_of
from .printing import count, stock_name

_PLOT = "step_size_and_loss.png"
_ENOUGH_LOGGED = 20  # losses, to draw a curve
_TEMPLATE = Path(__file__).with_name("model_card_template.md")


def write_model_card(
    output_dir: Path,
    *,
    state: TrainerState,
    arguments: TrainingArguments,
    optimizer: LineSearchOptimizer,
    model: nn.Module,
    searches: Sequence[tuple[int, float, float]] = (),
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
    two logged training losses or searches; without them the card has none. A card that is there
    already is replaced, but its tags are kept; one whose metadata cannot be read becomes
    `README.md.bak`. Several processes: call it in one.

    Args:
        output_dir: The folder of the model. Made if it is missing.
        state: The trainer's state: log history, steps taken, best checkpoint.
        arguments: The training arguments.
        optimizer: The line-search optimizer that was used, not wrapped by accelerate.
        model: The model that was trained, without the wrappers of distributed training.
        searches: (step, step size, loss of the mini-batch) of searches of the run, from which a
            short run shows more than from its few logged losses. The plot marks them.
        processing_class: The tokenizer or processor that is saved with the model.
        data: The evaluation (else the training) data. If it is a data set of the hub, it gives the
            defaults of `dataset_tags` and `dataset_args`.
        model_name: Title of the card; by default the name of `output_dir`.
        language: Language codes, for the metadata; by default those of the base model's card.
        license: License, for the metadata; by default that of the base model's card.
        tags: Tags for the metadata, beside `generated_from_trainer` and `hf_salsa`.
        finetuned_from: The base model on the hub, or a folder; by default where the model was
            loaded from. An empty string says that it was trained from scratch.
        tasks: Task identifiers of the hub; by default that of the model's class.
        dataset_tags: Identifiers of the data sets on the hub.
        dataset: Names of the data sets, for readers; by default `dataset_tags`.
        dataset_args: One entry per data set of `dataset_tags`, for the metadata.

    Warns:
        UserWarning: matplotlib is not installed, or the metadata of the `README.md` that is there
            cannot be read.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    readme = output_dir / "README.md"
    bare_model = unwrap_peft_model(model)  # type: ignore[no-untyped-call]
    adapters = adapters_of(model, bare_model)
    base_id, base_folder = base_model(bare_model, finetuned_from)
    kept_tags = tags_of(readme)
    title = model_name or output_dir.resolve().name
    data_sets = data_sets_of(dataset_tags, dataset, dataset_args, data)

    training = [e for e in state.log_history if "loss" in e and "learning_rate" in e]
    if len(training) < min(_ENOUGH_LOGGED, len(searches)):
        training = [dict(zip(("step", "learning_rate", "loss"), s, strict=True)) for s in searches]
    phases = phases_of(optimizer, state.max_steps)
    best_step = best_step_of(state, arguments)
    evaluations = evaluations_of(state.log_history, best_step)
    results = results_of(evaluations, best_step)

    given = {"license": license, "language": listed(language)}
    metadata = _metadata(
        title,
        results,
        data_sets,
        listed(tasks) or tasks_of(bare_model),
        library_name=library(model, bare_model),
        base_model=base_id,
        tags=[*listed(tags), *(kept_tags or []), "generated_from_trainer", "hf_salsa"],
        optim=_name(optimizer),
        **base_card(bare_model, finetuned_from, {n: value for n, value in given.items() if value}),
    )
    code = loading_code(
        model,
        bare_model,
        processing_class,
        path=arguments.hub_model_id or title,
        base=base_id or base_folder or "base_model",
        adapters=adapters,
    )
    costs, has_median = _costs(state.log_history)
    has_plot = plot(
        output_dir / _PLOT,
        training,
        evaluations,
        title=title,
        searches=searches,
        phases=phases,
    )
    card = render(
        _TEMPLATE,
        front_matter=Markdown(front_matter(metadata)),
        title=title,
        origin=_origin(bare_model, base_id, base_folder, adapters),
        data=data_set_names(data_sets),
        steps=state.global_step,
        best_step=best_step,
        results=results,
        metric_label=metric_label,
        metric_text=metric_text,
        plot=_PLOT if has_plot else None,
        loading=code_block(code, "python"),
        procedure=Markdown(procedure(optimizer, model, phases.head, _returns(state.log_history))),
        plain_optimizer=stock_name(optimizer),
        hyperparameters=_hyperparameters(state, arguments, optimizer),
        costs=costs,
        has_median=has_median,
        table=results_table(training, evaluations),
        versions=_versions(is_adapter=bool(adapters)),
    )
    if kept_tags is None:
        warnings.warn(
            f"{readme} has no front matter that can be read, and so no tags to keep in the new "
            f"model card: it is {keep_aside(readme)} from now on",
            stacklevel=2,
        )
    readme.write_text(f"{card.strip()}\n", encoding="utf-8", newline="\n")


def _metadata(
    title: str, results: list[Evaluation], data_sets: list[DataSet], tasks: list[str], **given: Any
) -> dict[str, Any]:
    """Return what the hub reads of the card: what is `given`, the data sets and the results."""
    eval_results = eval_results_of(results, tasks, data_sets)
    card_data = ModelCardData(
        datasets=[entry.tag for entry in data_sets if entry.tag is not None] or None,
        metrics=metric_tags(results) or None,
        model_name=title,
        eval_results=eval_results or None,
        **given,
    )
    if not eval_results:
        card_data.pop("model_name")  # only the name of the results
    metadata: dict[str, Any] = card_data.to_dict()  # type: ignore[no-untyped-call]
    return metadata


def _name(optimizer: LineSearchOptimizer) -> str:
    """Return the name by which `--optim` knows an optimizer; of another one that of its class."""
    kind = type(optimizer)
    return next((name for name, cls in OPTIMIZERS.items() if cls is kind), kind.__name__)


def _origin(
    model: nn.Module, base_id: str | None, base_folder: str | None, adapters: list[str]
) -> Markdown:
    """Return what the model was made from: `is a fine-tuned version of ...` and the like."""
    if base_id is not None:
        base = f"[{escape(base_id)}](https://huggingface.co/{base_id})"
    elif base_folder is not None:
        base = f"a local model, {code_span(base_folder)},"
    elif adapters:
        base = f"a model, {code_span(type(model).__name__)},"
    else:
        return Markdown("was trained from scratch")
    if not adapters:
        return Markdown(f"is a fine-tuned version of {base}")
    several = f"a set of {len(adapters)} adapters ({', '.join(map(code_span, adapters))})"
    kind = "an adapter" if len(adapters) == 1 else several
    return Markdown(f"is {kind} of {base.removesuffix(',')}, trained")


def _hyperparameters(
    state: TrainerState, arguments: TrainingArguments, optimizer: LineSearchOptimizer
) -> list[tuple[str, Any]]:
    """Return (name, value) of all that had an effect on the run."""
    # With auto_find_batch_size only the state knows the batch size.
    batch_size = state.train_batch_size or arguments.train_batch_size
    accumulated = arguments.gradient_accumulation_steps
    processes = arguments.world_size
    settings = _settings(optimizer)
    steps = str(state.global_step)
    if state.max_steps > state.global_step:
        steps += f" of {state.max_steps} planned"
    if state.epoch is not None:
        steps += f" ({count(f'{state.epoch:.4g}', 'epoch')})"
    # On a CPU fp16 runs in float32.
    mixed_precision = arguments.mixed_precision
    if mixed_precision == "fp16" and arguments.device.type == "cpu":
        mixed_precision = "no"
    hyperparameters: list[tuple[str, Any]] = [
        ("optimizer", " with ".join(filter(None, [type(optimizer).__name__, settings]))),
        ("train_batch_size (per device)", batch_size),
        ("gradient_accumulation_steps", accumulated),
        ("processes", processes),
        ("total_train_batch_size", batch_size * accumulated * processes),
        ("eval_batch_size (per device)", arguments.eval_batch_size),
        ("training steps", steps),
        ("seed", arguments.seed),
        ("mixed_precision", mixed_precision),
    ]
    if arguments.max_grad_norm:
        hyperparameters.append(("max_grad_norm", arguments.max_grad_norm))
    if arguments.label_smoothing_factor:
        hyperparameters.append(("label_smoothing_factor", arguments.label_smoothing_factor))
    return hyperparameters


def _settings(optimizer: LineSearchOptimizer) -> str:
    """Return the arguments of the optimizer as `name=value, ...`."""
    settings = []
    for name in optimizer.default_settings():
        values = dict.fromkeys(str(group[name]) for group in optimizer.param_groups)
        first, *others = values
        note = f" ({', '.join(others)} in other parameter groups)" if others else ""
        settings.append(f"{name}={first}{note}")
    return ", ".join(settings)


def _returns(log_history: list[dict[str, Any]]) -> int:
    """Return how often the run went back to earlier weights."""
    logged = [entry["salsa/returns"] for entry in log_history if "salsa/returns" in entry]
    return int(logged[-1]) if logged else 0


def _costs(log_history: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """Return lines on what the searches cost, and whether a median step size is among them."""
    reports = [entry for entry in log_history if "salsa/trials" in entry]
    if not reports:
        return [], False
    report = {key.removeprefix("salsa/"): value for key, value in reports[-1].items()}
    # An interrupted run logged a part of this, up to a step before its last.
    searches = count(report["searches"], "search", "searches")
    lines = [
        f"{searches} in {count(report['step'], 'step')}",
        count(report["trials"], "extra forward pass", "extra forward passes"),
    ]
    if "extra_forward_share" in report:
        share = 100 * report["extra_forward_share"]
        lines[1] += f", {share:.1f} % of all forward passes of training"
    if "search_runtime" in report:
        share = 100 * report["search_runtime"] / max(report["train_runtime"], 1e-4)
        lines.append(f"{share:.1f} % of the time of training")
    if "failed_searches" in report:
        failed = count(report["failed_searches"], "failed search", "failed searches")
        lines.append(f"{failed}, which kept the step size of before")
    if "skipped_steps" in report:
        skipped = count(report["skipped_steps"], "skipped step")
        lines.append(f"{skipped}, at which the loss or a gradient was not finite")
    sizes = {name: report.get(f"{name}_step_size") for name in ("settled", "median", "final")}
    known = [f"{name} {step_size_text(size)}" for name, size in sizes.items() if size]
    if known:
        lines.append(f"step size: {', '.join(known)}")
    median = sizes["median"]
    return lines, median is not None and is_finite_number(median) and median > 0


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
