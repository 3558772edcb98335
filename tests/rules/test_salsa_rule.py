"""The paper's rule on plain floats: criterion, averages, interval, failed searches."""

import dataclasses
import math
import sys
from fractions import Fraction

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from lines import accepts_up_to, search, states_of_the_paper

from hf_salsa.rules import SaLSa, SaLSaState, moving_average
from hf_salsa.rules.salsa import search_interval

DEFAULTS = SaLSa()
SLS = SaLSa(c=0.1, beta3=0.0, max_search_interval=1)
AT_REST = 1e300  # steps to double: the step size does not grow by a digit
# What a search that accepts nothing must leave alone.
KEPT = (
    "step_size",
    "h",
    "s",
    "step_size_average_fast",
    "step_size_average_slow",
    "search_interval",
)
MID_RUN = SaLSaState(
    step_size=0.5,
    h=0.02,
    s=0.1,
    step_size_average_fast=0.45,
    step_size_average_slow=0.4,
    search_interval=8,
    steps_since_search=7,
    searches=12,
    failed_searches=1,
)


# --- interval and criterion ---------------------------------------------------------------------

positive = st.floats(1e-12, 1e12)


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
    assert settings.accepts(state, step_size, decrease, slope) is expected


@given(step_size=st.floats(1e-6, 10), trial_loss=st.floats(-10, 10), slope=st.floats(1e-6, 10))
def test_without_smoothing_the_criterion_is_armijos(step_size, trial_loss, slope):
    """Eq. 1 and 3, whatever h and s were."""
    bound = 1.0 - SLS.c * step_size * slope
    assume(abs(trial_loss - bound) > 1e-12)
    accepted = SLS.accepts(MID_RUN, step_size, 1.0 - trial_loss, slope)
    assert accepted is (trial_loss < bound)


def test_equality_is_accepted():
    settings = dataclasses.replace(SLS, c=0.25)
    assert settings.accepts(MID_RUN, 2.0, 1.0, 2.0)
    assert not settings.accepts(MID_RUN, 2.0, math.nextafter(1.0, 0.0), 2.0)


@pytest.mark.parametrize("decrease", [math.inf, -math.inf, math.nan])
def test_not_finite_is_never_accepted(decrease):
    rising = dataclasses.replace(MID_RUN, h=1e9)  # would accept any finite loss
    assert DEFAULTS.accepts(rising, 1.0, -1.0, 1.0)
    assert not DEFAULTS.accepts(rising, 1.0, decrease, 1.0)


def test_theorem_1_forbids_a_rising_loss():
    rising = dataclasses.replace(MID_RUN, h=1e9)
    strict = dataclasses.replace(DEFAULTS, require_decrease=True)
    assert DEFAULTS.accepts(rising, 1.0, -1e-9, 1.0)
    assert not strict.accepts(rising, 1.0, -1e-9, 1.0)
    assert strict.accepts(rising, 1.0, 0.0, 1.0)


# --- averages and interval over a run -----------------------------------------------------------


def test_averages_start_at_zero_and_searches_grow_rare():
    """Early training searches at every step; a step size at rest every `max_search_interval`."""
    settings = dataclasses.replace(DEFAULTS, steps_to_double=AT_REST)
    state = SaLSaState(step_size=0.1)
    assert not state.step_size_known
    intervals = []
    for _ in range(400):
        record, state, _ = search(settings, state, accepts_up_to(math.inf))
        intervals.append(record.interval)
    assert state.step_size_known
    assert intervals[:20] == [1] * 20
    assert intervals == sorted(intervals)
    assert intervals[-1] == 10
    assert set(intervals) == set(range(1, 11))


@given(state=states_of_the_paper, threshold=st.floats(1e-4, 10))
def test_an_accepted_search_moves_every_average_once(state, threshold):
    """However many trials it took (Eq. 5 and 8)."""
    record, searched, _ = search(DEFAULTS, state, accepts_up_to(threshold), loss=2.0, slope=3.0)
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
    record, searched, tried = search(settings, MID_RUN, lambda _: trial_loss, **problem)
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


def test_a_loss_of_zero_at_a_huge_step_size():
    record, _, _ = search(SLS, SaLSaState(step_size=1e20), lambda _: 1.0, loss=0.0, resolution=0.0)
    assert record.outcome == "unresolved"
