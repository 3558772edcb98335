"""Looking back over skipped steps, late parameters, every layout, and checkpoints."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases import low_precision_expected
from look_back import LookBack, both_kinds, make, seen
from problems import (
    backward,
    batches,
    clones,
    complex_numbers,
    differences,
    each_way_of_carrying_over,
    initial_weights,
    mixed_precision,
    network_loss,
    non_contiguous,
    parameters,
    point,
    same,
    scalar_and_empty,
    snapshot,
    spoil,
    square,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import Shard, distribute_tensor

from hf_salsa.optimizers import base


@both_kinds
@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("period", [1, 2, 3])
def test_a_skipped_step_is_no_step(cls, readable, period, monkeypatch):
    """Wherever it falls between two searches, and whoever notices it."""
    if not readable:
        monkeypatch.setattr(base, "_HOST_DEVICES", ())
    params = parameters()
    optimizer = make(cls, params, period=period)
    moved = [clones(params)] * 2  # the weights before and after the last step that was taken
    pattern = "..x....xx..x.x.."
    for kind, (x, y) in zip(pattern, batches(len(pattern)), strict=True):
        if kind == "x":
            closure, loss = spoil(params, "nan gradient")
            optimizer.step(closure, loss=loss)
            assert same(clones(params), moved[1])
            continue
        searches = optimizer.counters.searches
        expected = float(network_loss(moved[0], x, y))
        train(optimizer, params, [(x, y)])
        if optimizer.counters.searches > searches:
            assert seen(optimizer)[0] == expected
        moved = [moved[1], clones(params)]
    assert optimizer.counters.skipped_steps == pattern.count("x")
    assert optimizer.counters.searches == math.ceil(pattern.count(".") / period)


@both_kinds
@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("period", [1, 2])
def test_the_factor_is_that_of_the_last_step_that_was_taken(cls, readable, period, monkeypatch):
    """In a tail over the whole run, in which a skipped step has a factor of its own.

    A second run does not know that of the first one's last step.
    """
    if not readable:
        monkeypatch.setattr(base, "_HOST_DEVICES", ())
    factors = []

    class Noting(LookBack):
        def search(self, state, line):
            factors.append(line.last_factor)
            return super().search(state, line)

    params = parameters()
    patterns = ["..x..xx..x.", "x..x."]
    own = type("Own", (cls.__base__,), {"rule_type": Noting})
    optimizer = own(params, period=period, cool_down=1.0)
    expected = []
    for pattern in patterns:
        optimizer.plan(len(pattern))
        last = 0.0
        for step, (kind, batch) in enumerate(zip(pattern, batches(len(pattern)), strict=True)):
            if kind == "x":
                closure, loss = spoil(params, "nan gradient")
                optimizer.step(closure, loss=loss)
                continue
            searches = optimizer.counters.searches
            train(optimizer, params, [batch])
            if optimizer.counters.searches > searches:
                expected.append(last)
            last = optimizer.rule.factor(step, len(pattern))
    assert factors == expected
    assert len(set(factors)) > 3


@both_kinds
def test_a_parameter_that_joins_has_no_step_yet(cls):
    early, late = point(1.0, -2.0), point(0.5)
    optimizer = make(cls, [early])
    for _ in range(3):
        loss_fn = partial(square, [early])
        optimizer.step(loss_fn, loss=backward([early], loss_fn))
    before = clones([early])[0]
    loss_fn = partial(square, [early])
    optimizer.step(loss_fn, loss=backward([early], loss_fn))
    optimizer.add_param_group({"params": [late]})
    loss_fn = partial(square, [early, late])
    step = early.detach() - before
    loss = backward([early, late], loss_fn)
    slope = float(early.grad @ step)
    optimizer.step(loss_fn, loss=loss)
    assert seen(optimizer) == (
        float(square([before, late.new_tensor([0.5])])),
        pytest.approx(slope),
    )


@both_kinds
def test_a_parameter_that_rested_has_no_step(cls):
    """It had no gradient at the step before, so it did not move."""
    used, rested = point(1.0, -2.0), point(0.5)
    optimizer = make(cls, [used, rested])
    weights = []
    for those in ([used, rested], [used, rested], [used], [used, rested]):
        weights.append(clones([used, rested]))
        loss_fn = partial(square, those)
        optimizer.step(loss_fn, loss=backward([used, rested], loss_fn))
    assert not torch.equal(weights[1][1], weights[2][1])
    assert torch.equal(weights[2][1], weights[3][1])
    assert seen(optimizer)[0] == float(square([weights[2][0], weights[3][1]]))


@both_kinds
def test_a_step_of_the_head_alone_is_none_to_look_back_to(cls):
    body, head = point(1.0, -2.0), point(0.5)
    groups = [{"params": [body], "head": False}, {"params": [head], "head": True}]
    optimizer = make(cls, groups, head_first=2)
    start = clones([head])
    for _ in range(3):
        loss_fn = partial(square, [body, head])
        loss = backward([body, head], loss_fn)
        optimizer.step(loss_fn, loss=loss)
    assert optimizer.param_groups[0]["head_steps"] == 2
    assert not same(clones([head]), start)
    assert seen(optimizer) == (float(loss), 0.0)


@both_kinds
@pytest.mark.parametrize(
    "make_params", [scalar_and_empty, non_contiguous, complex_numbers, mixed_precision]
)
def test_parameters_of_every_layout(cls, make_params):
    params = make_params()
    optimizer = make(cls, params)

    def loss_fn():
        return sum((p - 0.3).abs().square().sum().double() for p in params)

    weights = [clones(params)]
    for _ in range(5):
        loss = backward(params, loss_fn)
        before = weights[-2] if len(weights) > 1 else weights[-1]
        expected = sum(float((w - 0.3).abs().square().sum().double()) for w in before)
        slope = sum(
            float(torch.real(p.grad.conj() * (p.detach() - w)).sum())
            for p, w in zip(params, before, strict=True)
        )
        optimizer.step(loss_fn, loss=loss)
        assert seen(optimizer) == (pytest.approx(expected), pytest.approx(slope, rel=1e-4))
        weights.append(clones(params))


@both_kinds
@low_precision_expected
def test_low_precision_weights_look_back_in_float32(cls):
    params = parameters(torch.bfloat16)
    optimizer = make(cls, params)
    weights = [clones(params)]
    for x, y in batches(5, torch.bfloat16):
        loss_fn = partial(network_loss, params, x, y)
        loss = backward(params, loss_fn)
        before = weights[-2] if len(weights) > 1 else weights[-1]
        slope = sum(
            float((p.grad.float() * (p.detach().float() - w.float())).sum())
            for p, w in zip(params, before, strict=True)
        )
        optimizer.step(loss_fn, loss=loss)
        assert seen(optimizer)[0] == float(network_loss(before, x, y))
        assert seen(optimizer)[1] == pytest.approx(slope, rel=1e-4)
        weights.append(clones(params))
    saved = snapshot(optimizer)
    assert {s["previous"].dtype for s in saved["state"].values()} == {torch.bfloat16}


@both_kinds
def test_sharded_parameters_look_back_too(mesh, cls):
    plain = parameters()
    sharded = [nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in initial_weights()]
    optimizer, other = make(cls, sharded), make(cls, plain)
    assert dist.get_world_size() == 1
    for x, y in batches(5):

        def loss_fn(x=x, y=y):
            return network_loss([p.full_tensor() for p in sharded], x, y)

        optimizer.step(loss_fn, loss=backward(sharded, loss_fn))
        train(other, plain, [(x, y)])
        assert seen(optimizer) == pytest.approx(seen(other), rel=1e-9, abs=1e-15)


# --- state --------------------------------------------------------------------------------------


@both_kinds
@each_way_of_carrying_over
@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("done", [1, 5, 6, 7])
def test_a_continued_run_equals_the_uninterrupted_one(cls, carry_over, period, done):
    params = parameters()
    optimizer = make(cls, params, period=period)
    data = list(batches(14))
    train(optimizer, params, data[:done])
    other_params, other = carry_over(partial(make, cls), params, optimizer)
    assert same(other.state_dict(), optimizer.state_dict())
    for batch in data[done:]:
        assert train(other, other_params, [batch]) == train(optimizer, params, [batch])
        assert seen(other) == seen(optimizer)
    assert same(clones(other_params), clones(params))
    assert same(other.state_dict(), optimizer.state_dict())


@both_kinds
def test_checkpoint_libraries_round_trip(cls):
    def steps(model, optimizer, xs):
        found = []
        for x in xs:

            def loss_fn(x=x):
                return (model(x) - 1).square().mean()

            optimizer.step(loss_fn, loss=backward(list(model.parameters()), loss_fn))
            found.append(seen(optimizer))
        return found

    xs = torch.randn(8, 8, 3, generator=torch.Generator().manual_seed(0))
    model, other_model = nn.Linear(3, 1), nn.Linear(3, 1)
    optimizer, other = make(cls, model.parameters()), make(cls, other_model.parameters())
    steps(model, optimizer, xs[:4])
    stored = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, stored)
    assert steps(other_model, other, xs[4:]) == steps(model, optimizer, xs[4:])
    assert same(other.state_dict()["state"], optimizer.state_dict()["state"])


@both_kinds
def test_only_a_rule_that_looks_back_keeps_weights(cls):
    class Other(cls.__base__):
        rule_type = type("Blind", (LookBack,), {"looks_back": False})

    params = parameters()
    optimizer, other = make(cls, params), Other(params)
    optimizer.step()
    assert all("previous" in state for state in optimizer.state.values())
    for param in params:
        param.grad = torch.zeros_like(param)
    other.param_groups[0]["search_interval"] = 5
    other.step(lambda: 0.0)
    assert all("previous" not in state for state in other.state.values())


@both_kinds
def test_groups_hold_its_state_and_settings(cls):
    params = parameters()
    groups = [{"params": params[:2], "weight_decay": 0.2}, {"params": params[2:]}]
    optimizer = make(cls, groups, period=2)
    train(optimizer, params, batches(5))
    first, second = optimizer.param_groups
    assert differences(first, second) == {"weight_decay"}
    assert (first["period"], first["searches"]) == (2, 3)
    assert first["slope_before"] != 0


@both_kinds
def test_frozen_parameters_are_not_kept(cls):
    """They do not move; a copy and two moments of a large frozen body are not affordable."""
    params = parameters()
    frozen = point(1.0, 2.0).requires_grad_(False)
    optimizer = make(cls, [*params, frozen])
    train(optimizer, params, batches(3))
    assert optimizer.counters.searches == 3
    assert not optimizer.state.get(frozen)


@both_kinds
def test_a_rule_that_forgot_to_say_that_it_looks_back_is_told(cls):
    class Forgetful(cls.__base__):
        rule_type = type("Forgetful", (LookBack,), {"looks_back": False})

    params = parameters()
    with pytest.raises(RuntimeError, match="looks_back = True"):
        train(Forgetful(params), params, batches(2))
