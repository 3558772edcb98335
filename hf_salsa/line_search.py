"""The step-size rule of SaLSa on plain floats.

Everything here is scalar arithmetic in double precision: the optimizers bring the loss and the
slope, this module decides. Source of the equation numbers: Kenneweg, Kenneweg, Fumagalli, Hammer,
"No learning rates needed: Introducing SALSA - Stable Armijo Line Search Adaptation" (IJCNN 2024).
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

Outcome = Literal["accepted", "slope", "unresolved", "trials"]

_FEWEST_SAMPLES = 3  # of which a standard error is worth something
_SAMPLES_OF_AN_AVERAGE = 10  # before that, a lack of agreement may be chance
_SEARCHES_PER_INTERVAL = 8  # of `search_once`: so many before the interval grows by a step


def _is_number(value: Any) -> bool:
    # bool is an int to Python, but `c=True` is a mistake.
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# Argument -> (what is allowed, in words; the same as a test).
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "c": ("a number strictly between 0 and 1 (0.3 to 0.5 works well)", lambda x: 0 < x < 1),
    "beta3": ("a number in [0, 1) (0.9 to 0.999 works well, 0 is SLS)", lambda x: 0 <= x < 1),
    "steps_to_double": ("a finite number of steps, at least 1", lambda x: 1 <= x < math.inf),
    "backtrack_factor": ("a number strictly between 0 and 1", lambda x: 0 < x < 1),
    "initial_step_size": ("a finite number above 0", lambda x: 0 < x < math.inf),
    "max_search_interval": ("a whole number of steps, at least 1", lambda x: x >= 1),
    "require_decrease": ("True or False", lambda x: True),
    "max_trials": ("a whole number of forward passes, at least 1", lambda x: x >= 1),
    "steps_to_double_fast": ("a finite number of steps, at least 1", lambda x: 1 <= x < math.inf),
    "confidence": ("a number of standard errors (2 works well)", lambda x: not math.isnan(x)),
    "first_share": ("a number in (0, 1]", lambda x: 0 < x <= 1),
    "cool_down": ("a share of the run, a number in [0, 1]", lambda x: 0 <= x <= 1),
    "total_steps": ("a whole number of steps, at least 1", lambda x: x >= 1),
    "direction": ("'gradient' or 'momentum'", lambda x: x in ("gradient", "momentum")),
    "betas": (
        "two numbers in [0, 1)",
        lambda x: len(x) == 2 and all(_is_number(beta) and 0 <= beta < 1 for beta in x),
    ),
    "eps": ("a finite number above 0", lambda x: 0 < x < math.inf),
    "momentum": ("a number in [0, 1)", lambda x: 0 <= x < 1),
    "weight_decay": ("a finite number, at least 0", lambda x: 0 <= x < math.inf),
}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "max_search_interval": int,
    "max_trials": int,
    "total_steps": int,
    "require_decrease": bool,
    "direction": str,
    "betas": (tuple, list),
}


def check_setting(name: str, value: Any, argument: str | None = None) -> None:
    """Raise a `ValueError` that names the argument, its value and the allowed range.

    Args:
        name: The setting, as the optimizers call it (`"c"`, `"beta3"`, ...).
        value: What the user gave.
        argument: The name under which the user gave it, where that differs (`"salsa_c"`).
    """
    allowed, test = _ALLOWED[name]
    expected = _TYPES.get(name, (int, float))
    right_type = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
    if not right_type or not test(value):
        raise ValueError(f"{argument or name}={value!r} is not allowed: it must be {allowed}.")


@dataclass(frozen=True)
class SearchSettings:
    """What a search may do. The optimizers document the fields; `check_setting` has the ranges."""

    c: float
    beta3: float
    steps_to_double: float
    backtrack_factor: float
    initial_step_size: float
    max_search_interval: int
    require_decrease: bool
    max_trials: int


@dataclass(frozen=True)
class SearchState:
    """All that one step hands to the next, as plain scalars.

    Attributes:
        step_size: eta_{k-1}, the step size of the last search.
        h: h_{k-1}, the smoothed decrease of the loss (Eq. 5).
        s: s_{k-1}, the smoothed slope (Eq. 5, 7).
        step_size_average_fast: etabar(0.9) of Eq. 8.
        step_size_average_slow: etabar(0.99) of Eq. 8.
        search_interval: L_k, steps from one search to the next (Eq. 11).
        steps_since_search: Steps taken since the last search, that search's own step not counted.
        reevaluate_loss: The replay does not reproduce the training loss, so f(w_k) is evaluated
            with the trials.
        searches: Searches so far.
        trials: Evaluations of the objective so far, each an extra forward pass.
        failed_searches: Searches that found no step size.
        skipped_steps: Steps not taken because the loss or the gradient was not finite.
        consecutive_skips: How many of them came last in a row.
        steps: Steps so far, skipped ones too.
        run_start: `steps` at the start of the run.
        run_steps: Steps of the run; 0 where they are not known.
    """

    step_size: float
    h: float = 0.0
    s: float = 0.0
    step_size_average_fast: float = 0.0
    step_size_average_slow: float = 0.0
    search_interval: int = 1
    steps_since_search: int = 0
    reevaluate_loss: bool = False
    searches: int = 0
    trials: int = 0
    failed_searches: int = 0
    skipped_steps: int = 0
    consecutive_skips: int = 0
    steps: int = 0
    run_start: int = 0
    run_steps: int = 0

    @property
    def search_due(self) -> bool:
        """Whether the coming step searches."""
        return self.steps_since_search + 1 >= self.search_interval

    @property
    def step_size_known(self) -> bool:
        """Whether any search has been accepted yet."""
        return self.searches > self.failed_searches


@dataclass(frozen=True)
class AgreementSettings(SearchSettings):
    """What `search_once` may do besides. The optimizers document the fields."""

    steps_to_double_fast: float
    confidence: float
    first_share: float


@dataclass(frozen=True)
class AgreementState(SearchState):
    """What `search_once` hands to the next step besides.

    `s` is the smoothed slope; `h` and the averages of the step size are not used.

    Attributes:
        curvature: Smoothed curvature of the loss along the tested direction.
        agreement: Smoothed <g_k, p_k>; p_k is what earlier gradients put into the direction.
        agreement_square: The same of its square.
        samples: How many searches these averages, and `s`, have seen.
        warm_up_over: The step size no longer grows fast.
    """

    curvature: float = 0.0
    agreement: float = 0.0
    agreement_square: float = 0.0
    samples: int = 0
    warm_up_over: bool = False


@dataclass(frozen=True)
class SearchRecord:
    """What the latest search saw and decided.

    Attributes:
        step_size: The step size chosen; the one of before if the search failed.
        loss: f_k(w_k).
        trial_loss: f_k at the chosen trial point (`search_once`: at its only one, from which it
            chose); of the last trial if the search failed, NaN if there was none.
        decrease: `loss - trial_loss`.
        slope: Minus the directional derivative of f_k along the tested direction, ||g||^2 for SGD.
        trials: Step sizes tried, each one forward pass.
        outcome: `"accepted"`; or why the search failed: `"slope"` (the tested direction does not
            descend), `"unresolved"` (the loss's precision cannot show the decrease of any smaller
            step), `"trials"` (`max_trials` forward passes were not enough).
        interval: L_k, steps until the next search.
    """

    step_size: float
    loss: float
    trial_loss: float
    decrease: float
    slope: float
    trials: int
    outcome: Outcome
    interval: int

    @property
    def accepted(self) -> bool:
        """Whether the search found a step size."""
        return self.outcome == "accepted"


def moving_average(average: float, value: float, beta: float) -> float:
    """Return `beta * average + (1 - beta) * value` (Eq. 5, 8)."""
    return beta * average + (1 - beta) * value


def search_interval(average_fast: float, average_slow: float, max_search_interval: int) -> int:
    """Return L_k, the number of steps from this search to the next (Eq. 9-11).

    r = etabar(0.9) / etabar(0.99) shows how much the step size moves; rbar = max(r, 1/r);
    L_k is the nearest integer of 1 / (rbar - 1), clamped to [1, max_search_interval].
    """
    movement = max(average_fast / average_slow, average_slow / average_fast) - 1  # Eq. 9, 10
    if movement * max_search_interval <= 1:  # no division by zero for a step size at rest
        return max_search_interval
    return max(1, math.floor(1 / movement + 0.5))  # Eq. 11


def is_accepted(
    settings: SearchSettings, state: SearchState, step_size: float, decrease: float, slope: float
) -> bool:
    """Return whether h_k >= c * eta_k * s_k (Eq. 6; Eq. 7 for Adam; Eq. 1 and 3 for beta3 = 0).

    With `require_decrease` the loss must not rise either, the extra condition of Theorem 1. A trial
    loss that is not finite rejects.
    """
    if not math.isfinite(decrease) or (settings.require_decrease and decrease < 0):
        return False
    h = moving_average(state.h, decrease, settings.beta3)
    s = moving_average(state.s, slope, settings.beta3)
    return h >= settings.c * step_size * s


def first_step_size(settings: SearchSettings, state: SearchState) -> float:
    """Return eta_{k-1} * 2^(n/b), the step size that the coming search tries first."""
    doublings = (state.steps_since_search + 1) / settings.steps_to_double
    growth = 2 ** min(doublings, sys.float_info.max_exp - 1)
    return min(state.step_size * growth, sys.float_info.max)


def cooling(cool_down: float, step: int, total_steps: int) -> float:
    """Return the factor by which the step size of a step is applied.

    min(1, (T - k) / (cool_down T)): 1, but over the last `cool_down` of the run falling linearly to
    0 at step T. Should there be steps from T on, they keep the factor of step T - 1.

    Args:
        cool_down: Share of the run, in [0, 1].
        step: k, the number of the step: 0, 1, ..., T - 1.
        total_steps: T, steps of the run.
    """
    if cool_down * total_steps == 0:
        return 1.0
    return min(1.0, max(1, total_steps - step) / (cool_down * total_steps))


def search(
    settings: SearchSettings,
    state: SearchState,
    evaluate: Callable[[float], float],
    *,
    loss: float,
    slope: float,
    resolution: float,
) -> tuple[SearchRecord, SearchState]:
    """Find the step size of this step: the largest of the trial step sizes that is accepted.

    The trial step sizes are eta_{k-1} * 2^(n/b) * delta^j, j = 0, 1, 2, ..., with n the steps since
    the last search, b = `steps_to_double` and delta = `backtrack_factor`: Algorithm 1, its growth
    of 2^(1/b) per training step whatever the interval. Where acceptance is monotone in j the answer
    is that of trying them one by one; j = 0, 1, 2, 4, 8, ... and then bisection find it in
    O(log j) evaluations.

    Args:
        settings: The rule's constants.
        state: As the step before left it.
        evaluate: Step size -> f_k(w_k + step_size * d_k).
        loss: f_k(w_k), finite.
        slope: Minus the directional derivative of f_k along d_k, finite.
        resolution: The smallest change of the loss that its precision can show. Step sizes whose
            first-order decrease `step_size * slope` lies below are not tried.

    Returns:
        The record of the search, and the state with averages, interval and counters moved on
        (`trials` is left to whoever counts the evaluations).
    """
    first = first_step_size(settings, state)
    losses: dict[int, float] = {}

    def step_size(j: int) -> float:
        return first * settings.backtrack_factor**j

    def accepts(j: int) -> bool:
        losses[j] = evaluate(step_size(j))
        return is_accepted(settings, state, step_size(j), loss - losses[j], slope)

    best: int | None = None
    outcome: Outcome
    if slope <= 0:
        outcome = "slope"
    elif first * slope < resolution:
        outcome = "unresolved"
    else:
        smallest = max(resolution / slope, sys.float_info.min)
        shrinkage = math.log(smallest) - math.log(first)  # the quotient itself may underflow
        last = max(0, math.floor(shrinkage / math.log(settings.backtrack_factor)))
        best, outcome = _largest_accepted(accepts, last, settings.max_trials)

    searched = replace(
        state,
        searches=state.searches + 1,
        steps_since_search=0,
        failed_searches=state.failed_searches + (best is None),
    )
    if best is None:
        chosen, trial_loss = state.step_size, list(losses.values())[-1] if losses else math.nan
    else:
        chosen, trial_loss = step_size(best), losses[best]
        fast = moving_average(state.step_size_average_fast, chosen, 0.9)  # Eq. 8
        slow = moving_average(state.step_size_average_slow, chosen, 0.99)
        searched = replace(
            searched,
            step_size=chosen,
            h=moving_average(state.h, loss - trial_loss, settings.beta3),  # Eq. 5
            s=moving_average(state.s, slope, settings.beta3),
            step_size_average_fast=fast,
            step_size_average_slow=slow,
            search_interval=search_interval(fast, slow, settings.max_search_interval),
        )
    record = SearchRecord(
        step_size=chosen,
        loss=loss,
        trial_loss=trial_loss,
        decrease=loss - trial_loss,
        slope=slope,
        trials=len(losses),
        outcome=outcome,
        interval=searched.search_interval,
    )
    return record, searched


def _largest_accepted(
    accepts: Callable[[int], bool], last: int, max_trials: int
) -> tuple[int | None, Outcome]:
    """Return the smallest accepted j in [0, last] (the largest step size), or None and why."""
    doubling = sorted({0, last, *(2**i for i in range(last.bit_length()))})
    # At `last` the rounding errors of the loss may decide instead of the criterion: then away from
    # it, last - 1, - 2, - 4, ..., through the gap in which one-by-one backtracking would have
    # stopped.
    gap = range(doubling[-2] + 1 if last else 0, last)
    back = [last - 2**i for i in range(len(gap).bit_length())]
    # Each with the j below it that is known to be rejected.
    candidates = [*pairwise([-1, *doubling]), *((gap.start - 1, j) for j in back)]
    found = next((i for i, (_, j) in enumerate(candidates[:max_trials]) if accepts(j)), None)
    if found is None:
        return None, "trials" if len(candidates) > max_trials else "unresolved"
    (rejected, accepted), trials = candidates[found], found + 1
    while accepted - rejected > 1 and trials < max_trials:
        middle = (rejected + accepted) // 2
        trials += 1
        if accepts(middle):
            accepted = middle
        else:
            rejected = middle
    return accepted, "accepted"


def search_once(
    settings: AgreementSettings,
    state: AgreementState,
    evaluate: Callable[[float], float],
    *,
    loss: float,
    slope: float,
    agreement: float,
    resolution: float,
) -> tuple[SearchRecord, AgreementState]:
    """Find the step size of this step from one trial: no backtracking, but for the first search.

    The first search is `search`'s; the step size starts at `first_share` of what it accepts. After
    that, with beta = beta3, n the steps since the last search and averages free of the bias of
    their start at 0:

        eta = eta_{k-1} 2^(n/b): b = steps_to_double_fast during the warm-up, if the agreement is
              above 0 by more than `confidence` standard errors; else steps_to_double
        s_k = beta s_{k-1} + (1 - beta) slope
        kappa_k = beta kappa_{k-1} + (1 - beta) 2 (slope - decrease(eta) / eta) / eta
        eta_k = min(eta, max(2 (1 - c) s_k / kappa_k, delta eta_{k-1}))

    A sample of the curvature counts as at most 4 max(|slope|, s_k) / eta, and a trial that is not
    finite is repeated at delta of its step size. 2 (1 - c) s / kappa is the largest step size that
    satisfies Eq. 6 on the parabola with slope s and curvature kappa. In contrast to an average of
    decreases it does not lag behind a step size that moves.

    The warm-up searches at every step and is over for good when, after 10 searches or more, the
    agreement is no longer certain: later it is noise around 0, which in a long run would now and
    then pass for agreement. From then on searches are 1 + (searches so far) / 8 steps apart, at
    most `max_search_interval`.

    Args:
        settings: The rule's constants.
        state: As the step before left it.
        evaluate: Step size -> f_k(w_k + step_size * d_k).
        loss: f_k(w_k), finite.
        slope: Minus the directional derivative of f_k along d_k, finite.
        agreement: <g_k, p_k>, where -p_k is what earlier gradients put into the final direction:
            above 0 where the loss of this mini-batch still falls along them.
        resolution: The smallest change of the loss that its precision can show. Nothing is tried
            where the first-order decrease lies below.

    Returns:
        As `search`.
    """
    if not state.step_size_known:
        return _start(settings, state, evaluate, loss=loss, slope=slope, resolution=resolution)
    beta, samples = settings.beta3, state.samples + 1
    seen = replace(
        state,
        s=moving_average(state.s, slope, beta),
        agreement=moving_average(state.agreement, agreement, beta),
        agreement_square=moving_average(state.agreement_square, agreement**2, beta),
        samples=samples,
        searches=state.searches + 1,
        steps_since_search=0,
    )
    agrees = _agrees(settings, seen)
    over = state.warm_up_over or (samples >= _SAMPLES_OF_AN_AVERAGE and not agrees)
    seen = replace(seen, warm_up_over=over)
    if agrees and not over:
        fast = replace(settings, steps_to_double=settings.steps_to_double_fast)
        trial = first_step_size(fast, state)
    else:
        trial = first_step_size(settings, state)
    steepest = max(abs(slope), seen.s / (1 - beta**samples))
    trial_loss, trials = math.nan, 0
    outcome: Outcome = "unresolved"
    if trial * steepest > resolution:
        trial_loss, trials = evaluate(trial), 1
        while not math.isfinite(trial_loss) and trials < settings.max_trials:
            trial *= settings.backtrack_factor
            trial_loss, trials = evaluate(trial), trials + 1
        outcome = "accepted" if math.isfinite(trial_loss) else "trials"
    decrease = loss - trial_loss
    if outcome == "accepted":
        # One bad mini-batch, or one step into a wall, must not decide for long.
        curvature = min(2 * (slope - decrease / trial), 4 * steepest) / trial
        seen = replace(seen, curvature=moving_average(state.curvature, curvature, beta))
        largest = max(
            _largest_on_parabola(settings.c, seen), settings.backtrack_factor * state.step_size
        )
        chosen = min(trial, largest)
        interval = 1 + samples // _SEARCHES_PER_INTERVAL if over else 1
        searched = replace(
            seen,
            step_size=chosen,
            search_interval=min(interval, settings.max_search_interval),
        )
    else:
        searched = replace(
            state,
            searches=seen.searches,
            steps_since_search=0,
            failed_searches=state.failed_searches + 1,
        )
    record = SearchRecord(
        step_size=searched.step_size,
        loss=loss,
        trial_loss=trial_loss,
        decrease=decrease,
        slope=slope,
        trials=trials,
        outcome=outcome,
        interval=searched.search_interval,
    )
    return record, searched


def _start(
    settings: AgreementSettings,
    state: AgreementState,
    evaluate: Callable[[float], float],
    *,
    loss: float,
    slope: float,
    resolution: float,
) -> tuple[SearchRecord, AgreementState]:
    """Take the first step size from a search on one mini-batch, and nothing else of it."""
    record, searched = search(
        settings, state, evaluate, loss=loss, slope=slope, resolution=resolution
    )
    started = replace(state, searches=searched.searches, failed_searches=searched.failed_searches)
    if record.accepted:
        step_size = settings.first_share * record.step_size
        started = replace(started, step_size=step_size)
        record = replace(record, step_size=step_size, interval=started.search_interval)
    return record, started


def _agrees(settings: AgreementSettings, state: AgreementState) -> bool:
    """Return whether the average agreement is above 0 by more than `confidence` standard errors."""
    if state.samples < _FEWEST_SAMPLES:
        return False
    weight = 1 - settings.beta3**state.samples
    mean = state.agreement / weight
    variance = max(0.0, state.agreement_square / weight - mean**2)
    # So many samples of equal weight have the variance of an exponential average.
    count = min(state.samples, (1 + settings.beta3) / (1 - settings.beta3))
    return mean > settings.confidence * math.sqrt(variance / count)


def _largest_on_parabola(c: float, state: AgreementState) -> float:
    """Return the largest eta with eta s - eta^2 kappa / 2 >= c eta s, 0 if the loss rises."""
    if state.s <= 0:
        return 0.0
    return 2 * (1 - c) * state.s / state.curvature if state.curvature > 0 else math.inf
