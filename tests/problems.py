"""Small models, data and losses, functions that are hard for a line search, and comparisons."""

import copy
import io
import math
import pickle
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor, nn

# --- a small nonlinear problem ------------------------------------------------------------------


def initial_weights():
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 8), (8,), (8, 1), (1,)]
    return [0.5 * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def parameters(dtype=torch.float64):
    return [nn.Parameter(w.to(dtype)) for w in initial_weights()]


def batches(steps, dtype=torch.float64):
    """Mini-batches of 16 examples of a noisy function of four variables."""
    generator = torch.Generator().manual_seed(1)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    teacher = normal(4, 1)
    for _ in range(steps):
        x = normal(16, 4)
        yield x.to(dtype), (torch.sin(x @ teacher) + 0.1 * normal(16, 1)).to(dtype)


def network_loss(weights, x, y):
    w1, b1, w2, b2 = weights
    return (torch.tanh(x @ w1 + b1) @ w2 + b2 - y).square().mean()


def backward(params, loss_fn):
    """Leave the gradients in `.grad` and return the loss."""
    for param in params:
        param.grad = None
    loss = loss_fn()
    loss.backward()
    return loss.detach()


def train(optimizer, params, data):
    """One step per mini-batch; the step size of each."""
    step_sizes = []
    for x, y in data:
        loss_fn = partial(network_loss, params, x, y)
        optimizer.step(loss_fn, loss=backward(params, loss_fn))
        step_sizes.append(optimizer.step_size)
    return step_sizes


@dataclass
class Recorded:
    """The least that an objective is."""

    closure: object
    loss: object = None
    clip_factor: object = 1.0
    gradient_norm: object = None
    recorded: bool = True
    with_gradients: bool = False
    alone: bool = True
    cleared: int = field(default=0)

    def __call__(self):
        return self.closure()

    def parts(self, before, agree):
        return None

    def clear(self):
        self.cleared += 1


# --- smaller ones -------------------------------------------------------------------------------


def train_regression(optimizer, model, steps, start=0):
    """The step sizes of steps on mini-batches of a regression on four variables."""
    found = []
    for k in range(start, start + steps):
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(32, 4, generator=generator)
        y = x[:, :1] * x[:, 1:2] + 2

        def loss_fn(x=x, y=y):
            return nn.functional.mse_loss(model(x), y)

        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        optimizer.step(loss_fn, loss=loss.detach())
        found.append(optimizer.step_size)
    return found


def square(params):
    return sum(p.square().sum() for p in params)


def search_every(optimizer, interval):
    for group in optimizer.param_groups:
        group["search_interval"] = interval


def point(*values, dtype=torch.float64):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def regression():
    """A linear regression: the model, and the loss on the mini-batch of each of 8 steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    inputs = torch.randn(8, 8, 3, generator=torch.Generator().manual_seed(0))
    return model, lambda step: (model(inputs[step]) - 1).square().mean()


# --- parameters of every layout -----------------------------------------------------------------


def scalar_and_empty():
    scalar = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    return [point(), scalar, point(0.5, 0.5)]


def non_contiguous():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(5, 3).t()), nn.Parameter(torch.randn(4, 6)[:, ::2])]


def complex_numbers():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, dtype=torch.complex128)), point(0.1, 0.2)]


def mixed_precision():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4)), point(2.0, 3.0), nn.Parameter(torch.randn(2, 2))]


def bowl(params, step):
    """A loss whose last parameter takes part from the third step on only."""
    used = params if step > 2 else params[:-1]
    return sum((p - 0.3).abs().square().sum().double() for p in used)


# --- steps on which something is not finite -----------------------------------------------------

CAUSES = ["nan gradient", "inf gradient", "-inf gradient"]  # of a step that is skipped
LOST = ["nan loss", "inf loss", "-inf loss", "nan closure"]  # of a search that fails


def spoil(params, cause):
    """Leave the gradients of such a step and return its closure and its loss."""
    loss_fn = partial(network_loss, params, *next(batches(1, params[0].dtype)))
    loss = backward(params, loss_fn)
    if cause == "nan closure":
        return lambda: torch.tensor(math.nan), None
    value, what = cause.split()
    if what == "loss":
        return loss_fn, loss * float(value)
    params[1].grad[3] = float(value)
    return loss_fn, loss


# --- what a run is continued with: parameters and optimizer -------------------------------------


def saved_and_loaded(make, params, optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params = [nn.Parameter(w) for w in clones(params)]
    fresh = make(params, initial_step_size=123.0)  # what is loaded must prevail
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return params, fresh


def deepcopied(make, params, optimizer):
    return copy.deepcopy((params, optimizer))


def pickled(make, params, optimizer):
    return pickle.loads(pickle.dumps((params, optimizer)))


each_way_of_carrying_over = pytest.mark.parametrize(
    "carry_over", [saved_and_loaded, deepcopied, pickled]
)


# --- hard functions of plain floats: x -> value, gradient ---------------------------------------


def quadratic(x):
    return 0.5 * sum(v * v * 10**i for i, v in enumerate(x)), [v * 10**i for i, v in enumerate(x)]


def rosenbrock(x):
    a, b = x
    value = (1 - a) ** 2 + 100 * (b - a * a) ** 2
    return value, [-2 * (1 - a) - 400 * a * (b - a * a), 200 * (b - a * a)]


def cliff(beyond):
    def function(x):  # the loss of an unstable network: fine, and then nothing at all
        if abs(x[0] - 1) > 0.05:
            return beyond, [math.nan]
        return x[0], [1.0]

    return function


def flat(x):
    return 1.0, [0.0 for _ in x]


def absolute(x):
    return sum(map(abs, x)), [math.copysign(1.0, v) if v else 0.0 for v in x]


def exponential(x):
    return math.exp(x[0]), [math.exp(x[0])]


def wavy(x):  # acceptance is not monotone in the step size
    return x[0] ** 2 + math.sin(30 * x[0]), [2 * x[0] + 30 * math.cos(30 * x[0])]


# Name -> the function, where to start, the outcome of the paper's first search.
HARD = {
    "quadratic": (quadratic, [1.0, -2.0, 3.0], "accepted"),
    "rosenbrock": (rosenbrock, [-1.2, 1.0], "accepted"),
    "cliff to inf": (cliff(math.inf), [1.0], "accepted"),
    "cliff to -inf": (cliff(-math.inf), [1.0], "accepted"),
    "cliff to nan": (cliff(math.nan), [1.0], "accepted"),
    "flat": (flat, [1.0], "slope"),
    "absolute": (absolute, [1.0, -0.3], "accepted"),
    "absolute at its kink": (absolute, [0.0], "slope"),
    "exponential": (exponential, [50.0], "accepted"),  # the step must shrink by exp(50)
    "exponential tail": (exponential, [-300.0], "unresolved"),  # x does not move
    "wavy": (wavy, [1.0], "accepted"),
}


# --- comparisons --------------------------------------------------------------------------------


def clones(tensors):
    return [t.detach().clone() for t in tensors]


def snapshot(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def same(a, b):
    """Equal bit for bit, types included."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def differences(group, other):
    """Names of what two parameter groups do not share, parameters aside."""
    assert group.keys() == other.keys()
    return {name for name in group if name != "params" and group[name] != other[name]}
