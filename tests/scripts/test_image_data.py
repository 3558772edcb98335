"""Images to train on, and data that is not fit for it."""

import datasets
import numpy as np
import pytest
from datasets import Value
from running import CIFAR100
from support import images_data


def test_embedded_data():
    data = images_data.load_embedded_data()
    assert {split: len(rows) for split, rows in data.items()} == {"train": 1437, "validation": 360}
    for rows in data.values():
        assert rows.features["label"].names == list("0123456789")
        shares = np.bincount(rows["label"]) / len(rows)
        assert shares == pytest.approx([0.1] * 10, abs=0.005)
    again = images_data.load_embedded_data()
    assert again["validation"]["label"][:] == data["validation"]["label"][:]
    pixels = np.stack([np.asarray(image) for rows in data.values() for image in rows["image"]])
    digits = images_data.load_digits()
    assert sorted(map(bytes, pixels)) == sorted(
        bytes(image) for image in (digits.images * 255 / 16).round().astype(np.uint8)
    )  # each digit in one of the splits


@pytest.mark.parametrize(
    ("feature", "values", "names", "ids"),
    [
        (Value("string"), ["pear", "fig"], ["fig", "pear"], [1, 0]),
        (Value("int64"), [2, 0], ["0", "1", "2"], [2, 0]),
    ],
    ids=["strings", "integers"],
)
def test_labels_of_other_types(hub, feature, values, names, ids):
    hub({"picture": datasets.Image(), "label": feature}, {"label": values})
    data = images_data.load_data(images_data.DataArguments(dataset_name="a/b"))
    for rows in data.values():
        assert rows.features["label"].names == names
        assert rows["label"][:2] == ids
        assert rows.column_names == ["image", "label"]


@pytest.mark.parametrize(
    ("features", "rows", "held_out", "flags", "complaint"),
    [
        (CIFAR100, {"fine_label": [0, 1], "coarse_label": [0]}, None, [],
         "a/b: which of the columns fine_label, coarse_label is the label? Say it with "
         "--label_column"),
        (CIFAR100, {"fine_label": [0, 1], "coarse_label": [0]}, None, ["--label_column", "x"],
         "a/b has no column 'x', only img, fine_label, coarse_label"),
        ({"text": Value("string"), "label": Value("int64")}, {"text": ["a"], "label": [0, 1]}, None,
         [], "a/b: which of the columns text, label is the image? Say it with --image_column"),
        ({"image": Value("string"), "label": Value("int64")}, {"image": ["a"], "label": [0, 1]},
         None, [], "a/b: the column 'image' holds no images"),
        ({"image": datasets.Image(), "label": Value("int64")}, {"label": [0, 1]}, {"label": [-1]},
         [], "a/b: the split validation has examples without a label"),
        ({"image": datasets.Image(), "label": Value("int64")}, {"label": [0]}, None,
         [], "a/b has 1 classes, nothing to tell apart"),
        ({"image": datasets.Image(), "label": Value("float64")}, {"label": [0.5]}, None,
         [], "a/b: the labels are neither classes, strings nor integers but Value('float64')"),
    ],
)  # fmt: skip
def test_unfit_hub_data(image_error, hub, features, rows, held_out, flags, complaint):
    hub(features, rows, held_out)
    assert image_error("--dataset_name", "a/b", *flags) == complaint


def test_class_that_the_training_data_lacks(image_error, hub):
    hub({"image": datasets.Image(), "label": Value("string")}, {"label": ["a", "b"]},
        {"label": ["c"]})  # fmt: skip
    assert image_error("--dataset_name", "a/b").startswith("a/b, column 'label': ")


def test_hub_data_without_validation(image_error, hub):
    hub(CIFAR100, {"fine_label": [0, 1], "coarse_label": [0]}, splits=("train", "extra"))
    message = image_error("--dataset_name", "a/b")
    assert (
        message == "a/b has the splits train, extra, needs train and one of validation, val, test"
    )


def test_wrong_image_folders(image_error, image_dir):
    flags = ("--image_dir", image_dir)
    train, held_out = image_dir / "train", image_dir / "val"
    (held_out / "green").mkdir()
    assert image_error(*flags) == f"{held_out / 'green'} is no class of {train}"
    (held_out / "green").rename(train / "green")
    formats = ", ".join(images_data.IMAGE_SUFFIXES)
    assert image_error(*flags) == f"{train / 'green'} holds no images ({formats})"
    (train / "green").rmdir()
    held_out.rename(image_dir / "held_out")
    assert image_error(*flags) == f"{image_dir} has no folder validation, val, test"
