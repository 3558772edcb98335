"""Train or fine-tune a ResNet or a ViT on images, without a learning rate.

Embedded data (handwritten digits) and a small ResNet from scratch, no download; under a minute on
one core, accuracy 98.9 % (99.2 % with --optim salsa_sgd, 98.3 % with the baseline's flags below):
    python scripts/run_image_classification.py --output_dir runs/digits

A folder of your own, DIR/train/<class>/*.png and DIR/validation/<class>/*.png (or jpg, ...), and a
model of the hub or a folder, which gets a new head:
    python scripts/run_image_classification.py --image_dir DIR \
        --model_name_or_path google/vit-base-patch16-224-in21k --output_dir runs/own

The paper's settings, from scratch (data from the hub; ImageNet needs a login there):
    python scripts/run_image_classification.py --preset resnet34_cifar10 --output_dir runs/cifar10
    python scripts/run_image_classification.py --preset resnet34_cifar100 --output_dir runs/cifar100
    python scripts/run_image_classification.py --preset resnet50_imagenet --output_dir runs/imagenet

A ViT fine-tuned on CIFAR-10, which is not the paper's:
    python scripts/run_image_classification.py --preset vit_cifar10 --output_dir runs/vit

The baseline through the same script:
    python scripts/run_image_classification.py --output_dir runs/digits_adamw \
        --optim adamw_torch --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_steps 0.1

After Ctrl-C, the same command and:
        --resume_from_checkpoint true

The settings may come from a file: python scripts/run_image_classification.py settings.yaml

A preset only sets defaults; any other flag wins. Evaluation and a checkpoint after each epoch.

Training images are augmented as in the ResNet paper (He et al., 2015). Small ones (up to 64 pixels)
are padded with an eighth of their side in zeros and cropped at random to their size (CIFAR: 4
pixels); larger ones are resized to a random scale and cropped to the model's size (256 to 480 and
224 pixels); half of them are mirrored. For evaluation larger images are resized (256) and cropped
in the middle.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets import ClassLabel, DatasetDict, Features, Value
from PIL import Image
from script_utils import (
    COMMON_DEFAULTS,
    ScriptArgumentParser,
    UsageError,
    check_processes,
    check_sample_limits,
    evaluation_at_start,
    prepare_output_dir,
    print_closing_report,
    train_and_evaluate,
)
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    ConvNextImageProcessorPil,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.image_utils import SizeDict

from hf_salsa import SaLSaTrainer, SaLSaTrainingArguments

# Where the script differs from SaLSaTrainingArguments.
DEFAULTS = {
    **COMMON_DEFAULTS,
    "num_train_epochs": 20.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 256,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
}
PRESETS: dict[str, dict[str, Any]] = {
    "resnet34_cifar10": {
        "architecture": "resnet34",
        "dataset_name": "uoft-cs/cifar10",
        "num_train_epochs": 100.0,
        "dataloader_num_workers": 4,
        "per_device_train_batch_size": 128,
    },
    "resnet34_cifar100": {
        "architecture": "resnet34",
        "dataset_name": "uoft-cs/cifar100",
        "label_column": "fine_label",
        "dataloader_num_workers": 4,
        "num_train_epochs": 100.0,
        "per_device_train_batch_size": 128,
    },
    "resnet50_imagenet": {
        "architecture": "resnet50",
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
EMBEDDED_NAME = "handwritten digits"
EMBEDDED_NOTICE = (
    f"No data was given: this run uses embedded images, the 1797 {EMBEDDED_NAME}\n"
    "(8 x 8 pixels) that scikit-learn carries."
)
SMALL = 64  # pixels up to which an image is small: another stem, another augmentation
LARGE_SIZE = 224
VALIDATION_SPLITS = ("validation", "val", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
STATISTICS_IMAGES = 1000
METRICS = ("loss", "accuracy")


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


@dataclass
class DataArguments:
    """Which images to train on: a folder, a data set of the hub, or (neither) the embedded data."""

    image_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder with train/<class>/ and validation/<class>/ (or val, or test), in "
            "these the images."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A data set of the hub with the splits train and validation (or test)."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Which configuration of it."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Its column of images. Default: the only one of that type."}
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Its column of classes. Default: label, or the only one of that type."},
    )
    horizontal_flip: bool | None = field(
        default=None,
        metadata={
            "help": "Mirror half of the training images. Default: true, but false for the embedded "
            "digits."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many examples only, drawn at random."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on so many examples only, drawn at random."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Delete the checkpoints and results of an earlier run in output_dir. Without "
            "effect when it is resumed."
        },
    )

    def __post_init__(self) -> None:
        if self.image_dir and self.dataset_name:
            raise ValueError("give an image_dir or a dataset_name, not both")
        for name in ("dataset_config_name", "image_column", "label_column"):
            if getattr(self, name) and not self.dataset_name:
                raise ValueError(f"{name} needs a dataset_name")
        check_sample_limits(self)
        if self.horizontal_flip is None:
            self.horizontal_flip = not is_embedded(self)


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


# What loads data returns the splits train and validation with the columns image and label (a
# ClassLabel), and raises a UsageError.


def is_embedded(args: DataArguments) -> bool:
    """Return whether no data was given."""
    return not args.image_dir and not args.dataset_name


def load_data(args: DataArguments) -> DatasetDict:
    """Return the data that `args` ask for."""
    if args.image_dir:
        data = load_image_folder(args.image_dir)
    elif args.dataset_name:
        data = load_from_hub(
            args.dataset_name, args.dataset_config_name, args.image_column, args.label_column
        )
    else:
        data = load_embedded_data()
    classes = data["train"].features["label"].num_classes
    if classes < 2:
        raise UsageError(f"{data_name(args)} has {classes} classes, nothing to tell apart")
    for split, dataset in data.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit is not None and limit < len(dataset):
            # At random, because folders are in the order of their classes.
            data[split] = dataset.shuffle(seed=0).select(range(limit))
    return data


def load_embedded_data() -> DatasetDict:
    """Return scikit-learn's handwritten digits, a fifth of each class held out."""
    digits = load_digits()
    images = (digits.images * 255 / 16).round().astype(np.uint8)
    train, validation = train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0
    )
    names = [str(name) for name in digits.target_names]
    return DatasetDict(
        {
            split: _to_dataset(
                [Image.fromarray(images[i]) for i in rows], digits.target[rows].tolist(), names
            )
            for split, rows in (("train", train), ("validation", validation))
        }
    )


