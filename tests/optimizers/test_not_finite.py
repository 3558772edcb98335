"""What is not finite, anywhere in a run: no average keeps it, and training goes on (line 5)."""

import math
from contextlib import suppress
from functools import partial

import pytest
import torch
from cases import both_directions, every_optimizer
from problems import (
    LOST,
    Recorded,
    backward,
    batches,
    clones,
    differences,
    network_loss,
    parameters,
    same,
    snapshot,
    spoil,
    train,
)

from hf_salsa import SaLSaAdam
from hf_salsa.optimizers import base
from hf_salsa.optimizers.skips import gradient_norm, square_limit
from hf_salsa.rules import SaLSa

VALUES = [math.nan, math.inf, -math.inf, 1e-45, 1e38]
pytestmark = pytest.mark.filterwarnings("ignore")


def all_finite(optimizer):
    numbers = [v for g in optimizer.param_groups for v in g.values() if isinstance(v, float)]
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    return all(map(math.isfinite, numbers)) and all(bool(t.isfinite().all()) for t in tensors)


def spoiled_step(optimizer, params, batch, what, value):
    loss_fn = partial(network_loss, params, *batch)
    loss, closure = backward(params, loss_fn), loss_fn
    if what == "loss":
        loss = torch.full_like(loss, value)
    elif what == "loss and trials":
        loss, closure = torch.full_like(loss, value), lambda: torch.full_like(loss, value)
    elif what == "trials":
        closure = lambda: torch.full_like(loss, value)  # noqa: E731
    elif what == "scale":
        loss, closure = loss * value, lambda: loss_fn() * value
        for param in params:
            param.grad *= value
    elif what == "one gradient":
        params[1].grad[3] = value
    else:
        for param in params:
            param.grad.fill_(value)
    return optimizer.step(closure, loss=loss)


@pytest.mark.slow
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    "what", ["loss", "loss and trials", "trials", "scale", "one gradient", "all gradients"]
)
@every_optimizer
def test_at_every_position_of_a_short_run(case, what, value):
    """Weights and all that is kept stay finite; only a loss of another scale is refused."""
    spoils_gradients = what in ("scale", "one gradient", "all gradients")
    data = list(batches(5, torch.float32))
    for position in (0, 1, 3):
        params = parameters(torch.float32)
        optimizer = case.make(params)
        for number, batch in enumerate(data):
            if number != position:
                train(optimizer, params, [batch])
            elif position == 0 and math.isfinite(value):  # no multiple of the other's
                with suppress(RuntimeError):  # then the first search says that
                    spoiled_step(optimizer, params, batch, what, value)
            else:
                spoiled_step(optimizer, params, batch, what, value)
            assert all_finite(optimizer)
            assert all(bool(p.isfinite().all()) for p in params)
        before = clones(params)
        train(optimizer, params, data[:3])
        assert all_finite(optimizer)
        counters = optimizer.counters
        if not math.isfinite(value):
            assert counters.skipped_steps == spoils_gradients
        elif spoils_gradients and value == 1e38:  # the largest of "scale" may be below the limit
            assert counters.skipped_steps == 1
        assert optimizer.step_size == 0 or not same(clones(params), before)


@pytest.mark.parametrize("cause", LOST)
@every_optimizer
def test_a_lost_loss_costs_the_search_and_not_the_step(case, cause):
    params = parameters()
    optimizer = case.make(params)
    train(optimizer, params, batches(5))
    assert optimizer.search_due
    before, start = snapshot(optimizer)["param_groups"][0], clones(params)
    for number in range(2):
        closure, loss = spoil(params, cause)
        optimizer.step(closure, loss=loss)
        assert optimizer.last_search.outcome == "loss"
        assert optimizer.last_search.trials == 0
        assert optimizer.counters.failed_searches == number + 1
    moved = differences(before, optimizer.param_groups[0])
    assert moved - {"trials"} == {"steps", "searches", "failed_searches"}
    assert optimizer.counters.skipped_steps == 0
    assert not same(clones(params), start)  # a step of the size of before


@every_optimizer
def test_a_lost_loss_is_said_once(case):
    params = parameters()
    optimizer = case.make(params)
    train(optimizer, params, batches(5))
    with pytest.warns(UserWarning, match=r"the loss is nan while the gradients are finite") as said:
        for _ in range(2):
            closure, loss = spoil(params, "nan loss")
            optimizer.step(closure, loss=loss)
    assert len(said) == 1


@pytest.mark.parametrize("cause", LOST)
@every_optimizer
def test_lost_losses_never_end_a_run(case, cause):
    params = parameters()
    optimizer = case.make(params)
    train(optimizer, params, batches(3))
    for _ in range(25):
        closure, loss = spoil(params, cause)
        optimizer.step(closure, loss=loss)
    assert optimizer.counters.failed_searches == 25
    train(optimizer, params, batches(1))
    assert optimizer.counters.failed_searches == 25


@pytest.mark.parametrize("cause", LOST)
@every_optimizer
def test_before_any_step_size_a_lost_loss_moves_the_moments_only(case, cause):
    params = parameters()
    optimizer = case.make(params)
    start = clones(params)
    closure, loss = spoil(params, cause)
    optimizer.step(closure, loss=loss)
    assert same(clones(params), start)
    assert optimizer.step_size == optimizer.param_groups[0]["lr"] == 0.0
    assert len(optimizer.state) == (len(params) if case.state_names else 0)
    train(optimizer, params, batches(1))
    assert optimizer.step_size > 0


