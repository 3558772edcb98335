"""The rule of the plus optimizers on plain floats."""

import math
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from lines import parabola, search
from problems import HARD

from hf_salsa.rules import Plus, PlusState

SETTINGS = Plus(
    c=0.4,
    beta3=0.9,
    steps_to_double=500,
    steps_to_double_fast=6,
    confidence=2.0,
    first_share=0.1,
    backtrack_factor=0.5,
    initial_step_size=1.0,
    max_search_interval=10,
    max_trials=30,
)
STARTED = PlusState(step_size=0.01, searches=1)


def run(state, loss_at, *, settings=SETTINGS, agreement=0.0, resolution=0.0, **line):
    return search(settings, state, loss_at, agreement=agreement, resolution=resolution, **line)


def test_training_starts_at_a_tenth_of_what_the_first_mini_batch_allows():
    """1 - eta + 32 eta^2 accepts eta <= (1 - c) / 32: 2^-6 of the halvings of 1 * 2^(1/500)."""
    record, state, tried = run(PlusState(step_size=1.0), parabola(64.0))
    found = 2**-6 * 2 ** (1 / 500)
    assert state.step_size == record.step_size == pytest.approx(0.1 * found)
    assert found in map(pytest.approx, tried)
    assert record.trials == len(tried) < 10
    assert (record.interval, state.search_interval, state.steps_since_search) == (1, 1, 0)
    assert replace(state, searches=0, step_size=1.0) == PlusState(step_size=1.0)


def test_a_first_search_that_fails_leaves_everything_to_the_next():
    record, state, tried = run(PlusState(step_size=1.0), parabola(1.0), slope=-1.0)
    assert (record.outcome, tried, state.failed_searches) == ("slope", [], 1)
    assert not state.step_size_known
    assert run(state, parabola(64.0))[1].step_size_known


def test_one_trial_measures_slope_and_curvature_and_armijo_bounds_the_step():
    """A parabola is known from one trial: eta = 2 (1 - c) slope / curvature, however far it is."""
    for curvature in (100.0, 200.0):
        record, state, tried = run(STARTED, parabola(curvature))
        assert tried == [0.01 * 2 ** (1 / 500)]
        assert record.step_size == pytest.approx(min(tried[0], 2 * 0.6 / curvature))
        assert (record.trials, record.outcome, state.samples) == (1, "accepted", 1)
        assert state.curvature / 0.1 == pytest.approx(curvature)
        assert state.s / 0.1 == pytest.approx(1.0)


def test_the_step_size_at_most_halves_and_a_wall_counts_as_four_slopes():
    record, state, _ = run(STARTED, lambda eta: 1e6)
    assert record.step_size == 0.005
    trial = 0.01 * 2 ** (1 / 500)
    assert state.curvature == pytest.approx(0.1 * 4 / trial)
    # A slope that points uphill on average halves too; one bad mini-batch among good ones does not.
    assert run(STARTED, parabola(1.0), slope=-1.0)[0].step_size == 0.005
    seen = replace(STARTED, samples=50, s=1.0, curvature=1.0)
    assert run(seen, parabola(1.0, slope=-1.0), slope=-1.0)[0].step_size > 0.01


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_halves_the_trial(broken):
    walled = lambda eta: broken if eta > 0.004 else parabola(1.0)(eta)  # noqa: E731
    record, state, tried = run(STARTED, walled)
    assert tried == [pytest.approx(0.01 * 2 ** (1 / 500) / 2**i) for i in range(3)]
    # Not below half of the step size of before, though: the next search looks again.
    assert record.step_size == tried[-1] < 0.005
    assert (record.trials, state.failed_searches) == (3, 0)
    record, state, tried = run(STARTED, lambda eta: broken)
    assert (record.outcome, len(tried), record.step_size) == ("trials", 30, 0.01)
    assert state == replace(STARTED, searches=2, failed_searches=1)


def test_what_the_precision_of_the_loss_cannot_show_is_not_tried():
    record, state, tried = run(STARTED, parabola(1.0), resolution=0.02)
    assert (record.outcome, tried, record.step_size) == ("unresolved", [], 0.01)
    assert state == replace(STARTED, searches=2, failed_searches=1)
    # The slope of this mini-batch may vanish: the loss's change along the direction need not.
    seen = replace(STARTED, samples=50, s=3.0)
    assert run(seen, parabola(1.0), slope=0.0, resolution=0.02)[0].accepted


def agreeing(values, **settings):
    """The growth of each search on a flat loss with these agreements, and the last state."""
    changed, state, growths = replace(SETTINGS, **settings), STARTED, []
    for value in values:
        # Growth is tested alone: a straight line bounds nothing, and every step searches.
        state = replace(state, search_interval=1, steps_since_search=0)
        before = state.step_size
        _, state, _ = run(state, parabola(0.0), settings=changed, agreement=value)
        growths.append(state.step_size / before)
    return growths, state


def test_growth_is_fast_while_the_mini_batches_agree():
    fast, slow = pytest.approx(2 ** (1 / 6)), pytest.approx(2 ** (1 / 500))
    assert agreeing([1.0] * 5)[0] == [slow, slow, fast, fast, fast]
    assert agreeing([-1.0] * 5)[0] == [slow] * 5
    noise = [-0.9, 1.0] * 20
    assert agreeing([1.0, *noise])[0] == [slow] * 41
    assert agreeing(noise, confidence=-math.inf)[0][2:] == [fast] * 38
    assert agreeing([1.0] * 5, confidence=math.inf)[0] == [slow] * 5


