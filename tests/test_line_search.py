"""The step-size rule on plain floats (contract lines 1-4, 18)."""

import dataclasses
import math
import random
import re
import sys
from fractions import Fraction

import hypothesis
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from hf_salsa.line_search import (
    SearchSettings,
    SearchState,
    check_setting,
    cooling,
    is_accepted,
    moving_average,
    search,
    search_interval,
)

# The same examples in every run, however slow the machine.
hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None)
hypothesis.settings.load_profile("reproducible")

EPSILON = sys.float_info.epsilon
DEFAULTS = SearchSettings(
    c=0.3,
    beta3=0.99,
    steps_to_double=500,
    backtrack_factor=0.9,
    initial_step_size=1.0,
    max_search_interval=10,
    require_decrease=False,
    max_trials=30,
)
SLS = dataclasses.replace(DEFAULTS, c=0.1, beta3=0.0, max_search_interval=1)
# What a search that accepts nothing must leave alone.
KEPT = (
    "step_size",
    "h",
    "s",
    "step_size_average_fast",
    "step_size_average_slow",
    "search_interval",
)
MID_RUN = SearchState(
    step_size=0.5,
    h=0.02,
    s=0.1,
    step_size_average_fast=0.45,
    step_size_average_slow=0.4,
    search_interval=8,
    steps_since_search=7,
    searches=12,
    trials=40,
    failed_searches=1,
)


def run(settings, state, evaluate, *, loss=1.0, slope=1.0, resolution=EPSILON):
    """One search: its record, the next state, and the step sizes tried in their order."""
    tried = []

    def evaluate_and_note(step_size):
        tried.append(step_size)
        return evaluate(step_size)

    record, searched = search(
        settings, state, evaluate_and_note, loss=loss, slope=slope, resolution=resolution
    )
    return record, searched, tried


def accepts_up_to(threshold, rejected=math.nan):
    """A loss that falls far enough for every criterion up to `threshold`, and is bad beyond."""
    return lambda step_size: -1e9 if step_size <= threshold else rejected


def plain_backtracking(settings, state, evaluate, *, loss, slope, resolution):
    """Algorithm 1, one by one: the accepted step size or None, and how often it was cut."""
    n = state.steps_since_search + 1
    first = state.step_size * 2 ** (n / settings.steps_to_double)
    j = 0
    while True:
        step_size = first * settings.backtrack_factor**j
        if step_size * slope < resolution:
            return None, j
        if is_accepted(settings, state, step_size, loss - evaluate(step_size), slope):
            return step_size, j
        j += 1


# --- moving averages, interval, criterion -------------------------------------------------------

unit = st.floats(0, 1, exclude_max=True)
positive = st.floats(1e-12, 1e12)


def test_moving_average():
    assert moving_average(4.0, 8.0, 0.75) == 5.0  # dyadic numbers: no rounding
    assert moving_average(4.0, 8.0, 0.0) == 8.0
    assert moving_average(0.0, 8.0, 0.5) == 4.0  # started at 0, not at the first value


@pytest.mark.parametrize(
    ("fast", "slow", "interval"),
    [
        (0.1, 0.01, 1),  # the first search: the averages start at 0
        (1.0, 1.0, 10),  # at rest: no division by zero
        (1.0, math.nextafter(1.0, 2.0), 10),
        (1.75, 1.0, 1),  # 1 / 0.75 = 1.33
        (1.625, 1.0, 2),  # 1 / 0.625 = 1.6
        (1.25, 1.0, 4),
        (1.28125, 1.0, 4),  # 3.56
        (1.3125, 1.0, 3),  # 3.2
        (1.09375, 1.0, 10),  # 10.67, clamped
        (1e300, 1e-300, 1),
        (1e-300, 1e300, 1),
    ],
)
def test_interval_by_hand(fast, slow, interval):
    assert search_interval(fast, slow, 10) == interval
    assert search_interval(slow, fast, 10) == interval  # rbar = max(r, 1/r)


