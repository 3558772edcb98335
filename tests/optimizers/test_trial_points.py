"""Slopes, trial points, and the way back (contract lines 2, 8, 9, 14)."""

import math
from functools import partial
from typing import ClassVar

import pytest
import torch
from cases import (
    EVERY,
    both_directions,
    every_optimizer,
    failures_expected,
    that_backtrack,
    with_rare_searches,
)
from problems import (
    Recorded,
    backward,
    batches,
    bowl,
    clones,
    complex_numbers,
    network_loss,
    non_contiguous,
    parameters,
    point,
    same,
    search_every,
    square,
    train,
)
from torch import nn

from hf_salsa import SLSSGD, SaLSaSGD, SLSAdam
from hf_salsa.optimizers import LineSearchAdam, LineSearchSGD, trial_points
from hf_salsa.rules import Plus, SaLSa


@pytest.mark.parametrize("clip_factor", [1.0, 0.01])
@every_optimizer
@both_directions
def test_slope_is_the_directional_derivative(case, direction, clip_factor, monkeypatch):
    """Measured by tiny steps. Clipping shortens the step, it does not make the loss flatter."""
    params = parameters()
    optimizer = case.make(params, direction=direction, initial_step_size=1e-7)
    x, y = next(batches(1))
    loss_fn = partial(network_loss, params, x, y)
    tried = {}  # loss -> step size

    def moves_to(points, step_size, move_to=trial_points.TrialPoints.move_to):
        move_to(points, step_size)
        tried[float(loss_fn())] = step_size

    monkeypatch.setattr(trial_points.TrialPoints, "move_to", moves_to)
    objective = Recorded(loss_fn, clip_factor=clip_factor)
    optimizer.attach(objective)
    for _ in range(1 if case.rule.looks_back else 4):
        objective.loss = backward(params, loss_fn)
        for param in params:
            param.grad *= clip_factor
        optimizer.step()
        record = optimizer.last_search
        assert record.accepted
        # The smallest where it goes on to the largest that is accepted.
        decrease, trial = record.decrease, tried[record.trial_loss]
        if case.rule is Plus:
            trial = min(tried.values())
            decrease = next(record.loss - loss for loss, size in tried.items() if size == trial)
        assert decrease == pytest.approx(trial * record.slope, rel=1e-4)
        if case.rule is SaLSa:
            assert record.decrease == pytest.approx(record.step_size * record.slope, rel=1e-4)


def test_words_that_have_not_occurred_change_no_digit_of_the_trial_point():
    """Their second moment is 0, which is raised to what the processor takes the root of fast."""
    param = point(0.0, 0.0, 0.0, 0.0, dtype=torch.float32)
    param.grad = grad = torch.tensor([0.0, 1e-25, 1e-16, 1e-3])
    # Below half of the step of the first search's check: made from the backup.
    optimizer, trials = SLSAdam([param], initial_step_size=0.25, max_trials=1), []

    def closure():
        trials.append(param.detach().clone())
        return 1.0 + (param.detach().double() @ grad.double())

    optimizer.step(closure)
    vhat = torch.zeros(4).addcmul(grad, grad, value=(1 - 0.999) / (1 - 0.999**1))
    direction = grad * (vhat.sqrt() + 1e-8).reciprocal()
    assert optimizer.last_search.accepted
    assert direction[1] != 0 == vhat[1]
    assert torch.equal(trials[-1], -optimizer.last_search.step_size * direction)


def test_the_slope_counts_the_steps_of_each_parameter():
    """One that joins late has its own k in Eq. 2."""
    early, late = point(1.0, -2.0), point(0.5)
    optimizer = SLSAdam([early, late], initial_step_size=1e-3)
    for used in ([early], [early], [early, late]):
        loss_fn = partial(square, used)
        optimizer.step(loss_fn, loss=backward([early, late], loss_fn))
    slope = 0.0
    for param, k in ((early, 3), (late, 1)):
        vhat = optimizer.state[param]["exp_avg_sq"] / (1 - 0.999**k)
        slope += float((param.grad**2 / (vhat.sqrt() + 1e-8)).sum())
    assert optimizer.last_search.slope == pytest.approx(slope, rel=1e-9)


def test_the_slope_is_added_up_in_double_precision():
    params = [point(0.0, dtype=torch.float32) for _ in range(101)]
    for param in params:
        param.grad = torch.ones_like(param)
    params[0].grad *= 1e4
    optimizer = SaLSaSGD(params, initial_step_size=1e-12)
    grads = [param.grad for param in params]
    optimizer.step(
        lambda: 1.0 + sum(float(g @ p.detach()) for g, p in zip(grads, params, strict=True))
    )
    assert optimizer.last_search.slope == 1e8 + 100  # float32 has no such number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, float])
