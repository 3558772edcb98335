"""Nobody can tell that a search took place: layers, buffers, generators, the batch (6, 7)."""

import random

import numpy as np
import pytest
import torch
from kinds import (
    OPTIMIZERS,
    Kinds,
    Meter,
    Net,
    Setup,
    every_optimizer,
    traces_of,
    traces_of_evaluations,
)
from torch import nn

from hf_salsa import traces

KINDS = Kinds()
LARGE = 2**20  # bytes


# --- layers -------------------------------------------------------------------------------------


@KINDS.add
class Dropout(Net):
    def set_up(self):
        self.layer = nn.Dropout(0.5)


@KINDS.add
class BatchNorm(Net):
    def set_up(self):
        self.layer = nn.BatchNorm1d(6)


@KINDS.add
class CumulativeBatchNorm(Net):
    def set_up(self):
        self.layer = nn.BatchNorm1d(6, momentum=None, affine=False)


@KINDS.add
class SpectralNorm(Net):
    def set_up(self):
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))


@KINDS.add
class WeightNorm(Net):
    def set_up(self):
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))


@KINDS.add
class FakeQuantised(Net):
    def set_up(self):
        observer = torch.ao.quantization.MovingAverageMinMaxObserver
        self.layer = torch.ao.quantization.FakeQuantize(observer)


@KINDS.add
class RenormalisedEmbedding(Net):
    """A trained weight that its forward pass writes into."""

    def set_up(self):
        self.words = nn.Embedding(5, 6, max_norm=1.0)

    def mixed(self, h):
        return h + self.words((h[:, 0] > 0).long())


@KINDS.add
class SharedTwice(Net):
    def set_up(self):
        self.one = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.1))
        self.other = nn.ModuleList([self.one])

    def mixed(self, h):
        return self.other[0](self.one(h))


@KINDS.add
class FlipsTraining(Net):
    def set_up(self):
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)

    def mixed(self, h):
        self.norm.train(not self.norm.training)  # every second pass in eval mode
        self.drop.eval() if self.norm.training else self.train()
        return self.drop(self.norm(h))


