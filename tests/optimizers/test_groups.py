"""Parameter groups: plain scalars, what they share, what is their own (contract lines 15, 18)."""

import math
from dataclasses import asdict
from functools import partial

import pytest
import torch
from cases import every_optimizer
from problems import (
    backward,
    batches,
    clones,
    differences,
    network_loss,
    parameters,
    same,
    train,
)

from hf_salsa import SaLSaAdam, SaLSaSGD


@every_optimizer
def test_groups_hold_the_same_plain_scalars_from_beginning_to_end(case):
    params = parameters()
    optimizer = case.make([{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:]}])

    def types():
        return [
            {name: type(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    before = types()
    assert before[0] == before[1]
    assert set(before[0].values()) <= {int, float, bool, str, tuple}
    train(optimizer, params, batches(50))
    assert optimizer.counters.searches > 5
    assert types() == before
    first, second = optimizer.param_groups
    assert differences(first, second) == {"weight_decay"}
    assert first["lr"] == first["step_size"] == optimizer.step_size
    assert first["lr"] != first["initial_step_size"]
    assert asdict(optimizer.counters).items() <= first.items()
    assert optimizer.state_dict().keys() == {"state", "param_groups"}


@every_optimizer
def test_a_group_may_join_late(case):
    params = parameters()
    optimizer = case.make(params[:2])
    for x, y in batches(5):
        loss = backward(params, partial(network_loss, params, x, y))
        optimizer.step(partial(network_loss, params, x, y), loss=loss)
    own = {"weight_decay": 0.1, **({"betas": (0.8, 0.9)} if case.adam else {"momentum": 0.5})}
    optimizer.add_param_group({"params": params[2:], **own})
    first, second = optimizer.param_groups
    assert differences(first, second) == own.keys()
    assert second["lr"] == optimizer.step_size
    before = clones(params)
    train(optimizer, params, batches(5))
    assert all(not torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert first["lr"] == second["lr"] == optimizer.step_size


@every_optimizer
def test_settings_of_the_search_are_not_a_groups_own(case):
    params = parameters()
    defaults = case.cls.default_settings()
    other = {"gradient": "momentum", "momentum": "gradient"}[defaults["direction"]]
    setting, start = case.some_setting, defaults["initial_step_size"]
    for own in (
        {setting: defaults[setting] / 2},
        {"cool_down": 0.123},
        {"lr": start / 2},
        {"direction": other},
        {"searches": 7},
    ):
        ((name, value),) = own.items()
        message = f"{name}={value!r} in a parameter group is not allowed.*one step size for all"
        with pytest.raises(ValueError, match=message):
            case.make([{"params": params, **own}])
        optimizer = case.make(params[:1])
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": params[1:], **own})
        assert len(optimizer.param_groups) == 1
    # The same value is no contradiction: groups that are read from another optimizer have it.
    same_values = {setting: defaults[setting], "lr": start}
    assert case.make([{"params": params, **same_values}]).step_size == start


@pytest.mark.parametrize(
    ("cls", "own"),
    [
        (SaLSaAdam, {"weight_decay": -0.1}),
        (SaLSaAdam, {"betas": (0.9, 1.0)}),
        (SaLSaAdam, {"eps": 0.0}),
        (SaLSaSGD, {"momentum": 1.0}),
        (SaLSaSGD, {"weight_decay": math.nan}),
    ],
)
def test_a_groups_own_options_are_checked(cls, own):
    (name,) = own
    with pytest.raises(ValueError, match=f"^{name}=.* is not allowed: it must be"):
        cls([{"params": parameters(), **own}])


@every_optimizer
def test_a_learning_rate_from_outside_is_ignored_and_said_once(case):
    ours, theirs = parameters(), parameters()
    optimizer, undisturbed = case.make(ours), case.make(theirs)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    with pytest.warns(UserWarning, match=r"Something set lr=.*scheduler.*ignored.*Remove") as said:
        for batch in batches(6):
            train(optimizer, ours, [batch])
            assert optimizer.param_groups[0]["lr"] == optimizer.step_size
            scheduler.step()
            train(undisturbed, theirs, [batch])
    assert len(said) == 1
    assert same(clones(ours), clones(theirs))
    assert optimizer.step_size == undisturbed.step_size