@failures_expected
def test_what_the_losss_precision_cannot_show_is_not_tried(dtype):
    """A loss that is a plain number has the precision of the weights."""
    param = point(1.0)
    param.grad = torch.ones_like(param)
    optimizer = SLSSGD([param], max_trials=100)
    tried = []

    def closure():
        tried.append(1 - param.item())
        loss = 1.0 if param.item() == 1 else 2.0
        return loss if dtype is float else torch.tensor(loss, dtype=dtype)

    optimizer.step(closure)
    assert optimizer.last_search.outcome == "unresolved"
    spacing = torch.finfo(torch.float64 if dtype is float else dtype).eps
    smallest = min(step for step in tried if step > 0)
    assert 0.99 * spacing <= smallest <= 1.01 * spacing / 0.9


@that_backtrack
def test_a_long_way_down_costs_few_evaluations(case):
    """From 1 to about 1e-5: beyond 2e-5 the loss rises."""
    param = point(1.0, -1.0)
    start = param.detach().clone()
    optimizer = case.make([param])
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        moved = float((param - start).abs().max())
        return 2.0 if moved > 2e-5 else 1.0 - float((start - param).sum())

    param.grad = torch.ones_like(param)
    optimizer.step(closure, loss=1.0)
    settings = case.cls.default_settings()
    found = optimizer.step_size / settings.get("first_share", 1)
    assert settings["backtrack_factor"] * 2e-5 < found <= 2e-5
    assert optimizer.last_search.accepted
    assert optimizer.counters.trials == calls <= 20


@pytest.mark.parametrize("beyond", [math.nan, 1e9])
@pytest.mark.parametrize("backtrack_factor", [0.4, 0.9])
def test_trial_points_are_exact_to_a_few_roundings(beyond, backtrack_factor):
    """Also those that are made of the trial point before: j = 0, 1, 2, 4, ... and back again."""
    generator = torch.Generator().manual_seed(3)
    start = torch.rand(1000, generator=generator) + 0.5  # none so small that the fit below decides
    grad = torch.randn(1000, generator=generator)
    direction = -grad.double()
    param = nn.Parameter(start.clone())
    optimizer = SaLSaSGD([param], backtrack_factor=backtrack_factor, initial_step_size=3e37)
    threshold = 3e-3
    seen: ClassVar[list[float]] = []

    def closure():
        moved = param.detach().double() - start.double()
        seen.append((float(moved @ direction / (direction @ direction)), param.detach().clone()))
        return torch.tensor(-1e30 if seen[-1][0] < threshold else beyond)

    closure_of_replay = iter([torch.tensor(1.0)])
    param.grad = grad
    optimizer.step(lambda: next(closure_of_replay, None) or closure(), loss=torch.tensor(1.0))
    assert optimizer.last_search.accepted
    assert len(seen) > 10
    for step_size, weights in seen:
        exact = start.double() + step_size * direction
        largest = torch.maximum(start.abs().double(), exact.abs())
        error = (weights.double() - exact).abs()
        assert (error <= 3 * torch.finfo(torch.float32).eps * largest).all()
    below = [step_size for step_size, _ in seen if step_size < threshold]
    assert optimizer.step_size == pytest.approx(max(below), rel=1e-4)
    # The last two of the bisection enclose the threshold.
    assert optimizer.step_size / backtrack_factor > threshold


@pytest.mark.parametrize(
    ("make", "pieces"), [(parameters, 11), (complex_numbers, 2), (non_contiguous, 2)]
)
@every_optimizer
@both_directions
@failures_expected
def test_small_pieces_give_the_same_trajectory(monkeypatch, case, make, pieces, direction):
    """A model larger than one piece; a layout that cannot be cut is taken whole."""
    runs = []
    for limit in (2**18, 5):
        monkeypatch.setattr(trial_points, "_SMALLEST_CHUNK", limit)
        params = make()
        optimizer = case.make(params, direction=direction)
        loss_fn = partial(bowl, params, 3)
        sizes = []
        for _ in range(10):
            optimizer.step(loss_fn, loss=backward(params, loss_fn))
            sizes.append(optimizer.step_size)
        chunks = trial_points.cut(
            optimizer.param_groups,
            state_of=optimizer._state_of,
            step_numbers=optimizer.step_numbers,
            backups={},
        )
        runs.append((sizes, clones(params), len(list(chunks))))
    (sizes, weights, whole), (sizes_cut, weights_cut, cut) = runs
    assert (whole, cut) == (1, pieces)
    assert sizes_cut == pytest.approx(sizes, rel=1e-6)
    for weight, weight_cut in zip(weights, weights_cut, strict=True):
        torch.testing.assert_close(weight_cut, weight)


def test_parameters_without_gradients_are_neither_copied_nor_written():
    frozen = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    unused = point(1.0)
    params = parameters()
    groups = [{"params": [*params, unused]}, {"params": [frozen]}]
    optimizer = SLSAdam(groups, weight_decay=0.1)
    versions = frozen._version, unused._version
    train(optimizer, params, batches(5))
    assert (frozen._version, unused._version) == versions
    assert set(optimizer._backups) == set(params)
    assert frozen not in optimizer.state
    assert unused not in optimizer.state


