"""The plus optimizers against their formulas, and what their rule needs of the tensors."""

import math
from functools import partial

import pytest
import torch
from cases import both_directions, of_plus, silent
from problems import (
    Recorded,
    backward,
    batches,
    clones,
    differences,
    each_way_of_carrying_over,
    initial_weights,
    network_loss,
    parameters,
    point,
    same,
    snapshot,
    train,
)
from reference import Parameter, PlusReference

from hf_salsa.optimizers import trial_points


@of_plus
@both_directions
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("variant", ["defaults", "all others"])
@silent
def test_trajectory_is_the_references(case, direction, grouped, variant):
    """300 steps of stochastic mini-batches: every step size, and the weights at the end."""
    weights, params = initial_weights(), parameters()
    search_options = case.variants[variant]
    options = {"direction": direction, **search_options}
    if grouped:
        first, second = case.groups
        own = [first, first, second, second]
        groups = [{"params": params[:2], **first}, {"params": params[2:], **second}]
        optimizer = case.make(groups, **options)
    else:
        own = [{} if case.adam else {"momentum": 0.9}] * 4
        optimizer = case.make(params, **options)
    reference = PlusReference(
        case.cls.__name__, [Parameter(w, **o) for w, o in zip(weights, own, strict=True)], **options
    )
    for x, y in batches(300):
        train(optimizer, params, [(x, y)])
        reference.step(lambda w, x=x, y=y: network_loss(w, x, y))
        assert optimizer.step_size == pytest.approx(reference.applied, rel=1e-4)
    for param, weight in zip(params, reference.weights, strict=True):
        torch.testing.assert_close(param.detach(), weight, rtol=0, atol=1e-3)
    counters = optimizer.counters
    assert counters.searches == reference.searches < 100
    assert 0 <= counters.trials - reference.trials <= 5  # the check of the first search
    print(reference.decided)


@of_plus
@each_way_of_carrying_over
def test_a_continued_run_equals_the_uninterrupted_one(case, carry_over):
    params = parameters()
    optimizer = case.cls(params, total_steps=90)
    data = list(batches(90))
    done = 45
    train(optimizer, params, data[:done])
    while not optimizer.param_groups[0]["steps_since_search"]:  # go on between two searches
        train(optimizer, params, data[done : done + 1])
        done += 1
    other_params, other = carry_over(partial(case.make, c=0.77), params, optimizer)
    assert same(other.state_dict(), optimizer.state_dict())
    assert train(other, other_params, data[done:]) == train(optimizer, params, data[done:])
    assert same(clones(other_params), clones(params))
    assert same(other.state_dict(), optimizer.state_dict())
    assert optimizer.step_size < 0.1 * optimizer.last_search.step_size  # cooled down


@pytest.mark.parametrize("pieces", [5, 12])
@of_plus
def test_small_pieces_give_the_same_trajectory(monkeypatch, case, pieces):
    whole, cut = parameters(), parameters()
    expected = train(case.make(whole), whole, batches(40))
    monkeypatch.setattr(trial_points, "_SMALLEST_CHUNK", pieces)
    assert train(case.make(cut), cut, batches(40)) == pytest.approx(expected, rel=1e-9)


@of_plus
def test_a_group_without_momentum_is_refused_and_not_added(case):
    optimizer = case.make([point(1.0)])
    own = {"betas": (0.0, 0.9)} if case.adam else {"momentum": 0.0}
    with pytest.raises(ValueError, match="compares each gradient with those before it"):
        optimizer.add_param_group({"params": [point(2.0)], **own})
    assert len(optimizer.param_groups) == 1


@of_plus
def test_a_failed_search_keeps_the_step_size(case):
    """No trial is finite: the one thing that a search after the first can fail of here."""
    params = parameters()
    optimizer = case.make(params)
    train(optimizer, params, batches(3))
    before, start = snapshot(optimizer)["param_groups"][0], clones(params)
    loss = backward(params, partial(network_loss, params, *next(batches(1))))
    with pytest.warns(UserWarning, match="max_trials=30 .* step size .* of before is kept") as said:
        for _ in range(2):
            optimizer.step(lambda: torch.tensor(math.nan), loss=loss)
    assert len(said) == 1
    assert optimizer.last_search.outcome == "trials"
    assert optimizer.last_search.trials == 30
    assert optimizer.counters.failed_searches == 2
    moved = differences(before, optimizer.param_groups[0])
    assert moved == {"steps", "searches", "trials", "failed_searches"}
    assert not same(clones(params), start)  # a step of the size of before
