"""Gradients that are not finite: skip, count, say it once, give up (contract line 5)."""

import copy
import warnings

import pytest
import torch
from cases import EVERY, each, every_optimizer, silent
from problems import CAUSES, batches, clones, parameters, same, snapshot, spoil, train
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hf_salsa import BatchObjective, SaLSaAdam
from hf_salsa.optimizers import base


@pytest.mark.parametrize("cause", CAUSES)
@every_optimizer
def test_not_finite_steps_are_skipped(case, cause):
    params = parameters()
    optimizer = case.make(params)
    train(optimizer, params, batches(5))
    assert optimizer.search_due
    weights, state, record = clones(params), snapshot(optimizer), optimizer.last_search
    closure, loss = spoil(params, cause)
    with pytest.warns(UserWarning, match=r"gradients of step 6 are not finite.*skipped.*Said once"):
        optimizer.step(closure, loss=loss)

    assert same(clones(params), weights)
    group = state["param_groups"][0]
    group.update(steps=6, skipped_steps=1, consecutive_skips=1)
    assert same(optimizer.state_dict(), state)
    assert optimizer.counters.skipped_steps == 1
    assert optimizer.last_search is record

    train(optimizer, params, batches(1))
    assert optimizer.param_groups[0]["consecutive_skips"] == 0
    assert optimizer.counters.skipped_steps == 1
    closure, loss = spoil(params, cause)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said
        optimizer.step(closure, loss=loss)
    assert optimizer.counters.skipped_steps == 2


@pytest.mark.parametrize("cause", CAUSES)
def test_twenty_skips_in_a_row_end_the_run(cause):
    params = parameters()
    optimizer = SaLSaAdam(params)
    train(optimizer, params, batches(3))

    def skip(times):
        for _ in range(times):
            closure, loss = spoil(params, cause)
            optimizer.step(closure, loss=loss)

    skip(19)
    train(optimizer, params, batches(1))  # a good step begins the count anew
    skip(19)
    weights = clones(params)
    with pytest.raises(FloatingPointError, match=r"not finite 20 steps in a row.*bf16.*clipping"):
        skip(1)
    assert same(clones(params), weights)
    assert optimizer.counters.skipped_steps == 39


# On an accelerator a step that does not search must not wait for the device: it leaves the skipping
# to torch's fused kernels, and the counting for later. The same path runs on a CPU if no device
# counts as readable.


@pytest.fixture
def unread(monkeypatch):
    monkeypatch.setattr(base, "_HOST_DEVICES", ())


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("layout", ["dense", "not contiguous"])
@every_optimizer
def test_not_finite_steps_are_skipped_without_a_read(case, layout, cause, unread):
    """The fused kernels skip; where a layout forbids them, the foreach ones are not called."""
    params = parameters()
    if layout == "not contiguous":
        params[0] = nn.Parameter(params[0].detach().t().contiguous().t())
    optimizer = case.make(params, weight_decay=0.1)
    train(optimizer, params, batches(5))
    case.settle(optimizer, interval=10)
    train(optimizer, params, batches(2))
    weights, state = clones(params), snapshot(optimizer)
    closure, loss = spoil(params, cause)
    optimizer.step(closure, loss=loss)

    assert same(clones(params), weights)
    assert optimizer._unread_skips._total is not None
    state["param_groups"][0].update(steps=8, skipped_steps=1, consecutive_skips=1)
    with pytest.warns(UserWarning, match=r"not finite: the step is skipped.*Said once"):
        assert same(optimizer.state_dict(), state)
    assert optimizer._unread_skips._total is None

    twin = copy.deepcopy(optimizer)
    twin_params = twin.param_groups[0]["params"]
    for cleared, readable in ((params, ()), (twin_params, ("cpu",))):
        base._HOST_DEVICES = readable
        train(optimizer if cleared is params else twin, cleared, batches(12))
    assert same(clones(params), clones(twin_params))
    assert same(optimizer.state_dict(), twin.state_dict())
    assert optimizer.param_groups[0]["consecutive_skips"] == 0