@given(fast=positive, slow=positive, longest=st.integers(1, 1000))
@example(fast=1.004, slow=1.0, longest=1000)
@example(fast=1.0, slow=1.02, longest=1000)
@example(fast=1.3, slow=1.0, longest=10)
def test_interval_is_the_nearest_integer_clamped(fast, slow, longest):
    r = Fraction(fast) / Fraction(slow)
    movement = max(r, 1 / r) - 1
    wanted = float(1 / movement) if movement > Fraction(1, 10**6) else 1e6
    assume(abs(wanted % 1 - 0.5) > 1e-6)  # half-way between two integers rounding decides
    expected = min(max(1, round(wanted)), longest)
    assert search_interval(fast, slow, longest) == expected
    assert search_interval(slow, fast, longest) == expected


@given(
    c=st.floats(0.01, 0.99),
    beta3=st.floats(0, 0.999),
    h=st.floats(-10, 10),
    s=st.floats(0, 10),
    step_size=st.floats(1e-6, 10),
    decrease=st.floats(-10, 10),
    slope=st.floats(1e-6, 10),
    require_decrease=st.booleans(),
)
def test_criterion_is_the_papers(c, beta3, h, s, step_size, decrease, slope, require_decrease):
    """Eq. 6 and 7 in exact arithmetic, away from the ties that rounding decides."""
    b = Fraction(beta3)
    smoothed_decrease = b * Fraction(h) + (1 - b) * Fraction(decrease)
    smoothed_slope = b * Fraction(s) + (1 - b) * Fraction(slope)
    excess = smoothed_decrease - Fraction(c) * Fraction(step_size) * smoothed_slope
    assume(abs(excess) > 1e-12)
    settings = dataclasses.replace(DEFAULTS, c=c, beta3=beta3, require_decrease=require_decrease)
    state = dataclasses.replace(MID_RUN, h=h, s=s)
    expected = excess > 0 and (decrease >= 0 or not require_decrease)
    assert is_accepted(settings, state, step_size, decrease, slope) is expected


@given(step_size=st.floats(1e-6, 10), trial_loss=st.floats(-10, 10), slope=st.floats(1e-6, 10))
def test_without_smoothing_the_criterion_is_armijos(step_size, trial_loss, slope):
    """Eq. 1 and 3, whatever h and s were."""
    bound = 1.0 - SLS.c * step_size * slope
    assume(abs(trial_loss - bound) > 1e-12)
    accepted = is_accepted(SLS, MID_RUN, step_size, 1.0 - trial_loss, slope)
    assert accepted is (trial_loss < bound)


def test_equality_is_accepted():
    settings = dataclasses.replace(SLS, c=0.25)
    assert is_accepted(settings, MID_RUN, 2.0, 1.0, 2.0)
    assert not is_accepted(settings, MID_RUN, 2.0, math.nextafter(1.0, 0.0), 2.0)


@pytest.mark.parametrize("decrease", [math.inf, -math.inf, math.nan])
def test_not_finite_is_never_accepted(decrease):
    rising = dataclasses.replace(MID_RUN, h=1e9)  # would accept any finite loss
    assert is_accepted(DEFAULTS, rising, 1.0, -1.0, 1.0)
    assert not is_accepted(DEFAULTS, rising, 1.0, decrease, 1.0)


def test_theorem_1_forbids_a_rising_loss():
    rising = dataclasses.replace(MID_RUN, h=1e9)
    strict = dataclasses.replace(DEFAULTS, require_decrease=True)
    assert is_accepted(DEFAULTS, rising, 1.0, -1e-9, 1.0)
    assert not is_accepted(strict, rising, 1.0, -1e-9, 1.0)
    assert is_accepted(strict, rising, 1.0, 0.0, 1.0)


# --- which step sizes are tried, and how many ---------------------------------------------------

settings_drawn = st.builds(
    SearchSettings,
    c=st.floats(0.01, 0.99),
    beta3=st.floats(0, 0.99),
    steps_to_double=st.floats(1, 1000),
    backtrack_factor=st.floats(0.1, 0.95),
    initial_step_size=st.just(1.0),
    max_search_interval=st.integers(1, 20),
    require_decrease=st.booleans(),
    max_trials=st.just(10_000),
)
states_drawn = st.builds(
    SearchState,
    step_size=st.floats(1e-6, 10),
    h=st.floats(-10, 10),
    s=st.floats(0, 10),
    step_size_average_fast=st.floats(1e-6, 10),
    step_size_average_slow=st.floats(1e-6, 10),
    steps_since_search=st.integers(0, 19),
)


