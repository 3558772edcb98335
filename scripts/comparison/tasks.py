"""What is compared on: each task's data, model and budget; presets of tasks."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from comparison.pretrained import EFFICIENTNET, EFFICIENTNET_PACKAGES

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
BERT = "google-bert/bert-base-uncased"


@dataclass(frozen=True)
class Task:
    """One task: data, model and budget, and the rates of the tuned candidates.

    Attributes:
        kind: Which of `LOADERS` makes it.
        title: What readers call it.
        metric: The metric of held-out data, a key of its evaluation.
        batch_size: Examples in an update.
        adam_rate: The peak rate of candidate `adam`, the paper's.
        sgd_rate: The peak rate of candidate `sgd`, the paper's.
        rates: The peak rates of which `adamw_calibrated` takes the best.
        settings: What the loader takes. Where the task is smaller than the paper's, it says how.
        epochs: Passes over the training data.
        updates: Updates instead.
        group_by_length: Batches are of examples of like length, which saves padding.
        new_head: The model is a trained body with a new head.
        chance: The metric of the best answer that is always the same, None of language models.
        packages: What must be installed.
        flat: The paper's Adam and SGD keep one rate here, without warm-up and cosine.
        seeds: Those of the comparison.
        calibration_seeds: Those on which the best of `rates` is found.
    """

    kind: str
    title: str
    metric: str
    batch_size: int
    adam_rate: float
    sgd_rate: float
    rates: tuple[float, ...]
    settings: dict[str, Any]
    epochs: float = 1.0
    updates: int | None = None
    group_by_length: bool = False
    new_head: bool = False
    chance: float | None = None
    packages: tuple[str, ...] = ()
    flat: bool = False
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    calibration_seeds: tuple[int, ...] = (100, 101)

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is a loss."""
        return self.metric.startswith("loss")

    @property
    def folk_rate(self) -> float:
        """The peak rate that people set without a search."""
        return 1e-4 if self.new_head else 3e-3


WARM_UP = {"warmup_steps": 0.1}
COSINE = {"lr_scheduler_type": "cosine", **WARM_UP}
CONSTANT = {"lr_scheduler_type": "constant"}
FINE_TUNING_RATES = (2e-5, 5e-5, 1e-4, 3e-4, 1e-3)
SCRATCH_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
NANO_GPT = {"n_layer": 4, "n_head": 4, "n_embd": 128} | dict.fromkeys(
    ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0
)
TWO_LAYERS = NANO_GPT | {"n_layer": 2}
SHAKESPEARE = {"block_size": 64, "tokenizer": "bytes", "file": True}
PRETRAINING = {"per_device_train_batch_size": 12, "learning_rate": 3e-3, **COSINE}
_glue = partial(Task, "glue", adam_rate=2e-5, sgd_rate=2e-3, rates=FINE_TUNING_RATES)
_text = partial(
    Task, "text", metric="loss_per_character", adam_rate=1e-3, sgd_rate=1e-1, rates=SCRATCH_RATES
)
_image = partial(
    Task, "image", metric="accuracy", adam_rate=1e-3, sgd_rate=1e-1, rates=SCRATCH_RATES, flat=True
)


# GLUE on two cores: short sentences, small batches, one epoch. (CoLA's sentences are shorter still,
# and in one epoch nothing leaves the majority class.)
_small_glue = partial(_glue, group_by_length=True, new_head=True)
_SMALL = {"model": MINILM, "max_seq_length": 64}


def _shakespeare(title: str, model: dict[str, Any], updates: int, **options: Any) -> Task:
    """Return a language model of Shakespeare's characters, from scratch."""
    settings = {"overrides": model, **SHAKESPEARE}
    return _text(title, batch_size=12, updates=updates, settings=settings, **options)


def _shakespeare_tuned(
    title: str, model: dict[str, Any], updates_before: int, updates: int, **options: Any
) -> Task:
    """Return the same on the second half of the text, after AdamW has trained on the first."""
    task = _shakespeare(title, model, updates, rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2), **options)
    pretraining = {"max_steps": updates_before, **PRETRAINING}
    return replace(task, settings=task.settings | {"pretraining": pretraining})


