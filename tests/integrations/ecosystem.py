"""What the tests of TRL's and sentence-transformers' trainers share: cases, data and checks."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "on", "under", "tree", "and", "is", "was"]


def sentences(seed, n=32):
    """Sentences of four to eight words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 9, (n,), generator=generator)
    return [
        " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator))
        for length in lengths
    ]


@dataclass
class Case:
    """A trainer as its library has it and with the mixins, and what it trains on."""

    trainers: tuple[type[Trainer], type[Trainer]]
    arguments: tuple[type[TrainingArguments], type[TrainingArguments]]
    data: dict[str, list]
    options: dict[str, Any] = field(default_factory=dict)
    loss: Any = None


def case_arguments(case, folder, salsa, **options):
    """Make the arguments of a case: four updates, each logged, with a search at each."""
    line_search = options.get("optim", "").startswith("salsa") or (salsa and "optim" not in options)
    return case.arguments[salsa](
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
            **({"salsa_max_search_interval": 1} if line_search else {}),
            **case.options,
            **options,
        }
    )


def log(trainer):
    """What the library itself logs in training, without the times."""
    return [
        {
            name: value
            for name, value in entry.items()
            if not name.startswith("salsa/") and name not in ("learning_rate", "step_time")
        }
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def assert_same_state(*trainers):
    first, second = (trainer.model.state_dict() for trainer in trainers)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


class CheckReplay(TrainerCallback):
    """At every search: the objective at w_k is the loss of training, bit for bit."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.checked = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        objective = self.trainer._objective
        assert self.trainer.line_search.search_due
        assert torch.equal(objective(), objective.loss)
        self.checked += 1


# Each of the following takes `make` and a case; `make(case, salsa=True, **options)` is a trainer.


def check_replay(make: Callable[..., Trainer], case: Case) -> None:
    """Check that what a search evaluates is what was trained on, and that nobody complains."""
    trainer = make(case)
    check = CheckReplay(trainer)
    trainer.add_callback(check)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Evaluating the objective again")
        warnings.filterwarnings("error", message="Ignored with SaLSaAdam")  # no rate was set
        trainer.train()
    assert check.checked == 4
    assert trainer.line_search.counters.failed_searches == 0


def check_metrics(make: Callable[..., Trainer], case: Case, trained_loss: bool = False) -> None:
    """Check that forward passes of the search count in no metric.

    Up to the first update all metrics are stock's, unless that one trains a new head alone. Stock
    leaves parameters of a loss out of the norm of the gradient, and does not clip them.
    """
    stock = make(case, salsa=False)
    stock.train()
    trainer = make(case, salsa_head_first=0)
    trainer.train()
    assert trainer.line_search.counters.trials > 4
    first, of_stock = log(trainer)[0], log(stock)[0]
    if trained_loss:
        assert first.pop("grad_norm") > of_stock.pop("grad_norm")
    assert first == of_stock
    for entry, expected in zip(log(trainer), log(stock), strict=True):
        assert entry.get("num_tokens") == expected.get("num_tokens")
        assert entry.keys() == expected.keys()
        if "half" in entry:
            assert entry["half"] == pytest.approx(entry["loss"] / 3, abs=1e-4)


def check_stock(make: Callable[..., Trainer], case: Case) -> None:
    """Check that with a stock optimizer all is stock, to the checkpoint and its model card."""
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    stock = make(case, salsa=False, **options)
    stock.train()
    trainer = make(case, **options)
    trainer.train()
    assert_same_state(stock, trainer)
    assert log(trainer) == log(stock)


def check_resume(make: Callable[..., Trainer], case: Case) -> None:
    """Check that a resumed run equals the straight one."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    straight = make(case, **options)
    straight.train()
    resumed = make(case, **options)
    resumed.train(resume_from_checkpoint=os.path.join(straight.args.output_dir, "checkpoint-2"))
    assert_same_state(straight, resumed)
