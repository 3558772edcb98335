"""Clipping by norm leaves Armijo's right-hand side the true directional derivative (14)."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_salsa import BatchObjective, SaLSaAdam, SaLSaSGD

STEPS = 6
MAX_NORM = 0.05  # below every norm that occurs


def test_clipping_leaves_the_slope_as_it_was():
    slopes = []
    for max_norm in (None, 1e-3):
        torch.manual_seed(0)
        net = nn.Linear(6, 1).double()
        x = torch.randn(32, 6, dtype=torch.float64)
        optimizer = SaLSaSGD(net.parameters())
        objective = BatchObjective(net, optimizer)
        objective.record(lambda x, net=net: (net(x) - 3).square().mean(), x).backward()
        true_slope = sum(float(p.grad.square().sum()) for p in net.parameters())
        if max_norm is not None:
            norm = nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            objective.note_clipping(norm, max_norm)
            # <g, -d> along the clipped direction: one factor, not its square.
            true_slope *= max_norm / (float(norm) + 1e-6)
        optimizer.step()
        slopes.append((optimizer.last_search.slope, true_slope))
    for slope, true_slope in slopes:
        assert slope == pytest.approx(true_slope, rel=1e-9)
    # The directional derivative, measured.
    assert slopes[1][0] < slopes[0][0]


def test_a_clip_that_does_not_bite_changes_nothing():
    net = nn.Linear(2, 1)
    objective = BatchObjective(net, SaLSaSGD(net.parameters()))
    objective.note_clipping(torch.tensor(0.5), 1.0)
    assert float(objective.clip_factor) == 1.0
    objective.note_clipping(4.0, 1.0)
    assert objective.clip_factor == pytest.approx(0.25, rel=1e-5)


def clip_by_hand(objective, scaler):
    optimizer = objective.line_search
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_NORM)
    objective.note_clipping(norm, MAX_NORM)
    return norm


def clip(objective, scaler):
    return objective.clip_grad_norm_(MAX_NORM)


def train(how, cls=SaLSaAdam, scaler=None):
    """Train a small network with dropout; what each step found, and the weights at the end."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = cls(net.parameters())
    objective = BatchObjective(net, optimizer, scaler=scaler)
    found = []
    for _ in range(STEPS):
        x = torch.randn(16, 6)
        loss = objective.record(lambda x: (net(x) - 3).square().mean(), x)
        (loss if scaler is None else scaler.scale(loss)).backward()
        norm = how(objective, scaler)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        found.append((float(norm), optimizer.last_search))
    assert optimizer.counters.searches == STEPS
    return found, [p.detach() for p in net.parameters()]


def assert_same(run, expected):
    assert run[0] == expected[0]
    assert all(map(torch.equal, run[1], expected[1]))


@pytest.mark.parametrize("cls", [SaLSaAdam, SaLSaSGD])
def test_clip_grad_norm_is_clipping_by_hand(cls):
    expected = train(clip_by_hand, cls)
    assert all(norm > MAX_NORM for norm, _ in expected[0])
    assert_same(train(clip, cls), expected)


@pytest.mark.parametrize("how", [clip, clip_by_hand])
def test_clip_grad_norm_sees_through_a_gradient_scaler(how):
    """Scaling by a power of two is exact: the norms and the trajectory are those without."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    assert_same(train(how, scaler=scaler), train(clip))


def test_clip_grad_norm_takes_no_scaler():
    """The constructor has it, so that the objective knows the loss that was differentiated."""
    net = nn.Linear(6, 1)
    objective = BatchObjective(net, SaLSaSGD(net.parameters()))
    with pytest.raises(TypeError, match="positional argument"):
        objective.clip_grad_norm_(1.0, torch.amp.GradScaler("cpu"))


def test_clip_grad_norm_knows_the_scaler_of_accelerate():
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
    net, optimizer = accelerator.prepare(net, SaLSaAdam(net.parameters()))
    objective = BatchObjective(net, optimizer)
    found = []
    for _ in range(STEPS):
        x = torch.randn(16, 6)
        loss = objective.record(lambda x: (net(x) - 3).square().mean(), x)
        accelerator.backward(loss)
        norm = objective.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        found.append((float(norm), objective.line_search.last_search))
    assert_same((found, [p.detach() for p in net.parameters()]), train(clip))


def test_the_slope_of_clipped_gradients_is_the_true_one():
    """<g, -d> with g as it was: with SGD kappa ||g||^2, where d is kappa g."""
    torch.manual_seed(0)
    net = nn.Linear(6, 1).double()
    optimizer = SaLSaSGD(net.parameters())
    objective = BatchObjective(net, optimizer)
    x = torch.randn(32, 6, dtype=torch.float64)
    objective.record(lambda x: (net(x) - 3).square().mean(), x).backward()
    squared = sum(float(p.grad.square().sum()) for p in net.parameters())
    norm = objective.clip_grad_norm_(1e-3)
    assert float(norm) == pytest.approx(squared**0.5, rel=1e-9)
    clipped = sum(float(p.grad.square().sum()) for p in net.parameters()) ** 0.5
    assert clipped == pytest.approx(1e-3, rel=1e-5)
    optimizer.step()
    assert optimizer.last_search.slope == pytest.approx(clipped * float(norm), rel=1e-9)


def test_clip_grad_norm_of_an_overflow_skips_the_step():
    net = nn.Linear(6, 1)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = SaLSaSGD(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    objective = BatchObjective(net, optimizer, scaler=scaler)
    scaler.scale(objective.record(lambda x: net(x).mean() * 3e38, torch.ones(4, 6))).backward()
    assert not torch.isfinite(objective.clip_grad_norm_(1.0))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert all(map(torch.equal, net.parameters(), before))
    objective.record(lambda x: net(x).mean(), torch.ones(4, 6)).backward()
    assert optimizer.counters.skipped_steps == 1
    assert objective.clip_factor == 1.0


@pytest.mark.parametrize("max_norm", [0, 0.0, -1.0, float("nan")])
def test_a_norm_that_is_not_above_0_is_refused(max_norm):
    net = nn.Linear(6, 1)
    objective = BatchObjective(net, SaLSaSGD(net.parameters()))
    objective.record(lambda x: net(x).mean(), torch.ones(4, 6)).backward()
    with pytest.raises(ValueError, match=rf"max_norm={max_norm!r} is not allowed: .*above 0"):
        objective.clip_grad_norm_(max_norm)
