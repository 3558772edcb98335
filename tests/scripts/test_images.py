"""run_image_classification.py as its users see it."""

import functools
import gc
import json
import math

import pytest
import run_image_classification as script
import torch
from datasets import ClassLabel
from running import CIFAR100, colour, interrupt_in_trial
from safetensors.torch import load_file
from support import images, images_data, images_models
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from hf_salsa import SaLSaAdam

pytestmark = pytest.mark.slow

FLAGS = ["--max_train_samples", "48", "--max_eval_samples", "40"]
FLAGS += ["--per_device_train_batch_size", "8"]


@pytest.fixture
def run(run_script):
    """Runs the script's main; flags given later win over the tiny settings."""
    return functools.partial(run_script, script, *FLAGS)


def accuracy(model, processor, data):
    """The accuracy on a split, through the processor that was saved."""
    right = 0
    for row in data:
        inputs = processor(row["image"].convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            right += model.eval()(**inputs).logits.argmax().item() == row["label"]
    return right / len(data)


@pytest.mark.slow
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
    assert "SaLSaAdamPlus" in card
    assert "from support.images_models import SmallStemResNetForImageClassification" in card
    for path in ("README.md", "step_size_and_loss.png", "checkpoint-40"):
        assert str(result.folder / path) in report

    # The folder holds the model that was evaluated, and what prepares its images.
    model = script.SmallStemResNetForImageClassification.from_pretrained(result.folder)
    processor = AutoImageProcessor.from_pretrained(result.folder)
    validation = images_data.load_embedded_data()["validation"]
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


def test_fine_tunes_a_vit(run, image_error, tmp_path, capsys):
    set_seed(0)
    folder = tmp_path / "vit"
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(image_size=16, patch_size=4, intermediate_size=32, num_labels=3, **shape)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    capsys.readouterr()  # progress of saving
    message = image_error("--model_name_or_path", folder, "--image_size", 32)
    complaint = "it takes 16 pixels only, not image_size 32"
    assert message == f"model {folder} did not load: {complaint}"

    result = run("--model_name_or_path", folder)
    assert "of 10 classes, 16 x 16 pixels" in result.stdout
    assert list(result.json("config.json")["id2label"].values()) == list("0123456789")
    assert result.json("preprocessor_config.json")["image_mean"] == [0.5, 0.5, 0.5]
    model, _ = images_models.load_model_and_processor(str(folder), ClassLabel(num_classes=10))
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
    assert "Search: " not in result.stdout
    card = (result.folder / "README.md").read_text()
    assert "0.001" in card
    assert "salsa" not in card.lower()


def test_searches_leave_batch_norm_alone(run, monkeypatch):
    models, steps = [], []
    make_model, step = images_models.make_model, SaLSaAdam.step

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

    monkeypatch.setattr(images_models, "make_model", keep_model)
    monkeypatch.setattr(SaLSaAdam, "step", checked_step)
    flags = ("--optim", "salsa_adam", "--salsa_max_search_interval", 1)
    run("--max_steps", 4, *flags, "--eval_strategy", "no")
    assert len(steps) == 4
    assert min(steps) >= 1
    norms = [module for module in models[0].modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 15
    for norm in norms:
        assert norm.num_batches_tracked == 4
        assert not torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))


@pytest.mark.slow
def test_interrupted_and_resumed_equals_the_straight_run(run, tmp_path, capsys, monkeypatch):
    """The checkpoint lies in the middle of the second epoch."""
    flags = ("--max_steps", 12, "--save_strategy", "steps", "--save_steps", 8, "--logging_steps", 1)
    flags += ("--salsa_max_search_interval", 1)  # a search to interrupt at the update that is named
    epochs = []
    begin_epoch = images.ImageExamples.begin_epoch
    monkeypatch.setattr(
        images.ImageExamples,
        "begin_epoch",
        lambda self, epoch: epochs.append(epoch) or begin_epoch(self, epoch),
    )
    straight = run(*flags, output_dir="straight")
    assert epochs == [0, 1]

    with monkeypatch.context() as patch:
        interrupt_in_trial(patch, update=9)
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
def test_wrong_flags(image_error, flags, complaint):
    message = image_error(*flags)
    assert message.startswith(complaint)
    if complaint.endswith("hub ("):
        assert message.endswith("--image_dir reads a folder")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("cut", [20, 200], ids=["no image", "half an image"])
def test_broken_image(image_error, image_dir, cut):
    """Found while the statistics are taken, or (the held-out images) while the run goes on."""
    flags = ("--image_dir", image_dir, "--architecture", "resnet_small")
    for split in ("val", "train"):
        path = image_dir / split / "red" / "1.PNG"
        content = path.read_bytes()
        path.write_bytes(content[:cut])
        assert image_error(*flags).startswith(f"{path} cannot be read: ")
    gc.collect()  # PIL leaves the broken file open: it is closed here, not in another test


def test_output_dir_in_use_is_refused(image_error, tmp_path):
    notes = tmp_path / "out" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    assert image_error().startswith(f"output_dir {notes.parent} is not empty.")
    assert list(notes.parent.iterdir()) == [notes]
