"""The first search asks whether the loss falls as the gradients say (contract line 10)."""

import math
import re
from functools import partial

import pytest
import torch
from cases import (
    CASES,
    both_directions,
    each,
    every_optimizer,
    failures_expected,
    low_precision_expected,
)
from problems import HARD, backward, batches, clones, network_loss, parameters, point, same, train
from torch import nn

from hf_salsa import BatchObjective, SaLSaAdam, SaLSaSGD
from hf_salsa.optimizers.checks import check_derivative
from hf_salsa.rules import Line, Plus

WRONG = "The gradients are not those of the loss that is searched"
both_classes = pytest.mark.parametrize("cls", [SaLSaAdam, SaLSaSGD])


def step(optimizer, params, loss_fn, wrong=None):
    """One step, its gradients altered by `wrong`."""
    loss = backward(params, loss_fn)
    if wrong is not None:
        wrong(params)
    return optimizer.step(loss_fn, loss=loss)


# --- alarms -------------------------------------------------------------------------------------


def by_value(params):
    nn.utils.clip_grad_value_(params, 0.01)


def by_norm(params):
    nn.utils.clip_grad_norm_(params, float(nn.utils.get_total_norm([p.grad for p in params])) / 5)


def scaled(factor, params):
    for param in params:
        param.grad *= factor


def larger_in_one(params):
    params[2].grad *= 10


WRONGS = {
    "clipping by value": by_value,
    "clipping by norm": by_norm,
    "an unknown scale": partial(scaled, 16.0),
    "a share": partial(scaled, 0.5),
    "the opposite": partial(scaled, -1.0),
    "one layer": larger_in_one,
}


@pytest.mark.parametrize("wrong", WRONGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_optimizer
def test_gradients_of_another_loss_are_an_error(case, dtype, wrong):
    params = parameters(dtype)
    optimizer = case.make(params)
    start = clones(params)
    loss_fn = partial(network_loss, params, *next(batches(1, dtype)))
    with pytest.raises(RuntimeError, match=WRONG) as refused:
        step(optimizer, params, loss_fn, WRONGS[wrong])
    for hint in (
        "clipping by value",
        "by norm without telling",
        "objective.clip_grad_norm_(max_norm)",
        "scaled after record()",
        "optimizer.zero_grad()",
        "changed by hand",
        "detached",
    ):
        assert hint in str(refused.value)
    assert same(clones(params), start)
    # A step with the right gradients works afterwards.
    optimizer = case.make(params)
    step(optimizer, params, loss_fn)
    assert optimizer.counters.failed_searches == 0


@both_classes
def test_a_part_that_is_detached_is_an_error(cls):
    """The loss of `dft`: its gradient is that of -mean(p)."""
    torch.manual_seed(0)
    net = nn.Linear(4, 10)
    objective = BatchObjective(net, cls(net.parameters()))
    x, y = torch.randn(64, 4), torch.randint(0, 10, (64,))

    def loss_fn():
        p = net(x).softmax(-1)[range(64), y]
        return -(p.detach() * p.log()).mean()

    objective.record(loss_fn).backward()
    with pytest.raises(RuntimeError, match=f"{WRONG}.*detached"):
        objective.line_search.step()


@both_classes
@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0, 10.0])
def test_a_loss_that_is_scaled_in_the_closure_only_is_an_error(cls, factor):
    params = parameters()
    loss_fn = partial(network_loss, params, *next(batches(1)))
    backward(params, loss_fn)
    with pytest.raises(RuntimeError, match=WRONG):
        cls(params).step(lambda: factor * loss_fn())


@both_classes
@pytest.mark.parametrize("factor", [1e-2, 1e-3])
def test_gradients_that_are_far_too_small_are_an_error(cls, factor):
    """As by hard clipping without telling: float64 could show it at a smaller step."""
    params = parameters()
    loss_fn = partial(network_loss, params, *next(batches(1)))
    with pytest.raises(RuntimeError, match=WRONG):
        step(cls(params), params, loss_fn, partial(scaled, factor))