def load_image_folder(image_dir: str | Path) -> DatasetDict:
    """Return the images in `image_dir`/train/<class>/ and `image_dir`/validation/<class>/."""
    root = Path(image_dir)
    if not (root / "train").is_dir():
        raise UsageError(f"{root} has no folder train")
    held_out = next((name for name in VALIDATION_SPLITS if (root / name).is_dir()), None)
    if held_out is None:
        raise UsageError(f"{root} has no folder {', '.join(VALIDATION_SPLITS)}")
    names = _class_folders(root / "train")
    unknown = sorted(set(_class_folders(root / held_out)) - set(names))
    if unknown:
        raise UsageError(f"{root / held_out / unknown[0]} is no class of {root / 'train'}")
    splits = {}
    for split, folder in (("train", root / "train"), ("validation", root / held_out)):
        paths, labels = [], []
        for label, name in enumerate(names):
            found = sorted(
                str(path)
                for path in (folder / name).rglob("*")
                if path.suffix.lower() in IMAGE_SUFFIXES
            )
            if not found and split == "train":
                raise UsageError(f"{folder / name} holds no images ({', '.join(IMAGE_SUFFIXES)})")
            paths += found
            labels += [label] * len(found)
        if not paths:
            raise UsageError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        splits[split] = _to_dataset(paths, labels, names)
    return DatasetDict(splits)


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _to_dataset(images: list[Any], labels: list[int], names: list[str]) -> datasets.Dataset:
    """Return images, or paths of such, which are then read when they are needed."""
    return datasets.Dataset.from_dict(
        {"image": images, "label": labels},
        features=Features({"image": datasets.Image(), "label": ClassLabel(names=names)}),
    )


