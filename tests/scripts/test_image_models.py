"""Architectures and presets."""

import math

import pytest
import run_image_classification as script
import torch
from datasets import ClassLabel
from support import images_models
from support.images_models import SmallStemResNetForImageClassification as SmallStem
from transformers import AutoModelForImageClassification, set_seed

DIGITS = ClassLabel(num_classes=10)


def test_small_stem_round_trip(tmp_path):
    set_seed(0)
    model = images_models.make_model("resnet_small", DIGITS, 32).eval()
    assert type(model) is SmallStem
    stem = model.resnet.embedder
    images = torch.randn(2, 3, 32, 32)
    assert stem(images).shape == (2, 16, 32, 32)
    # Kaiming's: variance 2 / (3 x 3 x 16 outputs)
    assert stem.embedder.convolution.weight.std().item() == pytest.approx(
        math.sqrt(2 / (9 * 16)), rel=0.15
    )
    model.save_pretrained(tmp_path)
    again = SmallStem.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(images).logits, again(images).logits)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "size", "classes", "parameters"),
    [
        # torchvision's counts; with the small stem 7 x 7 - 3 x 3 weights less for 64 x 3 filters
        ("resnet34", 224, 1000, 21_797_672),
        ("resnet50", 224, 1000, 25_557_032),
        ("resnet34", 32, 1000, 21_797_672 - 40 * 192),
        # DeiT-Ti's count
        ("vit_tiny", 224, 1000, 5_717_416),
    ],
)
def test_architectures(architecture, size, classes, parameters):
    with torch.device("meta"):
        model = images_models.make_model(architecture, ClassLabel(num_classes=classes), size)
    assert model.num_parameters() == parameters


def parse(*flags):
    parser = images_models.PresetArgumentParser(script.ARGUMENTS, "x.py", "", **script.DEFAULTS)
    return parser.parse(["--output_dir", "unused", "--use_cpu", "true", *flags])


@pytest.mark.parametrize(
    ("preset", "model", "dataset", "epochs", "batch", "image_size"),
    [
        ("resnet34_cifar10", "resnet34", "uoft-cs/cifar10", 100, 128, None),
        ("resnet34_cifar100", "resnet34", "uoft-cs/cifar100", 100, 128, None),
        ("resnet50_imagenet", "resnet50", "ILSVRC/imagenet-1k", 12, 256, 224),
        ("vit_cifar10", "google/vit-base-patch16-224-in21k", "uoft-cs/cifar10", 3, 32, None),
    ],
)
def test_presets(preset, model, dataset, epochs, batch, image_size):
    model_args, data_args, training_args = parse("--preset", preset)
    assert (model_args.architecture or model_args.model_name_or_path) == model
    assert data_args.dataset_name == dataset
    assert data_args.label_column == ("fine_label" if preset == "resnet34_cifar100" else None)
    assert training_args.num_train_epochs == epochs
    assert training_args.per_device_train_batch_size == batch
    assert model_args.image_size == image_size
    papers = preset != "vit_cifar10"
    assert training_args.optim == ("salsa_adam" if papers else "salsa_adam_plus")


def test_other_flags_win_over_a_preset(tmp_path):
    flags = ("--num_train_epochs", "2", "--optim", "salsa_sgd", "--architecture", "vit_tiny")
    model_args, data_args, training_args = parse("--preset=resnet34_cifar100", *flags)
    assert (training_args.num_train_epochs, training_args.optim) == (2, "salsa_sgd")
    assert model_args.architecture == "vit_tiny"
    assert data_args.dataset_name == "uoft-cs/cifar100"
    assert parse("--preset", "vit_cifar10", *flags)[0].model_name_or_path is None
    model_args, data_args, _ = parse(
        *("--preset", "resnet34_cifar100", "--image-dir", "x", "--model_name_or_path", "y")
    )
    assert (data_args.image_dir, data_args.dataset_name, data_args.label_column) == (
        *("x", None),
        None,
    )
    assert (model_args.model_name_or_path, model_args.architecture) == ("y", None)


def test_preset_in_a_settings_file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("preset: resnet50_imagenet\nnum_train_epochs: 1\noutput_dir: unused\n")
    parser = images_models.PresetArgumentParser(script.ARGUMENTS, "x.py", "", **script.DEFAULTS)
    model_args, _, training_args = parser.parse([str(path)])
    assert model_args.architecture == "resnet50"
    assert training_args.num_train_epochs == 1
    assert training_args.per_device_train_batch_size == 256


@pytest.mark.parametrize(
    ("flags", "flip"),
    [
        ([], False),
        (["--horizontal_flip", "true"], True),
        (["--image_dir", "x"], True),
        (["--preset", "resnet34_cifar10"], True),
        (["--dataset_name", "ylecun/mnist", "--horizontal_flip", "false"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_digits_alone_are_not_flipped(flags, flip):
    assert parse(*flags)[1].horizontal_flip is flip