@both_classes
def test_the_error_comes_in_the_first_search_only(cls):
    params = parameters()
    optimizer = cls(params)
    train(optimizer, params, batches(3))
    loss_fn = partial(network_loss, params, *next(batches(1)))
    trials = optimizer.counters.trials
    step(optimizer, params, loss_fn, partial(scaled, 0.9))
    assert optimizer.counters.trials - trials == optimizer.last_search.trials


# --- no false alarms ----------------------------------------------------------------------------


class Plain(torch.autograd.Function):
    """A function of plain floats that brings its own gradient."""

    @staticmethod
    def forward(ctx, x, function):
        try:
            value, gradient = function(x.tolist())
        except OverflowError:
            value, gradient = math.inf, [math.nan] * x.numel()
        ctx.gradient = x.new_tensor(gradient)
        return x.new_tensor(value)

    @staticmethod
    def backward(ctx, factor):
        return factor * ctx.gradient, None


def search_once(case, optimizer, params, loss_fn):
    """One step; the plus optimizers refuse a negative loss, and say just that."""
    if case.rule is Plus and -math.inf < loss_fn() < 0:
        with pytest.raises(RuntimeError, match="need one that is not negative"):
            step(optimizer, params, loss_fn)
        return
    step(optimizer, params, loss_fn)
    assert optimizer.counters.searches == 1


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", HARD)
@every_optimizer
@both_directions
@failures_expected
def test_hard_functions_are_no_error(case, name, direction, sign, scale):
    function, start, _ = HARD[name]
    param = point(*start)
    optimizer = case.make([param], direction=direction)
    search_once(case, optimizer, [param], lambda: sign * scale * Plain.apply(param, function))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, -1.0, -1e3, 1e3])
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
@every_optimizer
@failures_expected
def test_losses_of_every_size_and_sign_are_no_error(case, scale, offset, dtype):
    """Also 0 and below: the check looks at shares of their size."""
    if dtype == torch.float32:
        scale = min(scale, 1e15)  # squares of gradients must be finite
    params = parameters(dtype)
    x, y = next(batches(1, dtype))
    at_start = float(network_loss(params, x, y))
    for shift in (offset, -at_start):
        optimizer = case.make(parameters(dtype))
        ours = optimizer.param_groups[0]["params"]
        search_once(
            case, optimizer, ours, lambda s=shift, p=ours: scale * (network_loss(p, x, y) + s)
        )


@both_classes
@failures_expected
def test_a_loss_of_0_is_no_error(cls):
    param = point(1.0, 2.0)
    step(cls([param]), [param], lambda: (param - param.detach()).sum() * 0 + (param - 1).prod() * 0)
    param = point(1.0, 2.0)
    optimizer = cls([param])
    step(optimizer, [param], lambda: param.sum() - 3)
    assert optimizer.last_search.loss == 0
    assert optimizer.last_search.accepted


@every_optimizer
@both_directions
@pytest.mark.parametrize("seed", range(5))
@failures_expected
def test_networks_with_kinks_are_no_error(case, direction, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    optimizer = case.make(net.parameters(), direction=direction)
    step(optimizer, list(net.parameters()), lambda: nn.functional.l1_loss(net(x), y))
    assert optimizer.last_search.accepted


@every_optimizer
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("low_precision_loss", [False, True])
@failures_expected
def test_bf16_autocast_is_no_error(case, seed, low_precision_loss):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(16, 4)

    def loss_fn():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x)
            return (out if low_precision_loss else out.float()).sub(1).square().mean()

    optimizer = case.make(net.parameters())
    step(optimizer, list(net.parameters()), loss_fn)
    assert optimizer.counters.searches == 1


@each([case for case in CASES if case.variants])
@pytest.mark.parametrize("wrong", [None, partial(scaled, 3.0)], ids=["right", "wrong"])
@low_precision_expected
@failures_expected
def test_16_bit_parameters_get_no_verdict(case, wrong):
    """Their steps are rounded: what the loss does at a small one says nothing."""
    params = parameters(torch.bfloat16)
    x, y = next(batches(1, torch.bfloat16))
    optimizer = case.make(params)
    step(
        optimizer,
        params,
        lambda: network_loss([p.float() for p in params], x.float(), y.float()),
        wrong,
    )
    assert optimizer.counters.searches == 1


