"""Searches that reject or fail keep what there was (contract line 4)."""

import math
from functools import partial

import pytest
import torch
from cases import CASES, EVERY, each, that_backtrack
from problems import backward, differences, point, search_every, snapshot, square

from hf_salsa.rules import SaLSa


@pytest.mark.parametrize("beyond", [math.nan, math.inf, -math.inf])
@that_backtrack
def test_a_trial_loss_that_is_not_finite_is_a_rejection(case, beyond):
    param = point(1.0, 1.0)
    optimizer = case.make([param])
    values = []

    def closure():
        broken = bool((param - 1).abs().max() > 0.01)
        loss = torch.tensor(beyond) if broken else square([param])
        values.append(loss.item())
        return loss

    optimizer.step(closure, loss=backward([param], closure))
    assert optimizer.last_search.accepted
    assert math.isfinite(optimizer.last_search.trial_loss)
    assert sum(not math.isfinite(v) for v in values) >= 5
    assert 0.99 <= float(param.detach().min()) < 1


FAILURES = {
    "slope": (r"does not descend \(slope ", {"direction": "momentum"}),
    "unresolved": ("smaller than its precision can show", {"max_trials": 1000}),
    "trials": ("3 forward passes, the most .* found no step size", {"max_trials": 3}),
}


@pytest.mark.parametrize("outcome", FAILURES)
@each([case for case in CASES if case.rule is SaLSa and case.has_momentum])
def test_a_failed_search_keeps_the_step_size(case, outcome):
    message, options = FAILURES[outcome]
    param = point(1.0, 2.0)
    optimizer = case.make([param], initial_step_size=0.01, **options)
    for _ in range(3):
        optimizer.step(partial(square, [param]), loss=backward([param], partial(square, [param])))
    assert optimizer.counters.failed_searches == 0
    search_every(optimizer, 1)
    before = snapshot(optimizer)["param_groups"][0]
    start = param.detach().clone()

    param.grad = torch.full_like(param, -1e-3 if outcome == "slope" else 1.0)
    with pytest.warns(UserWarning, match=f"{message}.*step size .* of before is kept") as caught:
        for _ in range(2):
            optimizer.step(lambda: torch.tensor(2.0), loss=1.0)
    assert len(caught) == 1  # said once
    assert optimizer.last_search.outcome == outcome
    assert (optimizer.last_search.trials > 0) is (outcome != "slope")
    assert not optimizer.last_search.accepted
    assert optimizer.counters.failed_searches == 2
    moved = differences(before, optimizer.param_groups[0])
    assert moved <= {"steps", "searches", "trials", "failed_searches"}
    assert not torch.equal(param, start)  # a step of the size of before


@pytest.mark.parametrize(
    ("case", "outcome"),
    [
        (case, outcome)
        for case in EVERY
        if case.has_momentum
        for outcome in FAILURES
        if outcome == "slope" or (case.backtracks and case.has("max_trials"))
    ],
    ids=str,
)
def test_without_any_step_size_only_the_moments_move(case, outcome):
    """No search has been accepted: 1.0 may be anything, so no step is taken."""
    message, options = FAILURES[outcome]
    param = point(1.0, 2.0)
    optimizer = case.make([param], weight_decay=0.1, **options)
    param.grad = torch.full_like(param, 0.0 if outcome == "slope" else 1.0)
    with pytest.warns(UserWarning, match=f"{message}.*no step is taken"):
        optimizer.step(lambda: torch.tensor(2.0), loss=2.0)
    assert optimizer.last_search.outcome == outcome
    assert optimizer.counters.failed_searches == 1
    assert param.tolist() == [1.0, 2.0]
    name, share = case.momentum
    torch.testing.assert_close(optimizer.state[param][name], share * param.grad)
    assert optimizer.step_size == optimizer.param_groups[0]["lr"] == 0.0
