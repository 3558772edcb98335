"""Weights of a 16-bit type: moments and arithmetic in float32, results rounded once (line 13)."""

import warnings
from functools import partial

import pytest
import torch
from cases import (
    both_directions,
    every_optimizer,
    failures_expected,
    low_precision_expected,
    of_plus,
)
from problems import (
    backward,
    batches,
    clones,
    initial_weights,
    network_loss,
    parameters,
    point,
    same,
    snapshot,
)
from torch import nn

from hf_salsa import SLSSGD


@pytest.mark.parametrize(
    ("dtype", "numbers"),
    [(torch.bfloat16, r"bfloat16.*0\.004 .*40 %.*10 %"), (torch.float16, r"float16.*0\.0005 ")],
)
@every_optimizer
def test_low_precision_weights_are_warned_of(case, dtype, numbers):
    with pytest.warns(UserWarning, match=f"{numbers}.*float32.*bf16=True") as caught:
        case.make([point(1.0, dtype=dtype), point(2.0, dtype=dtype)])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = point(1.0, dtype=dtype).requires_grad_(False)
        case.make([point(1.0), frozen])


@every_optimizer
@both_directions
@low_precision_expected
@failures_expected
def test_low_precision_weights_step_in_float32(case, direction):
    """Moments and arithmetic are float32; only the result is rounded. A float32 one is not."""
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    ours = [nn.Parameter(w.to(dtype)) for w, dtype in zip(initial_weights(), dtypes, strict=True)]
    theirs = [nn.Parameter(p.detach().float()) for p in ours]
    rival = case.torchs_own(theirs, 0.0)
    optimizer = case.make(ours, direction=direction)
    for x, y in batches(10, torch.bfloat16):

        def loss_fn(x=x, y=y):
            return network_loss([p.float() for p in ours], x.float(), y.float())

        loss = backward(ours, loss_fn)
        for p, q in zip(ours, theirs, strict=True):
            q.data = p.detach().float()
            q.grad = p.grad.float()
        optimizer.step(loss_fn, loss=loss)
        rival.param_groups[0]["lr"] = optimizer.step_size
        rival.step()
        rounded = [q.detach().to(p.dtype) for p, q in zip(ours, theirs, strict=True)]
        assert same(clones(ours), rounded)
    kept = [(n, t) for p in ours for n, t in optimizer.state[p].items() if n != "previous"]
    assert {t.dtype for _, t in kept} <= {torch.float32}
    assert all(optimizer.state[p].keys() == case.state_names for p in ours)
    assert optimizer.counters.searches > optimizer.counters.failed_searches


@low_precision_expected
def test_low_precision_trial_points_are_rounded_once():
    """And those of wider neighbours in the same group not at all."""
    low, wide = point(1.0, 3.0, -0.3, dtype=torch.bfloat16), point(1.0, 3.0)
    optimizer = SLSSGD([low, wide], initial_step_size=0.1, backtrack_factor=0.5)
    start, seen = clones([low, wide]), []

    def closure():
        seen.append(clones([low, wide]))
        return [1.0, 2.0, 2.0, 0.0][len(seen) - 1]  # the first call checks the replay

    low.grad = torch.tensor([0.1, -0.2, 0.7], dtype=torch.bfloat16)
    wide.grad = torch.tensor([0.1, -0.2], dtype=torch.float64)
    optimizer.step(closure, loss=1.0)
    first = 0.1 * 2 ** (1 / 500)
    for step_size, (low_trial, wide_trial) in zip(
        [0.0, first, first * 0.5, first * 0.25], seen, strict=True
    ):
        assert same(low_trial, (start[0].float() - step_size * low.grad.float()).bfloat16())
        torch.testing.assert_close(wide_trial, start[1] - step_size * wide.grad, rtol=1e-15, atol=0)


@low_precision_expected
@every_optimizer
def test_loading_keeps_the_precision_of_the_moments(case):
    low = [nn.Parameter(w.bfloat16()) for w in initial_weights()]
    optimizer = case.make(low)
    data = list(batches(5, torch.bfloat16))
    for x, y in data:
        loss_fn = partial(network_loss, low, x, y)
        backward(low, loss_fn)
        optimizer.step(loss_fn)
    saved = snapshot(optimizer)
    fresh = case.make([nn.Parameter(w) for w in clones(low)])
    fresh.load_state_dict(saved)
    assert same(fresh.state_dict(), saved)
    kept = [(n, t) for state in fresh.state.values() for n, t in state.items()]
    dtypes = {t.dtype for name, t in kept if name != "previous"}
    assert dtypes == ({torch.float32} if case.state_names - {"previous"} else set())
    # A copy: training on must not write into the loaded checkpoint.
    assert all(
        value.data_ptr() != saved["state"][i][name].data_ptr()
        for i, state in fresh.state_dict()["state"].items()
        for name, value in state.items()
    )


@of_plus
@low_precision_expected
def test_low_precision_weights_train(case):
    """Slope, agreement and trial points are in float32; the loss is what it is."""
    params = parameters(torch.bfloat16)
    optimizer = case.make(params)
    losses = []
    for x, y in batches(200, torch.bfloat16):
        loss_fn = partial(network_loss, params, x, y)
        losses.append(backward(params, loss_fn))
        optimizer.step(loss_fn, loss=losses[-1])
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
