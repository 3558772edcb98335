"""Nobody can tell that a search took place: what modules keep in Python attributes (6, 7)."""

import math
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass

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

from hf_salsa import BatchObjective, traces

KINDS = Kinds()
LARGE = 2**20  # bytes


# --- attributes ---------------------------------------------------------------------------------


class Attribute(Net):
    """`update` keeps something, `number` reads it."""

    def mixed(self, h):
        self.update(h.detach())
        return h * (1 + self.number() / 10)


@KINDS.add
class Annealed(Net):
    def set_up(self):
        self.step = 0

    def mixed(self, h):
        self.step += 1
        return h * (1 + math.exp(-self.step))


@KINDS.add
class AnnealedFromNothing(Attribute):
    """The counter is not there before the first pass."""

    def update(self, h):
        self.step = getattr(self, "step", 0) + 1

    def number(self):
        return self.step


@KINDS.add
class AdaptiveStrength(Attribute):
    def set_up(self):
        self.strength = np.float64(0.5)
        self.best = None

    def update(self, h):
        self.strength *= 1.1 if h.mean() > 0 else 0.9
        self.best = float(h.max()) if self.best is None else max(self.best, float(h.max()))

    def number(self):
        return self.strength + self.best


@KINDS.add
class CollectsLosses(Net):
    def set_up(self):
        self.losses = []
        self.last = torch.zeros(())

    def loss(self, batch):
        loss = super().loss(batch) * (1 + len(self.losses) / 10) + 0.1 * self.last
        self.losses.append(loss.item())
        self.last = loss.detach()
        return loss


@KINDS.add
class OneMeter(Attribute):
    def set_up(self):
        self.meter = Meter()

    def update(self, h):
        self.meter.update(h.mean().item())

    def number(self):
        return self.meter.sum / self.meter.count


@KINDS.add
class Meters(Attribute):
    def set_up(self):
        self.meters = {"a": Meter(), "b": Meter()}

    def update(self, h):
        self.meters["a"].update(h.mean().item())
        self.meters["b"].update(1)

    def number(self):
        return self.meters["a"].sum + self.meters["b"].count


@KINDS.add
class MetersInNewDict(Attribute):
    """Meters that appear when something is first seen."""

    def set_up(self):
        self.meters = defaultdict(Meter)

    def update(self, h):
        self.meters["mean"].update(h.mean().item())

    def number(self):
        return self.meters["mean"].sum


@KINDS.add
class Window(Attribute):
    def set_up(self):
        self.window = deque(maxlen=3)

    def update(self, h):
        self.window.append(h.mean().item())

    def number(self):
        return sum(self.window)


@KINDS.add
class Nested(Attribute):
    def set_up(self):
        self.tensors = {"a": {"b": [torch.zeros(6)]}}
        self.pair = (torch.zeros(6), [0])

    def update(self, h):
        self.tensors["a"]["b"][0] += h[0]
        self.tensors["a"]["b"].append(h[1])
        self.pair[0].add_(1)
        self.pair[1][0] += 1

    def number(self):
        return torch.stack(self.tensors["a"]["b"]).mean() + self.pair[0].mean() + self.pair[1][0]


@KINDS.add
class Counters(Attribute):
    def set_up(self):
        self.seen, self.signs = set(), Counter()
        self.sums, self.order = defaultdict(lambda: defaultdict(float)), OrderedDict(a=1, b=2)

    def update(self, h):
        sign = bool(h.mean() > 0)
        self.seen.add(round(h.mean().item(), 3))
        self.signs[sign] += 1
        self.sums["h"][sign] += h.mean().item()
        self.order.move_to_end(next(iter(self.order)))

    def number(self):
        first = next(iter(self.order.values()))
        return len(self.seen) + sum(self.signs.values()) + sum(self.sums["h"].values()) + first


@KINDS.add
class Array(Attribute):
    def set_up(self):
        self.counts = np.zeros(3)
        self.grown = np.zeros(0)

    def update(self, h):
        self.counts[int(h[0, 0] > 0)] += 1
        self.grown = np.append(self.grown, h.mean().item())

    def number(self):
        return self.counts[1] + self.grown.sum()


@KINDS.add
class LongMemo(Attribute):
    def set_up(self):
        self.memo = dict.fromkeys(range(1005), 0.0)

    def update(self, h):
        self.memo[len(self.memo)] = h.mean().item()

    def number(self):
        return len(self.memo) / 1000


@KINDS.add
class LongCounts(Attribute):
    """How often each token of a vocabulary was seen."""

    def set_up(self):
        self.counts = Counter(dict.fromkeys(range(2000), 0))

    def update(self, h):
        self.counts.update(range(0, 2000, 2))

    def number(self):
        return self.counts[0]


@KINDS.add
class LongWindow(Attribute):
    def set_up(self):
        self.window = deque([0.0] * 1500, maxlen=1500)
        self.ring = [0.0] * 1500

    def update(self, h):
        self.window.append(h.mean().item())
        self.ring[int(self.ring[0]) + 1] = h.mean().item()
        self.ring[0] += 1

    def number(self):
        return self.window[-1] + self.ring[0]


@KINDS.add
class LongSet(Attribute):
    def set_up(self):
        self.seen = set(range(1500))

    def update(self, h):
        self.seen.add(len(self.seen))

    def number(self):
        return len(self.seen) / 1000


