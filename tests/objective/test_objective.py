"""The objective is the loss that was differentiated, of all its micro-batches (6, 8, 10)."""

import warnings

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from noisy import clones, streams
from torch import nn

from hf_salsa import BatchObjective, SaLSaAdam, SaLSaSGD
from hf_salsa.accelerated import unwrap_optimizer


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


class Counting(BatchObjective):
    """Counts its evaluations."""

    calls = 0

    def __call__(self):
        self.calls += 1
        return super().__call__()


@pytest.mark.parametrize("cls", [BatchObjective, Counting])
@pytest.mark.parametrize("held", [lambda objective: objective, lambda objective: [objective]])
def test_a_model_may_hold_its_objective(model, cls, held):
    """It moves on while it evaluates: a trial does not put it back to an earlier micro-batch."""
    optimizer = SaLSaSGD(model.parameters())
    objective = cls(model, optimizer)
    model.held = held(objective)
    total = 0.0
    for _ in range(3):
        loss = objective.record(model, torch.randn(5, 6))
        loss.backward()
        total = total + loss.detach()
    assert torch.equal(objective(), total)
    assert torch.equal(objective(), total)
    if cls is Counting:
        assert objective.calls == 2
    optimizer.step()
    assert optimizer.counters.searches == 1
    assert not objective.recorded


def test_a_model_that_holds_its_objective_tries_without_gradients_once(model):
    """A loss that takes a derivative of its own is known as such from the first trial on."""
    optimizer = SaLSaSGD(model.parameters())
    objective = model.objective = BatchObjective(model, optimizer)
    passes = []

    def forces(x):
        passes.append(torch.is_grad_enabled())
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(model(x), x, create_graph=True)
        return force.square().mean()

    objective.record(forces, torch.randn(5, 6)).backward()
    for _ in range(3):
        objective()
    assert passes == [True, False, True, True, True]


def test_accumulated_update_tests_all_its_micro_batches():
    """1 x 8 and 2 x 4 choose the same step sizes and weights."""
    x, y = torch.randn(40, 8, 6, dtype=torch.float64), torch.randn(40, 8, 1, dtype=torch.float64)
    ends = []
    for pieces in (1, 2, 4):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        optimizer = SaLSaAdam(net.parameters())
        objective = BatchObjective(net, optimizer)
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
    assert optimizer.counters.skipped_steps == 1
    loss.backward()
    assert torch.equal(objective.loss, loss.detach())
    second = objective.record(model, torch.randn(5, 6))
    assert torch.equal(objective.loss, loss.detach())  # until it is differentiated
    second.backward()
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


def test_other_optimizers_are_refused(model):
    with pytest.raises(TypeError, match="needs a line-search optimizer.*AdamW"):
        BatchObjective(model, torch.optim.AdamW(model.parameters()))


def test_line_search_is_the_optimizer(model):
    optimizer = SaLSaAdam(model.parameters())
    objective = BatchObjective(model, optimizer)
    assert objective.line_search is optimizer
    with pytest.raises(AttributeError):
        objective.line_search = optimizer  # read only


def test_unwraps_accelerate(model):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = SaLSaAdam(model.parameters())
    prepared = accelerator.prepare(optimizer)
    assert isinstance(prepared, AcceleratedOptimizer)
    assert unwrap_optimizer(prepared) is optimizer
    assert unwrap_optimizer(torch.optim.SGD(model.parameters())) is None
    objective = BatchObjective(model, prepared)
    assert objective.line_search is optimizer
    objective.record(model, torch.randn(5, 6)).backward()
    prepared.step()
    assert optimizer.counters.searches == 1
