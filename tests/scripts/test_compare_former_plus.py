"""The former rule of `salsa_adam_plus`: it does what it did when its results were published."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comparison.candidates import CANDIDATES
from comparison.former_plus import FormerPlus, FormerPlusAdam, FormerPlusSGD, FormerPlusState
from comparison.runs import Run
from comparison.tasks import PRESETS

from hf_salsa.rules import Line

SETTINGS = FormerPlus(steps_to_double_fast=6)
STARTED = FormerPlusState(step_size=0.01, searches=1)


def parabola(curvature, slope=1.0):
    return lambda eta: 1.0 - slope * eta + curvature * eta**2 / 2


def run(state, loss_at, *, settings=SETTINGS, slope=1.0, agreement=0.0, resolution=0.0):
    """One search: its record, the next state, and the step sizes tried in their order."""
    tried = []

    def noting(step_size):
        tried.append(step_size)
        return loss_at(step_size)

    line = Line(noting, loss=1.0, slope=slope, resolution=resolution, agreement=agreement)
    return *settings.search(state, line), tried


def test_training_starts_at_a_tenth_of_what_the_first_mini_batch_allows():
    """1 - eta + 32 eta^2 accepts eta <= (1 - c) / 32: 2^-6 of the halvings of 1 * 2^(1/500)."""
    record, state, tried = run(FormerPlusState(step_size=1.0), parabola(64.0))
    found = 2**-6 * 2 ** (1 / 500)
    assert state.step_size == record.step_size == pytest.approx(0.1 * found)
    assert record.trials == len(tried) < 10
    assert replace(state, searches=0, step_size=1.0) == FormerPlusState(step_size=1.0)


def test_one_trial_measures_slope_and_curvature_and_armijo_bounds_the_step():
    """A parabola is known from one trial: eta = 2 (1 - c) slope / curvature, however far it is."""
    for curvature in (100.0, 200.0):
        record, state, tried = run(STARTED, parabola(curvature))
        assert tried == [0.01 * 2 ** (1 / 500)]
        assert record.step_size == pytest.approx(min(tried[0], 2 * 0.6 / curvature))
        assert state.curvature / 0.1 == pytest.approx(curvature)


def test_the_step_size_at_most_halves_and_a_wall_counts_as_four_slopes():
    record, state, _ = run(STARTED, lambda eta: 1e6)
    assert record.step_size == 0.005
    assert state.curvature == pytest.approx(0.1 * 4 / (0.01 * 2 ** (1 / 500)))


def test_what_cannot_be_judged():
    walled = lambda eta: math.nan if eta > 0.004 else parabola(1.0)(eta)  # noqa: E731
    record, _, tried = run(STARTED, walled)
    assert tried == [pytest.approx(0.01 * 2 ** (1 / 500) / 2**i) for i in range(3)]
    assert record.step_size == tried[-1]
    record, state, tried = run(STARTED, parabola(1.0), resolution=0.02)
    assert (record.outcome, tried, record.step_size) == ("unresolved", [], 0.01)
    assert state == replace(STARTED, searches=2, failed_searches=1)


def agreeing(values):
    """The growth of each search on a flat loss with these agreements, and the last state."""
    state, growths = STARTED, []
    for value in values:
        state = replace(state, search_interval=1, steps_since_search=0)
        before = state.step_size
        _, state, _ = run(state, parabola(0.0), agreement=value)
        growths.append(state.step_size / before)
    return growths, state


def test_growth_is_fast_while_the_mini_batches_agree_and_never_after():
    fast, slow = pytest.approx(2 ** (1 / 6)), pytest.approx(2 ** (1 / 500))
    assert agreeing([1.0] * 5)[0] == [slow, slow, fast, fast, fast]
    assert agreeing([-1.0] * 5)[0] == [slow] * 5
    growths, state = agreeing([1.0] * 12 + [-1.0] * 8 + [1.0] * 60)
    assert state.warm_up_over
    assert growths[-1] == slow
    assert agreeing([0.0] * 9)[1].warm_up_over is False
    assert agreeing([0.0] * 10)[1].warm_up_over is True


def test_searches_grow_rare_after_the_warm_up():
    state, intervals = replace(STARTED, warm_up_over=True), []
    for _ in range(80):
        state = replace(state, steps_since_search=0)
        record, state, _ = run(state, parabola(0.0))
        intervals.append(record.interval)
    assert intervals == [min(10, 1 + n // 8) for n in range(1, 81)]


@pytest.mark.parametrize("kind", [FormerPlusAdam, FormerPlusSGD])
def test_the_optimizers_are_what_they_were(kind):
    """Along the direction of the step, with every default of then; f = w^2 / 2 at w = 1."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = kind([weight], total_steps=100)
    (group,) = optimizer.param_groups
    expected = {"c": 0.4, "beta3": 0.9, "steps_to_double": 500, "steps_to_double_fast": 12}
    expected |= {"confidence": 2.0, "first_share": 0.1, "backtrack_factor": 0.5, "max_trials": 30}
    expected |= {"max_search_interval": 10, "initial_step_size": 1.0, "cool_down": 0.6}
    expected |= {"direction": "momentum", "head_first": 0, "weight_decay": 0.0}
    expected |= {"momentum": 0.9} if kind is FormerPlusSGD else {"betas": (0.9, 0.999)}
    assert expected.items() <= group.items()
    for step in range(2):
        weight.grad = weight.detach().clone()
        optimizer.step(lambda: weight.square().sum() / 2)
        if step == 0:  # 1 * 2^(1/500) reaches half of the slope's promise, which c = 0.4 allows
            assert optimizer.step_size == pytest.approx(0.1 * 2 ** (1 / 500))
    assert group["agreement"] > 0


def test_the_published_runs_of_it_count_as_done():
    root = Path(__file__).parents[2] / "model_cards"
    for preset in ("cpu", "study"):
        for path in (root / preset).glob("*/*/seed_*/results.json"):
            if path.parent.parent.name.startswith(("former", "tried")):
                results = json.loads(path.read_text(encoding="utf-8"))
                task = PRESETS[preset][results["task"]]
                wanted = (results["task"], task, results["candidate"], None, results["seed"])
                published = Run(*wanted, root / preset)
                assert published.folder == path.parent
                assert published.configuration == results["configuration"]


def test_head_first_it_starts_at_more():
    candidate = CANDIDATES["former_plus_head_first"]
    assert candidate.options == {"head_first": 10, "first_share": 0.3}
    assert CANDIDATES["former_plus"].options == {}
