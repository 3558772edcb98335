"""Small networks of plain PyTorch, on which no setting of the package was chosen.

    python scripts/benchmarks/plain_networks.py

`SaLSaAdamPlus` as it is beside AdamW at the best of seven peak rates (warm-up over a tenth of the
run, then cosine), in a loop of one's own: same weights, mini-batches and clipping. A figure is the
mean training loss of the last tenth of the updates, over the seeds (`--repeats`). The best rate is
the one with the lowest, so AdamW has its sweep on the very runs that count. Ten minutes, one core.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pydoc_data import topics
from typing import NamedTuple

import numpy as np
import torch
from measuring import Report, Row, make_parser, parse
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, make_friedman1
from torch import Tensor, nn
from torch.nn import functional

from hf_salsa import BatchObjective, SaLSaAdamPlus

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BATCH_SIZE = 32
LEAST = 0.02  # losses below count as this in a ratio


class Task(NamedTuple):
    """Inputs, targets, the loss of a prediction, and what makes the network."""

    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    make: Callable[[], nn.Module]


class Recurrent(nn.Module):
    """An LSTM; its last state says the class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(8, 96, batch_first=True)
        self.head = nn.Linear(96, 10)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.body(rows)[0][:, -1])


class Attentive(nn.Module):
    """A Transformer encoder; the mean of its states says the class."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.1, batch_first=True)
        self.embed = nn.Linear(8, 48)
        self.places = nn.Parameter(0.02 * torch.randn(8, 48))
        self.body = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.body(self.embed(rows) + self.places).mean(1))


class NextCharacter(nn.Module):
    """An LSTM that predicts the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        self.body = nn.LSTM(64, 128, batch_first=True)
        self.head = nn.Linear(128, 256)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.body(self.embed(characters))[0]).transpose(1, 2)


def layers(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers with an activation between them."""
    made: list[nn.Module] = []
    for before, after in pairwise(widths):
        made += [activation(), nn.Linear(before, after)]
    return nn.Sequential(*made[1:])


def convolutions() -> nn.Sequential:
    """Return two convolutions and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
    )


def tasks() -> dict[str, Task]:
    """Return the tasks by their names."""

    def numbers(array: np.ndarray) -> Tensor:
        return torch.tensor(array, dtype=torch.float32)

    pixels, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
    pixels = pixels.float() / 16
    rows, classify = pixels.view(-1, 8, 8), functional.cross_entropy
    friedman, of_friedman = make_friedman1(3000, noise=1.0, random_state=0)
    diabetes, progression = load_diabetes(return_X_y=True)
    cells, benign = load_breast_cancer(return_X_y=True)
    text = "".join(topics.topics.values()).encode("ascii", "ignore")[:200_000]
    lines = torch.tensor(list(text[: len(text) // 33 * 33])).view(-1, 33)
    standardised = (cells - cells.mean(0)) / cells.std(0)
    deep = [64] * 10 + [10]
    return {
        "digits, three layers": Task(pixels, digits, classify, lambda: layers(64, 256, 256, 10)),
        "digits, ten layers": Task(
            pixels, digits, classify, lambda: layers(*deep, activation=nn.Tanh)
        ),
        "digits, convolutions": Task(rows[:, None], digits, classify, convolutions),
        "digits, LSTM": Task(rows, digits, classify, Recurrent),
        "digits, Transformer": Task(rows, digits, classify, Attentive),
        "digits, autoencoder": Task(
            pixels,
            pixels,
            functional.mse_loss,
            lambda: layers(64, 128, 8, 128, 64, activation=nn.GELU),
        ),
        "regression, Friedman": Task(
            numbers(friedman),
            numbers(of_friedman)[:, None],
            functional.mse_loss,
            lambda: layers(10, 128, 128, 1),
        ),
        "regression, diabetes": Task(
            numbers(20 * diabetes),
            numbers(progression)[:, None],
            functional.mse_loss,
            lambda: layers(10, 64, 1),
        ),
        "logistic regression": Task(
            numbers(standardised),
            numbers(benign)[:, None],
            functional.binary_cross_entropy_with_logits,
            lambda: nn.Linear(30, 1),
        ),
        "next character, LSTM": Task(lines[:, :-1], lines[:, 1:], classify, NextCharacter),
    }


def train(task: Task, seed: int, updates: int, rate: float | None) -> tuple[float, float]:
    """Train once, with AdamW at a peak rate or without one.

    Returns:
        The mean loss of the last tenth of the updates, and the largest step size.
    """
    torch.manual_seed(seed)
    model = task.make()
    order = torch.Generator().manual_seed(seed)

    def loss_fn(inputs: Tensor, targets: Tensor) -> Tensor:
        return task.loss(model(inputs), targets)

    objective = schedule = None
    if rate is None:
        optimizer: torch.optim.Optimizer = SaLSaAdamPlus(model.parameters(), total_steps=updates)
        objective = BatchObjective(model, optimizer)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        rise = max(1, updates // 10)

        def share(k: int) -> float:
            fall = math.pi * max(0, k - rise) / (updates - rise)
            return min((k + 1) / rise, 0.5 + 0.5 * math.cos(fall))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    losses, step_sizes = [], []
    for _ in range(updates):
        chosen = torch.randint(len(task.inputs), (BATCH_SIZE,), generator=order)
        batch = task.inputs[chosen], task.targets[chosen]
        loss = objective.record(loss_fn, *batch) if objective else loss_fn(*batch)
        loss.backward()
        if objective:
            objective.clip_grad_norm_(1.0)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step_sizes.append(optimizer.param_groups[0]["lr"])
        if schedule:
            schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return statistics.fmean(losses[-max(1, updates // 10) :]), max(step_sizes)


def compare(task: Task, seeds: int, updates: int) -> Row:
    """Return a row of the table, without its name."""
    found = {
        rate: [train(task, seed, updates, rate) for seed in range(seeds)] for rate in (None, *RATES)
    }
    losses = {rate: statistics.fmean(loss for loss, _ in runs) for rate, runs in found.items()}
    ours = losses.pop(None)
    best = min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
    return {
        "SaLSaAdamPlus": ours,
        "largest step size": statistics.geometric_mean(size for _, size in found[None]),
        "AdamW, best of 7 rates": losses[best],
        "its rate": best,
        "ratio": max(ours, LEAST) / max(losses[best], LEAST),
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--updates", type=int, default=400)
    args = parse(parser, argv)
    if args.updates < 10:
        parser.error(f"--updates {args.updates} is too few: at least 10")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    report = Report(args)
    rows: list[Row] = []
    for name, task in tasks().items():
        rows.append({"network": name, **compare(task, args.repeats, args.updates)})
    mean = statistics.geometric_mean(row["ratio"] for row in rows)
    rows.append({"network": "geometric mean", **dict.fromkeys(list(rows[0])[1:-1]), "ratio": mean})
    report.add(f"Training loss at the end of {args.updates} updates", rows)


if __name__ == "__main__":
    main()
