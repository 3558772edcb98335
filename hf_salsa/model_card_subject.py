"""What a model card is about: the model, the data it was trained on, the code that loads it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import nn
from transformers import (
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modelcard import TASK_MAPPING, is_hf_dataset

_CARD = "README.md"
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
# What loads a tokenizer or processor of a kind, and its name in the code.
_PARTS = (
    (PreTrainedTokenizerBase, "tokenizer", "AutoTokenizer"),
    (ImageProcessingMixin, "processor", "AutoImageProcessor"),
    (FeatureExtractionMixin, "processor", "AutoFeatureExtractor"),
)


@dataclass(frozen=True)
class DataSet:
    """A data set as the hub describes it: its identifier, a name for readers, and the rest."""

    tag: str | None
    name: str
    args: Any = None
    config: str | None = None
    split: str | None = None


def listed(value: str | list[str] | None) -> list[str]:
    """Return a list, of what may be one or none."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _source(model: nn.Module, finetuned_from: str | None) -> tuple[str | None, Path | None]:
    """Return the base model as (identifier on the hub, None) or (None, folder)."""
    if finetuned_from is None and isinstance(model, PreTrainedModel):
        finetuned_from = model.config.name_or_path
    if not finetuned_from:
        return None, None
    if not os.path.isdir(finetuned_from):
        try:
            validate_repo_id(finetuned_from)
        except HFValidationError:
            pass  # the path of a folder that is not here
        else:
            return finetuned_from, None
    return None, Path(finetuned_from)


def base_model(model: nn.Module, finetuned_from: str | None) -> tuple[str | None, str | None]:
    """Return the base model as (identifier on the hub, None) or (None, name of a folder)."""
    identifier, folder = _source(model, finetuned_from)
    if folder is None:
        return identifier, None
    # Where a folder lies on somebody's disk is nobody's business. One that is not here has no other
    # name to resolve, and may hold what no path does.
    return None, folder.resolve().name if os.path.isdir(folder) else folder.name


def base_card(
    model: nn.Module, finetuned_from: str | None, given: dict[str, Any]
) -> dict[str, Any]:
    """Return licence and languages for the metadata.

    Args:
        model: The model that was trained, without adapters.
        finetuned_from: As in `write_model_card`.
        given: What the user says; the rest is what the card of the base model says, if it can be
            had, on the hub, in its cache or in the base model's folder.
    """
    identifier, folder = _source(model, finetuned_from)
    try:
        path = hf_hub_download(identifier, _CARD) if identifier else (folder or Path()) / _CARD
        data = (metadata_load(path) or {}) if identifier or folder else {}
    except Exception:  # no network, no such model, no card, and what makes values of one
        data = {}
    carried = {name: data[name] for name in ("license", "language") if data.get(name)} | given
    if "license" not in given:  # of a licence that the hub has no name for
        carried |= {n: data[n] for n in ("license_name", "license_link") if data.get(n)}
    return carried


def adapters_of(model: nn.Module, bare_model: nn.Module) -> list[str]:
    """Return the names of the adapters: of PEFT's wrapper, or of its layers inside of a model."""
    if bare_model is not model or getattr(model, "_hf_peft_config_loaded", False):
        return list(model.peft_config)  # type: ignore[arg-type]
    return []


def tasks_of(model: nn.Module) -> list[str]:
    """Return the task that the model's class was made for; as in Trainer, the last that fits."""
    mappings: dict[str, dict[str, Any]] = TASK_MAPPING  # type: ignore[assignment]
    tasks = [
        task
        for task, mapping in mappings.items()
        for names in mapping.values()
        if type(model).__name__ in ([names] if isinstance(names, str) else names)
    ]
    return tasks[-1:]


def library(model: nn.Module, bare_model: nn.Module) -> str | None:
    """Return the library that loads the model, as the hub calls it."""
    if bare_model is not model:
        return "peft"
    if _is_sentence_transformer(bare_model):
        return "sentence-transformers"
    return "transformers" if isinstance(model, PreTrainedModel) else None


def _is_sentence_transformer(model: nn.Module) -> bool:
    return type(model).__module__.startswith("sentence_transformers.")


