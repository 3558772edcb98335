"""`Line.look_back`: the loss and the slope at the weights before the last step."""

from functools import partial

import pytest
import torch
from cases import both_directions
from look_back import OPTIONS, LookBack, LookBackAdam, both_kinds, make, seen
from problems import (
    Recorded,
    backward,
    batches,
    clones,
    initial_weights,
    network_loss,
    parameters,
    same,
    snapshot,
    train,
)
from reference import Parameter, Reference

from hf_salsa.optimizers import trial_points
from hf_salsa.rules import SearchRecord


@both_kinds
@both_directions
@pytest.mark.parametrize("order", ["before", "after", "both"])
@pytest.mark.parametrize("clip_factor", [1.0, 0.25])
def test_it_sees_the_loss_before_the_last_step(cls, direction, order, clip_factor):
    """Against the formulas in float64: weight decay and momentum are part of the step."""
    params = parameters()
    optimizer = make(cls, params, direction=direction, order=order)
    reference = Reference(
        "SaLSaAdam" if cls is LookBackAdam else "SaLSaSGD",
        [Parameter(w, **OPTIONS[cls]) for w in initial_weights()],
    )
    objective = Recorded(None)
    optimizer.attach(objective)
    before = initial_weights()
    for k, (x, y) in enumerate(batches(8)):
        now = clones(reference.weights)
        step = [w - v for w, v in zip(now, before, strict=True)]
        expected = float(network_loss(before, x, y))
        objective.closure = partial(network_loss, params, x, y)
        objective.loss = backward(params, objective.closure)
        objective.clip_factor = clip_factor
        slope = sum(float((p.grad * u).sum()) for p, u in zip(params, step, strict=True))
        for param in params:
            param.grad *= clip_factor

        reference.observe([p.grad for p in params])
        reference.eta = 0.01 * (1 + k % 3)
        reference.update()
        optimizer.step()
        assert seen(optimizer) == (
            pytest.approx(expected, rel=1e-9),
            pytest.approx(slope, rel=1e-9, abs=1e-15),
        )
        assert (seen(optimizer)[1] == 0) is (k == 0)
        before = now
    for param, weight in zip(params, reference.weights, strict=True):
        torch.testing.assert_close(param.detach(), weight, rtol=0, atol=1e-9)


@both_kinds
@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_exactly_the_weights_of_before(cls, period, dtype):
    """Bit for bit, also where searches are rare: u is the last step, not all since the search."""
    params = parameters(dtype)
    optimizer = make(cls, params, period=period)
    history = [clones(params)]
    searched = 0
    for x, y in batches(13, dtype):
        loss_fn = partial(network_loss, params, x, y)
        loss = backward(params, loss_fn)
        before = history[-2] if len(history) > 1 else history[-1]
        if optimizer.search_due:
            searched += 1
            expected = float(network_loss(before, x, y))
            slope = sum(
                float(p.grad.double().flatten() @ (p.detach() - w).double().flatten())
                for p, w in zip(params, before, strict=True)
            )
            optimizer.step(loss_fn, loss=loss)
            loss_before, slope_before = seen(optimizer)
            assert loss_before == expected
            assert slope_before == pytest.approx(slope, rel=1e-4 if dtype.itemsize == 4 else 1e-12)
        else:
            optimizer.step(loss_fn, loss=loss)
        history.append(clones(params))
    assert searched == len(range(0, 13, period)) == optimizer.counters.searches


@both_kinds
def test_the_first_search_knows_no_step(cls):
    params = parameters()
    optimizer = make(cls, params)
    x, y = next(batches(1))
    loss = network_loss(params, x, y).item()
    train(optimizer, params, [(x, y)])
    assert seen(optimizer) == (loss, 0.0)


@both_kinds
@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_the_search_leaves_the_weights_exactly(cls, order):
    """The step goes from w_k: a twin that never looks back takes the very same."""

    class Twin(LookBack):
        looks_back = False

        def search(self, state, line):
            step_size = self.initial_step_size * (1 + state.searches % 3)
            searched = state.accepted(step_size=step_size)
            loss = line.loss_at(step_size)
            return SearchRecord.of(line, searched, trial_loss=loss, trials=1), searched

    class TwinOptimizer(cls.__base__):
        rule_type = Twin

    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer, twin = make(cls, ours, order=order), TwinOptimizer(theirs, **OPTIONS[cls])
    for batch in batches(10, torch.float32):
        train(optimizer, ours, [batch])
        train(twin, theirs, [batch])
        assert same(clones(ours), clones(theirs))


@both_kinds
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_exception_while_looking_back_leaves_the_weights_exactly(cls, error):
    params, undisturbed = parameters(torch.float32), parameters(torch.float32)
    optimizer, other = make(cls, params), make(cls, undisturbed)
    data = list(batches(6, torch.float32))
    train(optimizer, params, data[:3])
    train(other, undisturbed, data[:3])
    start, state = clones(params), snapshot(optimizer)

    def closure():
        raise error

    loss = backward(params, partial(network_loss, params, *data[3]))
    with pytest.raises(type(error)):
        optimizer.step(closure, loss=loss)
    assert same(clones(params), start)
    assert same(optimizer.state_dict(), state)
    assert train(optimizer, params, data[3:]) == train(other, undisturbed, data[3:])
    assert same(clones(params), clones(undisturbed))


@both_kinds
@pytest.mark.parametrize("order", ["before", "after", "both"])
@pytest.mark.parametrize("kernel", ["_foreach_copy_", "empty_like", "_foreach_add_", "dot"])
def test_an_exception_in_mid_exchange_loses_neither_weights(cls, order, kernel, monkeypatch):
    """At each call of the kernels that move weights, but for the way back at the end."""
    monkeypatch.setattr(trial_points, "_SMALLEST_CHUNK", 9)
    data = list(batches(4, torch.float32))

    def search(stop_at):
        """Return how often the kernel was called before the way back."""
        params = parameters(torch.float32)
        optimizer = make(cls, params, order=order)
        train(optimizer, params, data[:3])
        loss_fn = partial(network_loss, params, *data[3])
        loss = backward(params, loss_fn)
        start, state, calls, inside = clones(params), snapshot(optimizer), 0, 0
        function, leave = getattr(torch, kernel), trial_points.TrialPoints.__exit__

        def counted(*args, **kwargs):
            nonlocal calls
            result = function(*args, **kwargs)
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            return result

        def left(*args):
            nonlocal inside
            inside = calls
            leave(*args)

        with monkeypatch.context() as patch:
            patch.setattr(torch, kernel, counted)
            patch.setattr(trial_points.TrialPoints, "__exit__", left)
            patch.setattr(optimizer, "take_step", lambda update: None)
            if stop_at:
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step(loss_fn, loss=loss)
                assert same(optimizer.state_dict(), state)
            else:
                optimizer.step(loss_fn, loss=loss)
        assert same(clones(params), start)
        return inside

    number = search(0)
    assert number > 3
    for stop_at in range(1, number + 1):
        search(stop_at)