@KINDS.add
class GradientPenalty(Net):
    """A derivative of its own in the loss, and something that counts."""

    def set_up(self):
        self.passes = 0

    def loss(self, batch):
        self.passes += 1
        x = batch["x"].detach().requires_grad_()
        (slope,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        return super().loss(batch) + slope.square().mean() / self.passes


# --- buffers ------------------------------------------------------------------------------------


class Buffer(Net):
    start = None

    def set_up(self):
        self.register_buffer("seen", self.start)

    def mixed(self, h):
        self.update(h.detach())
        return h * (1 + self.number() / 10)

    def number(self):
        return self.seen.float().mean()


@KINDS.add
class IntegerCounter(Buffer):
    start = torch.tensor(0)

    def set_up(self):
        self.register_buffer("seen", torch.tensor(0))

    def update(self, h):
        self.seen += 1


@KINDS.add
class BoolFlag(Buffer):
    def set_up(self):
        self.register_buffer("seen", torch.tensor([False, True]))

    def update(self, h):
        self.seen.logical_not_()
        self.seen[0] = not self.seen[1]


@KINDS.add
class LargeIntegers(Buffer):
    def set_up(self):
        self.register_buffer("seen", torch.zeros(LARGE // 8 + 1, dtype=torch.int64))

    def update(self, h):
        self.seen[::2] += 1


@KINDS.add
class LargeUntouched(Buffer):
    def set_up(self):
        self.register_buffer("seen", torch.arange(LARGE // 4 + 1, dtype=torch.int32) % 7)

    def update(self, h):
        pass


@KINDS.add
class Grown(Buffer):
    def set_up(self):
        self.register_buffer("seen", torch.zeros(1, 6))

    def update(self, h):
        self.seen = torch.cat([self.seen, h[:2]])


@KINDS.add
class Replaced(Buffer):
    def set_up(self):
        self.register_buffer("seen", torch.zeros(6))

    def update(self, h):
        self.seen = 0.9 * self.seen + h.mean(0)


@KINDS.add
class Expanded(Buffer):
    def set_up(self):
        self.register_buffer("seen", torch.zeros(1, 1).expand(3, 4))

    def update(self, h):
        self.seen = (self.seen[:1, :1] + h.mean()).expand(3, 4)


@KINDS.add
class ExpandedInPlace(Buffer):
    def set_up(self):
        self.register_buffer("seen", torch.zeros(1, 1).expand(3, 4))

    def update(self, h):
        self.seen[:1, :1] += h.mean()


@KINDS.add
class Resized(Buffer):
    def set_up(self):
        self.register_buffer("seen", torch.zeros(2))

    def update(self, h):
        self.seen.resize_(self.seen.numel() + 1)
        self.seen[-1] = h.mean()


@KINDS.add
class WithoutVersions(Buffer):
    """`.data` is written without a count of changes, as vector quantisers do it."""

    def set_up(self):
        self.register_buffer("seen", torch.zeros(6))
        self.register_buffer("begun", torch.tensor(False))

    def update(self, h):
        if not self.begun:
            self.seen.data.copy_(h[0])
            self.begun.data.copy_(torch.tensor(True))
        self.seen.data.mul_(0.9).add_(h.mean(0))


@KINDS.add
class LargeWithoutVersions(Buffer):
    def set_up(self):
        self.register_buffer("seen", torch.zeros(LARGE // 4 + 1))

    def update(self, h):
        self.seen.data.add_(1)


@KINDS.add
class ThroughNumpy(Buffer):
    def set_up(self):
        self.register_buffer("seen", torch.zeros(3))

    def update(self, h):
        self.seen.numpy()[1] += 1


@KINDS.add
class ComplexStrided(Buffer):
    def set_up(self):
        self.register_buffer("seen", torch.zeros(3, 4, dtype=torch.complex64).t())
        self.register_buffer("conjugate", torch.ones(3, dtype=torch.complex64).conj())

    def update(self, h):
        self.seen[1:, ::2] += 1 + 2j
        self.conjugate *= 1j

    def number(self):
        return self.seen.abs().mean() + self.conjugate.imag.mean()


@KINDS.add
class MadeLater(Buffer):
    """A buffer that the first pass registers."""

    def set_up(self):
        pass

    def update(self, h):
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(6))
        self.seen += h.mean(0)


@KINDS.add
class Queue(Buffer):
    """MoCo's: keys of earlier batches."""

    def set_up(self):
        self.register_buffer("seen", torch.zeros(6, 24))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def update(self, h):
        start = int(self.pointer)
        self.seen[:, start : start + 8] = h.t()
        self.pointer[0] = (start + 8) % 24


class Teacher(Net):
    def set_up(self):
        self.teacher = nn.Linear(4, 6).requires_grad_(False)

    def forward(self, x):
        self.follow()
        h = torch.tanh(self.body(x))
        return self.head(h - 0.1 * self.teacher(x))


@KINDS.add
class MovingTeacher(Teacher):
    @torch.no_grad()
    def follow(self):
        for mean, param in zip(self.teacher.parameters(), self.body.parameters(), strict=True):
            mean.mul_(0.9).add_(param, alpha=0.1)


@KINDS.add
class MovingTeacherData(Teacher):
    def follow(self):
        for mean, param in zip(self.teacher.parameters(), self.body.parameters(), strict=True):
            mean.data = mean.data * 0.9 + param.data * 0.1


@KINDS.add
class MovingTeacherDataInPlace(Teacher):
    def follow(self):
        for mean, param in zip(self.teacher.parameters(), self.body.parameters(), strict=True):
            mean.data.mul_(0.9).add_(param.data, alpha=0.1)


# --- generators ---------------------------------------------------------------------------------


@KINDS.add
class OwnGenerators(Net):
    def set_up(self):
        self.torch = torch.Generator().manual_seed(1)
        self.numpy = np.random.default_rng(2)
        self.old = np.random.RandomState(3)
        self.python = random.Random(4)

    def mixed(self, h):
        noise = torch.rand(h.shape, generator=self.torch) + self.numpy.normal()
        return h + 0.1 * (noise + self.old.normal() + self.python.gauss(0, 1))


@KINDS.add
class GlobalStreams(Net):
    def mixed(self, h):
        noise = torch.randn(h.shape) + np.random.normal() + random.gauss(0, 1)
        return h + 0.1 * noise


@KINDS.add
class HeldGenerators(Net):
    """In containers and in an object."""

    def set_up(self):
        self.streams = {"a": [torch.Generator().manual_seed(1)], "b": (random.Random(4),)}
        self.augment = Meter()
        self.augment.rng = np.random.default_rng(2)

    def mixed(self, h):
        noise = torch.rand(h.shape, generator=self.streams["a"][0])
        return h + 0.1 * (noise + self.streams["b"][0].random() + self.augment.rng.random())


# --- what the loss does beside ------------------------------------------------------------------


@KINDS.add
def writes_into_the_batch():
    net = Net()

    def loss(batch):
        more = batch.pop("more")
        x = batch["x"].sub_(1)
        batch["seen"] = True
        return (net(x) - more.pop("y").mul_(2)).square().mean()

    return Setup(net, loss)


@KINDS.add
def replaces_entries_of_the_batch():
    net = Net()

    def loss(batch):
        batch["more"]["y"] = batch["more"]["y"] + 1
        batch["more"]["made"] = [batch["x"]]
        return net.loss(batch)

    return Setup(net, loss)


@KINDS.add
def module_beside_the_model():
    net, beside = Net(), nn.BatchNorm1d(4)
    beside.calls, beside.kept = 0, []

    def loss(batch):
        beside.calls += 1
        beside.kept.append(batch["x"].mean())
        return net.loss({**batch, "x": beside(batch["x"])}) * (1 + 1 / beside.calls)

    return Setup(net, loss, (beside,))


TRACELESS = (
    *("WeightNorm", "RenormalisedEmbedding", "LargeUntouched"),
    *("writes_into_the_batch", "replaces_entries_of_the_batch"),
)


@every_optimizer
@KINDS.each()
@pytest.mark.filterwarnings("error", "ignore:loss_fn writes into tensors of its batch")
def test_no_trace(make, case):
    assert traces_of(case, make) == []


@KINDS.each(but=TRACELESS)
@pytest.mark.filterwarnings("ignore:loss_fn writes into tensors of its batch")
def test_there_would_be_a_trace(make, monkeypatch):
    """What these kinds do is seen where nothing is put back."""
    monkeypatch.setattr(traces, "TRACES", ())
    assert traces_of_evaluations(OPTIMIZERS["salsa_sgd"], make) != []