def _shakespeare_adapted(title: str, tuned: Task, updates: int) -> Task:
    """Return the same with adapters, which are all that is trained."""
    lora = {"r": 8, "lora_alpha": 16, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    return replace(
        tuned,
        title=title,
        updates=updates,
        rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        settings=tuned.settings | {"lora": lora},
        packages=("peft",),
    )


TUNED = _shakespeare_tuned("Shakespeare, fine-tuned", NANO_GPT, 1000, 600)
STUDY_SEEDS: dict[str, Any] = {"seeds": (50, 51), "calibration_seeds": (150,)}
PRESETS: dict[str, dict[str, Task]] = {
    "smoke": {
        "probe": _glue(
            "Bigram shift",
            "accuracy",
            batch_size=32,
            settings={"max_train_samples": 320, "max_eval_samples": 64, "max_seq_length": 16},
            seeds=(0, 1),
            calibration_seeds=(100,),
        ),
        "prose": _text(
            "Prose",
            batch_size=8,
            updates=12,
            settings={
                "block_size": 32,
                "overrides": {"n_layer": 1, "n_head": 2, "n_embd": 16},
                "tokenizer": "bytes",
                "max_characters": 20_000,
            },
            seeds=(0, 1),
            calibration_seeds=(100,),
        ),
        "digits": _image(
            "Digits",
            batch_size=16,
            settings={
                "architecture": "resnet_small",
                "max_train_samples": 160,
                "max_eval_samples": 64,
            },
            seeds=(0, 1),
            calibration_seeds=(100,),
        ),
    },
    "cpu": {
        "mrpc": _small_glue(
            "MRPC",
            "accuracy",
            batch_size=16,
            settings={"task": "mrpc", **_SMALL},
            chance=0.6838,
        ),
        "sst2": _small_glue(
            "SST-2",
            "accuracy",
            batch_size=16,
            settings={"task": "sst2", "max_train_samples": 4800, **_SMALL},
            chance=0.5092,
        ),
        "cola": _small_glue(
            "CoLA",
            "matthews_correlation",
            batch_size=32,
            epochs=2.0,
            settings={"task": "cola", **_SMALL},
            chance=0.0,
        ),
        "rte": _small_glue(
            "RTE",
            "accuracy",
            batch_size=16,
            settings={"task": "rte", **_SMALL},
            chance=0.5271,
            calibration_seeds=(100,),
        ),
        "shakespeare": _shakespeare("Shakespeare", NANO_GPT, updates=1000),
        "shakespeare_tuned": TUNED,
        "digits": _image(
            "Digits",
            batch_size=32,
            epochs=20.0,
            settings={"architecture": "resnet_small"},
            chance=0.1,
        ),
        "python_prose": _text(
            "Prose of Python",
            batch_size=12,
            updates=600,
            settings={"block_size": 64, "overrides": NANO_GPT, "tokenizer": "bpe"},
        ),
        "stsb": _small_glue(
            "STS-B",
            "spearmanr",
            batch_size=16,
            settings={"task": "stsb", **_SMALL},
            chance=0.0,
        ),
        "sst2_scratch": _glue(
            "SST-2, from scratch",
            "accuracy",
            batch_size=32,
            rates=SCRATCH_RATES,
            group_by_length=True,
            settings={"task": "sst2", "max_train_samples": 20_000, "max_seq_length": 64},
            chance=0.5092,
        ),
        # Four that differ in kind from all above.
        "vit_digits": _image(
            "Digits, ViT",
            batch_size=32,
            epochs=10.0,
            settings={"architecture": "vit_tiny", "overrides": {"num_hidden_layers": 6}},
            chance=0.1,
        ),
        "efficientnet": _image(
            "Digits, pretrained EfficientNet",
            batch_size=16,
            updates=160,
            rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
            settings={"architecture": EFFICIENTNET, "image_size": 64},
            new_head=True,
            chance=0.1,
            packages=EFFICIENTNET_PACKAGES,
        ),
        "chunks": Task(
            "tags",
            "Capitals and punctuation",
            "macro_f1",
            batch_size=16,
            adam_rate=2e-5,
            sgd_rate=2e-3,
            rates=FINE_TUNING_RATES,
            settings={"model": MINILM},
            epochs=3.0,
            new_head=True,
            chance=0.22,
        ),
        "lora_lm": _shakespeare_adapted("Shakespeare, LoRA", TUNED, updates=1000),
    },
    # Quick enough to try rules for the step size on all of it, on seeds that the others do not use.
    "study": {
        "characters": _shakespeare(
            "Shakespeare, two layers", TWO_LAYERS, updates=400, **STUDY_SEEDS
        ),
        "characters_tuned": _shakespeare_tuned(
            "The same, fine-tuned", TWO_LAYERS, 400, 300, **STUDY_SEEDS
        ),
        "sst2": _small_glue(
            "SST-2",
            "accuracy",
            batch_size=16,
            settings={"task": "sst2", "max_train_samples": 2048, **_SMALL},
            **STUDY_SEEDS,
        ),
        "digits": _image(
            "Digits",
            batch_size=32,
            epochs=10.0,
            settings={"architecture": "resnet_small"},
            **STUDY_SEEDS,
        ),
    },
    "paper": {
        **{
            task: _glue(
                title,
                "accuracy",
                batch_size=32,
                epochs=5.0,
                settings={"task": task, "model": BERT, "max_seq_length": 256},
                new_head=True,
            )
            for task, title in (
                ("mnli", "MNLI"),
                ("qnli", "QNLI"),
                ("mrpc", "MRPC"),
                ("sst2", "SST-2"),
            )
        },
        "shakespeare": _shakespeare("GPT-2", NANO_GPT, updates=2000),
        "cifar10": _image(
            "CIFAR-10",
            batch_size=128,
            epochs=100.0,
            settings={"architecture": "resnet34", "dataset": "uoft-cs/cifar10"},
        ),
        "cifar100": _image(
            "CIFAR-100",
            batch_size=128,
            epochs=100.0,
            settings={
                "architecture": "resnet34",
                "dataset": "uoft-cs/cifar100",
                "label_column": "fine_label",
            },
        ),
        "imagenet": _image(
            "ImageNet",
            batch_size=256,
            epochs=12.0,
            settings={
                "architecture": "resnet50",
                "dataset": "ILSVRC/imagenet-1k",
                "image_size": 224,
            },
        ),
    },
}