def test_the_warm_up_is_over_for_good_when_agreement_is():
    fast, slow = pytest.approx(2 ** (1 / 6)), pytest.approx(2 ** (1 / 500))
    # Of a few samples a lack of agreement may be chance.
    growths, state = agreeing([1.0, 1.0, 1.0, -0.5, *[1.0] * 16])
    assert (growths[3], growths[-1]) == (slow, fast)
    assert not state.warm_up_over
    growths, state = agreeing([1.0] * 12 + [-1.0] * 8 + [1.0] * 60)
    assert state.warm_up_over
    assert growths[-1] == slow
    assert agreeing([0.0] * 9)[1].warm_up_over is False
    assert agreeing([0.0] * 10)[1].warm_up_over is True


@pytest.mark.parametrize(("mean", "fast"), [(0.45, False), (0.47, True)])
def test_the_standard_error_is_that_of_an_exponential_average(mean, fast):
    """That of 19 samples: with variance 1, two of them are 2 / sqrt(19) = 0.459."""
    square = mean**2 + 1 / 0.9  # of which the next sample, at the mean itself, leaves 1
    seen = replace(STARTED, samples=200, agreement=mean, agreement_square=square)
    record, state, _ = run(seen, parabola(0.0), agreement=mean)
    assert record.step_size == pytest.approx(0.01 * 2 ** (1 / (6 if fast else 500)))
    assert state.warm_up_over != fast


def test_growth_counts_steps_not_searches():
    state = replace(STARTED, steps_since_search=3, search_interval=4)
    assert run(state, parabola(0.0))[0].step_size == pytest.approx(0.01 * 2 ** (4 / 500))
    seen = replace(state, samples=9, agreement=1.0, agreement_square=1.0)
    record, _, _ = run(seen, parabola(0.0), agreement=1.0)
    assert record.step_size == pytest.approx(0.01 * 2 ** (4 / 6))


def test_searches_grow_rare_after_the_warm_up():
    state, intervals = replace(STARTED, warm_up_over=True), []
    for _ in range(80):
        state = replace(state, steps_since_search=0)
        record, state, _ = run(state, parabola(0.0))
        intervals.append(record.interval)
    assert intervals == [min(10, 1 + n // 8) for n in range(1, 81)]
    assert agreeing([1.0] * 30)[1].search_interval == 1
    few = replace(SETTINGS, max_search_interval=3)
    assert run(state, parabola(0.0), settings=few)[0].interval == 3


finite = st.floats(-1e6, 1e6)


@given(
    step_size=st.floats(1e-12, 1e3),
    slope=finite,
    agreement=finite,
    loss=finite,
    trial_loss=finite,
    samples=st.integers(0, 1000),
    s=finite,
    curvature=finite,
    n=st.integers(0, 9),
    c=st.floats(0.01, 0.99),
)
def test_the_step_size_never_leaves_its_bounds(
    step_size, slope, agreement, loss, trial_loss, samples, s, curvature, n, c
):
    assume(samples > 0 or s == curvature == 0)
    state = PlusState(
        step_size, searches=1, samples=samples, s=s, curvature=curvature, steps_since_search=n
    )
    settings = replace(SETTINGS, c=c)
    record, new, tried = run(
        state,
        lambda eta: trial_loss,
        settings=settings,
        loss=loss,
        slope=slope,
        agreement=agreement,
        resolution=sys.float_info.min,
    )
    if not record.accepted:
        assert (tried, new.step_size) == ([], step_size)
        return
    (trial,) = tried
    assert step_size <= trial <= step_size * 2 ** ((n + 1) / 6) * (1 + 1e-12)
    assert min(trial, step_size / 2) <= new.step_size <= trial
    assert all(math.isfinite(getattr(new, field.name)) for field in fields(new))
    if new.step_size > step_size / 2:
        # Armijo's criterion on the parabola of the averages.
        decrease = new.step_size * new.s - new.step_size**2 * new.curvature / 2
        armijo = c * new.step_size * new.s
        slack = 1e-9 * (abs(new.step_size * new.s) + new.step_size**2 * abs(new.curvature))
        assert decrease >= armijo - slack
    assert new.search_interval == (min(10, 1 + new.samples // 8) if new.warm_up_over else 1)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("initial", [1e-3, 1.0, 1e3])
def test_hard_functions_break_nothing(name, initial):
    """Gradient descent: whatever the losses are, the step size and the averages stay finite."""
    function, x, first_outcome = HARD[name]
    state = PlusState(step_size=initial)
    for k in range(30):
        loss, gradient = function(x)
        if not all(map(math.isfinite, [loss, *gradient])):
            break  # the optimizer would skip this step

        def moved(step_size, x=x, gradient=gradient):
            return [v - step_size * g for v, g in zip(x, gradient, strict=True)]

        before = state
        record, state, tried = run(
            before,
            lambda step_size, moved=moved: function(moved(step_size))[0],
            loss=loss,
            slope=sum(g * g for g in gradient),
            resolution=sys.float_info.epsilon * abs(loss),
        )
        assert record.trials == len(tried) <= 30
        assert all(math.isfinite(getattr(state, field.name)) for field in fields(state))
        assert state.step_size > 0
        if k == 0:
            # Halving, it may step over the one step size that the paper's finer grid finds.
            assert record.outcome in (first_outcome, "unresolved", "trials")
        if not record.accepted:
            assert state == before.failed()
            break
        if before.step_size_known:
            assert min(tried[-1], before.step_size / 2) <= state.step_size <= tried[0]
            assert tried[0] <= before.step_size * 2 ** (10 / 6)
        x = moved(record.step_size)
