"""The objective equals the training loss and leaves no trace (contract lines 6, 7, 8, 10)."""

import random
import warnings

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from hf_salsa import BatchObjective, SaLSaAdam, SaLSaSGD
from hf_salsa.objective import unwrap_optimizer


class Noisy(nn.Module):
    """Draws from every random stream and moves buffers of every kind."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.Dropout(0.5), nn.Linear(8, 1)
        )
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 1))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("quantised", torch.arange(5000))  # too large to be a counter

    def forward(self, x):
        self.replaced = self.replaced + 1  # a new tensor, not an update in place
        noise = torch.rand(()) + float(np.random.rand()) + random.random()
        return (self.layers(x) + self.spectral(x) + self.replaced.sum()).square().mean() * noise


def streams():
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        random.getstate(),
    )


def clones(named):
    return {name: tensor.clone() for name, tensor in named}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Noisy()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_replay_equals_the_recorded_loss_bit_for_bit(model, micro_batches):
    optimizer = SaLSaSGD(model.parameters())
    objective = BatchObjective(model, optimizer)
    total = 0.0
    for _ in range(micro_batches):
        loss = objective.record(model, torch.randn(5, 6))  # draws between micro-batches, too
        loss.backward()
        total = total + loss.detach()
    assert torch.equal(objective.loss, total)
    assert torch.equal(objective(), total)
    assert torch.equal(objective(), total)  # and again


def test_evaluation_leaves_no_trace(model):
    optimizer = SaLSaSGD(model.parameters())
    objective = BatchObjective(model, optimizer)
    x = torch.randn(5, 6)
    batch = {"x": x}
    objective.record(lambda b: model(b.pop("x")), batch).backward()
    assert "x" not in batch  # the user's own batch is the user's business
    model.layers.eval()
    before = streams(), clones(model.named_buffers()), x.clone()
    grads = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    objective()
    assert streams() == before[0]
    after = clones(model.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before[1].items())
    assert torch.equal(x, before[2])
    for name, param in model.named_parameters():
        grad, value = grads[name]
        assert param.grad is grad
        assert torch.equal(grad, value)
    assert model.training
    assert not model.layers.training


def test_a_step_leaves_only_its_update_behind(model):
    """The same draws follow a step that searched and a step that did not."""
    drawn = []
    for interval in (1, 10):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        net = Noisy()
        optimizer = SaLSaSGD(net.parameters(), initial_step_size=1e-4)  # accepts at once
        objective = BatchObjective(net, optimizer)
        optimizer.param_groups[0]["search_interval"] = interval
        optimizer.param_groups[0]["searches"] = 1  # as if searched before
        before = clones(net.named_parameters())
        objective.record(net, torch.randn(5, 6)).backward()
        optimizer.step()
        counters = optimizer.counters
        assert (counters.searches, counters.failed_searches) == (1 + (interval == 1), 0)
        assert any(not torch.equal(before[name], p) for name, p in net.named_parameters())
        drawn.append((streams(), clones(net.named_buffers())))
    assert drawn[0][0] == drawn[1][0]
    assert all(torch.equal(drawn[0][1][name], value) for name, value in drawn[1][1].items())


def test_nothing_is_captured_on_steps_that_do_not_search(model, monkeypatch):
    optimizer = SaLSaSGD(model.parameters())
    objective = BatchObjective(model, optimizer)
    optimizer.param_groups[0]["search_interval"] = 3

    def fail(*args):
        raise AssertionError("captured")

    monkeypatch.setattr(torch, "get_rng_state", fail)
    monkeypatch.setattr(objective, "_copy_buffers", fail)
    objective.record(model, torch.randn(5, 6)).backward()
    with pytest.raises(RuntimeError, match="no mini-batch to evaluate"):
        objective()
    optimizer.step()
    assert not objective.recorded


def test_accumulated_update_tests_all_its_micro_batches():
    """1 x 8 and 2 x 4 choose the same step sizes and weights."""
    x, y = torch.randn(40, 8, 6, dtype=torch.float64), torch.randn(40, 8, 1, dtype=torch.float64)
    ends = []
    for pieces in (1, 2, 4):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        optimizer = SaLSaAdam(net.parameters())
        objective = BatchObjective(net, optimizer, gradient_accumulation_steps=pieces)
        sizes = []
        for inputs, targets in zip(x, y, strict=True):
            for a, b in zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True):
                loss = objective.record(lambda a, b, net=net: (net(a) - b).square().mean(), a, b)
                (loss / pieces).backward()
            optimizer.step()
            optimizer.zero_grad()
            sizes.append(optimizer.step_size)
        ends.append((sizes, [p.detach().clone() for p in net.parameters()]))
    for sizes, weights in ends[1:]:
        assert sizes == pytest.approx(ends[0][0], rel=1e-9)
        for weight, expected in zip(weights, ends[0][1], strict=True):
            torch.testing.assert_close(weight, expected, rtol=0, atol=1e-9)


def test_an_abandoned_update_is_dropped(model):
    """An overflow under fp16 or an exception leaves a record that no step takes."""
    optimizer = SaLSaSGD(model.parameters())
    objective = BatchObjective(model, optimizer)
    objective.record(model, torch.randn(5, 6)).backward()
    optimizer.zero_grad()  # the step was skipped
    loss = objective.record(model, torch.randn(5, 6))
    assert torch.equal(objective.loss, loss.detach())
    assert optimizer.counters.skipped_steps == 1
    loss.backward()
    second = objective.record(model, torch.randn(5, 6))
    assert torch.equal(objective.loss, loss.detach() + second.detach())


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), KeyboardInterrupt()])
def test_an_exception_in_a_trial_leaves_everything_as_it_was(model, error):
    optimizer = SaLSaAdam(model.parameters())
    objective = BatchObjective(model, optimizer)
    calls = 0

    def loss_fn(x):
        nonlocal calls
        calls += 1
        loss = model(x)
        if calls == 4:
            raise error
        return loss

    objective.record(loss_fn, torch.randn(5, 6)).backward()
    before = streams(), clones(model.named_buffers()), clones(model.named_parameters())
    with pytest.raises(type(error)):
        optimizer.step()
    assert streams() == before[0]
    assert all(torch.equal(b, before[1][name]) for name, b in model.named_buffers())
    assert all(torch.equal(p, before[2][name]) for name, p in model.named_parameters())
    assert not objective.recorded


def test_a_replay_that_differs_is_said_and_mended(model):
    hidden = iter(range(1000))

    def loss_fn(x):
        return (model.spectral(x) - 1).square().mean() * (1 + 0.1 * next(hidden))

    optimizer = SaLSaSGD(model.spectral.parameters())
    objective = BatchObjective(model, optimizer)
    with pytest.warns(UserWarning, match="state that the forward pass changes") as caught:
        for _ in range(3):
            objective.record(loss_fn, torch.ones(5, 6)).backward()
            searched = optimizer.counters.trials
            optimizer.step()
            optimizer.zero_grad()
    assert len([w for w in caught if "re-evaluated" in str(w.message)]) == 1
    # f(w_k) and at least one trial; at the first search the check came on top.
    assert optimizer.counters.trials - searched >= 2
    assert optimizer.param_groups[0]["reevaluate_loss"] is True


def test_a_replay_that_agrees_is_silent(model):
    optimizer = SaLSaSGD(model.parameters())
    objective = BatchObjective(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective.record(model, torch.randn(5, 6)).backward()
        optimizer.step()


def test_autocast_trials_see_the_trial_weights():
    """Inside one autocast region the cached low-precision weights would hide every trial."""
    torch.manual_seed(0)
    net = nn.Linear(6, 1)
    optimizer = SaLSaSGD(net.parameters())
    x = torch.randn(32, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective = BatchObjective(net, optimizer)
        loss = objective.record(lambda x: (net(x).float() - 3).square().mean(), x)
        loss.backward()
        optimizer.step()
    assert optimizer.last_search.accepted
    assert optimizer.last_search.decrease != 0


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


def test_other_optimizers_are_refused(model):
    with pytest.raises(TypeError, match="needs a line-search optimizer.*AdamW"):
        BatchObjective(model, torch.optim.AdamW(model.parameters()))


def test_unwraps_accelerate(model):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = SaLSaAdam(model.parameters())
    prepared = accelerator.prepare(optimizer)
    assert isinstance(prepared, AcceleratedOptimizer)
    assert unwrap_optimizer(prepared) is optimizer
    assert unwrap_optimizer(torch.optim.SGD(model.parameters())) is None
    BatchObjective(model, prepared).record(model, torch.randn(5, 6)).backward()
    prepared.step()
    assert optimizer.counters.searches == 1
