"""The rule of the plus optimizers on plain floats."""

import math
import random
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lines import parabola, search
from problems import HARD

from hf_salsa.rules import Line, Plus, PlusState
from hf_salsa.rules.first import _BISECTIONS, _MOST_TRIALS, _STRIDE
from hf_salsa.rules.plus import (
    _AGREED,
    _BETA,
    _BETA_LONG,
    _C,
    _DENSE,
    _FALLING,
    _FIRST,
    _GROWN_TO,
    _HARDLY,
    _OUT_OF_RANGE,
    _RESOLVED,
    _RUN,
    _SAMPLE_LIMIT,
    _STEPS_TO_COME_UP,
    _STEPS_TO_RETURN,
    _TOLERATED,
    _UNKNOWN_WARM_UP,
)

SETTINGS = Plus()
BOUND = SETTINGS.trust  # B where the first losses are 1
NEW = PlusState(step_size=SETTINGS.initial_step_size)
STARTED = PlusState(step_size=0.25, searches=1, first_losses=1.0, first_squares=1.0)
LIMITS = {False: _TOLERATED * BOUND, True: BOUND}  # untrained -> above what eta shrinks
SAMPLES = 50
DEVIATION = 0.125  # of the first losses of `seen`


def seen(*, change=0.0, loss=1.0, progress=1.0, **changed):
    """A state whose averages, which start at 0, stand for these values."""
    weight = 1 - _BETA**SAMPLES
    state = replace(
        STARTED,
        first_losses=float(_FIRST),
        first_squares=_FIRST * (1 + DEVIATION**2),
        loss=weight * loss,
        change=weight * change,
        progress=(1 - _BETA_LONG**SAMPLES) * progress,
        samples=SAMPLES,
    )
    return replace(state, **changed)


LOSS = 0.5  # of `falling`


def falling(behind, **changed):
    """A state that, once it has seen `LOSS`, is so many times as far below as it must be."""
    weight = 1 - _BETA_LONG ** (SAMPLES + 1)
    longer = LOSS + behind * _FALLING * DEVIATION
    squares = DEVIATION**2 + longer**2
    return seen(
        loss=LOSS,
        longer_loss=(weight * longer - (1 - _BETA_LONG) * LOSS) / _BETA_LONG,
        longer_squares=(weight * squares - (1 - _BETA_LONG) * LOSS**2) / _BETA_LONG,
        **changed,
    )


def look(state, change=0.0, *, loss=1.0, slope=1e9, foreseen=0.5, settings=SETTINGS, **line):
    """A search that sees D = `change`; the record, the state, how often it looked."""
    looks = []

    def look_back():
        looks.append(None)
        return loss + (change - foreseen), foreseen

    def loss_at(step_size):
        raise AssertionError("a search that looks back tries nothing")

    line = {"resolution": 0.0} | line
    record, found = settings.search(
        state, Line(loss_at, loss=loss, slope=slope, look_back=look_back, **{"step": 1, **line})
    )
    return record, found, len(looks)


def all_finite(state):
    return all(math.isfinite(getattr(state, entry.name)) for entry in fields(state))


# --- the start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", [1e-9, 1e-4, 1.0, 1e5])
@pytest.mark.parametrize("curvature", [0.03, 70.0])
def test_the_start_goes_up_and_down_to_what_armijo_accepts(initial, curvature):
    """A parabola is accepted up to 2 (1 - c) slope / curvature."""
    largest = 2 * (1 - _C) / curvature
    record, state, tried = search(SETTINGS, replace(NEW, step_size=initial), parabola(curvature))
    found = state.step_size / SETTINGS.first_share
    assert found <= largest < found * _STRIDE ** (0.5**_BISECTIONS)
    assert found in map(pytest.approx, tried)
    assert record.step_size == state.step_size
    assert record.trials == len(tried) <= 3 + _BISECTIONS + abs(math.log(initial / largest, 8))
    assert record.trial_loss == pytest.approx(parabola(curvature)(found))
    assert record.decrease == record.loss - record.trial_loss
    assert record.accepted
    assert (record.interval, state.search_interval, state.steps_since_search) == (1, 1, 0)


