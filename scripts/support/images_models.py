"""Models for images: presets, architectures, a pretrained model with a new head, the metric."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import ClassLabel, DatasetDict
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.image_utils import SizeDict

from support.command_line import ScriptArgumentParser, UsageError
from support.images import LARGE_SIZE, SMALL, make_processor, size_of
from support.images_data import EMBEDDED_NOTICE, DataArguments, data_name, is_embedded

PRESETS: dict[str, dict[str, Any]] = {
    "resnet34_cifar10": {
        "architecture": "resnet34",
        "optim": "salsa_adam",
        "dataset_name": "uoft-cs/cifar10",
        "num_train_epochs": 100.0,
        "dataloader_num_workers": 4,
        "per_device_train_batch_size": 128,
    },
    "resnet34_cifar100": {
        "architecture": "resnet34",
        "optim": "salsa_adam",
        "dataset_name": "uoft-cs/cifar100",
        "label_column": "fine_label",
        "dataloader_num_workers": 4,
        "num_train_epochs": 100.0,
        "per_device_train_batch_size": 128,
    },
    "resnet50_imagenet": {
        "architecture": "resnet50",
        "optim": "salsa_adam",
        "dataset_name": "ILSVRC/imagenet-1k",
        "image_size": 224,
        "dataloader_num_workers": 8,
        "num_train_epochs": 12.0,
        "per_device_train_batch_size": 256,
    },
    "vit_cifar10": {
        "model_name_or_path": "google/vit-base-patch16-224-in21k",
        "dataset_name": "uoft-cs/cifar10",
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
    },
}
METRICS = ("loss", "accuracy")
# A flag, and the settings of a preset that make no sense beside it.
SUPERSEDED = {
    "model_name_or_path": ("architecture",),
    "architecture": ("model_name_or_path",),
    "image_dir": ("dataset_name", "label_column"),
    "dataset_name": ("label_column",),
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet_small": {
        "layer_type": "basic",
        "depths": [2, 2, 2],
        "hidden_sizes": [16, 32, 64],
        "embedding_size": 16,
    },
    "resnet34": {
        "layer_type": "basic",
        "depths": [3, 4, 6, 3],
        "hidden_sizes": [64, 128, 256, 512],
    },
    "resnet50": {
        "layer_type": "bottleneck",
        "depths": [3, 4, 6, 3],
        "hidden_sizes": [256, 512, 1024, 2048],
    },
    "vit_tiny": {
        "hidden_size": 192,
        "num_hidden_layers": 12,
        "num_attention_heads": 3,
        "intermediate_size": 768,
    },
}


@dataclass
class ModelArguments:
    """Which model to train."""

    preset: Literal[tuple(PRESETS)] | None = field(
        default=None, metadata={"help": "Defaults for data, model, epochs and batches at once."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model of the hub or a folder, which gets a new head."}
    )
    architecture: Literal[tuple(ARCHITECTURES)] | None = field(
        default=None,
        metadata={
            "help": "A model from scratch. Default: resnet_small for the embedded data, else "
            "resnet34."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Pixels of a side of what the model sees. Default: the pretrained model's; "
            f"from scratch that of the first training image up to {SMALL}, else {LARGE_SIZE}."
        },
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path and self.architecture:
            raise ValueError("give a model_name_or_path or an architecture, not both")
        if self.image_size is not None and self.image_size < 8:
            raise ValueError(f"image_size must be at least 8, got {self.image_size}")


class PresetArgumentParser(ScriptArgumentParser):
    """`ScriptArgumentParser` in which `--preset` changes the defaults of other flags."""

    def parse_args_into_dataclasses(
        self, args: Sequence[str], *others: Any, **settings: Any
    ) -> tuple[Any, ...]:
        """Return the filled dataclasses; `args` holds the flags of a settings file as well."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name in ("preset", *SUPERSEDED):
            first.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?")
        given = vars(first.parse_known_args(args)[0])
        preset = dict(PRESETS.get(given["preset"], {}))  # a wrong name is refused below
        for name, superseded in SUPERSEDED.items():
            if given[name] is not None:
                for setting in superseded:
                    preset.pop(setting, None)
        self.set_defaults(**preset)
        return super().parse_args_into_dataclasses(args, *others, **settings)


