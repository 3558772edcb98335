"""Checkpoints, copies and pickles (contract line 15)."""

import copy
from functools import partial

import pytest
import torch
from cases import EVERY, every_optimizer, silent
from problems import (
    Recorded,
    backward,
    batches,
    clones,
    each_way_of_carrying_over,
    parameters,
    regression,
    same,
    snapshot,
    square,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)


@each_way_of_carrying_over
@every_optimizer
@pytest.mark.parametrize("tail", [{}, {"cool_down": 0.6, "total_steps": 40}], ids=["", "tail"])
def test_a_continued_run_equals_the_uninterrupted_one(case, carry_over, tail):
    params = parameters()
    optimizer = case.make(
        params, initial_step_size=0.01, **case.known(max_search_interval=10), **tail
    )
    data = list(batches(40))
    train(optimizer, params, data[:9])
    case.settle(optimizer, interval=3)
    train(optimizer, params, data[9:10])
    assert 0 < optimizer.param_groups[0]["steps_since_search"] < 3  # between two searches
    other_params, other = carry_over(partial(case.make, **case.known(c=0.77)), params, optimizer)
    assert same(other.state_dict(), optimizer.state_dict())
    assert other.counters == optimizer.counters
    assert other.search_due == optimizer.search_due
    assert train(other, other_params, data[10:]) == train(optimizer, params, data[10:])
    assert same(clones(other_params), clones(params))
    assert same(other.state_dict(), optimizer.state_dict())
    assert not set(map(id, other_params)) & set(map(id, params))
    if tail:
        assert optimizer.step_size < 0.1 * optimizer.last_search.step_size  # cooled down


@every_optimizer
def test_checkpoint_libraries_round_trip(case):
    """torch.distributed.checkpoint makes the optimizer create its state with step(None), lr 0."""

    def steps(model, loss_at, optimizer):
        sizes = []
        for step in range(8):
            loss_fn = partial(loss_at, step)
            optimizer.step(loss_fn, loss=backward(list(model.parameters()), loss_fn))
            sizes.append(optimizer.step_size)
        return sizes

    model, loss_at = regression()
    optimizer = case.make(model.parameters())
    untouched = snapshot(optimizer)["param_groups"]
    get_optimizer_state_dict(model, optimizer)
    assert same(optimizer.state_dict()["param_groups"], untouched)
    steps(model, loss_at, optimizer)
    stored = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other_model, other_loss_at = regression()
    other = case.make(other_model.parameters())
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, stored)
    assert steps(other_model, other_loss_at, other) == steps(model, loss_at, optimizer)
    assert same(other.state_dict()["state"], optimizer.state_dict()["state"])


@every_optimizer
def test_loading_keeps_the_objective(case):
    params = parameters()
    optimizer = case.make(params)
    objective = Recorded(partial(square, params))
    optimizer.attach(objective)
    optimizer.load_state_dict(optimizer.state_dict())
    backward(params, objective)
    optimizer.step()
    assert optimizer.counters.searches == 1


@every_optimizer
def test_copies_leave_the_objective_behind(case):
    params = parameters()
    optimizer = case.make(params)
    optimizer.attach(Recorded(partial(square, params)))
    train(optimizer, params, batches(1))
    copied_params, copied = copy.deepcopy((params, optimizer))
    assert copied.last_search is None
    backward(copied_params, partial(square, copied_params))
    with pytest.raises(RuntimeError, match="no loss to re-evaluate"):
        copied.step()


@every_optimizer
@pytest.mark.parametrize("rival", [torch.optim.AdamW, torch.optim.SGD])
def test_checkpoints_of_other_optimizers_are_refused(case, rival):
    params = parameters()
    name = case.cls.__name__
    message = f"not written by {name} but by another kind of optimizer. Resume with"
    with pytest.raises(ValueError, match=message):
        case.make(params).load_state_dict(rival(params).state_dict())


@every_optimizer
def test_checkpoints_of_other_rules_are_refused(case):
    params = parameters()
    for other in EVERY:
        if other.state_of_rule != case.state_of_rule:
            message = f"not written by {case.cls.__name__} but by {other.family}. Resume with the"
            with pytest.raises(ValueError, match=message):
                case.make(params).load_state_dict(other.make(params).state_dict())


@every_optimizer
@pytest.mark.parametrize("steps", [0, 2])
def test_checkpoints_of_other_directions_are_refused(case, steps):
    """Adam's in SGD and SGD's in Adam, whether a step was taken or not."""
    params = parameters()
    for other in EVERY:
        if other.rule is case.rule and other.adam != case.adam:
            rival = other.make(params)
            train(rival, params, batches(steps))
            message = f"not written by {case.cls.__name__} but by {other.family}. Resume with the"
            with pytest.raises(ValueError, match=message):
                case.make(params).load_state_dict(rival.state_dict())


def twin_of(case):
    """The class with another rule, whose state has the same names."""
    rule = type(f"Twin{case.rule.__name__}", (case.rule,), {})
    return type(f"Twin{case.cls.__name__}", (case.cls,), {"rule_type": rule})


@every_optimizer
@pytest.mark.parametrize("steps", [0, 2])
def test_checkpoints_of_rules_with_the_same_names_are_refused(case, steps):
    params = parameters()
    ours, theirs = case.make(params), twin_of(case)(params, **case.settings)
    for one, other in ((ours, theirs), (theirs, ours)):
        train(other, params, batches(steps))
        untouched = snapshot(one)
        message = (
            f"written with the rule {other.rule_type.__name__}, but the rule of "
            f"{type(one).__name__} is {one.rule_type.__name__}. Resume with"
        )
        with pytest.raises(ValueError, match=message):
            one.load_state_dict(other.state_dict())
        assert same(one.state_dict(), untouched)


@every_optimizer
@silent
def test_a_checkpoint_that_does_not_name_its_rule_loads(case):
    """As those of before did not."""
    params = parameters()
    optimizer = case.make(params)
    train(optimizer, params, batches(3))
    stored = snapshot(optimizer)
    for group in stored["param_groups"]:
        assert group.pop("rule") == case.rule.__name__
    other = case.make(params)
    other.load_state_dict(stored)
    assert same(other.state_dict(), optimizer.state_dict())


# What the parameter groups of a checkpoint held before rules had states of their own.
FORMER = {
    "h": 0.0,
    "step_size_average_fast": 0.0,
    "step_size_average_slow": 0.0,
    "require_decrease": False,
    "former_setting": 1.5,
}


@every_optimizer
@silent
def test_a_checkpoint_that_holds_more_loads(case):
    params = parameters()
    optimizer = case.make(params)
    data = list(batches(20))
    train(optimizer, params, data[:10])
    stored = snapshot(optimizer)
    for group in stored["param_groups"]:
        group.update({name: value for name, value in FORMER.items() if name not in group})
    other_params = [nn.Parameter(w) for w in clones(params)]
    other = case.make(other_params)
    other.load_state_dict(stored)
    assert train(other, other_params, data[10:]) == train(optimizer, params, data[10:])
    assert same(clones(other_params), clones(params))
    assert other.counters == optimizer.counters
    other.add_param_group({"params": [nn.Parameter(torch.ones(2))]})  # has no former settings
    # torch adds "differentiable" to the defaults of whatever was loaded
    assert other.param_groups[1].keys() - {"differentiable"} == optimizer.param_groups[0].keys()
    train(other, other_params, data[:3])