def test_the_start_remembers_loss_and_time_and_no_sample():
    line = Line(parabola(1.0, loss=3.0), loss=3.0, slope=1.0, resolution=0.0, step=17)
    _, state = SETTINGS.search(NEW, line)
    expected = replace(NEW, first_losses=3.0, first_squares=9.0, started_at=17, searches=1)
    assert replace(state, step_size=NEW.step_size) == expected


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_trial_loss_that_is_not_finite_is_a_rejection(broken):
    walled = lambda eta: broken if eta > 1e-4 else parabola(1.0)(eta)  # noqa: E731
    record, state, _ = search(SETTINGS, NEW, walled)
    assert record.accepted
    assert math.isfinite(record.trial_loss)
    assert 1e-4 / _STRIDE < state.step_size / SETTINGS.first_share <= 1e-4


def test_a_loss_that_falls_for_ever_ends_the_search_with_the_largest():
    record, state, tried = search(SETTINGS, NEW, parabola(0.0))
    assert (record.outcome, record.trials) == ("accepted", _MOST_TRIALS)
    assert state.step_size == SETTINGS.first_share * max(tried)


@pytest.mark.parametrize(
    ("outcome", "trials", "line"),
    [
        ("slope", 0, {"loss_at": parabola(1.0), "slope": -1.0}),
        ("slope", 0, {"loss_at": parabola(1.0), "slope": 0.0}),
        ("unresolved", 0, {"loss_at": parabola(1.0), "resolution": 1.0}),
        ("unresolved", 2, {"loss_at": lambda eta: 2.0, "resolution": NEW.step_size / 60}),
        ("trials", _MOST_TRIALS, {"loss_at": lambda eta: math.nan, "resolution": 0.0}),
    ],
)
def test_a_start_that_fails_leaves_everything_to_the_next(outcome, trials, line):
    record, state, tried = search(SETTINGS, NEW, **line)
    assert (record.outcome, len(tried), record.trials) == (outcome, trials, trials)
    assert state == NEW.failed()
    assert not state.step_size_known
    assert search(SETTINGS, state, parabola(64.0))[1].step_size_known


# --- weights that were never trained ------------------------------------------------------------

USUAL = 2.0**-10
WARM = replace(STARTED, warm_up_to=USUAL, warming_up=True, step_size=USUAL / 8)
# After a head phase: the matrices of the body are of such a size that the same is right for them.
WEIGHTS = {
    "untrained": {"untrained": True, "usual_step_size": USUAL},
    "head": {"matrix_scale": 50 * USUAL},
}