@KINDS.add
class BuiltOnce(Net):
    """A cache that the first pass makes."""

    def set_up(self):
        self.cache = None

    def mixed(self, h):
        if self.cache is None:
            self.cache = torch.arange(6.0)
        if not hasattr(self, "compiled"):
            self.compiled = lambda value: value + 1
        return self.compiled(h) + self.cache


@KINDS.add
class WritesConfig(Net):
    def set_up(self):
        self.config = Meter()
        self.config.problem_type = None
        self.config.labels = {"a": 0}

    def mixed(self, h):
        self.config.problem_type = self.config.problem_type or "regression"
        self.config.labels["a"] += 1
        return h * (1 + self.config.labels["a"] / 10)


@KINDS.add
class SetterWithSideEffect(Net):
    def set_up(self):
        self.sets, self._level = 0, 0

    @property
    def level(self):
        return self._level

    @level.setter
    def level(self, value):
        self.sets += 1
        self._level = value

    def mixed(self, h):
        self.level = self.level + 1
        return h * (1 + self.level / 10)


@KINDS.add
class OwnSetattr(Net):
    def __setattr__(self, name, value):
        if name == "level":
            self.__dict__["sets"] = self.__dict__.get("sets", 0) + 1
        super().__setattr__(name, value)

    def set_up(self):
        self.level = 0

    def mixed(self, h):
        self.level += 1
        return h * (1 + self.level / 10)


class Stateful(Net):
    rounding = 1e-5  # another kernel where nothing is differentiated

    def set_up(self):
        self.lstm = nn.LSTM(6, 6)
        self.hidden = self.first()

    def mixed(self, h):
        out, hidden = self.lstm(h[None], self.hidden)
        self.hidden = tuple(part.detach() for part in hidden)
        return out[0]


@KINDS.add
class StatefulFromZero(Stateful):
    def first(self):
        return (torch.zeros(1, 8, 6), torch.zeros(1, 8, 6))


@KINDS.add
class StatefulFromNone(Stateful):
    def first(self):
        return None


@KINDS.add
class MixtureOfExperts(Net):
    """Statistics of the load steer the router, and the loss of this pass is kept with its graph."""

    def set_up(self):
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.router = nn.Linear(6, 3)
        self.register_buffer("bias", torch.zeros(3))
        self.load, self.auxiliary = torch.zeros(3), None

    def mixed(self, h):
        scores = self.router(h).softmax(-1)
        chosen = (scores + self.bias).argmax(-1)
        self.load += torch.bincount(chosen, minlength=3)
        self.bias.add_(0.01 * (self.load.mean() - self.load).sign())
        self.auxiliary = scores.mean(0).square().sum()
        out = torch.stack([expert(h) for expert in self.experts], 1)
        return h + (out[range(len(h)), chosen] * scores.gather(1, chosen[:, None]))

    def loss(self, batch):
        return super().loss(batch) + self.auxiliary


Hidden = namedtuple("Hidden", ["h", "c"])


@KINDS.add
class NamedTupleState(Attribute):
    def set_up(self):
        self.hidden = Hidden(torch.zeros(6), torch.zeros(6))

    def update(self, h):
        self.hidden.h.add_(h.mean(0))

    def number(self):
        return self.hidden.h.mean()


@dataclass(slots=True)
class Slots:
    count: int = 0


@KINDS.add
class SlotsMeter(Attribute):
    def set_up(self):
        self.meter = Slots()

    def update(self, h):
        self.meter.count += 1

    def number(self):
        return self.meter.count


class AttributeDict(dict):
    __getattr__ = dict.__getitem__


@KINDS.add
class OwnDict(Attribute):
    """A subclass of dict, as libraries bring them."""

    def set_up(self):
        self.statistics = AttributeDict(count=0)

    def update(self, h):
        self.statistics["count"] += 1

    def number(self):
        return self.statistics.count


@KINDS.add
class TwoNames(Attribute):
    """One list under two names, one of them in another module, and one seen from outside."""

    def set_up(self):
        self.history = []
        self.body.history = self.history

    def update(self, h):
        self.history.append(h.mean().item())

    def number(self):
        return sum(self.body.history)


@KINDS.add
def kept_by_the_script():
    """Objects of the model that the script looks at: they stay the model's."""
    net = TwoNames()
    return Setup(net, net.loss, kept={"history": net.history, "dict": vars(net)})


TRACELESS = ("BuiltOnce",)


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


def test_what_a_closure_counts_counts_evaluations():
    """Nobody can put back what a hook keeps in a variable of its own: `evaluating` tells it."""
    net, all_passes, passes = Net(), [], []
    optimizer = OPTIMIZERS["sls_sgd"].make(net.parameters())
    objective = BatchObjective(net, optimizer)
    net.body.register_forward_hook(lambda *_: all_passes.append(1))
    net.body.register_forward_hook(lambda *_: None if objective.evaluating else passes.append(1))
    batch = {"x": torch.ones(3, 4), "more": {"y": torch.zeros(3, 1)}}
    objective.record(net.loss, batch).backward()
    optimizer.step()
    assert len(passes) == 1
    assert len(all_passes) == 1 + optimizer.counters.trials > 2