class SmallStemResNetForImageClassification(ResNetForImageClassification):
    """A ResNet with the stem that the ResNet paper gives its networks for CIFAR.

    The stem of the other class, a 7 x 7 convolution and a pooling each with a stride of 2, leaves
    8 x 8 of 32 x 32 pixels to the first stage; this one is a 3 x 3 convolution with a stride of 1.
    `transformers` has no setting for that, so a saved model comes back through this class,
    `SmallStemResNetForImageClassification.from_pretrained(folder)`; through the classes of
    `transformers` it does not, they say that the shapes of the stem differ.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(
            config.num_channels, config.embedding_size, kernel_size=3, padding=1, bias=False
        )
        stem.pooler = nn.Identity()
        self.post_init()  # draws the new weights as the class does, and leaves the others


def _head(label: ClassLabel) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(label.names)),
        "label2id": {name: i for i, name in enumerate(label.names)},
    }


def _architecture(model_args: ModelArguments, data_args: DataArguments) -> str:
    default = "resnet_small" if is_embedded(data_args) else "resnet34"
    return model_args.architecture or default


def model_and_processor(
    model_args: ModelArguments, data_args: DataArguments, data: DatasetDict
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Return the model that the arguments ask for, and its image processor."""
    label = data["train"].features["label"]
    size = model_args.image_size
    if model_args.model_name_or_path:
        return load_model_and_processor(model_args.model_name_or_path, label, size)
    processor = make_processor(data, size)
    model = make_model(_architecture(model_args, data_args), label, size_of(processor))
    return model, processor


def make_model(
    architecture: str, label: ClassLabel, image_size: int, **overrides: Any
) -> PreTrainedModel:
    """Return a model with random weights.

    Args:
        architecture: A key of `ARCHITECTURES`.
        label: The classes.
        image_size: Pixels of a side; a ResNet gets the small stem up to 64.
        overrides: Settings of the architecture that shall be others.
    """
    settings = {**ARCHITECTURES[architecture], **_head(label), **overrides}
    if architecture.startswith("vit"):
        patch_size = 16 if image_size > SMALL else image_size // 8
        return ViTForImageClassification(
            ViTConfig(image_size=image_size, patch_size=patch_size, **settings)
        )
    config = ResNetConfig(**settings)
    if image_size <= SMALL:
        return SmallStemResNetForImageClassification(config)
    return ResNetForImageClassification(config)


def load_model_and_processor(
    name_or_path: str, label: ClassLabel, image_size: int | None = None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Return a pretrained model with a head for the classes `label`, and its image processor.

    Raises:
        UsageError: There is no such model, or none for images of this size.
    """
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, **_head(label), problem_type="single_label_classification"
        )
        processor = AutoImageProcessor.from_pretrained(name_or_path)
        fixed = getattr(config, "image_size", None)  # a ResNet has none
        if image_size is not None and fixed is not None and image_size != fixed:
            raise ValueError(f"it takes {fixed} pixels only, not image_size {image_size}")
        model = _model_class(config).from_pretrained(
            name_or_path,
            config=config,
            ignore_mismatched_sizes=True,  # a model fine-tuned on other labels gets a new head
            dtype=torch.float32,  # in half precision small steps round away; --bf16 is autocast
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"model {name_or_path} did not load: {error}") from error
    if image_size is not None:
        side = {"shortest_edge": image_size}
        if processor.size["height"]:
            side = {"height": image_size, "width": image_size}
        processor.size = SizeDict(**side)
    return model, processor


def _model_class(config: PreTrainedConfig) -> type:
    own = SmallStemResNetForImageClassification
    return own if config.architectures == [own.__name__] else AutoModelForImageClassification


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return the accuracy, as `Trainer` takes it."""
    logits = prediction.predictions
    if isinstance(logits, tuple):  # some models return more than logits
        logits = logits[0]
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def describe(
    model_args: ModelArguments,
    data_args: DataArguments,
    data: DatasetDict,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
) -> str:
    """Return the lines that say what is about to be trained on what."""
    sizes = ", ".join(f"{split} {len(dataset)}" for split, dataset in data.items())
    classes = data["train"].features["label"].num_classes
    size = size_of(processor)
    name = model.name_or_path or f"{_architecture(model_args, data_args)} from scratch"
    lines = [
        f"Data: {data_name(data_args)}, {sizes} images of {classes} classes, "
        f"{size} x {size} pixels.",
        f"Model: {name}, {model.num_parameters():,} parameters.",
    ]
    return "\n".join([EMBEDDED_NOTICE, *lines] if is_embedded(data_args) else lines)