def test_one_backup_is_kept_while_every_step_searches():
    params = parameters()
    optimizer = SLSAdam(params)
    train(optimizer, params, batches(1))
    backup = dict(optimizer._backups)
    train(optimizer, params, batches(3))
    assert all(optimizer._backups[p] is backup[p] for p in params)


@with_rare_searches
def test_steps_that_do_not_search_evaluate_and_copy_nothing(case):
    params = parameters()
    optimizer = case.make(params, initial_step_size=1e-3, max_search_interval=10)
    train(optimizer, params, batches(3))
    case.settle(optimizer, interval=1)
    train(optimizer, params, batches(1))
    assert not optimizer.search_due

    def closure():
        raise AssertionError("evaluated")

    for _ in range(2):
        backward(params, partial(square, params))
        before = clones(params)
        searches, size = optimizer.counters.searches, optimizer.step_size
        assert optimizer.step(closure) is None
        assert (optimizer.counters.searches, optimizer.step_size) == (searches, size)
        assert optimizer._backups == {}
        assert all(not torch.equal(a, b) for a, b in zip(before, params, strict=True))


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("case", "failing_call"),
    [(case, call) for case in EVERY for call in (1, 2, 3, 4) if call < 4 or case.backtracks],
    ids=str,
)
def test_an_exception_in_the_closure_leaves_the_weights_exactly(case, failing_call, error):
    params = parameters(torch.float32)
    optimizer, undisturbed = case.make(params), parameters(torch.float32)
    data = list(batches(4, torch.float32))
    loss_fn = partial(network_loss, params, *data[0])
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise error
        return loss_fn()

    loss = backward(params, loss_fn)
    start = clones(params)
    with pytest.raises(type(error)):
        optimizer.step(closure, loss=loss)
    assert calls == failing_call
    assert same(clones(params), start)
    # And the run can go on as if nothing had happened.
    assert train(optimizer, params, data) == train(case.make(undisturbed), undisturbed, data)
    assert same(clones(params), clones(undisturbed))


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("steps_before", [0, 5])
@every_optimizer
def test_an_exception_in_a_trial_leaves_everything_as_it_was(case, steps_before, error):
    params, undisturbed = parameters(torch.float32), parameters(torch.float32)
    optimizer, other = case.make(params), case.make(undisturbed)
    data = list(batches(9, torch.float32))
    train(optimizer, params, data[:steps_before])
    train(other, undisturbed, data[:steps_before])
    loss_fn = partial(network_loss, params, *data[steps_before])
    start, calls = clones(params), 0

    def closure():
        nonlocal calls
        calls += 1
        if not same(clones(params), start):
            raise error
        return loss_fn()

    loss = backward(params, loss_fn)
    with pytest.raises(type(error)):
        optimizer.step(closure, loss=loss)
    # The first search of all evaluates the loss once more at w_k.
    assert calls == (1 if steps_before else 2)
    assert same(clones(params), start)
    rest = data[steps_before:]
    assert train(optimizer, params, rest) == train(other, undisturbed, rest)
    assert same(clones(params), clones(undisturbed))


class Agreement(SaLSa):
    """It notes <g_k, p_k> where others can read it."""

    wants_agreement = True
    seen: ClassVar[list[float]] = []

    def search(self, state, line):
        self.seen.append(line.agreement)
        return super().search(state, line)


class AgreementAdam(LineSearchAdam):
    rule_type = Agreement


class AgreementSGD(LineSearchSGD):
    rule_type = Agreement


def test_without_momentum_there_is_no_agreement():
    """Earlier gradients put nothing into the direction: <g_k, 0>."""
    params = parameters()
    train(AgreementSGD(params), params, batches(3))
    assert Agreement.seen[-3:] == [0.0] * 3


@pytest.mark.parametrize("clip_factor", [1.0, 0.25])
@pytest.mark.parametrize("cls", [AgreementAdam, AgreementSGD])
def test_the_agreement_is_of_earlier_steps_only(cls, clip_factor):
    """Against the formula, computed from the state that the step before left; unclipped."""
    params = parameters()
    optimizer = cls(params, **({} if cls is AgreementAdam else {"momentum": 0.9}))
    data = list(batches(6))
    train(optimizer, params, data[:5])
    search_every(optimizer, 1)
    objective = Recorded(partial(network_loss, params, *data[5]), clip_factor=clip_factor)
    optimizer.attach(objective)
    objective.loss = backward(params, objective.closure)
    expected = 0.0
    for param in params:
        state, unclipped = optimizer.state[param], param.grad.clone()
        param.grad *= clip_factor
        if cls is AgreementSGD:
            earlier = 0.9 * state["momentum_buffer"]
        else:
            v = 0.999 * state["exp_avg_sq"] + 0.001 * param.grad**2
            denominator = (v / (1 - 0.999**6)).sqrt() + 1e-8
            earlier = 0.9 * state["exp_avg"] / (1 - 0.9**6) / denominator
        expected += (unclipped * earlier).sum().item()
    optimizer.step()
    assert Agreement.seen[-1] == pytest.approx(expected, rel=1e-9)