@given(
    settings=settings_drawn,
    state=states_drawn,
    exponent=st.floats(-20, 2),  # below -16 nothing is accepted in time
    slope=st.floats(1e-3, 10),
    rejected=st.sampled_from([math.nan, math.inf, -math.inf, 1e12]),
)
def test_the_result_is_that_of_one_by_one_backtracking(settings, state, exponent, slope, rejected):
    """Wherever acceptance is monotone in the step size: here it ends at a random threshold."""
    evaluate = accepts_up_to(10**exponent, rejected)
    problem = {"loss": 1.0, "slope": slope, "resolution": EPSILON}
    expected, cuts = plain_backtracking(settings, state, evaluate, **problem)
    record, searched, tried = run(settings, state, evaluate, **problem)

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
    record, _, tried = run(DEFAULTS, SearchState(step_size=initial), accepts_up_to(target))
    first = initial * 2 ** (1 / 500)
    cuts = max(0, math.ceil(math.log(target / first) / math.log(0.9)))
    assert record.step_size == pytest.approx(first * 0.9**cuts)
    assert len(tried) <= 20


def test_first_trials_double_then_bisect():
    settings = dataclasses.replace(SLS, backtrack_factor=0.5, steps_to_double=1)
    _, _, tried = run(settings, SearchState(step_size=0.5), accepts_up_to(2**-11))
    assert [round(-math.log2(step)) for step in tried] == [0, 1, 2, 4, 8, 16, 12, 10, 11]


def test_where_rounding_rejects_the_smallest_step_the_search_turns_back():
    """Doubling ends at 2^-11, the last that shows; from there 10, 9, and down again in the gap."""
    settings = dataclasses.replace(SLS, backtrack_factor=0.5, steps_to_double=1)

    def evaluate(step_size):
        return -1.0 if 2**-10 < step_size < 2**-8.5 else 1.0

    record, _, tried = run(settings, SearchState(step_size=0.5), evaluate, resolution=2**-11)
    assert [round(-math.log2(step)) for step in tried] == [0, 1, 2, 4, 8, 11, 10, 9]
    assert record.step_size == 2**-9

    _, _, tried = run(settings, SearchState(step_size=0.5), lambda _: 1.0, resolution=2**-15)
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

        state = SearchState(step_size=noise.uniform(0.5, 1.0))
        problem = {"loss": 1.0, "slope": 1.0, "resolution": resolution}
        assert plain_backtracking(SLS, state, evaluate, **problem)[0] is not None
        record, _, _ = run(SLS, state, evaluate, **problem)
        failed += not record.accepted
    assert failed == 0


@pytest.mark.parametrize("interval", [1, 2, 5, 10])
def test_growth_per_training_step_does_not_depend_on_the_interval(interval):
    settings = dataclasses.replace(DEFAULTS, steps_to_double=50)
    state = SearchState(step_size=1e-3, search_interval=interval)
    for k in range(1, 101):
        if state.search_due:
            _, state, tried = run(settings, state, accepts_up_to(math.inf))
            state = dataclasses.replace(state, search_interval=interval)
            assert len(tried) == 1
            assert state.step_size == pytest.approx(1e-3 * 2 ** (k / 50), rel=1e-12)
        else:
            state = dataclasses.replace(state, steps_since_search=state.steps_since_search + 1)
    assert state.searches == 100 // interval
    assert state.step_size == pytest.approx(4e-3)


def test_a_search_is_due_after_the_interval():
    due = [SearchState(1.0, search_interval=3, steps_since_search=n).search_due for n in range(4)]
    assert due == [False, False, True, True]


# --- averages and interval over a run -----------------------------------------------------------


def test_averages_start_at_zero_and_searches_grow_rare():
    """Early training searches at every step; a step size at rest every `max_search_interval`."""
    settings = dataclasses.replace(DEFAULTS, steps_to_double=math.inf)  # the step size rests
    state = SearchState(step_size=0.1)
    assert not state.step_size_known
    intervals = []
    for _ in range(400):
        record, state, _ = run(settings, state, accepts_up_to(math.inf))
        intervals.append(record.interval)
    assert state.step_size_known
    assert intervals[:20] == [1] * 20
    assert intervals == sorted(intervals)
    assert intervals[-1] == 10
    assert set(intervals) == set(range(1, 11))