@pytest.mark.parametrize(("total", "steps"), [(0, _UNKNOWN_WARM_UP), (400, 20), (459, 22), (10, 1)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_such_a_run_starts_with_a_warm_up_and_tries_nothing(total, steps, weights):
    line = {"total_steps": total, **WEIGHTS[weights]}
    record, state, looks = look(NEW, loss=3.0, slope=-1.0, **line)
    assert (record.outcome, record.trials, looks) == ("accepted", 0, 0)
    expected = {"first_losses": 3.0, "first_squares": 9.0, "started_at": 1, "searches": 1}
    expected |= {"step_size": USUAL / steps, "warm_up_to": USUAL, "warming_up": steps > 1}
    expected |= {"untrained": weights == "untrained"}
    assert state == replace(NEW, **expected)


@pytest.mark.parametrize("change", [0.0, BOUND / 4, 5 * BOUND, math.inf])
@pytest.mark.parametrize("loss", [1.0, 50.0])
def test_in_the_warm_up_of_trained_weights_it_rises_whatever_a_search_sees(change, loss):
    state = WARM
    for step in (1, 2, 9, 18):
        record, state, looks = look(state, change, loss=loss, step=step, total_steps=400)
        assert state.step_size == record.step_size == pytest.approx(USUAL * (step + 1) / 20)
        assert (state.warming_up, looks) == (True, 1)
    assert state.samples == 4
    assert (state.change > 0) == (change > 0)  # what it saw counts afterwards


@pytest.mark.parametrize("steps", [1, 2])
def test_from_scratch_the_end_of_a_warm_up_shrinks_while_steps_change_too_much(steps):
    """As eta does after it, and the average of the changes with both."""
    state = replace(WARM, untrained=True, steps_since_search=steps - 1)
    _, kept, _ = look(state, BOUND * (1 - 1e-9), step=9, total_steps=400)
    assert (kept.step_size, kept.warm_up_to) == (USUAL / 2, USUAL)
    _, lower, _ = look(state, 4 * BOUND, step=9, total_steps=400)
    shrunk = 4 ** (-steps / 10)
    assert lower.step_size == pytest.approx(shrunk * USUAL / 2)
    assert lower.warm_up_to == pytest.approx(shrunk * USUAL)
    assert lower.change == pytest.approx((1 - _BETA) * 4 * BOUND * shrunk**2)
    assert lower.warming_up
    _, least, _ = look(replace(state, steps_since_search=99), math.inf, step=19, total_steps=400)
    assert (least.step_size, least.warm_up_to) == (USUAL / 2, USUAL / 2)
    assert not least.warming_up


def test_a_second_run_that_begins_in_the_warm_up_begins_it_anew():
    state = replace(WARM, started_at=10)  # after a head phase
    for step in (0, 1, 5):
        _, state, _ = look(state, step=step, total_steps=400)
        assert (state.step_size, state.warming_up) == (USUAL * (step + 1) / 20, True)


def test_the_slope_of_the_record_is_that_at_the_step_size_that_was_taken():
    record, _, _ = look(WARM, foreseen=-3.0, step=9, total_steps=400)
    assert record.slope == pytest.approx(3.0 / WARM.step_size)
    record, _, _ = look(seen(), foreseen=-3.0, last_factor=0.5)  # in the tail half of it was
    assert record.slope == pytest.approx(3.0 / 0.125)


def test_a_loss_without_the_precision_to_judge_a_step_does_not_stop_the_warm_up():
    record, state, looks = look(WARM, step=9, total_steps=400, resolution=1.0)
    assert (record.outcome, looks, state.step_size) == ("unresolved", 0, USUAL / 2)


@pytest.mark.parametrize("last", [19, 22])
@pytest.mark.parametrize("step", [24, 0])
def test_after_the_warm_up_the_trust_region_decides_and_no_second_run_warms_up(last, step):
    """Its last search, or the first one after it, reaches the usual step size."""
    warm = seen(step_size=USUAL / 2, warm_up_to=USUAL, warming_up=True)
    _, over, _ = look(warm, 8 * BOUND, step=last, total_steps=400)
    assert (over.step_size, over.warming_up) == (USUAL, False)
    _, later, _ = look(over, 8 * BOUND, step=step, total_steps=400)
    assert later.step_size < over.step_size


@pytest.mark.parametrize("start", [0.6, 1.0, 3.0])
@pytest.mark.parametrize(
    ("behind", "grows"), [(-1.0, False), (0.0, False), (0.9, False), (1.1, True)]
)
def test_a_step_size_grows_only_while_the_loss_falls(behind, grows, start):
    """By 0.4 deviations below the longer average; wherever the loss began, here at `start`."""
    sums = {"first_losses": _FIRST * start, "first_squares": _FIRST * start**2}
    for untrained in (False, True):
        state = replace(falling(behind, step_size=USUAL, untrained=untrained), **sums)
        assert (look(state, 0.0, loss=LOSS)[1].step_size > USUAL) == grows


def test_one_hard_mini_batch_counts_at_most_three_times_the_first_ones():
    """Else its square would be all that the deviation is for the rest of the run."""
    _, found, _ = look(seen(loss=0.5), loss=1e200)
    _, limited, _ = look(seen(loss=0.5), loss=3.0)
    assert found.longer_loss == limited.longer_loss == pytest.approx(0.1 * 3.0)
    assert found.longer_squares == limited.longer_squares == pytest.approx(0.1 * 9.0)


@pytest.mark.parametrize("untrained", [False, True])
@pytest.mark.parametrize(("loss", "grows"), [(0.99, True), (1.01, False)])
def test_while_ten_losses_are_not_known_it_grows_below_their_mean(untrained, loss, grows):
    """In a run of a hundred steps the tail begins before the tenth search."""
    state = seen(step_size=USUAL, untrained=untrained)
    state = replace(state, samples=5, first_losses=6.0, first_squares=6 * (1 + DEVIATION**2))
    state = replace(state, loss=(1 - _BETA**5) * loss)
    _, found, _ = look(state, 0.0, loss=loss)
    assert (found.step_size > USUAL) is grows


# --- what a search sees -------------------------------------------------------------------------


def test_a_search_looks_back_once_and_measures_what_the_gradient_did_not_foresee():
    record, state, looks = look(STARTED, 2**-9, loss=1.5, foreseen=-0.125)
    loss_before = 1.5 + 2**-9 + 0.125
    assert (looks, record.trials, record.outcome) == (1, 1, "accepted")
    assert (record.trial_loss, record.decrease) == (loss_before, loss_before - 1.5)
    assert state.samples == 1
    new = pytest.approx(1 - _BETA)
    assert state.change / 2**-9 == new
    assert state.loss / 1.5 == new
    assert state.progress == pytest.approx(1 - _BETA_LONG)
    assert record.slope == 0.125 / 0.25
    assert (state.first_losses, state.first_squares) == (2.5, 3.25)


@pytest.mark.parametrize("samples", [0, 3, _FIRST - 2, _FIRST - 1, SAMPLES])
@pytest.mark.parametrize("untrained", [False, True])
def test_the_bound_is_a_share_of_the_mean_of_the_first_losses(samples, untrained):
    """The losses so far are 1, this one is 3 and of the first ten or not."""
    count = min(samples + 1, _FIRST)
    sums = {"first_losses": float(count), "first_squares": 1e6}
    bound = LIMITS[untrained] * (1.0 if count == _FIRST else (count + 3.0) / (count + 1))
    for share, shrinks in [(0.999, False), (1.001, True)]:
        average = (1 - _BETA**samples) * share * bound
        state = replace(STARTED, samples=samples, change=average, untrained=untrained, **sums)
        _, found, _ = look(state, share * bound, loss=3.0)
        assert (found.step_size < 0.25) is shrinks
        first = count < _FIRST
        assert found.first_losses == count + 3.0 * first
        assert found.first_squares == 1e6 + 9.0 * first


@pytest.mark.parametrize(
    ("share", "trained", "untrained"),
    [(0.98, 1, 1), (1.02, 1, -1), (1.98, 1, -1), (2.02, 0, -1), (2.98, 0, -1), (3.02, -1, -1)],
)
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_from_twice_to_three_times_its_bound_trained_weights_keep_the_step_size(
    share, trained, untrained, factor
):
    """In the tail, where none grows, by what a step without the tail would change."""
    for of_scratch, moves in ((False, trained), (True, untrained)):
        average = (1 - _BETA**SAMPLES) * share * BOUND
        state = falling(2.0, change=average, untrained=of_scratch)
        change = share * BOUND * factor**2
        found = look(state, change, loss=LOSS, last_factor=factor)[1].step_size
        assert (found > 0.25) - (found < 0.25) == min(moves, moves if factor == 1 else 0)


@pytest.mark.parametrize("change", [BOUND / 3, 4 * BOUND, 99 * BOUND])
def test_a_change_counts_whichever_way_it_goes_from_scratch_and_else_upwards(change):
    up, down = (look(replace(STARTED, untrained=True), x)[1] for x in (change, -change))
    assert up.change == pytest.approx(down.change)
    assert up.step_size == pytest.approx(down.step_size)
    trained = look(STARTED, change)[1]
    assert (trained.step_size < 0.25) is (change > LIMITS[False])
    assert look(STARTED, -change)[1].change == 0


@pytest.mark.parametrize("change", [1e3 * BOUND, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("foreseen", [0.0, math.nan, math.inf, -math.inf])
def test_one_mini_batch_does_not_decide_for_long(change, foreseen):
    """However large the change; a loss or slope that is not finite is a large change."""
    record, state, _ = look(replace(STARTED, loss=1.0), change, foreseen=foreseen)
    assert record.slope == 0
    _, limited, _ = look(replace(STARTED, loss=1.0), _SAMPLE_LIMIT * BOUND, foreseen=0.0)
    assert replace(state, progress=limited.progress) == limited
    assert state.step_size < STARTED.step_size
    assert all_finite(state)


def test_a_step_of_no_length_is_no_sample():
    """Before the first step, and where the weights' precision lost it."""
    for state in (STARTED, seen()):
        record, found, looks = look(state, 0.0, foreseen=0.0)
        assert (looks, record.trials, record.accepted) == (1, 1, True)
        assert found == replace(state, searches=2)


def test_what_the_precision_of_the_loss_cannot_show_is_not_looked_at():
    limit = BOUND / _RESOLVED
    record, state, looks = look(seen(), 1.0, resolution=1.001 * limit)
    assert (looks, record.trials, record.outcome) == (0, 0, "unresolved")
    assert math.isnan(record.trial_loss)
    assert state == seen(searches=2, failed_searches=1)
    late = look(seen(), 1.0, resolution=1.001 * limit, step=10 * _DENSE)[1]
    assert late.search_interval == 11  # it may tell at last, if the loss falls
    assert look(seen(), 1.0, resolution=0.999 * limit)[2] == 1
    # In the tail steps are short, and changes small in the square of that.
    record, _, looks = look(seen(), 1.0, resolution=0.999 * limit, last_factor=0.5)
    assert (looks, record.outcome) == (0, "accepted")
    assert look(seen(), 1.0, resolution=0.249 * limit, last_factor=0.5)[2] == 1


@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0])
def test_a_loss_so_large_that_it_hides_all_changes_halves_the_step_size(factor):
    """Of thousands of times the first losses: the trust region's bound is one of their size."""
    for loss in (1e9, 1e200):
        line = {"loss": loss, "resolution": 1e-7 * loss, "last_factor": factor}
        record, state, looks = look(seen(), 1.0, **line)
        assert (looks, record.trials, record.outcome) == (0, 0, "accepted")
        assert state.step_size == seen().step_size / 2
        assert SETTINGS.out_of_range(state)
    # Where not even the first losses would have shown them, it is no sign of anything.
    coarse = {"loss": 1e9, "resolution": 1e9 * 1.001 * BOUND / _RESOLVED}
    assert look(seen(), 1.0, **coarse)[0].outcome == "unresolved"


@pytest.mark.parametrize("samples", [0, 1, _FIRST - 2])
def test_a_negative_loss_is_refused_in_the_beginning(samples):
    for state in (replace(STARTED, samples=samples), NEW):
        with pytest.raises(RuntimeError, match=r"The loss is -0\.5, but the plus .* constant"):
            look(state, 0.0, loss=-0.5)
    assert look(replace(STARTED, samples=_FIRST - 1), 0.0, loss=-0.5)[0].accepted


# --- shrinking ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("excess", [1.01, 3.0, 9.9])
@pytest.mark.parametrize("untrained", [False, True])
def test_too_large_a_change_shrinks_the_step_size(steps, excess, untrained):
    """At several times its limit it comes back in ten steps; at most by half at once."""
    change = excess * LIMITS[untrained]
    state = replace(STARTED, steps_since_search=steps - 1, untrained=untrained)
    _, found, _ = look(state, change)
    counted = min(change, _SAMPLE_LIMIT * BOUND)
    shrinkage = max(0.5, (counted / LIMITS[untrained]) ** (-steps / _STEPS_TO_RETURN))
    assert found.step_size == pytest.approx(0.25 * shrinkage)
    # The average is that of steps of the new size: D falls with the square.
    assert found.change == pytest.approx((1 - _BETA) * counted * shrinkage**2)


def test_the_average_decides_not_one_mini_batch():
    assert look(seen(change=BOUND / 5), 2 * BOUND)[1].step_size >= 0.25
    assert look(seen(change=5 * BOUND), 0.0)[1].step_size < 0.25


# --- growing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("total_steps", [0, 100, 1000])
@pytest.mark.parametrize("share", [0.0, 1e-300, 1e-4, 0.1, 0.9])
@pytest.mark.parametrize("progress", [1, 0.4])
@pytest.mark.parametrize("weights", ["untrained", "all_trained", "beside a new part"])
def test_where_changes_are_small_the_step_size_grows(weights, progress, steps, share, total_steps):
    """The faster the smaller they are; beside a new part also the faster the more votes agree."""
    average = (1 - _BETA**SAMPLES) * share * BOUND
    new_part = weights == "beside a new part"
    of_weights = {"change": average} | ({} if new_part else {weights: True})
    before = (progress - 0.1) / _BETA_LONG / (1 - _BETA_LONG**SAMPLES)  # without this one's vote
    state = falling(2.0, steps_since_search=steps - 1, progress=before, **of_weights)
    line = {"loss": LOSS, "total_steps": total_steps, "foreseen": -0.5}
    found = look(state, share * BOUND, **line)[1].step_size / 0.25
    steps = steps * min(1, _AGREED * progress**2) if new_part else steps
    growth = min(2.0, 2 ** (steps / SETTINGS.steps_to_double))
    if share > 1e-200:
        to_come_up = _STEPS_TO_COME_UP * (0.2 if total_steps == 100 else 1.0)
        room = (1 if weights == "untrained" else _GROWN_TO) / share
        growth = min(growth, room ** (steps / to_come_up))
    assert found == pytest.approx(growth)


@pytest.mark.parametrize("untrained", [False, True])
def test_it_does_not_grow_unless_most_steps_lower_the_loss_of_the_next_mini_batch(untrained):
    """The average decides, whatever this one says."""
    weight = 1 - _BETA_LONG**SAMPLES
    for progress in (-1.0, -0.5, -1e-3):  # with the vote of this one
        state = falling(2.0, progress=(progress - 0.1) / _BETA_LONG / weight, untrained=untrained)
        assert look(state, loss=LOSS, foreseen=-0.5)[1].step_size == 0.25
    for progress in (1e-3, 0.8):
        state = falling(2.0, progress=(progress + 0.1) / _BETA_LONG / weight, untrained=untrained)
        assert look(state, loss=LOSS, foreseen=0.5)[1].step_size > 0.25


def test_each_search_has_one_vote():
    """A mini-batch of another kind, whose loss moved a thousand times as far, has no more."""
    for sign in (1, -1):
        votes = (look(seen(), foreseen=sign * moved)[1].progress for moved in (1e-3, 1e3))
        assert list(votes) == [pytest.approx(seen().progress * _BETA_LONG - sign * 0.1)] * 2


# --- the tail -----------------------------------------------------------------------------------


def test_in_the_tail_it_does_not_grow_and_changes_count_by_the_square_of_the_factor():
    _, state, _ = look(falling(2.0), 0.0, loss=LOSS, last_factor=0.5)
    assert state.step_size == 0.25
    _, whole, _ = look(STARTED, 5 * BOUND)
    _, cooled, _ = look(STARTED, 5 * BOUND / 4, last_factor=0.5)
    for name in ("step_size", "change"):
        assert getattr(cooled, name) == pytest.approx(getattr(whole, name))
    assert cooled.step_size < 0.25


# --- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [1.001 * BOUND / _HARDLY, 1.001 * BOUND, 9 * BOUND])
def test_it_halves_while_the_loss_is_out_of_the_range_of_the_start(change):
    edge = 1 + _OUT_OF_RANGE * DEVIATION
    _, state, _ = look(seen(loss=1.01 * edge, change=change), change, loss=1.01 * edge)
    assert state.step_size == 0.125
    average = change * (1 - _BETA ** (SAMPLES + 1))
    assert state.change == pytest.approx(average / 4)
    little = 0.999 * BOUND / _HARDLY
    _, state, _ = look(seen(loss=9.0, change=little), little, loss=9.0)
    assert state.step_size == 0.25
    within, _, _ = look(seen(loss=0.99 * edge), 0.0, loss=0.99 * edge)
    assert within.step_size == 0.25


@pytest.mark.parametrize("samples", [1, 2, _FIRST - 3])
def test_of_few_first_losses_the_range_ends_at_three_times_their_mean(samples):
    count = samples + 1
    sums = {"first_losses": float(count), "first_squares": float(count)}
    edge = 3 * (count + 3) / (count + 1)  # this loss counts 3 among them, those so far 1 each
    for loss, out in [(0.999 * edge, False), (1.001 * edge, True)]:
        state = replace(STARTED, samples=samples, loss=(1 - _BETA**samples) * loss, **sums)
        _, found, _ = look(state, 0.9 * BOUND, loss=loss)
        assert SETTINGS.out_of_range(found) is out
        assert found.step_size == (0.125 if out else 0.25)


@pytest.mark.parametrize("samples", [0, 5, _FIRST - 2])
def test_a_run_that_breaks_down_in_its_first_steps_is_not_its_own_measure(samples):
    sums = {"first_losses": samples + 1.0, "first_squares": samples + 1.0}
    _, found, _ = look(replace(STARTED, samples=samples, **sums), 0.0, loss=1e6)
    assert found.first_losses == samples + 1 + 3.0
    assert found.first_squares == samples + 1 + 9.0
    nothing = {"first_losses": 0.0, "first_squares": 0.0}  # a mean of 0 is no measure
    _, found, _ = look(replace(STARTED, samples=samples, **nothing), 0.0, loss=5.0)
    assert found.first_losses == 5.0


def test_out_of_range_it_does_not_halve_for_ever():
    """Steps whose changes hardly show do not keep the loss there, and only steps bring it back."""
    state = seen(loss=9.0, change=BOUND)
    for _ in range(100):
        _, state, _ = look(state, BOUND * (state.step_size / 0.25) ** 2, loss=9.0)
    assert 0.25 / 2**5 < state.step_size < 0.25
    falls = {"longer_loss": state.longer_loss, "longer_squares": state.longer_squares}
    back = replace(state, loss=0.1, progress=1.0, **falls)
    assert look(back, loss=0.1)[1].step_size > state.step_size


# --- when it searches ---------------------------------------------------------------------------


def searches_of(total, *, known=True, settings=SETTINGS, started_at=0):
    """The steps of a run that search, its first one aside, and the intervals."""
    state, steps, intervals = replace(STARTED, started_at=started_at), [], []
    for step in range(started_at + 1, total):
        if not state.search_due:
            state = replace(state, steps_since_search=state.steps_since_search + 1)
            continue
        line = {"step": step, "total_steps": total if known else 0}
        record, state, _ = look(state, 0.0, settings=settings, **line)
        assert record.interval == state.search_interval
        steps.append(step)
        intervals.append(record.interval)
    return steps, intervals


@pytest.mark.parametrize("known", [True, False])
def test_searches_grow_rare(known):
    steps, intervals = searches_of(4 * _RUN, known=known)
    most = SETTINGS.max_search_interval
    assert intervals == [min(most, 1 + step // _DENSE) for step in steps]
    assert (intervals[0], intervals[-1]) == (1, most)
    assert searches_of(_RUN, settings=replace(SETTINGS, max_search_interval=3))[1][-1] == 3


def test_a_shorter_run_has_its_share_of_them():
    dense = [searches_of(total)[1].count(1) for total in (_RUN // 9, _RUN // 3, _RUN)]
    assert dense[0] < dense[1] < dense[2] < _DENSE
    assert searches_of(4) == ([1, 3], [2, 4])  # at least one step each
    steps, _ = searches_of(_RUN, started_at=100)
    assert [step - 100 for step in steps] == searches_of(2 * _RUN)[0][: len(steps)]


def test_a_second_run_counts_its_steps_anew():
    """Those before the start are behind it."""
    record, _, _ = look(seen(started_at=50), 0.0, step=3, total_steps=_RUN)
    assert record.interval == 1


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("total", "budget"), [(200, 0.3), (400, 0.15), (_RUN, 0.15), (1000, 0.15), (20_000, 0.15)]
)
def test_it_costs_few_forward_passes(total, budget, known):
    """The start from five factors of its stride away, and five that check its derivative."""
    far = SETTINGS.initial_step_size * _STRIDE**-5
    start = search(SETTINGS, NEW, parabola(2 * (1 - _C) / far))[0].trials
    steps, _ = searches_of(total, known=known)
    assert 7 <= start + 5 + len(steps) <= budget * total


# --- whatever the losses are --------------------------------------------------------------------


def test_the_scale_of_the_loss_does_not_matter():
    """f and 4 f: the same step sizes of Adam, a quarter of them for SGD, bit for bit."""
    scratch = {"untrained": True, "warm_up_to": 0.25}
    for of_step_size, weights in [(1.0, {}), (0.25, {}), (1.0, scratch), (0.25, scratch)]:
        numbers = random.Random(0)
        state = seen(**weights)
        other = state.rescaled(4.0, of_step_size)
        for _ in range(200):
            loss, change = numbers.uniform(0, 2), numbers.uniform(-0.01, 0.03)
            _, state, _ = look(state, change, loss=loss)
            _, other, _ = look(other, 4 * change, loss=4 * loss, foreseen=2.0)
            assert other == state.rescaled(4.0, of_step_size)
        assert state.step_size != 0.25


sizes = st.floats(1e-6, 1e6)
signed = st.floats(-1e6, 1e6)


@pytest.mark.parametrize("untrained", [False, True])
@given(
    step_size=sizes,
    losses=st.lists(st.floats(0, 1e6), min_size=1, max_size=30),
    changes=st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=30, max_size=30),
    foreseen=signed,
    steps=st.integers(1, 20),
    last_factor=st.floats(1e-3, 1),
)
def test_the_step_size_never_leaves_its_bounds(
    untrained, step_size, losses, changes, foreseen, steps, last_factor
):
    first = losses[0]
    state = replace(
        STARTED,
        step_size=step_size,
        first_losses=first,
        first_squares=first**2,
        untrained=untrained,
    )
    for loss, change in zip(losses, changes, strict=False):
        state = replace(state, steps_since_search=steps - 1)
        before, settled = state.step_size, state.samples + 2 >= _FIRST
        record, state, _ = look(
            state,
            change,
            loss=loss,
            foreseen=foreseen,
            last_factor=last_factor,
            resolution=sys.float_info.min,
        )
        assert all_finite(state)
        assert record.step_size == state.step_size > 0
        growth = min(2.0, 2 ** (steps / SETTINGS.steps_to_double)) if last_factor == 1 else 1.0
        assert 0.5 * before <= state.step_size <= growth * before * (1 + 1e-12)
        if state.step_size > before:
            assert state.progress > 0
            assert state.change <= SETTINGS.trust * max(losses)
        if not settled and state.change == 0:
            assert state.step_size >= before


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("initial", [1e-3, 1.0, 1e3])
def test_hard_functions_break_nothing(name, initial):
    """Gradient descent: whatever the losses are, the step size and the averages stay finite."""
    function, x, _ = HARD[name]
    shift = 2.0 if name == "wavy" else 0.0  # it must not be negative
    state, before = PlusState(step_size=initial), x
    for k in range(60):
        loss, gradient = function(x)
        if not all(map(math.isfinite, [loss, *gradient])):
            break  # the optimizer would skip this step

        def moved(step_size, x=x, gradient=gradient):
            return [v - step_size * g for v, g in zip(x, gradient, strict=True)]

        def look_back(x=x, before=before, gradient=gradient):
            step = [v - w for v, w in zip(x, before, strict=True)]
            slope = sum(g * u for g, u in zip(gradient, step, strict=True))
            return function(before)[0] + shift, slope

        line = Line(
            lambda step_size, moved=moved: function(moved(step_size))[0] + shift,
            loss=loss + shift,
            slope=sum(g * g for g in gradient),
            resolution=sys.float_info.epsilon * abs(loss + shift),
            look_back=look_back,
            step=k,
        )
        old = state
        record, state = SETTINGS.search(replace(state, search_interval=1), line)
        assert all_finite(state)
        assert state.step_size > 0
        if not record.accepted:
            assert record.outcome in ("slope", "unresolved", "trials")
            assert state == old.failed()
            break
        if old.step_size_known:
            assert record.trials <= 1
            assert 0.5 * old.step_size <= state.step_size <= 2 * old.step_size
        before, x = x, moved(record.step_size)