def data_sets_of(
    tags: str | list[str] | None,
    names: str | list[str] | None,
    args: str | list[str] | None,
    data: Any,
) -> list[DataSet]:
    """Return the data sets that the user named, or else that `data` knows of itself."""
    tags, names, args = listed(tags), listed(names), listed(args)
    if tags:
        names += tags[len(names) :]
        padded: list[str | None] = [*args, *[None] * len(tags)]
        return [DataSet(*entry) for entry in zip(tags, names, padded, strict=False)]
    if names:
        return [DataSet(None, name) for name in names]
    if not is_hf_dataset(data):  # type: ignore[no-untyped-call]
        return []
    tag = data.builder_name
    if tag is None or tag in _FILE_BUILDERS:
        return []
    split = None if data.split is None else str(data.split)
    return [DataSet(tag, tag, data.config_name, data.config_name, split)]


def data_set_names(data_sets: list[DataSet]) -> str:
    """Return what the model was trained on, in words."""
    *others, last = [f"the {entry.name}" for entry in data_sets] or ["an unknown"]
    if not others:
        return f"{last} dataset"
    return f"{', '.join(others)} and {last} datasets"


def loading_code(
    model: nn.Module,
    bare_model: nn.Module,
    processing_class: object | None,
    *,
    path: str,
    base: str,
    adapters: list[str],
) -> str:
    """Return the Python code that loads the model, as its class asks for.

    Args:
        model: The model that was trained.
        bare_model: The same without PEFT's wrapper.
        processing_class: The tokenizer or processor that is saved with it.
        path: Where the model is, on the hub or beside the code.
        base: The same of the base model of adapters.
        adapters: Their names.
    """
    name = type(bare_model).__name__
    if _is_sentence_transformer(bare_model):  # loads its tokenizer itself
        return f"from sentence_transformers import {name}\n\nmodel = {name}({_quoted(path)})"
    module = type(bare_model).__module__
    imports = []
    of_transformers = []
    trust = ""
    if module.startswith("transformers_modules."):  # the hub's code, which no import finds
        auto_class = type(bare_model)._auto_class  # type: ignore[attr-defined]
        name, trust = f"{auto_class or 'AutoModel'}", ", trust_remote_code=True"
        of_transformers.append(name)
    elif module.startswith("transformers."):
        of_transformers.append(name)
    else:
        imports.append(f"from {'your_script' if module == '__main__' else module} import {name}")

    pretrained = isinstance(bare_model, PreTrainedModel)
    wrapped = bare_model is not model  # by PEFT
    labels = bare_model.config.num_labels if isinstance(bare_model, PreTrainedModel) else 2
    if pretrained and wrapped:
        # Two labels are the default; any other number is not written in the base model.
        options = f", num_labels={labels}" if labels != 2 else ""
        code = [f"model = {name}.from_pretrained({_quoted(base)}{options}{trust})"]
    elif pretrained:
        code = [f"model = {name}.from_pretrained({_quoted(path)}{trust})"]
    else:
        code = [f"model = {name}(...)  # as it was made for training"]
    if wrapped:
        imports.append("from peft import PeftModel")
        first, *others = adapters
        code.append(f"model = PeftModel.from_pretrained(model, {_place(path, first)})")
        code += [f"model.load_adapter({_place(path, other)})" for other in others]
    elif not pretrained:
        imports.append("from safetensors.torch import load_file")
        code.append(f"model.load_state_dict(load_file({_quoted(f'{path}/model.safetensors')}))")

    if processing_class is not None:
        # AutoProcessor wants all parts of a processor, of which this may be one.
        variable, auto = next(
            (names for kind, *names in _PARTS if isinstance(processing_class, kind)),
            ("processor", "AutoProcessor"),
        )
        of_transformers.append(auto)
        code.append(f"{variable} = {auto}.from_pretrained({_quoted(path)})")
    if of_transformers:
        imports.append(f"from transformers import {', '.join(sorted(of_transformers))}")
    return "\n".join([*sorted(imports), "", *code])


def _place(path: str, adapter: str) -> str:
    """Return where PEFT saves an adapter, as arguments: but for the default in a folder of it."""
    if adapter == "default":
        return _quoted(path)
    return f"{_quoted(path)}, adapter_name={_quoted(adapter)}, subfolder={_quoted(adapter)}"


def _quoted(text: str) -> str:
    """Return `text` as a Python string, with double quotes where that changes nothing else."""
    code = repr(text)
    return code if '"' in code else f'"{code[1:-1]}"'
