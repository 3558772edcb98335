"""Which step sizes the paper's rule tries, how many, and that what it takes fits its criterion."""

import dataclasses
import math
import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lines import EPSILON, accepts_up_to, search, states_of_the_paper
from problems import HARD

from hf_salsa.rules import SaLSa, SaLSaState

DEFAULTS = SaLSa()
SLS = SaLSa(c=0.1, beta3=0.0, max_search_interval=1)
AT_REST = 1e300  # steps to double: the step size does not grow by a digit


def plain_backtracking(settings, state, evaluate, *, loss, slope, resolution):
    """Algorithm 1, one by one: the accepted step size or None, and how often it was cut."""
    n = state.steps_since_search + 1
    first = state.step_size * 2 ** (n / settings.steps_to_double)
    j = 0
    while True:
        step_size = first * settings.backtrack_factor**j
        if step_size * slope < resolution:
            return None, j
        if settings.accepts(state, step_size, loss - evaluate(step_size), slope):
            return step_size, j
        j += 1


settings_of_the_paper = st.builds(
    SaLSa,
    c=st.floats(0.01, 0.99),
    beta3=st.floats(0, 0.99),
    steps_to_double=st.floats(1, 1000),
    backtrack_factor=st.floats(0.1, 0.95),
    max_search_interval=st.integers(1, 20),
    require_decrease=st.booleans(),
    max_trials=st.just(10_000),
)


@given(
    settings=settings_of_the_paper,
    state=states_of_the_paper,
    exponent=st.floats(-20, 2),  # below -16 nothing is accepted in time
    slope=st.floats(1e-3, 10),
    rejected=st.sampled_from([math.nan, math.inf, -math.inf, 1e12]),
)
def test_the_result_is_that_of_one_by_one_backtracking(settings, state, exponent, slope, rejected):
    """Wherever acceptance is monotone in the step size: here it ends at a random threshold."""
    evaluate = accepts_up_to(10**exponent, rejected)
    problem = {"loss": 1.0, "slope": slope, "resolution": EPSILON}
    expected, cuts = plain_backtracking(settings, state, evaluate, **problem)
    record, searched, tried = search(settings, state, evaluate, **problem)

    assert record.accepted is (expected is not None)
    assert record.step_size == pytest.approx(expected or state.step_size, rel=1e-12)
    assert record.trials == len(tried)
    assert record.outcome == ("accepted" if expected is not None else "unresolved")
    assert searched.step_size == record.step_size
    # Doubling up to the answer, then bisection back.
    assert record.trials <= (2 * math.ceil(math.log2(cuts)) + 2 if cuts > 0 else 1)

    n = state.steps_since_search + 1
    first = state.step_size * 2 ** (n / settings.steps_to_double)
    cut = [math.log(step / first) / math.log(settings.backtrack_factor) for step in tried]
    assert cut == pytest.approx([round(j) for j in cut], abs=1e-9)  # eta 2^(n/b) delta^j, whole j
    assert len({round(j) for j in cut}) == len(cut)  # none twice
    assert all(step * slope >= EPSILON * (1 - 1e-9) for step in tried)


@pytest.mark.parametrize("initial", [1.0, 1e-3])
@pytest.mark.parametrize("target", [1e-1, 1e-5, 1e-8])
def test_a_long_way_down_costs_few_evaluations(initial, target):
    record, _, tried = search(DEFAULTS, SaLSaState(step_size=initial), accepts_up_to(target))
    first = initial * 2 ** (1 / 500)
    cuts = max(0, math.ceil(math.log(target / first) / math.log(0.9)))
    assert record.step_size == pytest.approx(first * 0.9**cuts)
    assert len(tried) <= 20


def test_first_trials_double_then_bisect():
    settings = dataclasses.replace(SLS, backtrack_factor=0.5, steps_to_double=1)
    _, _, tried = search(settings, SaLSaState(step_size=0.5), accepts_up_to(2**-11))
    assert [round(-math.log2(step)) for step in tried] == [0, 1, 2, 4, 8, 16, 12, 10, 11]


def test_where_rounding_rejects_the_smallest_step_the_search_turns_back():
    """Doubling ends at 2^-11, the last that shows; from there 10, 9, and down again in the gap."""
    settings = dataclasses.replace(SLS, backtrack_factor=0.5, steps_to_double=1)

    def evaluate(step_size):
        return -1.0 if 2**-10 < step_size < 2**-8.5 else 1.0

    record, _, tried = search(settings, SaLSaState(step_size=0.5), evaluate, resolution=2**-11)
    assert [round(-math.log2(step)) for step in tried] == [0, 1, 2, 4, 8, 11, 10, 9]
    assert record.step_size == 2**-9

    _, _, tried = search(settings, SaLSaState(step_size=0.5), lambda _: 1.0, resolution=2**-15)
    assert [round(-math.log2(step)) for step in tried] == [0, 1, 2, 4, 8, 15, 14, 13, 11]