@given(state=states_drawn, threshold=st.floats(1e-4, 10))
def test_an_accepted_search_moves_every_average_once(state, threshold):
    """However many trials it took (Eq. 5 and 8)."""
    record, searched, _ = run(DEFAULTS, state, accepts_up_to(threshold), loss=2.0, slope=3.0)
    assert record.accepted
    assert record.decrease == record.loss - record.trial_loss == 2.0 + 1e9
    assert (record.loss, record.trial_loss, record.slope) == (2.0, -1e9, 3.0)
    expected = {
        "step_size": record.step_size,
        "h": moving_average(state.h, record.decrease, DEFAULTS.beta3),
        "s": moving_average(state.s, 3.0, DEFAULTS.beta3),
        "step_size_average_fast": moving_average(
            state.step_size_average_fast, record.step_size, 0.9
        ),
        "step_size_average_slow": moving_average(
            state.step_size_average_slow, record.step_size, 0.99
        ),
    }
    for name, value in expected.items():
        assert getattr(searched, name) == value, name
    assert searched.search_interval == record.interval
    assert record.interval == search_interval(
        expected["step_size_average_fast"], expected["step_size_average_slow"], 10
    )
    counted = (searched.searches, searched.failed_searches, searched.steps_since_search)
    assert counted == (state.searches + 1, state.failed_searches, 0)


# --- how a search fails -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "changed", "problem", "trials"),
    [
        ("slope", {}, {"slope": 0.0}, 0),
        ("slope", {}, {"slope": -1.0}, 0),
        ("unresolved", {}, {"slope": 1e-17}, 0),  # not even the first trial could be seen
        ("unresolved", {}, {"slope": 1e-15}, 7),  # 0, 1, 2, 4, the last that shows: 7, and 6, 5
        ("unresolved", {"max_trials": 7}, {"slope": 1e-15}, 7),
        ("trials", {"max_trials": 6}, {"slope": 1e-15}, 6),
        ("unresolved", {}, {"resolution": 0.0}, 27),  # down to the smallest normal number and back
        ("trials", {"max_trials": 1}, {}, 1),
        ("trials", {"max_trials": 4}, {}, 4),
    ],
)
@pytest.mark.parametrize("trial_loss", [5.0, math.nan, math.inf])
def test_a_failed_search_keeps_everything_but_its_counters(
    outcome, changed, problem, trials, trial_loss
):
    settings = dataclasses.replace(DEFAULTS, **changed)
    record, searched, tried = run(settings, MID_RUN, lambda _: trial_loss, **problem)
    assert (record.outcome, record.accepted) == (outcome, False)
    assert (record.trials, len(tried)) == (trials, trials)
    assert all(step_size >= sys.float_info.min for step_size in tried)
    assert record.step_size == MID_RUN.step_size
    assert record.interval == MID_RUN.search_interval
    assert record.trial_loss == pytest.approx(trial_loss if trials else math.nan, nan_ok=True)
    assert searched == dataclasses.replace(
        MID_RUN, searches=13, failed_searches=2, steps_since_search=0
    )
    assert all(getattr(searched, name) == getattr(MID_RUN, name) for name in KEPT)


def test_max_trials_ends_the_bisection_with_the_best_so_far():
    """0, 1, 2, 4, ..., 128 is accepted at the ninth trial; the tenth is 96."""
    state = SearchState(step_size=1.0)
    evaluate = accepts_up_to(0.9**100)
    settings = dataclasses.replace(DEFAULTS, max_trials=10)
    record, searched, tried = run(settings, state, evaluate)
    assert record.accepted
    assert len(tried) == record.trials == 10
    assert record.step_size == tried[8] < 0.9**100 < tried[9]
    assert searched.step_size == record.step_size
    unlimited, _, _ = run(DEFAULTS, state, evaluate)
    assert unlimited.step_size > record.step_size
    assert unlimited.trials > 10


# --- extreme but allowed ------------------------------------------------------------------------


