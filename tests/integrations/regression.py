"""A line through 32 points: what transformers' own tests of Trainer train, and how they compare."""

import dataclasses
import random

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback

from hf_salsa import SaLSaTrainer

# What counts from the latest resuming on, or tells the time.
_CLOCKS = (
    *("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"),
    "salsa/search_runtime",
)


class LineConfig(PreTrainedConfig):
    model_type = "line"


class Line(PreTrainedModel):
    """y = a x + b; a loss that is the mean over what it is given."""

    config_class = LineConfig

    def __init__(self, config=None):
        super().__init__(config or LineConfig())
        self.head = nn.Linear(1, 1)
        self.given = []  # the points that were differentiated, in their order
        self.post_init()

    def _init_weights(self, module):
        _initialise(module)

    def noise(self):
        return 0.0

    def forward(self, x, labels=None):
        if self.training and torch.is_grad_enabled():
            self.given += x.tolist()
        y = self.head(x[:, None]).squeeze(-1) + self.noise()
        if labels is None:
            return {"logits": y}
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}


class NoisyLine(Line):
    """Draws from the three random streams."""

    def noise(self):
        return 0.05 * (torch.randn(()) + np.random.rand() + random.random())


class PlainLine(nn.Module):
    """No model of transformers: no configuration, and its own way to be saved."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 1)
        _initialise(self.head)

    def forward(self, x, labels=None):
        y = self.head(x[:, None]).squeeze(-1)
        return nn.functional.mse_loss(y, labels), y


def _initialise(module):
    if isinstance(module, nn.Linear):
        nn.init.constant_(module.weight, 0.5)
        nn.init.zeros_(module.bias)


def points(number=32):
    """Points near y = 2 x + 3."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(number, generator=generator)
    y = 2 * x + 3 + 0.1 * torch.randn(number, generator=generator)
    return [{"x": float(a), "labels": float(b)} for a, b in zip(x, y, strict=True)]


def make_trainer(arguments, optim, model=None, *, kind=SaLSaTrainer, data=None, **options):
    """Return a trainer of three epochs of four updates, unless `options` say otherwise."""
    of_trainer = {n: options.pop(n) for n in list(options) if n in _OF_TRAINER}
    data = points() if data is None else data
    if "model_init" not in of_trainer:
        of_trainer["model"] = Line() if model is None else model
    settings = {"max_steps": -1, "num_train_epochs": 3, **options}
    return kind(
        args=arguments(optim=optim, **settings),
        train_dataset=data,
        eval_dataset=points(20),
        **of_trainer,
    )


_OF_TRAINER = (
    *("callbacks", "compute_loss_func", "compute_metrics", "model_init", "optimizers"),
    "optimizer_cls_and_kwargs",
)


def state_of(trainer):
    """All that Trainer knows of a run, without clocks."""
    state = dataclasses.asdict(trainer.state)
    state["log_history"] = [
        {name: value for name, value in entry.items() if not _tells_the_time(name)}
        for entry in state["log_history"]
    ]
    return state


def _tells_the_time(name):
    return name in _CLOCKS or (name.startswith("eval_") and name.endswith(("runtime", "_second")))


def logged(trainer, name="loss"):
    """The values of this name in the log."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Events(TrainerCallback):
    """Notes every event, and the update at which it came."""

    def __init__(self):
        self.seen = []


def _note(event):
    def method(self, args, state, control, **kwargs):
        self.seen.append((event, state.global_step))

    return method


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(Events, _event, _note(_event))
