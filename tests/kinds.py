"""Two runs of one script, one that searches and one that does not, and all that they leave.

The second takes the step sizes of the first, with the same updates and without any evaluation.
"""

import inspect
import random
import types
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_salsa import BatchObjective
from hf_salsa.optimizers import updates

# The six optimizers, from a step size at which the first search has some way to go.
OPTIMIZERS = {case.name: case for case in CASES if not case.note}
START = {"initial_step_size": 30.0}

STEPS = 5
_NUMBERS = (type(None), bool, int, float, complex, str, bytes)
_SCALARS = (*_NUMBERS, torch.dtype, torch.device, torch.Size)
_NOT_STATE = (type, types.ModuleType, weakref.ref, RemovableHandle)


# --- what is compared ---------------------------------------------------------------------------


def leaves(value: Any) -> dict[str, Any]:
    """Return path -> number or bytes of everything that a value holds, however deep.

    What is reached a second time is the path of the first: two names of one object stay two names
    of one object.
    """
    found: dict[str, Any] = {}
    _collect("", value, found, {}, [])
    return found


def _collect(path: str, value: Any, found: dict, seen: dict, alive: list) -> None:
    if isinstance(value, _SCALARS) or np.isscalar(value):
        found[path] = f"{type(value).__name__} {value!r}"
        return
    if inspect.isroutine(value) or isinstance(value, _NOT_STATE):
        found[path] = getattr(value, "__qualname__", str(type(value)))
        return
    if id(value) in seen:
        found[path] = f"same as {seen[id(value)]}"
        return
    seen[id(value)] = path
    alive.append(value)
    found[path] = type(value).__qualname__
    if isinstance(value, deque):
        found[f"{path} maxlen"] = value.maxlen
    if isinstance(value, (set, frozenset)):
        found[path] = sorted(map(repr, value))
    elif isinstance(value, Tensor):
        found[path] = _of_tensor(value)
        _collect(f"{path}.grad", value.grad if value.is_leaf else None, found, seen, alive)
    elif isinstance(value, np.ndarray):
        found[path] = (value.dtype, value.shape, value.strides, value.tobytes())
    elif isinstance(value, torch.Generator):
        found[path] = value.get_state().numpy().tobytes()
    elif isinstance(value, np.random.Generator):
        found[path] = repr(value.bit_generator.state)
    elif isinstance(value, np.random.RandomState):
        found[path] = repr(value.get_state(legacy=False))
    elif isinstance(value, random.Random):
        found[path] = value.getstate()
    else:
        if isinstance(value, dict):
            hooks = path.endswith("_hooks")  # their keys count all hooks of the process
            found[f"{path} keys"] = len(value) if hooks else [repr(key) for key in value]
            for i, (key, entry) in enumerate(value.items()):
                _collect(f"{path}[{i if hooks else repr(key)}]", entry, found, seen, alive)
        elif isinstance(value, (list, tuple, deque)):
            found[f"{path} length"] = len(value)
            for i, entry in enumerate(value):
                _collect(f"{path}[{i}]", entry, found, seen, alive)
        slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
        held = {
            name: getattr(value, name)
            for name in slots
            if name.isidentifier() and name[0] != "_" and hasattr(value, name)
        }
        for name, entry in {**held, **getattr(value, "__dict__", {})}.items():
            _collect(f"{path}.{name}", entry, found, seen, alive)


def _of_tensor(tensor: Tensor) -> tuple:
    plain = tensor.detach().resolve_conj().contiguous().reshape(-1)
    data = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    kind = (type(tensor).__name__, tensor.dtype, tuple(tensor.shape), tensor.stride())
    return (*kind, tensor.requires_grad, tensor.grad_fn is None, data)