def test_growth_stops_at_the_largest_number():
    state = SearchState(step_size=sys.float_info.max)
    record, _, _ = run(SLS, state, accepts_up_to(math.inf), slope=1e-300)
    assert record.step_size == sys.float_info.max


def test_growth_over_very_many_steps_does_not_overflow():
    settings = dataclasses.replace(DEFAULTS, steps_to_double=1, max_search_interval=5000)
    state = SearchState(step_size=1e-3, steps_since_search=4999)
    record, _, _ = run(settings, state, accepts_up_to(1.0))
    assert record.accepted
    assert 0.9 < record.step_size <= 1.0


def test_a_loss_of_zero_at_a_huge_step_size():
    record, _, _ = run(SLS, SearchState(step_size=1e20), lambda _: 1.0, loss=0.0, resolution=0.0)
    assert record.outcome == "unresolved"


def test_no_trial_is_above_the_first_where_rounding_decides():
    """0.965... * 0.642... rounds up to the resolution: the first trial is the only one to show."""
    step_size, slope = 0.9652762942911163, 0.6423916124530726
    resolution = step_size * slope
    assert resolution / slope > step_size
    settings = dataclasses.replace(SLS, steps_to_double=math.inf)
    record, _, tried = run(
        settings,
        SearchState(step_size=step_size),
        lambda step: 0.0 if step > step_size else math.nan,
        slope=slope,
        resolution=resolution,
    )
    assert tried == [step_size]
    assert record.outcome == "unresolved"


# --- hard functions -----------------------------------------------------------------------------


def quadratic(x):
    return 0.5 * sum(v * v * 10**i for i, v in enumerate(x)), [v * 10**i for i, v in enumerate(x)]


def rosenbrock(x):
    a, b = x
    value = (1 - a) ** 2 + 100 * (b - a * a) ** 2
    return value, [-2 * (1 - a) - 400 * a * (b - a * a), 200 * (b - a * a)]


def cliff(beyond):
    def function(x):  # the loss of an unstable network: fine, and then nothing at all
        if abs(x[0] - 1) > 0.05:
            return beyond, [math.nan]
        return x[0], [1.0]

    return function


def flat(x):
    return 1.0, [0.0 for _ in x]


def absolute(x):
    return sum(map(abs, x)), [math.copysign(1.0, v) if v else 0.0 for v in x]


def exponential(x):
    return math.exp(x[0]), [math.exp(x[0])]


def wavy(x):  # acceptance is not monotone in the step size
    return x[0] ** 2 + math.sin(30 * x[0]), [2 * x[0] + 30 * math.cos(30 * x[0])]


