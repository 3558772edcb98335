"""run_image_classification.py as its users see it."""

import functools
import json
import math

import datasets
import numpy as np
import pytest
import run_image_classification as script
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from hf_salsa import BatchObjective, SaLSaAdam, SaLSaTrainingArguments

FLAGS = ["--max_train_samples", "48", "--max_eval_samples", "40"]
FLAGS += ["--per_device_train_batch_size", "8"]
SmallStem = script.SmallStemResNetForImageClassification
DIGITS = ClassLabel(num_classes=10)


@pytest.fixture
def run(run_script):
    """Runs the script's main; flags given later win over the tiny settings."""
    return functools.partial(run_script, script, *FLAGS)


@pytest.fixture
def error(error):
    """Runs the script with wrong flags and returns its complaint."""

    def run(*flags):
        prefix = "run_image_classification.py: error: "
        return error(script, *flags).removeprefix(prefix).removesuffix("\n")

    return run


def colour(red, blue, size=(16, 12), seed=0):
    """A noisy image of one colour."""
    noise = np.random.default_rng(seed).integers(0, 40, (size[1], size[0], 3))
    return Image.fromarray((noise + np.array([red, 60, blue])).astype(np.uint8))


@pytest.fixture
def image_dir(tmp_path):
    """Eight red and eight blue images to train on, four each held out; one large, one grey."""
    root = tmp_path / "colours"
    for split, count in (("train", 8), ("val", 4)):
        for name, red, blue in (("red", 200, 20), ("blue", 20, 200)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                size = (100, 80) if i == 3 else (16, 12)
                image = colour(red, blue, size, seed=i)
                image.save(root / split / name / (f"{i}.jpg" if i == 3 else f"{i}.PNG"))
    colour(200, 20).convert("L").save(root / "train" / "red" / "grey.png")
    (root / "train" / "red" / "notes.txt").write_text("not an image")
    return root


def accuracy(model, processor, data):
    """The accuracy on a split, through the processor that was saved."""
    right = 0
    for row in data:
        inputs = processor(row["image"].convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            right += model.eval()(**inputs).logits.argmax().item() == row["label"]
    return right / len(data)


# --- The data that the script carries


def test_embedded_data():
    data = script.load_embedded_data()
    assert {split: len(rows) for split, rows in data.items()} == {"train": 1437, "validation": 360}
    for rows in data.values():
        assert rows.features["label"].names == list("0123456789")
        shares = np.bincount(rows["label"]) / len(rows)
        assert shares == pytest.approx([0.1] * 10, abs=0.005)
    again = script.load_embedded_data()
    assert again["validation"]["label"][:] == data["validation"]["label"][:]
    pixels = np.stack([np.asarray(image) for rows in data.values() for image in rows["image"]])
    digits = script.load_digits()
    assert sorted(map(bytes, pixels)) == sorted(
        bytes(image) for image in (digits.images * 255 / 16).round().astype(np.uint8)
    )  # each digit in one of the splits


# --- What a run leaves behind


def test_digits(run):
    flags = ("--max_train_samples", 1437, "--max_eval_samples", 360)
    result = run(*flags, "--max_steps", 40, "--per_device_train_batch_size", 32)
    for name in ("step_size_and_loss.png", "model.safetensors", "checkpoint-40/trainer_state.json"):
        assert (result.folder / name).stat().st_size > 0
    assert "this run uses embedded images, the 1797 handwritten digits" in result.stdout
    assert "train 1437, validation 360 images of 10 classes, 8 x 8 pixels" in result.stdout
    before, *_, after = result.log("eval_loss")
    assert before == pytest.approx(math.log(10), abs=0.2)
    assert after < 1

    metrics = result.json("eval_results.json")
    assert metrics["eval_accuracy"] > 0.7
    everything = result.json("all_results.json")
    card = (result.folder / "README.md").read_text()
    report = result.stdout[result.stdout.index("Before training:") :]
    for name in ("loss", "accuracy"):
        value = metrics[f"eval_{name}"]
        assert everything[f"eval_{name}"] == value
        assert result.log(f"eval_{name}")[-1] == value
        assert f"{name} {value:.4f}" in report
    assert f"Accuracy: {metrics['eval_accuracy']:.4f}" in card
    assert "handwritten digits" in card
    assert "SaLSaAdam" in card
    for path in ("README.md", "step_size_and_loss.png", "checkpoint-40"):
        assert str(result.folder / path) in report

    # The folder holds the model that was evaluated, and what prepares its images.
    model = SmallStem.from_pretrained(result.folder)
    processor = AutoImageProcessor.from_pretrained(result.folder)
    validation = script.load_embedded_data()["validation"]
    assert accuracy(model, processor, validation) == metrics["eval_accuracy"]


def test_image_folder(run, image_dir):
    result = run("--image_dir", image_dir, "--architecture", "resnet_small", "--max_steps", 8)
    assert "Data: colours, train 17, validation 8 images of 2 classes, 16 x 16" in result.stdout
    config = result.json("config.json")
    assert config["id2label"] == {"0": "blue", "1": "red"}
    assert result.json("eval_results.json")["eval_accuracy"] == 1
    card = (result.folder / "README.md").read_text()
    assert "colours" in card
    assert str(image_dir) not in card


def test_large_images_get_the_stem_of_transformers(run, image_dir):
    flags = ("--image_dir", image_dir, "--architecture", "resnet_small", "--image_size", 72)
    result = run(*flags, "--max_train_samples", 8, "--max_steps", 1)
    model = AutoModelForImageClassification.from_pretrained(result.folder)
    assert type(model) is ResNetForImageClassification
    assert model.resnet.embedder.embedder.convolution.kernel_size == (7, 7)
    processor = AutoImageProcessor.from_pretrained(result.folder)
    inputs = processor(colour(9, 9, (100, 80)), return_tensors="pt")["pixel_values"]
    assert inputs.shape == (1, 3, 72, 72)


def test_vit_from_scratch(run):
    result = run(
        *("--architecture", "vit_tiny", "--optim", "salsa_sgd", "--max_steps", 1),
        *("--max_eval_samples", 2, "--eval_on_start", "false", "--eval_strategy", "no"),
    )
    model = AutoModelForImageClassification.from_pretrained(result.folder)
    assert isinstance(model, ViTForImageClassification)
    assert (model.config.image_size, model.config.patch_size) == (8, 1)
    assert result.json("all_results.json")["salsa/searches"] == 1


def test_fine_tunes_a_vit(run, error, tmp_path, capsys):
    set_seed(0)
    folder = tmp_path / "vit"
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(image_size=16, patch_size=4, intermediate_size=32, num_labels=3, **shape)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    capsys.readouterr()  # progress of saving
    message = error("--model_name_or_path", folder, "--image_size", 32)
    complaint = "it takes 16 pixels only, not image_size 32"
    assert message == f"model {folder} did not load: {complaint}"

    result = run("--model_name_or_path", folder)
    assert "of 10 classes, 16 x 16 pixels" in result.stdout
    assert list(result.json("config.json")["id2label"].values()) == list("0123456789")
    assert result.json("preprocessor_config.json")["image_mean"] == [0.5, 0.5, 0.5]
    model, _ = script.load_model_and_processor(str(folder), DIGITS)
    weights = ViTForImageClassification.from_pretrained(folder).vit.state_dict()
    for name, value in model.vit.state_dict().items():
        assert torch.equal(value, weights[name])
    assert model.classifier.out_features == 10
    assert "vit" in (result.folder / "README.md").read_text()


def test_fine_tunes_what_it_saved(run):
    first = run(output_dir="first")
    second = run("--model_name_or_path", first.folder, output_dir="second")
    assert second.log("eval_loss")[0] == pytest.approx(first.log("eval_loss")[-1], rel=1e-6)
    assert second.json("preprocessor_config.json") == first.json("preprocessor_config.json")
    larger = run(*("--model_name_or_path", first.folder, "--image_size", 12), output_dir="third")
    assert larger.json("preprocessor_config.json")["size"] == {"shortest_edge": 12}


def test_baseline(run):
    result = run(
        *("--optim", "adamw_torch", "--learning_rate", "1e-3", "--logging_steps", 1),
        *("--lr_scheduler_type", "cosine", "--warmup_steps", 0.5, "--max_steps", 4),
    )
    assert result.log("learning_rate") == pytest.approx([0, 5e-4, 1e-3, 5e-4])
    assert "Line search" not in result.stdout
    card = (result.folder / "README.md").read_text()
    assert "0.001" in card
    assert "salsa" not in card.lower()


def test_searches_leave_batch_norm_alone(run, monkeypatch):
    models, steps = [], []
    make_model, step = script.make_model, SaLSaAdam.step

    def keep_model(*args):
        models.append(make_model(*args))
        return models[-1]

    def checked_step(self, *args, **kwargs):
        (model,) = models
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        result = step(self, *args, **kwargs)
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
        steps.append(self.last_search.trials)
        return result

    monkeypatch.setattr(script, "make_model", keep_model)
    monkeypatch.setattr(SaLSaAdam, "step", checked_step)
    run("--max_steps", 4, "--salsa_max_search_interval", 1, "--eval_strategy", "no")
    assert len(steps) == 4
    assert min(steps) >= 1
    norms = [module for module in models[0].modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 15
    for norm in norms:
        assert norm.num_batches_tracked == 4
        assert not torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))


# --- Interrupting and resuming


def test_interrupted_and_resumed_equals_the_straight_run(run, tmp_path, capsys, monkeypatch):
    """The checkpoint lies in the middle of the second epoch."""
    flags = ("--max_steps", 12, "--save_strategy", "steps", "--save_steps", 8, "--logging_steps", 1)
    epochs = []
    begin_epoch = script.ImageExamples.begin_epoch
    monkeypatch.setattr(
        script.ImageExamples,
        "begin_epoch",
        lambda self, epoch: epochs.append(epoch) or begin_epoch(self, epoch),
    )
    straight = run(*flags, output_dir="straight")
    assert epochs == [0, 1]

    updates = []
    record, evaluate = BatchObjective.record, BatchObjective.__call__

    def counting_record(self, *args):
        updates.append(1)
        return record(self, *args)

    def interrupted_evaluate(self):
        if len(updates) == 9:
            raise KeyboardInterrupt
        return evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(BatchObjective, "record", counting_record)
        patch.setattr(BatchObjective, "__call__", interrupted_evaluate)
        with pytest.raises(SystemExit) as exit_:
            run(*flags)
    assert exit_.value.code == 130
    checkpoint = tmp_path / "out" / "checkpoint-8"
    assert f"Interrupted at step 8. The last checkpoint is {checkpoint}" in capsys.readouterr().err

    assert json.loads((checkpoint / "trainer_state.json").read_text())["epoch"] == 8 / 6
    epochs.clear()
    resumed = run(*flags, "--resume_from_checkpoint", "true")
    assert epochs == [1]
    assert resumed.log("loss") == straight.log("loss")
    assert resumed.log("learning_rate") == straight.log("learning_rate")
    assert resumed.log("eval_loss") == straight.log("eval_loss")
    a, b = (load_file(result.folder / "model.safetensors") for result in (straight, resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "Before training" in resumed.stdout  # from the checkpoint's log


# --- Augmentation


def numbered(side):
    """An image whose pixels all differ, none of them black."""
    pixels = np.arange(1, side * side + 1)
    return Image.fromarray(
        np.stack([pixels % 256, pixels // 256, np.full_like(pixels, 9)], -1)
        .reshape(side, side, 3)
        .astype(np.uint8)
    )


@pytest.mark.parametrize(("side", "padding"), [(8, 1), (32, 4)])
@pytest.mark.parametrize("flip", [False, True], ids=["no flip", "flip"])
def test_small_images_are_shifted(side, padding, flip):
    image = numbered(side)
    padded = np.pad(np.asarray(image), ((padding, padding), (padding, padding), (0, 0)))
    crops = {}
    for left in range(2 * padding + 1):
        for top in range(2 * padding + 1):
            crop = padded[top : top + side, left : left + side]
            crops[crop.tobytes()] = (left, top, False)
            crops[crop[:, ::-1].tobytes()] = (left, top, True)
    generator = np.random.default_rng(0)
    drawn = [
        crops[script.augment_image(image, side, flip, generator).tobytes()] for _ in range(800)
    ]
    for axis in (0, 1):
        assert {draw[axis] for draw in drawn} == set(range(2 * padding + 1))
    assert np.mean([draw[2] for draw in drawn]) == pytest.approx(0.5 if flip else 0, abs=0.06)


def test_small_images_for_a_large_model():
    image = numbered(32)
    fitted = script.fit_image(image, 224)
    assert np.array_equal(fitted, image.resize((224, 224), Image.Resampling.BICUBIC))
    assert script.augment_image(image, 224, True, np.random.default_rng(0)).size == (224, 224)


def test_large_images_are_scaled_and_cropped(monkeypatch):
    image = colour(99, 9, (400, 300))
    sizes = []
    resize = script._resize
    monkeypatch.setattr(
        script, "_resize", lambda image, size: sizes.append(size) or resize(image, size)
    )
    generator = np.random.default_rng(0)
    crops = [script.augment_image(image, 28, True, generator) for _ in range(300)]
    assert {crop.size for crop in crops} == {(28, 28)}
    assert {min(size) for size in sizes} == set(range(32, 61))  # 256 to 480 for 224
    assert all(size[0] / size[1] == pytest.approx(4 / 3, rel=0.02) for size in sizes)
    assert len({crop.tobytes() for crop in crops}) > 290

    sizes.clear()
    fitted = script.fit_image(image, 224)
    assert sizes == [(341, 256)]
    middle = ImageOps.fit(resize(image, (341, 256)), (224, 224))
    assert np.asarray(fitted).shape == np.asarray(middle).shape
    expected = np.asarray(resize(image, (341, 256)))[16:240, 58:282]
    assert np.array_equal(fitted, expected)


def examples(augment, seed=0, flip=False):
    data = script.load_embedded_data()["train"].select(range(8))
    return script.ImageExamples(data, 8, [0.3] * 3, [0.4] * 3, augment, flip, seed)


def pixels_of(dataset):
    return torch.stack([dataset[i]["pixel_values"] for i in range(len(dataset))])


def test_evaluation_is_deterministic_and_normalised():
    dataset = examples(augment=False)
    pixels = pixels_of(dataset)
    assert torch.equal(pixels, pixels_of(dataset))
    assert pixels.shape == (8, 3, 8, 8)
    image = np.asarray(dataset.data[3]["image"], dtype=np.float64) / 255
    assert pixels[3, 1].numpy() == pytest.approx((image - 0.3) / 0.4, abs=1e-6)
    assert dataset[3]["labels"] == dataset.data[3]["label"]


def test_statistics_are_those_of_the_training_images(image_dir):
    data = script.load_image_folder(image_dir)
    processor = script.make_processor(data)
    _, dataset = script.make_examples(
        DatasetDict(train=data["train"], validation=data["train"]), processor, flip=False, seed=0
    )
    pixels = pixels_of(dataset)
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-4)
    assert pixels.std((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 3, abs=1e-4)
    assert processor.image_mean[0] > processor.image_mean[1]  # red before green


def test_draws_depend_on_seed_epoch_and_example_alone():
    dataset = examples(augment=True)
    with pytest.raises(RuntimeError, match="add an EpochCallback"):
        dataset[0]
    draws = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            dataset = examples(augment=True, seed=seed)
            dataset.begin_epoch(epoch)
            draws[seed, epoch] = pixels_of(dataset)
            torch.rand(3)
            assert torch.equal(dataset[5]["pixel_values"], draws[seed, epoch][5])
    for key, pixels in draws.items():
        others = [other for other_key, other in draws.items() if other_key != key]
        assert not any(torch.equal(pixels, other) for other in others)


def test_workers_that_outlive_an_epoch_draw_anew():
    dataset = examples(augment=True)
    loader = DataLoader(dataset, batch_size=8, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        dataset.begin_epoch(epoch)
        (batch,) = loader
        assert torch.equal(batch["pixel_values"], pixels_of(dataset))


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


# --- Models


def test_small_stem_round_trip(tmp_path):
    set_seed(0)
    model = script.make_model("resnet_small", DIGITS, 32).eval()
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
        model = script.make_model(architecture, ClassLabel(num_classes=classes), size)
    assert model.num_parameters() == parameters


# --- Presets


def parse(*flags):
    classes = (script.ModelArguments, script.DataArguments, SaLSaTrainingArguments)
    parser = script.PresetArgumentParser(classes, "x.py", "", **script.DEFAULTS)
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
    assert training_args.optim == "salsa_adam"


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
    classes = (script.ModelArguments, script.DataArguments, SaLSaTrainingArguments)
    parser = script.PresetArgumentParser(classes, "x.py", "", **script.DEFAULTS)
    model_args, _, training_args = parser.parse([str(path)])
    assert model_args.architecture == "resnet50"
    assert training_args.num_train_epochs == 1
    assert training_args.per_device_train_batch_size == 256


# --- Data sets of the hub


def hub_set(count, features, rows):
    """A data set with as many columns of images as `features` names, and others."""
    columns = {
        name: [colour(200 * (i % 2), 20, (32, 32), i) for i in range(count)]
        if isinstance(feature, datasets.Image)
        else [rows[name][i % len(rows[name])] for i in range(count)]
        for name, feature in features.items()
    }
    return Dataset.from_dict(columns, features=Features(features))


CIFAR100 = {
    "img": datasets.Image(),
    "fine_label": ClassLabel(names=["apple", "bear"]),
    "coarse_label": ClassLabel(names=["fruit", "animal"]),
}


@pytest.fixture
def hub(monkeypatch):
    """Puts a data set on the hub."""

    def put(features, rows, held_out=None, splits=("train", "test")):
        data = DatasetDict(
            {
                split: hub_set(8, features, rows if split == "train" else held_out or rows)
                for split in splits
            }
        )
        monkeypatch.setattr(datasets, "load_dataset", lambda name, config_name: data)

    datasets.disable_progress_bars()
    yield put
    datasets.enable_progress_bars()


def test_cifar100_by_preset(run, hub):
    hub(CIFAR100, {"fine_label": [0, 1], "coarse_label": [0]})
    result = run(
        *("--preset", "resnet34_cifar100", "--architecture", "resnet_small"),
        *("--dataloader_num_workers", 0, "--max_steps", 1),
    )
    assert result.json("config.json")["id2label"] == {"0": "apple", "1": "bear"}
    assert "uoft-cs/cifar100, train 8, validation 8 images of 2 classes, 32 x 32" in result.stdout
    assert "uoft-cs/cifar100" in (result.folder / "README.md").read_text()


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
    data = script.load_data(script.DataArguments(dataset_name="a/b"))
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
def test_unfit_hub_data(error, hub, features, rows, held_out, flags, complaint):
    hub(features, rows, held_out)
    assert error("--dataset_name", "a/b", *flags) == complaint


def test_class_that_the_training_data_lacks(error, hub):
    hub({"image": datasets.Image(), "label": Value("string")}, {"label": ["a", "b"]},
        {"label": ["c"]})  # fmt: skip
    assert error("--dataset_name", "a/b").startswith("a/b, column 'label': ")


def test_hub_data_without_validation(error, hub):
    hub(CIFAR100, {"fine_label": [0, 1], "coarse_label": [0]}, splits=("train", "extra"))
    message = error("--dataset_name", "a/b")
    assert (
        message == "a/b has the splits train, extra, needs train and one of validation, val, test"
    )


# --- Mistakes


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--preset", "resnet34"], "argument --preset: invalid choice: 'resnet34' (choose from"),
        (["--architecture", "resnet9"], "argument --architecture: invalid choice: 'resnet9'"),
        (["--architecture", "resnet34", "--model_name_or_path", "x"],
         "give a model_name_or_path or an architecture, not both"),
        (["--image_size", "7"], "image_size must be at least 8, got 7"),
        (["--image_dir", "x", "--dataset_name", "y"], "give an image_dir or a dataset_name"),
        (["--label_column", "x"], "label_column needs a dataset_name"),
        (["--image_column", "x"], "image_column needs a dataset_name"),
        (["--dataset_config_name", "x"], "dataset_config_name needs a dataset_name"),
        (["--max_eval_samples", "0"], "max_eval_samples must be at least 1, got 0"),
        (["--image_dir", "nowhere"], "nowhere has no folder train"),
        (["--preset", "resnet34_cifar10"], "uoft-cs/cifar10 did not load from the hub ("),
        (["--model_name_or_path", "nowhere/at-all"], "model nowhere/at-all did not load: "),
        (["--presset", "x"], "unknown argument --presset. Did you mean --preset?"),
        (["--optim", "salsa_adma"], "optim='salsa_adma'"),
        (["--resume_from_checkpoint", "true"], "no checkpoint to resume from"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_flags(error, flags, complaint):
    message = error(*flags)
    assert message.startswith(complaint)
    if complaint.endswith("hub ("):
        assert message.endswith("--image_dir reads a folder")


def test_wrong_image_folders(error, image_dir):
    flags = ("--image_dir", image_dir)
    train, held_out = image_dir / "train", image_dir / "val"
    (held_out / "green").mkdir()
    assert error(*flags) == f"{held_out / 'green'} is no class of {train}"
    (held_out / "green").rename(train / "green")
    formats = ", ".join(script.IMAGE_SUFFIXES)
    assert error(*flags) == f"{train / 'green'} holds no images ({formats})"
    (train / "green").rmdir()
    held_out.rename(image_dir / "held_out")
    assert error(*flags) == f"{image_dir} has no folder validation, val, test"


@pytest.mark.parametrize("cut", [20, 200], ids=["no image", "half an image"])
def test_broken_image(error, image_dir, cut):
    """Found while the statistics are taken, or (the held-out images) while the run goes on."""
    flags = ("--image_dir", image_dir, "--architecture", "resnet_small")
    for split in ("val", "train"):
        path = image_dir / split / "red" / "1.PNG"
        content = path.read_bytes()
        path.write_bytes(content[:cut])
        assert error(*flags).startswith(f"{path} cannot be read: ")


def test_output_dir_in_use_is_refused(error, tmp_path):
    notes = tmp_path / "out" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    assert error().startswith(f"output_dir {notes.parent} is not empty.")
    assert list(notes.parent.iterdir()) == [notes]
