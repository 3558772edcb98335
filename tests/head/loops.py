"""A trained body with a new head, and loops that train it."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from cases import CASES
from problems import clones
from torch import nn

from hf_salsa import BatchObjective, head_groups
from hf_salsa.optimizers.head_first import head_first_class

BIAS = 150.0  # of the targets, which a new head does not know


def network():
    """A body with the weights of somebody's training, and a new head."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)]
    body = nn.Sequential(*layers, nn.Tanh(), nn.Dropout(0.1))
    with torch.no_grad():
        for param in body.parameters():
            param.mul_(2)
    return nn.Sequential(body, nn.Linear(16, 1))


def batch(step, size=16):
    inputs = torch.randn(size, 8, generator=torch.Generator().manual_seed(step))
    return inputs, BIAS + 3 * inputs[:, :1]


@dataclass(frozen=True)
class Kind:
    """An optimizer to train with."""

    name: str
    cls: Any
    options: dict[str, Any]

    def __str__(self):
        return self.name

    def make(self, net, head_first=10, **options):
        return self.cls(head_groups(net), **{**self.options, "head_first": head_first, **options})


SEARCHES = [Kind(str(case), case.cls, case.settings) for case in CASES]
STOCK = [
    Kind("AdamW", head_first_class(torch.optim.AdamW), {"lr": 1e-3}),
    Kind("AdamW fused", head_first_class(torch.optim.AdamW), {"lr": 1e-3, "fused": True}),
    Kind("SGD", head_first_class(torch.optim.SGD), {"lr": 1e-6, "momentum": 0.9}),
    Kind("Adagrad", head_first_class(torch.optim.Adagrad), {"lr": 1e-3}),
]
ALL = [*SEARCHES, *STOCK]


class Loop:
    """Trains `net`; what the gradients of body and head become is up to `spoil`."""

    def __init__(self, net, optimizer, scaler=None, accumulate=1, max_norm=None):
        self.net, self.optimizer, self.scaler = net, optimizer, scaler
        self.objective = BatchObjective(net, optimizer, scaler=scaler)
        self.accumulate, self.max_norm = accumulate, max_norm
        self.losses, self.norms = [], []

    def loss(self, x, y):
        return (self.net(x) - y).square().mean()

    def step(self, number, spoil=None):
        x, y = batch(number)
        total = 0.0
        for part in zip(x.chunk(self.accumulate), y.chunk(self.accumulate), strict=True):
            loss = self.objective.record(self.loss, *part) / self.accumulate
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total += loss.item()
        self.losses.append(total)
        if spoil is not None:
            spoil(self.net)
        if self.max_norm is not None:
            self.norms.append(float(self.objective.clip_grad_norm_(self.max_norm)))
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def run(self, steps, first=0, spoil=None):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A line search failed")
            for number in range(first, first + steps):
                self.step(number, spoil)
        return self


def started(kind, head_first=10, make_loop=Loop, loop=None, **options):
    net = network()
    return make_loop(net, kind.make(net, head_first, **options), **(loop or {}))


def body_of(net):
    return clones(net[0].parameters())


def weights(net):
    return clones(net.parameters())


def spoil_body(net):
    """Give one weight of the body a gradient that is no number."""
    net[0][0].weight.grad[0, 0] = torch.nan


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