@both_classes
def test_a_kink_where_the_weights_are_is_no_error(cls):
    """An L1 penalty on weights that start at 0: the loss falls by less than its gradient says."""
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    nn.init.zeros_(net.weight)
    x = torch.randn(32, 4)
    y = x @ torch.tensor([[1.0], [0.5], [0.0], [0.0]])
    optimizer = cls(net.parameters())

    def loss_fn():
        return (net(x) - y).square().mean() + 0.7 * net.weight.abs().sum()

    step(optimizer, list(net.parameters()), loss_fn)
    assert optimizer.counters.searches == 1


@both_classes
@pytest.mark.parametrize(
    ("start", "offset"),
    [(1.0, 1.0), (1e-6, 1.0), (1.0, 1e6)],
)
@failures_expected
def test_a_kink_close_by_is_no_error(cls, start, offset):
    """Beyond it the loss rises along a straight line."""
    param = point(start)
    optimizer = cls([param])
    step(optimizer, [param], lambda: offset + param.abs().sum())
    assert optimizer.counters.searches == 1


@both_classes
@failures_expected
def test_the_optimum_of_a_classifier_is_no_error(cls):
    """The slope is tiny there, and a loss that is far away grows along a straight line."""
    x = torch.tensor([[1.0, 2.0], [2.0, 1.0], [-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    x, y = torch.cat([x, x]), torch.tensor([1, 0, 1, 0, 0, 1, 0, 1], dtype=torch.float64)
    param = point(1e-7, 0.0)
    optimizer = cls([param])
    loss_fn = nn.functional.binary_cross_entropy_with_logits
    step(optimizer, [param], lambda: loss_fn(x @ param, y))
    assert optimizer.counters.searches == 1


@both_classes
@pytest.mark.parametrize("beyond", [math.inf, -math.inf, math.nan])
@failures_expected
def test_a_cliff_close_by_is_no_error(cls, beyond):
    param = point(1.0)

    def loss_fn():
        return 1e4 + param.sum() + (beyond if float((param.detach() - 1).abs()) > 0.05 else 0.0)

    optimizer = cls([param])
    step(optimizer, [param], loss_fn)
    assert optimizer.counters.searches == 1


# --- the cost -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_at", "passes"),
    [
        (lambda eta: 1.0 - eta, 1),  # agrees
        (lambda eta: 1.0 - eta + 400 * eta**2, 2),  # only at the smaller step
        (lambda eta: 1.0 + math.cos(1e9 * eta), 5),  # nowhere, but not alike on both sides
        (lambda eta: math.nan, 4),
    ],
)
def test_it_costs_one_pass_where_all_is_well_and_at_most_five(loss_at, passes):
    tried = []

    def noting(eta):
        tried.append(eta)
        return loss_at(eta)

    check_derivative(Line(noting, loss=1.0, slope=1.0, resolution=1e-16))
    assert len(tried) == passes
    assert max(tried) <= 1e-2


@pytest.mark.parametrize(("slope", "resolution"), [(0.0, 1e-16), (-1.0, 1e-16), (1.0, 1e-3)])
def test_it_costs_nothing_where_there_can_be_no_verdict(slope, resolution):
    def fail(eta):
        raise AssertionError("evaluated")

    check_derivative(Line(fail, loss=1.0, slope=slope, resolution=resolution))


@pytest.mark.parametrize("ratio", [-1.0, 0.1, 0.65, 1.5, 2.0, 1000.0])
def test_a_straight_line_of_another_slope_is_an_error(ratio):
    with pytest.raises(
        RuntimeError, match=re.escape(f"fell by {ratio:.3g} times what they predict")
    ):
        check_derivative(Line(lambda eta: 1.0 - ratio * eta, loss=1.0, slope=1.0, resolution=1e-16))