@pytest.mark.parametrize(("value", "skips"), [(3e18, 0), (2e19, 1), (3e38, 1)])
@every_optimizer
def test_a_norm_that_overflows_is_looked_into(case, value, skips):
    """A step is taken if the square of each element is finite (on the host, which can ask)."""
    params = parameters(torch.float32)
    optimizer = case.make(params)
    train(optimizer, params, batches(3, torch.float32))
    loss_fn = partial(network_loss, params, *next(batches(1, torch.float32)))
    loss = backward(params, loss_fn)
    for param in params:
        param.grad.fill_(value)
    assert not gradient_norm(params) <= square_limit(torch.float32)
    optimizer.step(loss_fn, loss=loss)
    assert optimizer.counters.skipped_steps == skips
    assert all_finite(optimizer)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16, torch.float16]
)
def test_the_norm_shows_what_is_not_finite(dtype, transposed, value):
    """Of each type and layout, also where the sum of the squares is too large for the type."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.zeros(60, 50, dtype=dtype), torch.zeros(7, dtype=dtype)]
    for param in params:
        grad = (10 * torch.randn(param.shape, generator=generator)).to(dtype)
        param.grad = grad.t().contiguous().t() if transposed and grad.dim() == 2 else grad
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = torch.cat([param.grad.to(wide).flatten() for param in params]).norm()
    assert 0.99 * exact <= gradient_norm(params) <= 2 * exact
    params[0].grad[59, 49] = value
    assert not gradient_norm(params).isfinite()


@pytest.mark.parametrize("readable", [("cpu",), ()], ids=["host", "accelerator"])
@every_optimizer
def test_one_square_that_overflows_leaves_no_trace(case, readable, monkeypatch):
    """The norm of one element is finite where its square is not; searching or not, it is seen."""
    monkeypatch.setattr(base, "_HOST_DEVICES", readable)
    for interval in (1, 100):
        params = parameters(torch.float32)
        optimizer = case.make(params)
        train(optimizer, params, batches(3, torch.float32))
        case.settle(optimizer, interval)
        before = clones(params), snapshot(optimizer)["state"]
        closure, loss = spoil(params, "2e19 gradient")
        optimizer.step(closure, loss=loss)
        assert optimizer.counters.skipped_steps == 1
        assert same((clones(params), snapshot(optimizer)["state"]), before)


@every_optimizer
def test_large_gradients_in_a_row_keep_moments_finite(case):
    """Momentum adds up: each is finite, and so must their sum be."""
    params = parameters(torch.float32)
    optimizer = case.make(params)
    train(optimizer, params, batches(3, torch.float32))
    for _ in range(15):
        closure, loss = spoil(params, "3e38 gradient")
        optimizer.step(closure, loss=loss)
    assert optimizer.counters.skipped_steps == 15
    assert all_finite(optimizer)


@pytest.mark.parametrize("norm", ["tensor", "float"])
def test_a_noted_norm_that_overflows_is_looked_into(norm):
    params = parameters()
    optimizer = SaLSaAdam(params)
    loss_fn = partial(network_loss, params, *next(batches(1)))
    overflow = torch.tensor(math.inf) if norm == "tensor" else math.inf
    optimizer.attach(Recorded(loss_fn, backward(params, loss_fn), gradient_norm=overflow))
    optimizer.step()
    assert (optimizer.counters.searches, optimizer.counters.skipped_steps) == (1, 0)


@every_optimizer
@both_directions
def test_a_slope_that_overflows_is_a_failed_search(case, direction):
    """A rule that looks back sees <g, u> instead, which does not overflow."""
    params = parameters()
    optimizer = case.make(params, direction=direction)
    train(optimizer, params, batches(3))
    before = snapshot(optimizer)["param_groups"][0]
    loss_fn = partial(network_loss, params, *next(batches(1)))
    loss = backward(params, loss_fn)
    for param in params:
        param.grad.fill_(3e153)  # the sum of their squares overflows, none of them does
    optimizer.step(loss_fn, loss=loss)
    record = optimizer.last_search
    if not case.adam and not case.rule.looks_back:
        assert record.outcome == "slope"
        assert record.slope == math.inf
    if not record.accepted:
        moved = differences(before, optimizer.param_groups[0])
        assert moved - {"trials"} == {"steps", "searches", "failed_searches"}
    if case.rule.looks_back:
        assert record.accepted
        assert 1e150 < abs(record.slope) < math.inf
    assert optimizer.counters.skipped_steps == 0


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_state_that_overflows_is_a_failed_search(number):
    """Whatever the rule: the state of before is kept."""

    class Broken(SaLSa):
        def search(self, state, line):
            record, searched = super().search(state, line)
            return record, searched.accepted(h=number) if state.searches == 2 else searched

    class Own(base.LineSearchOptimizer.__subclasses__()[0]):
        rule_type = Broken

    params = parameters()
    optimizer = Own(params)
    train(optimizer, params, batches(2))
    before = snapshot(optimizer)["param_groups"][0]
    with pytest.warns(UserWarning, match="its numbers overflowed"):
        train(optimizer, params, batches(1))
    assert optimizer.last_search.outcome == "overflow"
    moved = differences(before, optimizer.param_groups[0])
    assert moved == {"steps", "searches", "failed_searches", "trials"}
    train(optimizer, params, batches(1))
    assert optimizer.last_search.accepted
