"""Where f_k(w_k) and its evaluations come from: closure, loss, objective (contract lines 9, 10)."""

import math
from functools import partial

import pytest
import torch
from cases import silent
from problems import (
    Recorded,
    backward,
    batches,
    clones,
    network_loss,
    parameters,
    same,
    square,
    train,
)
from torch import nn

from hf_salsa import SaLSaAdam, SaLSaSGD, SLSAdam
from hf_salsa.optimizers import skips


@pytest.mark.parametrize("pass_loss", [True, False])
@silent
def test_the_known_loss_saves_a_forward_pass(pass_loss):
    """The first search takes two more: one at the same weights, one at a small step."""
    params = parameters()
    optimizer = SLSAdam(params)
    for number, (x, y) in enumerate(batches(6)):
        calls = 0

        def closure(x=x, y=y):
            nonlocal calls
            calls += 1
            assert not torch.is_grad_enabled()
            return network_loss(params, x, y)

        loss = network_loss(params, x, y)
        optimizer.zero_grad()
        loss.backward()
        before = optimizer.counters.trials
        returned = optimizer.step(closure, loss=loss if pass_loss else None)  # graph and all
        checks = 2 if number == 0 else 0
        expected = optimizer.last_search.trials + checks + (not pass_loss)
        assert calls == expected == optimizer.counters.trials - before
        assert returned.item() == loss.item() == optimizer.last_search.loss


@pytest.mark.parametrize("as_float", [True, False])
def test_a_closure_that_does_not_reproduce_the_loss_is_said_and_mended(as_float):
    params = parameters()
    optimizer = SLSAdam(params)
    x, y = next(batches(1))

    def closure():  # say, other dropout masks
        loss = 1.1 * network_loss(params, x, y)
        return float(loss) if as_float else loss

    with pytest.warns(UserWarning, match="the step size is chosen on another loss") as caught:
        for _ in range(3):
            loss = backward(params, partial(network_loss, params, x, y))
            optimizer.step(closure, loss=float(loss) if as_float else loss)
            assert optimizer.last_search.loss == pytest.approx(1.1 * float(loss))
    assert len(caught) == 1
    assert optimizer.param_groups[0]["reevaluate_loss"] is True


@pytest.mark.parametrize(("error", "reevaluate"), [(20, False), (60, True)])
@pytest.mark.filterwarnings("ignore:Evaluating the objective again")
def test_a_few_roundings_are_no_difference(error, reevaluate):
    """The spacing is that of the loss's own precision."""
    params = parameters()
    optimizer = SLSAdam(params)
    loss_fn = partial(network_loss, params, *next(batches(1)))
    loss = backward(params, loss_fn)
    spacing = torch.finfo(torch.float32).eps
    optimizer.step(loss_fn, loss=(loss * (1 + error * spacing)).float())
    assert optimizer.param_groups[0]["reevaluate_loss"] is reevaluate


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("loss_known", [False, True])
def test_an_attached_objective_replaces_the_closure(explicit, loss_known):
    ours, theirs = parameters(), parameters()
    optimizer, other = SaLSaAdam(ours), SaLSaAdam(theirs)
    for x, y in batches(5):
        objective = Recorded(partial(network_loss, ours, x, y))
        optimizer.attach(objective)
        loss = backward(ours, objective)
        objective.loss = loss if loss_known else None
        optimizer.step(objective if explicit else None)
        assert objective.cleared == 1
        train(other, theirs, [(x, y)])
    assert same(clones(ours), clones(theirs))
    evaluations = 0 if loss_known else 5
    assert optimizer.counters.trials == other.counters.trials + evaluations


def test_no_stale_autocast_cache_is_left():
    """The next forward pass of the same autocast region sees the new weights."""
    torch.manual_seed(0)
    weight, x = nn.Parameter(torch.randn(1, 6)), torch.randn(32, 6)

    def loss_fn():
        return (nn.functional.linear(x, weight).float() - 3).square().mean()

    optimizer = SaLSaSGD([weight], weight_decay=0.9)  # the step is not the trial point
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step(loss_fn, loss=backward([weight], loss_fn))
        inside = loss_fn().item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert inside == loss_fn().item()
    assert optimizer.last_search.accepted


def test_the_objective_is_cleared_when_a_step_fails():
    params = parameters()
    optimizer = SaLSaAdam(params)

    def closure():
        raise KeyboardInterrupt

    objective = Recorded(closure)
    optimizer.attach(objective)
    backward(params, partial(square, params))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert objective.cleared == 1


def test_a_known_gradient_norm_is_not_computed_again(monkeypatch):
    params = parameters()
    optimizer = SaLSaAdam(params)
    objective = Recorded(partial(square, params), gradient_norm=torch.tensor(1.0))
    optimizer.attach(objective)
    backward(params, objective)
    with monkeypatch.context() as patch:
        patch.delattr(skips, "sum_over_shards")  # which the norm of all gradients takes
        optimizer.step()
        assert optimizer.counters.searches == 1
    objective.gradient_norm = math.inf
    backward(params, objective)
    optimizer.step()  # the norm overflowed, no gradient did
    assert optimizer.counters.skipped_steps == 0
    backward(params, objective)
    params[0].grad[0, 0] = math.inf
    optimizer.step()
    assert optimizer.counters.skipped_steps == 1
