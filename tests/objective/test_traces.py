"""An evaluation leaves no trace (7), and steps without a search capture nothing (9)."""

import random

import numpy as np
import pytest
import torch
from noisy import Noisy, clones, streams

from hf_salsa import BatchObjective, SaLSaSGD, traces
from hf_salsa.scene import Scene


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
    monkeypatch.setattr("hf_salsa.objective.Snapshot", fail)
    objective.record(model, torch.randn(5, 6)).backward()
    with pytest.raises(RuntimeError, match="no mini-batch to evaluate"):
        objective()
    optimizer.step()
    assert not objective.recorded


def test_without_trace_puts_all_back_even_after_an_error(model):
    x = torch.randn(5, 6)
    before = streams(), clones(model.named_buffers())

    def stop(x):
        model(x)
        assert streams() != before[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), traces.without_trace(Scene(model)):
        stop(x)
    assert streams() == before[0]
    assert all(torch.equal(b, before[1][name]) for name, b in model.named_buffers())


def test_a_snapshot_restores_more_than_once(model):
    x = torch.randn(5, 6)
    snapshot = traces.Snapshot(Scene(model))
    losses = []
    for _ in range(3):
        losses.append(model(x))
        snapshot.restore()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_large_tensors_that_stay_are_not_copied_again(model, monkeypatch):
    """They are quantised weights and the like, which no forward pass was seen to write."""
    model.quantised = torch.arange(200_000)
    scene = Scene(model)
    first = traces.Snapshot(scene)
    model(torch.randn(5, 6))
    first.restore()
    copied = []
    clone = torch.Tensor.clone

    def counting(tensor, *args, **kwargs):
        copied.append(tensor.numel())
        return clone(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "clone", counting)
    traces.Snapshot(scene)
    assert copied
    assert model.quantised.numel() not in copied


def test_one_more_trace_is_one_function(model, monkeypatch):
    """What is counted outside of all modules is put back by a function added to `TRACES`."""

    calls = [0]  # of nobody whom the traces know

    def of_calls(scene):
        count = calls[0]
        return lambda: calls.__setitem__(0, count)

    model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    monkeypatch.setattr(traces, "TRACES", (*traces.TRACES, of_calls))
    optimizer = SaLSaSGD(model.parameters())
    objective = BatchObjective(model, optimizer)
    objective.record(model, torch.randn(5, 6)).backward()
    optimizer.step()
    assert optimizer.counters.trials > 0
    assert calls == [1]
