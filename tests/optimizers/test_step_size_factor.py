"""`step_size_factor`: parameter groups with longer or shorter steps than the others."""

import math

import pytest
import torch
from cases import every_optimizer
from problems import (
    backward,
    batches,
    initial_weights,
    network_loss,
    parameters,
    snapshot,
    train,
)
from torch import nn

FACTORS = (0.25, 1.0, 4.0, 1.0)


def grouped(params):
    groups = [{"params": [p], "step_size_factor": f} for p, f in zip(params, FACTORS, strict=True)]
    for group in groups:
        if group["step_size_factor"] == 1:
            del group["step_size_factor"]
    return groups


@every_optimizer
def test_it_is_the_same_run_in_other_units(case):
    """w = s v: Adam's steps of v are s times as long in w, and SGD's s^2 times."""
    options = {"eps": 1e-30} if case.adam else {}
    units = [f if case.adam else math.sqrt(f) for f in FACTORS]
    ours = parameters()
    optimizer = case.make(grouped(ours), **options)
    theirs = [nn.Parameter(w / s) for w, s in zip(initial_weights(), units, strict=True)]
    plain = case.make(theirs, **options)
    for x, y in batches(40):
        train(optimizer, ours, [(x, y)])

        def loss_fn(x=x, y=y):
            return network_loss([v * s for v, s in zip(theirs, units, strict=True)], x, y)

        plain.step(loss_fn, loss=backward(theirs, loss_fn))
        assert optimizer.step_size == pytest.approx(plain.step_size, rel=1e-9)
        assert optimizer.last_search.slope == pytest.approx(plain.last_search.slope, rel=1e-9)
    assert optimizer.counters.trials == plain.counters.trials > 10
    for w, v, s in zip(ours, theirs, units, strict=True):
        torch.testing.assert_close(w.detach(), v.detach() * s, rtol=1e-6, atol=1e-9)


@every_optimizer
def test_a_checkpoint_has_it(case):
    whole, first, second = parameters(), parameters(), parameters()
    data = list(batches(8))
    train(case.make(grouped(whole)), whole, data)
    before = case.make(grouped(first))
    train(before, first, data[:4])
    after = case.make([{"params": [p]} for p in second])
    with torch.no_grad():
        for new, old in zip(second, first, strict=True):
            new.copy_(old)
    after.load_state_dict(snapshot(before))
    assert [g["step_size_factor"] for g in after.param_groups] == list(FACTORS)
    train(after, second, data[4:])
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


@every_optimizer
def test_a_checkpoint_from_before_there_was_one(case):
    params = parameters()
    optimizer = case.make(params)
    train(optimizer, params, batches(3))
    state = snapshot(optimizer)
    for group in state["param_groups"]:
        del group["step_size_factor"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["step_size_factor"] == 1.0


@every_optimizer
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "1", True])
def test_what_is_refused(case, value):
    with pytest.raises(ValueError, match="step_size_factor=.* finite number above 0"):
        case.make([{"params": parameters(), "step_size_factor": value}])


@every_optimizer
def test_a_learning_rate_of_a_group_is_refused_with_what_to_do(case):
    with pytest.raises(ValueError, match="lr=0.1 in a parameter group.* step_size_factor"):
        case.make([{"params": parameters(), "lr": 0.1}])
