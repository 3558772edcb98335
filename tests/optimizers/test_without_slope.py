"""A rule that does without the slope (`StepSizeRule.wants_slope`) and tries step sizes."""

from dataclasses import dataclass
from functools import partial

import pytest
from look_back import OPTIONS, LookBack, both_kinds, seen
from problems import backward, batches, clones, network_loss, parameters, same, snapshot, train

from hf_salsa.optimizers import LineSearchAdam, LineSearchSGD
from hf_salsa.rules import RuleState, SearchRecord, StepSizeRule


@dataclass(frozen=True, kw_only=True)
class Falls(StepSizeRule[RuleState]):
    """The first of 2, 1, 1/2, ... times the step size of before at which the loss falls at all."""

    initial_step_size: float = 100.0

    def search(self, state, line):
        step_size, trials = 4 * state.step_size, 0
        trial_loss = line.loss
        while not trial_loss < line.loss:
            step_size /= 2
            trial_loss, trials = line.loss_at(step_size), trials + 1
        searched = state.accepted(step_size=step_size)
        return SearchRecord.of(line, searched, trial_loss=trial_loss, trials=trials), searched


class FallsBlindly(Falls):
    def wants_slope(self, state):
        return False


bases = pytest.mark.parametrize("base", [LineSearchAdam, LineSearchSGD])


@bases
def test_it_takes_the_steps_of_one_that_has_the_slope(base):
    runs = []
    for rule in (Falls, FallsBlindly):
        params = parameters()
        optimizer = type("Own", (base,), {"rule_type": rule})(params)
        steps = []
        for batch in batches(12):
            train(optimizer, params, [batch])
            steps.append((optimizer.step_size, optimizer.last_search.trials, clones(params)))
        runs.append((steps, optimizer.last_search.slope))
    (with_slope, slope), (without, none) = runs
    assert same(without, with_slope)
    assert without[0][1] > 5  # the first search went a long way down
    assert len({size for size, _, _ in without}) > 2
    assert slope > 0
    assert none == 0


@bases
def test_an_exception_in_a_trial_leaves_the_weights_exactly(base):
    params = parameters()
    optimizer = type("Own", (base,), {"rule_type": FallsBlindly})(params)
    data = list(batches(4))
    train(optimizer, params, data[:3])
    start, state = clones(params), snapshot(optimizer)
    loss_fn, moved = partial(network_loss, params, *data[3]), []

    def closure():
        moved.append(not same(clones(params), start))
        raise KeyboardInterrupt

    loss = backward(params, loss_fn)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure, loss=loss)
    assert moved == [True]
    assert same(clones(params), start)
    assert same(optimizer.state_dict(), state)


@both_kinds
@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_it_may_look_back_too(cls, order):
    class Blind(LookBack):
        def wants_slope(self, state):
            return False

    runs = []
    for own in (cls, type("Own", (cls.__base__,), {"rule_type": Blind})):
        params = parameters()
        optimizer = own(params, **OPTIONS[cls], order=order)
        steps = []
        for batch in batches(6):
            train(optimizer, params, [batch])
            steps.append((seen(optimizer), clones(params)))
        runs.append(steps)
    assert same(*runs)
    assert runs[0][-1][0][1] != 0