@pytest.mark.parametrize("best", [6e-7, 1e-6, 3e-6])
def test_a_float32_loss_near_its_resolution(best):
    """One-by-one backtracking finds a step size in every search, so must the fast search.

    The loss is 1 - eta + eta^2 / (2 best), with an error of up to a rounding of float32.
    """
    resolution = 2.0**-23
    failed = 0
    for seed in range(300):
        noise = random.Random(seed)

        def evaluate(step_size, noise=noise):
            exact = 1 - step_size + step_size**2 / (2 * best)
            return round(exact / resolution + noise.uniform(-1, 1)) * resolution

        state = SaLSaState(step_size=noise.uniform(0.5, 1.0))
        problem = {"loss": 1.0, "slope": 1.0, "resolution": resolution}
        assert plain_backtracking(SLS, state, evaluate, **problem)[0] is not None
        record, _, _ = search(SLS, state, evaluate, **problem)
        failed += not record.accepted
    assert failed == 0


@pytest.mark.parametrize("interval", [1, 2, 5, 10])
def test_growth_per_training_step_does_not_depend_on_the_interval(interval):
    settings = dataclasses.replace(DEFAULTS, steps_to_double=50)
    state = SaLSaState(step_size=1e-3, search_interval=interval)
    for k in range(1, 101):
        if state.search_due:
            _, state, tried = search(settings, state, accepts_up_to(math.inf))
            state = dataclasses.replace(state, search_interval=interval)
            assert len(tried) == 1
            assert state.step_size == pytest.approx(1e-3 * 2 ** (k / 50), rel=1e-12)
        else:
            state = dataclasses.replace(state, steps_since_search=state.steps_since_search + 1)
    assert state.searches == 100 // interval
    assert state.step_size == pytest.approx(4e-3)


def test_max_trials_ends_the_bisection_with_the_best_so_far():
    """0, 1, 2, 4, ..., 128 is accepted at the ninth trial; the tenth is 96."""
    state = SaLSaState(step_size=1.0)
    evaluate = accepts_up_to(0.9**100)
    settings = dataclasses.replace(DEFAULTS, max_trials=10)
    record, searched, tried = search(settings, state, evaluate)
    assert record.accepted
    assert len(tried) == record.trials == 10
    assert record.step_size == tried[8] < 0.9**100 < tried[9]
    assert searched.step_size == record.step_size
    unlimited, _, _ = search(DEFAULTS, state, evaluate)
    assert unlimited.step_size > record.step_size
    assert unlimited.trials > 10


# --- extreme but allowed ------------------------------------------------------------------------


def test_growth_stops_at_the_largest_number():
    state = SaLSaState(step_size=sys.float_info.max)
    record, _, _ = search(SLS, state, accepts_up_to(math.inf), slope=1e-300)
    assert record.step_size == sys.float_info.max


def test_growth_over_very_many_steps_does_not_overflow():
    settings = dataclasses.replace(DEFAULTS, steps_to_double=1, max_search_interval=5000)
    state = SaLSaState(step_size=1e-3, steps_since_search=4999)
    record, _, _ = search(settings, state, accepts_up_to(1.0))
    assert record.accepted
    assert 0.9 < record.step_size <= 1.0


def test_no_trial_is_above_the_first_where_rounding_decides():
    """0.965... * 0.642... rounds up to the resolution: the first trial is the only one to show."""
    step_size, slope = 0.9652762942911163, 0.6423916124530726
    resolution = step_size * slope
    assert resolution / slope > step_size
    settings = dataclasses.replace(SLS, steps_to_double=AT_REST)
    record, _, tried = search(
        settings,
        SaLSaState(step_size=step_size),
        lambda step: 0.0 if step > step_size else math.nan,
        slope=slope,
        resolution=resolution,
    )
    assert tried == [step_size]
    assert record.outcome == "unresolved"


# --- hard functions -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("initial", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("backtrack_factor", [0.5, 0.9])
@pytest.mark.parametrize("beta3", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("c", [0.1, 0.5])
def test_accepted_steps_satisfy_the_criterion(name, initial, backtrack_factor, beta3, c):
    """Gradient descent on functions that are hard for a line search: the inequality, each step."""
    function, x, first_outcome = HARD[name]
    settings = dataclasses.replace(
        DEFAULTS, c=c, beta3=beta3, backtrack_factor=backtrack_factor, initial_step_size=initial
    )
    state = SaLSaState(step_size=initial)
    for k in range(10):
        loss, gradient = function(x)
        slope = sum(g * g for g in gradient)

        def moved(step_size, x=x, gradient=gradient):
            return [v - step_size * g for v, g in zip(x, gradient, strict=True)]

        record, searched, _ = search(
            settings,
            state,
            lambda step_size, moved=moved: function(moved(step_size))[0],
            loss=loss,
            slope=slope,
            resolution=EPSILON * abs(loss),
        )
        if k == 0:
            assert record.outcome == first_outcome
        if not record.accepted:
            assert searched.step_size == state.step_size
            break
        trial_loss = function(moved(record.step_size))[0]
        h = beta3 * state.h + (1 - beta3) * (loss - trial_loss)
        s = beta3 * state.s + (1 - beta3) * slope
        assert math.isfinite(trial_loss)
        assert h >= c * record.step_size * s  # Eq. 6
        if beta3 == 0:
            slack = 2 * EPSILON * abs(loss)
            assert trial_loss <= loss - c * record.step_size * slope + slack  # Eq. 1
        if k == 0:
            assert trial_loss < loss
        x, state = moved(record.step_size), searched
