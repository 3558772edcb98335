"""Images to train on: the embedded digits, a folder of one's own, data sets of the hub."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, DatasetDict, Features, Value
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from support.command_line import UsageError, check_sample_limits, overwrite_flag

EMBEDDED_NAME = "handwritten digits"
EMBEDDED_NOTICE = (
    f"No data was given: this run uses embedded images, the 1797 {EMBEDDED_NAME}\n"
    "(8 x 8 pixels) that scikit-learn carries."
)
VALIDATION_SPLITS = ("validation", "val", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


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
    overwrite_output_dir: bool = overwrite_flag()

    def __post_init__(self) -> None:
        if self.image_dir and self.dataset_name:
            raise ValueError("give an image_dir or a dataset_name, not both")
        for name in ("dataset_config_name", "image_column", "label_column"):
            if getattr(self, name) and not self.dataset_name:
                raise ValueError(f"{name} needs a dataset_name")
        check_sample_limits(self)
        if self.horizontal_flip is None:
            self.horizontal_flip = not is_embedded(self)


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


def data_name(args: DataArguments) -> str:
    """Return what people call the data that `args` ask for."""
    if args.image_dir:
        return Path(args.image_dir).resolve().name
    return args.dataset_name or EMBEDDED_NAME


def card_settings(args: DataArguments) -> dict[str, str]:
    """Return what the model card says about the data, for `Trainer.create_model_card`."""
    settings = {"tasks": "image-classification", "dataset": data_name(args)}
    if args.dataset_name:
        settings["dataset_tags"] = args.dataset_name
        if args.dataset_config_name:
            settings["dataset_args"] = args.dataset_config_name
    return settings