def streams() -> dict[str, Any]:
    """Return the states of the global random streams."""
    return leaves(
        {
            "torch": torch.get_rng_state(),
            "numpy": repr(np.random.get_state(legacy=False)),
            "python": random.getstate(),
        }
    )


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the paths at which two runs left something else."""
    return [path for path in {**a, **b} if path not in a or path not in b or a[path] != b[path]]


def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


class Net(nn.Module):
    """A small network; a kind says what it does with the hidden layer."""

    rounding = 0.0

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 1)
        self.layer = nn.Identity()
        self.set_up()

    def set_up(self):
        pass

    def mixed(self, h):
        return self.layer(h)

    def forward(self, x):
        return self.head(self.mixed(torch.tanh(self.body(x))))

    def loss(self, batch):
        return (self(batch["x"]) - batch["more"]["y"]).square().mean()


class Meter:
    """A plain object that adds up."""

    def __init__(self):
        self.sum, self.count = 0.0, 0

    def update(self, value):
        self.sum += value
        self.count += 1


# --- two runs of a plain loop -------------------------------------------------------------------


@dataclass
class Setup:
    """What a script trains.

    Attributes:
        model: The model.
        loss_fn: The loss of a batch.
        modules: What the loss uses beside the model.
        kept: What else the script can look at afterwards.
        rounding: By how much of itself the loss may differ where nothing is differentiated.
    """

    model: nn.Module
    loss_fn: Any
    modules: tuple[nn.Module, ...] = ()
    kept: Any = None
    rounding: float = 0.0


class Kinds(dict):
    """Name -> subclass of `Net`, or function that returns a `Setup`."""

    def add(self, make: Any) -> Any:
        self[make.__name__] = make
        return make

    def each(self, but: tuple[str, ...] = ()) -> Any:
        """Run a test once for each kind, as its argument `make`."""
        names = [name for name in self if name not in but]
        assert len(names) == len(self) - len(but)
        return pytest.mark.parametrize("make", [_setup(self[name]) for name in names], ids=names)


def _setup(kind: Any) -> Any:
    def of_net() -> Setup:
        net = kind()
        return Setup(net, net.loss, rounding=net.rounding)

    return of_net if isinstance(kind, type) else kind


# Two of them in every run of the tests, all with the slow ones: what is put back is the same.
_QUICK = ("sls_sgd", "salsa_adam_plus")
every_optimizer = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (name not in _QUICK), id=name)
        for name, case in OPTIMIZERS.items()
    ],
)


@dataclass
class Run:
    """What a run did, and all that it left."""

    step_sizes: list[float] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    passes: int = 0
    left: dict[str, Any] = field(default_factory=dict)


def batches(steps: int, accumulation: int) -> list[list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(1)

    def batch() -> dict[str, Any]:
        x, y = (torch.randn(8, n, generator=generator) for n in (4, 1))
        return {"x": x, "more": {"y": y}}

    return [[batch() for _ in range(accumulation)] for _ in range(steps)]


def traces_of(case: Any, make: Any) -> list[str]:
    """Return at which paths a run that searches differs from one that takes the same steps."""
    run = _train(case, make, _search)
    return differing(run.left, _replayed(case, make, run.step_sizes))


def traces_of_evaluations(case: Any, make: Any) -> list[str]:
    """Return the same of a run that evaluates, but takes steps of a fixed size."""

    def step(objective: Any, optimizer: Any, **_: Any) -> float:
        for _ in range(3):  # what is done twice may cancel
            objective()
        take_step(optimizer, 0.01)
        objective.clear()
        return 0.01

    return differing(_train(case, make, step).left, _replayed(case, make, STEPS * [0.01]))


def _search(objective: Any, optimizer: Any, rounding: float) -> float:
    """Take a step after checking twice that the objective is what was differentiated."""
    if optimizer.search_due:
        for _ in range(2):  # from the state before the pass, and then from the one after it
            torch.testing.assert_close(objective(), objective.loss, rtol=rounding, atol=0.0)
    optimizer.step()
    return optimizer.step_size


def _replayed(case: Any, make: Any, step_sizes: list[float]) -> dict[str, Any]:
    run = _train(case, make, None, step_sizes)
    assert run.passes == _accumulation(case) * STEPS  # not one more
    return run.left


def take_step(optimizer: Any, step_size: float) -> None:
    """Take the step of an optimizer of ours with a step size that is known."""
    for group in optimizer.param_groups:
        updates.apply(optimizer.take_step, group, optimizer._state_of, step_size, None)


def _accumulation(case: Any) -> int:
    return 2 if case.adam else 1


def _train(case: Any, make: Any, step: Any, step_sizes: Any = None) -> Run:
    """Run the script; with `step_sizes` it has no objective and evaluates nothing."""
    seed()
    setup, run, accumulation = make(), Run(), _accumulation(case)
    trained = [p for p in setup.model.parameters() if p.requires_grad]
    optimizer = case.make(trained, **START)
    objective = None
    if step_sizes is None:
        objective = BatchObjective(setup.model, optimizer, modules=setup.modules)

    def loss_fn(batch: dict[str, Any]) -> Tensor:
        run.passes += 1  # in no module, so nobody puts it back
        return setup.loss_fn(batch) / accumulation

    data = batches(STEPS, accumulation)
    for number, micro_batches in enumerate(data):
        for batch in micro_batches:
            loss = loss_fn(batch) if objective is None else objective.record(loss_fn, batch)
            loss.backward()
            run.losses.append(loss.item().hex())
            del loss
        if objective is None:
            take_step(optimizer, step_sizes[number])
        else:
            size = step(objective=objective, optimizer=optimizer, rounding=setup.rounding)
            run.step_sizes.append(size)
        optimizer.zero_grad()
    if objective is not None:
        trials = optimizer.counters.trials
        assert trials > STEPS or step is not _search  # searches evaluated it
        assert run.passes >= accumulation * (3 * STEPS + trials)  # with those of `step`
        assert optimizer.counters.failed_searches == 0
    # The weights of before are there for searches only.
    moments = [
        {name: t for name, t in optimizer.state[p].items() if name != "previous"} for p in trained
    ]
    run.left = leaves([setup.model, setup.modules, setup.kept, data, moments, run.losses])
    run.left |= streams()
    return run