@every_optimizer
def test_skips_that_nobody_read_end_the_run_too(case, unread):
    params = parameters()
    optimizer = case.make(params)
    train(optimizer, params, batches(3))
    case.settle(optimizer, interval=100)
    weights = clones(params)
    for _ in range(25):
        closure, loss = spoil(params, "nan gradient")
        optimizer.step(closure, loss=loss)
    with pytest.raises(FloatingPointError, match="not finite 25 steps in a row"):
        optimizer.state_dict()
    assert same(clones(params), weights)


@every_optimizer
def test_skips_that_nobody_read_do_not_outlive_a_load(case, unread):
    params = parameters()
    optimizer = case.make(params)
    train(optimizer, params, batches(3))
    case.settle(optimizer, interval=100)
    state = snapshot(optimizer)
    closure, loss = spoil(params, "nan gradient")
    optimizer.step(closure, loss=loss)
    optimizer.load_state_dict(state)
    assert optimizer.counters.skipped_steps == 0
    assert same(optimizer.state_dict(), state)


@pytest.mark.parametrize("pattern", ["x.x", "nx", "xx.x..x.xx.....x", "..x.xxxx.x.x..xxxx"])
@every_optimizer
def test_when_skips_are_read_makes_no_difference(case, pattern, monkeypatch):
    """x: not finite. n: skipped by somebody else. Searches fall on all kinds of steps."""
    ends = []
    for readable in (("cpu",), ()):
        monkeypatch.setattr(base, "_HOST_DEVICES", readable)
        params = parameters()
        optimizer = case.make(params, weight_decay=0.1, **case.known(max_search_interval=3))
        train(optimizer, params, batches(3))
        case.settle(optimizer, interval=3)
        for kind in pattern:
            if kind == "x":
                closure, loss = spoil(params, "inf gradient")
                optimizer.step(closure, loss=loss)
            elif kind == "n":
                optimizer.note_skipped_step()
            else:
                train(optimizer, params, batches(1))
        copied = copy.deepcopy(optimizer)
        assert same(copied.state_dict(), optimizer.state_dict())
        for state in optimizer.state.values():
            state.pop("previous", None)  # kept once more than is needed where skips are not read
        ends.append((clones(params), optimizer.state_dict()))
    assert same(ends[0], ends[1])
    group = ends[0][1]["param_groups"][0]
    assert group["skipped_steps"] == len(pattern) - pattern.count(".")
    assert group["consecutive_skips"] == len(pattern) - 1 - pattern.rfind(".")


@silent
@each([case for case in EVERY if case.adam])  # there is no SGD kernel for tensors without values
@pytest.mark.parametrize("norm", [None, "tensor"])
def test_a_step_without_a_search_reads_nothing_from_an_accelerator(case, norm):
    """Tensors without values stand for the device: to read one raises."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.randn(8, 8, device="cuda")) for _ in range(3)]
        optimizer = case.make(params, weight_decay=0.1)
        objective = BatchObjective(nn.ParameterList(params), optimizer)
        optimizer.param_groups[0].update(search_interval=10, step_size=0.1, lr=0.1, searches=1)
        for _ in range(3):
            loss = objective.record(lambda: torch.randn((), device="cuda", requires_grad=True))
            for param in params:
                param.grad = torch.randn(8, 8, device="cuda")
            objective._note_backward(objective._micro_batches[-1], torch.ones_like(loss))
            if norm is not None:
                objective.note_gradient_norm(torch.randn((), device="cuda"))
            assert optimizer.step() is None
            optimizer.zero_grad()
        assert optimizer.param_groups[0]["steps_since_search"] == 3
        with pytest.raises(DataDependentOutputException):
            _ = optimizer.counters


def test_steps_skipped_by_others_are_counted():
    optimizer = SaLSaAdam(parameters())
    for _ in range(19):
        optimizer.note_skipped_step()
    assert optimizer.counters.skipped_steps == 19
    with pytest.raises(FloatingPointError, match="20 steps in a row"):
        optimizer.note_skipped_step()
    assert optimizer.counters.skipped_steps == 20