def load_from_hub(
    name: str,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> DatasetDict:
    """Return a data set of the hub."""
    try:
        data = datasets.load_dataset(name, config_name)
    except (OSError, ValueError) as error:  # no network, no such data set or configuration
        raise UsageError(
            f"{name} did not load from the hub ({error}); --image_dir reads a folder"
        ) from error
    held_out = next((split for split in VALIDATION_SPLITS if split in data), None)
    if "train" not in data or held_out is None:
        raise UsageError(
            f"{name} has the splits {', '.join(data)}, needs train and one of "
            f"{', '.join(VALIDATION_SPLITS)}"
        )
    features = data["train"].features
    image_column = _column(name, features, image_column, datasets.Image, "image")
    label_column = _column(name, features, label_column, ClassLabel, "label")
    if not isinstance(features[image_column], datasets.Image):
        raise UsageError(f"{name}: the column {image_column!r} holds no images")
    splits = {}
    for split, source in (("train", "train"), ("validation", held_out)):
        columns = data[source].select_columns([image_column, label_column])
        splits[split] = columns.rename_columns(
            {
                old: new
                for old, new in ((image_column, "image"), (label_column, "label"))
                if old != new
            }
        )
    label = _label_feature(name, splits["train"])
    try:
        for split, rows in splits.items():
            if rows.features["label"] != label:  # a cast writes all images anew
                splits[split] = rows.cast_column("label", label)
    except ValueError as error:  # a class that the training data lacks
        raise UsageError(f"{name}, column {label_column!r}: {error}") from error
    for split, rows in splits.items():
        if any(value is None or value < 0 for value in rows.unique("label")):
            raise UsageError(f"{name}: the split {split} has examples without a label")
    return DatasetDict(splits)


def _column(name: str, features: Features, wanted: str | None, kind: type, usual: str) -> str:
    """Return the column that is `wanted`, or else the one of a kind."""
    if wanted is not None:
        if wanted not in features:
            raise UsageError(f"{name} has no column {wanted!r}, only {', '.join(features)}")
        return wanted
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if usual in features:
        return usual
    if len(found) != 1:
        raise UsageError(
            f"{name}: which of the columns {', '.join(found or features)} is the {usual}? Say it "
            f"with --{usual}_column"
        )
    return found[0]


def _label_feature(name: str, train: datasets.Dataset) -> ClassLabel:
    """Return the classes of a column that may be of strings or integers."""
    feature = train.features["label"]
    if isinstance(feature, ClassLabel):
        return feature
    if feature == Value("string"):
        return ClassLabel(names=sorted(train.unique("label")))
    if isinstance(feature, Value) and "int" in feature.dtype:
        return ClassLabel(num_classes=max(train.unique("label")) + 1)
    raise UsageError(f"{name}: the labels are neither classes, strings nor integers but {feature}")


# Images on their way to the model


class ImageExamples(torch.utils.data.Dataset):
    """The examples that a model takes: `pixel_values` and `labels`.

    The random draws of an augmentation depend on the seed, the epoch and the example alone. So they
    are the same whatever the number of processes and workers, and when a run is resumed: the data
    loader is then some batches ahead of the checkpoint, and so would be a common random stream.

    Args:
        data: A split of what `load_data` returns.
        image_size: Pixels of a side.
        mean: Of each channel, from 0 to 1.
        std: Of each channel.
        augment: Whether to draw crops and flips; the epoch then comes from `EpochCallback`.
        flip: Whether flips are among them.
        seed: Of the draws.
    """

    def __init__(
        self,
        data: datasets.Dataset,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = False,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.data = data
        self.image_size = image_size
        self.mean = np.array(mean, dtype=np.float32)
        self.std = np.array(std, dtype=np.float32)
        self.augment = augment
        self.flip = flip
        self.seed = seed
        # Shared, because workers of a data loader may outlive an epoch. Negative: not yet known.
        self._epoch = torch.tensor(-1).share_memory_()

    def begin_epoch(self, epoch: int) -> None:
        """Let the draws be those of `epoch`.

        Not named `set_epoch`, which `accelerate` calls, but not with every data loader.
        """
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = read_example(self.data, index)
        if self.augment:
            epoch = self._epoch.item()
            if epoch < 0:
                raise RuntimeError("augmentation needs to know the epoch: add an EpochCallback")
            generator = np.random.default_rng((self.seed, epoch, index))
            image = augment_image(image, self.image_size, self.flip, generator)
        else:
            image = fit_image(image, self.image_size)
        pixels = (to_array(image) - self.mean) / self.std
        return {"pixel_values": torch.from_numpy(pixels.transpose(2, 0, 1).copy()), "labels": label}


class EpochCallback(TrainerCallback):
    """Tells the training examples which epoch begins."""

    def __init__(self, examples: ImageExamples) -> None:
        self.examples = examples

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.examples.begin_epoch(int(state.epoch or 0))


def read_example(data: datasets.Dataset, index: int) -> tuple[Image.Image, int]:
    """Return an image and its label.

    Raises:
        UsageError: The image is broken.
    """
    try:
        row = data[int(index)]
        return row["image"].convert("RGB"), row["label"]
    except (OSError, SyntaxError) as error:  # what PIL raises, SyntaxError for a broken PNG
        undecoded = data.cast_column("image", datasets.Image(decode=False))[int(index)]["image"]
        where = undecoded["path"] or f"image {index} of the data"
        raise UsageError(f"{where} cannot be read: {error}") from error


def is_small(image: Image.Image) -> bool:
    """Return whether an image is one of those that the ResNet paper augments as CIFAR's."""
    return max(image.size) <= SMALL


def augment_image(
    image: Image.Image, image_size: int, flip: bool, generator: np.random.Generator
) -> Image.Image:
    """Return a random crop of an image, or of its mirror image if `flip`, for training."""
    if is_small(image):
        width, height = image.size
        left, top = (
            int(generator.integers(-(side // 8), side // 8 + 1)) for side in (width, height)
        )
        image = image.crop((left, top, left + width, top + height))  # zeros beyond the border
        image = _resize(image, (image_size, image_size))
    else:
        # 256 to 480 pixels for crops of 224.
        shorter = int(
            generator.integers(round(image_size * 8 / 7), round(image_size * 15 / 7), endpoint=True)
        )
        image = _resize_shorter(image, shorter)
        left, top = (int(generator.integers(side - image_size + 1)) for side in image.size)
        image = image.crop((left, top, left + image_size, top + image_size))
    if flip and generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def fit_image(image: Image.Image, image_size: int) -> Image.Image:
    """Return an image in the model's size, for evaluation: the whole, or a large one's middle."""
    if is_small(image):
        return _resize(image, (image_size, image_size))
    image = _resize_shorter(image, round(image_size * 8 / 7))  # 256 for 224
    left, top = ((side - image_size) // 2 for side in image.size)
    return image.crop((left, top, left + image_size, top + image_size))


def _resize_shorter(image: Image.Image, shorter: int) -> Image.Image:
    scale = shorter / min(image.size)
    width, height = (max(shorter, round(side * scale)) for side in image.size)
    return _resize(image, (width, height))


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def to_array(image: Image.Image) -> np.ndarray:
    """Return height x width x channels, from 0 to 1."""
    return np.asarray(image, dtype=np.float32) / 255


def channel_statistics(data: datasets.Dataset, image_size: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, of the first images in a random order."""
    rows = np.random.default_rng(0).permutation(len(data))[:STATISTICS_IMAGES]
    pixels = np.stack([to_array(fit_image(read_example(data, i)[0], image_size)) for i in rows])
    mean = pixels.mean((0, 1, 2), dtype=np.float64)
    std = pixels.std((0, 1, 2), dtype=np.float64)
    return mean.tolist(), np.maximum(std, 1 / 255).tolist()  # images of one colour have none


def make_examples(
    data: DatasetDict, processor: BaseImageProcessor, flip: bool, seed: int
) -> tuple[ImageExamples, ImageExamples]:
    """Return the examples for training, augmented, and those for evaluation.

    Args:
        data: What `load_data` returns.
        processor: It has the size and the statistics.
        flip: Whether to mirror half of the training images.
        seed: Of the augmentation.
    """
    settings = (size_of(processor), processor.image_mean, processor.image_std)
    train = ImageExamples(data["train"], *settings, augment=True, flip=flip, seed=seed)
    return train, ImageExamples(data["validation"], *settings)


# Models


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


def make_model(architecture: str, label: ClassLabel, image_size: int) -> PreTrainedModel:
    """Return a model with random weights.

    Args:
        architecture: A key of `ARCHITECTURES`.
        label: The classes.
        image_size: Pixels of a side; a ResNet gets the small stem up to 64.
    """
    settings = {**ARCHITECTURES[architecture], **_head(label)}
    if architecture.startswith("vit"):
        patch_size = 16 if image_size > SMALL else image_size // 8
        return ViTForImageClassification(
            ViTConfig(image_size=image_size, patch_size=patch_size, **settings)
        )
    config = ResNetConfig(**settings)
    if image_size <= SMALL:
        return SmallStemResNetForImageClassification(config)
    return ResNetForImageClassification(config)


def make_processor(data: DatasetDict, image_size: int | None = None) -> BaseImageProcessor:
    """Return what turns images into a model's input, with the statistics of the training data.

    Args:
        data: What `load_data` returns.
        image_size: Pixels of a side; by default those of the first training image up to 64, else
            224.
    """
    if image_size is None:
        first, _ = read_example(data["train"], 0)
        image_size = max(8, *first.size) if is_small(first) else LARGE_SIZE
    mean, std = channel_statistics(data["train"], image_size)
    return ConvNextImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_pct=1.0 if image_size <= SMALL else 7 / 8,
        image_mean=mean,
        image_std=std,
    )


def size_of(processor: BaseImageProcessor) -> int:
    """Return the pixels of a side."""
    return processor.size["height"] or processor.size["shortest_edge"]


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


def data_name(args: DataArguments) -> str:
    """Return what people call the data that `args` ask for."""
    if args.image_dir:
        return Path(args.image_dir).resolve().name
    return args.dataset_name or EMBEDDED_NAME


def _card_settings(args: DataArguments) -> dict[str, str]:
    """Return what the model card says about the data, for `Trainer.create_model_card`."""
    settings = {"tasks": "image-classification", "dataset": data_name(args)}
    if args.dataset_name:
        settings["dataset_tags"] = args.dataset_name
        if args.dataset_config_name:
            settings["dataset_args"] = args.dataset_config_name
    return settings


def _select(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[f"eval_{name}"] for name in METRICS if f"eval_{name}" in metrics}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line by default."""
    parser = PresetArgumentParser(
        (ModelArguments, DataArguments, SaLSaTrainingArguments), __file__, __doc__, **DEFAULTS
    )
    model_args, data_args, training_args = parser.parse(argv)
    name = model_args.model_name_or_path
    with parser.user_errors():
        check_processes(training_args.world_size)
        data = load_data(data_args)
        label = data["train"].features["label"]
        set_seed(training_args.seed)
        if name:
            model, processor = load_model_and_processor(name, label, model_args.image_size)
        else:
            architecture = model_args.architecture or (
                "resnet_small" if is_embedded(data_args) else "resnet34"
            )
            name = f"{architecture} from scratch"
            processor = make_processor(data, model_args.image_size)
            model = make_model(architecture, label, size_of(processor))
        # After all else that may be wrong: it deletes an earlier run.
        checkpoint = prepare_output_dir(training_args, data_args.overwrite_output_dir)
    if training_args.process_index == 0:
        if is_embedded(data_args):
            print(EMBEDDED_NOTICE)
        sizes = ", ".join(f"{split} {len(dataset)}" for split, dataset in data.items())
        size = size_of(processor)
        print(
            f"Data: {data_name(data_args)}, {sizes} images of {label.num_classes} classes, "
            f"{size} x {size} pixels."
        )
        print(f"Model: {name}, {model.num_parameters():,} parameters.")
    train, validation = make_examples(
        data, processor, data_args.horizontal_flip, training_args.seed
    )
    with parser.user_errors(ValueError):  # a set-up in which a line search comes out wrong
        trainer = SaLSaTrainer(
            model=model,
            args=training_args,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=processor,
            compute_metrics=compute_metrics,
            callbacks=[EpochCallback(train)],
        )

    with parser.user_errors():  # images are read while it trains
        train_metrics, metrics = train_and_evaluate(trainer, checkpoint)
    trainer.create_model_card(**_card_settings(data_args))

    print_closing_report(
        trainer,
        train_metrics,
        before=_select(evaluation_at_start(trainer)),
        after=_select(metrics),
    )


if __name__ == "__main__":
    main()