HARD = {
    "quadratic": (quadratic, [1.0, -2.0, 3.0], "accepted"),
    "rosenbrock": (rosenbrock, [-1.2, 1.0], "accepted"),
    "cliff to inf": (cliff(math.inf), [1.0], "accepted"),
    "cliff to -inf": (cliff(-math.inf), [1.0], "accepted"),
    "cliff to nan": (cliff(math.nan), [1.0], "accepted"),
    "flat": (flat, [1.0], "slope"),
    "absolute": (absolute, [1.0, -0.3], "accepted"),
    "absolute at its kink": (absolute, [0.0], "slope"),
    "exponential": (exponential, [50.0], "accepted"),  # the step must shrink by exp(50)
    "exponential tail": (exponential, [-300.0], "unresolved"),  # x does not move
    "wavy": (wavy, [1.0], "accepted"),
}


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
    state = SearchState(step_size=initial)
    for k in range(10):
        loss, gradient = function(x)
        slope = sum(g * g for g in gradient)

        def moved(step_size, x=x, gradient=gradient):
            return [v - step_size * g for v, g in zip(x, gradient, strict=True)]

        record, searched, _ = run(
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


# --- cooling down -------------------------------------------------------------------------------


@given(
    cool_down=st.floats(0.01, 1),
    total=st.integers(1, 10_000),
    steps=st.tuples(*[st.floats(0, 1)] * 2),
)
def test_the_factor_falls_in_a_straight_line_at_the_end(cool_down, total, steps):
    early, late = sorted(int(step * (total - 1)) for step in steps)
    factors = [cooling(cool_down, step, total) for step in (early, late)]
    assert 1 >= factors[0] >= factors[1] > 0
    for step, factor in zip((early, late), factors, strict=True):
        if step <= (1 - cool_down) * total:
            assert factor == pytest.approx(1)
        if factor < 1:
            assert factor == pytest.approx((total - step) / (cool_down * total))
    assert cooling(cool_down, total + 5, total) == cooling(cool_down, total - 1, total)


@pytest.mark.parametrize(("cool_down", "total"), [(0.0, 100), (0.5, 0), (1.0, 0)])
def test_nothing_cools_without_a_share_or_a_length(cool_down, total):
    assert [cooling(cool_down, step, total) for step in (0, 99, 1000)] == [1.0] * 3


# --- refused settings ---------------------------------------------------------------------------

OPEN_UNIT = "strictly between 0 and 1"
REFUSED = {
    "c": (OPEN_UNIT, [0, 1, 0.0, 1.0, -0.1, 2]),
    "beta3": ("in [0, 1)", [1, 1.0, -0.01]),
    "steps_to_double": ("a finite number of steps, at least 1", [0, 0.5, -500]),
    "backtrack_factor": (OPEN_UNIT, [0, 1, 1.1]),
    "initial_step_size": ("a finite number above 0", [0, -1.0]),
    "max_search_interval": ("a whole number of steps, at least 1", [0, -1, 10.0]),
    "max_trials": ("a whole number of forward passes, at least 1", [0, -5, 30.0]),
    "eps": ("a finite number above 0", [0, -1e-8]),
    "momentum": ("in [0, 1)", [1, 1.0, -0.9]),
    "weight_decay": ("a finite number, at least 0", [-0.01]),
    "betas": (
        "two numbers in [0, 1)",
        [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9,), (0.9, 0.9, 0.9), ()]
        + [0.9, {0.9, 0.99}, (math.nan, 0.9), (0.9, math.inf)]
        + [("0.9", 0.99), (0.9, None), (False, 0.9)],
    ),
    "direction": ("'gradient' or 'momentum'", ["Gradient", "", b"gradient"]),
    "require_decrease": ("True or False", [0, 1, "True"]),
    "cool_down": ("a share of the run, a number in [0, 1]", [-0.1, 1.1, 2]),
    "total_steps": ("a whole number of steps, at least 1", [0, -1, 10.0]),
}
NO_NUMBERS = [True, False, math.nan, math.inf, -math.inf, "0.5", None, [0.5], 1j]
NO_CHOICE = {"direction": [True, None, 1], "require_decrease": [None, 1.0, math.nan]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name, (_, values) in REFUSED.items()
        for value in values + NO_CHOICE.get(name, NO_NUMBERS)
    ],
    ids=str,
)
def test_a_refusal_names_setting_value_and_range(name, value):
    allowed, _ = REFUSED[name]
    start = re.escape(f"{name}={value!r} is not allowed: it must be ")
    with pytest.raises(ValueError, match=f"^{start}.*{re.escape(allowed)}.*\\.$"):
        check_setting(name, value)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "c": [1e-9, 0.3, 0.999],
        "beta3": [0, 0.0, 0.999],
        "steps_to_double": [1, 1.5, 500],
        "backtrack_factor": [0.01, 0.9],
        "initial_step_size": [1, 1e-30, 1e30],
        "max_search_interval": [1, 10, 10**6],
        "max_trials": [1, 30],
        "eps": [1e-30, 1],
        "momentum": [0, 0.0, 0.99],
        "weight_decay": [0, 0.0, 10],
        "betas": [(0, 0), (0.9, 0.999), [0.9, 0.999]],
        "direction": ["gradient", "momentum"],
        "require_decrease": [True, False],
        "cool_down": [0, 0.0, 0.5, 1],
        "total_steps": [1, 10**9],
    }.items(),
)
def test_the_ends_of_the_ranges_are_allowed(name, values):
    for value in values:
        check_setting(name, value)


def test_a_refusal_uses_the_name_the_user_wrote():
    with pytest.raises(ValueError, match=r"^salsa_c=2 is not allowed: it must be a number"):
        check_setting("c", 2, argument="salsa_c")


def test_every_setting_of_a_search_has_a_range():
    assert {field.name for field in dataclasses.fields(SearchSettings)} <= REFUSED.keys()
