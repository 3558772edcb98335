"""One step: the update is torch's, and `step()` without a search (contract lines 14, 16)."""

from functools import partial

import pytest
import torch
from cases import both_directions, every_optimizer
from problems import (
    Recorded,
    backward,
    batches,
    bowl,
    clones,
    complex_numbers,
    initial_weights,
    mixed_precision,
    network_loss,
    non_contiguous,
    parameters,
    point,
    same,
    scalar_and_empty,
    search_every,
    snapshot,
    square,
    train,
)
from torch import nn

from hf_salsa import SaLSaAdam, SaLSaAdamPlus, SaLSaSGD


@pytest.mark.parametrize(
    ("cls", "option", "equal"),
    [
        (SaLSaAdam, {"betas": (0.0, 0.999)}, True),
        (SaLSaAdam, {"betas": (0.9, 0.999)}, False),
        (SaLSaSGD, {"momentum": 0.0}, True),
        (SaLSaSGD, {"momentum": 0.9}, False),
    ],
)
@both_directions
def test_the_step_has_momentum_and_the_paper_tests_it_without(cls, option, equal, direction):
    params = parameters()
    optimizer = cls(params, direction=direction, initial_step_size=5e-3, **option)
    train(optimizer, params, batches(5))
    x, y = next(batches(1))
    seen = {}

    def closure():
        loss = network_loss(params, x, y)
        seen[float(loss.detach())] = clones(params)
        return loss

    loss = backward(params, closure)
    search_every(optimizer, 1)
    optimizer.step(closure, loss=loss)
    assert optimizer.last_search.accepted
    trial_point = seen[optimizer.last_search.trial_loss]
    end = clones(params)
    moved = max(float((w - t).abs().max()) for w, t in zip(end, trial_point, strict=True))
    if equal or direction == "momentum":
        assert moved < 1e-12
    else:
        assert moved > 1e-4


@pytest.mark.parametrize(
    "make", [parameters, scalar_and_empty, non_contiguous, complex_numbers, mixed_precision]
)
@every_optimizer
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_step_is_torchs_at_the_chosen_step_size(case, make, weight_decay):
    """AdamW's and SGD's own step, bit for bit, after searches and between them."""
    ours, theirs = make(), make()
    rival = case.torchs_own(theirs, weight_decay)
    optimizer = case.make(ours, weight_decay=weight_decay, initial_step_size=0.1)
    for step in range(12):
        search_every(optimizer, 1 if step % 3 == 0 else 5)
        searched = optimizer.search_due
        loss_fn = partial(bowl, ours, step)
        optimizer.step(loss_fn, loss=backward(ours, loss_fn))
        assert searched is (step % 3 == 0)
        backward(theirs, partial(bowl, theirs, step))
        rival.param_groups[0]["lr"] = optimizer.step_size
        if not case.adam:  # decoupled weight decay, which torch's SGD has not
            with torch.no_grad():
                for param in theirs:
                    if param.grad is not None:
                        param.mul_(1 - optimizer.step_size * weight_decay)
        rival.step()
        # Torch takes complex numbers apart only in its slower kernel.
        rtol = 1e-12 if make is complex_numbers else 0
        for param, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(param.detach(), expected.detach(), rtol=rtol, atol=0)
    assert optimizer.counters.searches == 4
    assert optimizer.counters.failed_searches == 0


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_momentum_of_plus_is_nesterovs(beta1, weight_decay):
    """By its formula; what is kept is Adam's m_k."""
    param = point(1.0, -2.0, 3.0)
    optimizer = SaLSaAdamPlus([param], betas=(beta1, 0.99), weight_decay=weight_decay, cool_down=0)
    w, m, v = param.detach().clone(), torch.zeros(3), torch.zeros(3)
    for k in range(1, 31):
        loss_fn = lambda k=k: (param * param).sum() * (1 + k % 3) + param.prod() + 9  # noqa: E731
        optimizer.step(loss_fn, loss=backward([param], loss_fn))
        g, eta = param.grad, optimizer.step_size
        m, v = beta1 * m + (1 - beta1) * g, 0.99 * v + 0.01 * g**2
        n = (beta1 * m + (1 - beta1) * g) / (1 - beta1 ** (2 * k))
        w = (1 - eta * weight_decay) * w - eta * n / ((v / (1 - 0.99**k)).sqrt() + 1e-8)
        torch.testing.assert_close(param.detach(), w, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], m, rtol=1e-9, atol=1e-12)
    assert float((w - point(1.0, -2.0, 3.0).detach()).abs().min()) > 0.01


@every_optimizer
def test_sparse_gradients_are_refused(case):
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = case.make(embedding.parameters())
    with pytest.raises(
        RuntimeError, match=f"{case.cls.__name__} does not support sparse.*sparse=False"
    ):
        optimizer.step(lambda: 0.0)


@every_optimizer
@pytest.mark.parametrize("with_gradients", [False, True])
def test_step_without_anything_creates_state_only(case, with_gradients):
    """As checkpoint libraries do: without gradients, or with lr 0."""
    params = parameters()
    optimizer = case.make(params, weight_decay=0.1)
    if with_gradients:
        backward(params, partial(square, params))
        optimizer.param_groups[0]["lr"] = 0.0
    before = snapshot(optimizer)
    assert optimizer.step(closure=None) is None
    assert same(clones(params), initial_weights())
    assert same(optimizer.state_dict()["param_groups"], before["param_groups"])
    for param in params:
        assert optimizer.state[param].keys() == case.state_names
        kept = {n: value for n, value in optimizer.state[param].items() if n != "previous"}
        assert not any(value.any() for value in kept.values())
    optimizer.param_groups[0]["lr"] = optimizer.step_size
    fresh_params = parameters()
    fresh = case.make(fresh_params, weight_decay=0.1)
    assert train(optimizer, params, batches(5)) == train(fresh, fresh_params, batches(5))


@every_optimizer
def test_step_without_anything_keeps_the_state_there_is(case):
    params = parameters()
    optimizer = case.make(params)
    train(optimizer, params, batches(3))
    before = snapshot(optimizer)
    for param in params:
        param.grad = None
    optimizer.step()
    assert same(optimizer.state_dict(), before)


@every_optimizer
def test_gradients_without_an_objective_show_the_fix(case):
    param = point(1.0)
    optimizer = case.make([param])
    backward([param], partial(square, [param]))
    name = case.cls.__name__
    fix = rf"{name}\.step\(\) found gradients.*step\(closure, loss=loss\).*BatchObjective"
    with pytest.raises(RuntimeError, match=fix):
        optimizer.step()
    optimizer.attach(Recorded(partial(square, [param]), recorded=False))
    with pytest.raises(RuntimeError, match=fix):
        optimizer.step()
    assert param.item() == 1.0


@every_optimizer
def test_a_closure_without_gradients_shows_the_fix(case):
    param = point(1.0)
    with pytest.raises(RuntimeError, match=r"found no gradients\. Call loss\.backward\(\) before"):
        case.make([param]).step(lambda: square([param]))
