"""The rule of `salsa_adam_plus` before another one took its place: a candidate of the comparison.

Nothing of it has changed since its results were published; to train, use the optimizers of
`hf_salsa`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hf_salsa.optimizers import LineSearchAdam, LineSearchSGD
from hf_salsa.rules import (
    Line,
    Outcome,
    RuleState,
    SaLSa,
    SaLSaState,
    SearchRecord,
    StepSizeRule,
    grown,
    moving_average,
)

_FEWEST_SAMPLES = 3  # of which a standard error is worth something
_SAMPLES_OF_AN_AVERAGE = 10  # before that, a lack of agreement may be chance
_SEARCHES_PER_INTERVAL = 8  # so many before the interval grows by a step
_OPTIONS = {"direction": "momentum", "head_first": 0}


@dataclass(frozen=True)
class FormerPlusState(RuleState):
    """What `FormerPlus` hands to the next step besides. All averages start at 0.

    Attributes:
        s: Smoothed slope.
        curvature: Smoothed curvature of the loss along the tested direction.
        agreement: Smoothed <g_k, p_k>; p_k is what earlier gradients put into the direction.
        agreement_square: The same of its square.
        samples: How many searches these averages have seen.
        warm_up_over: The step size no longer grows fast.
    """

    units: ClassVar[dict[str, tuple[int, int]]] = RuleState.units | {
        "s": (1, -1),
        "curvature": (1, -2),
        "agreement": (1, -1),
        "agreement_square": (2, -2),
    }

    s: float = 0.0
    curvature: float = 0.0
    agreement: float = 0.0
    agreement_square: float = 0.0
    samples: int = 0
    warm_up_over: bool = False


@dataclass(frozen=True, kw_only=True)
class FormerPlus(StepSizeRule[FormerPlusState]):
    """One trial per search measures slope and curvature; Armijo's criterion on their parabola.

    The first search backtracks from `initial_step_size` to the largest step size with f_k(w_k) -
    f_k(w_k + eta d_k) >= c eta slope_k; training starts at `first_share` of it. After that, with
    beta = beta3, n the steps since the last search and averages free of the bias of their start:

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
        c: Share of the first-order decrease that must be reached, in (0, 1).
        beta3: beta, smoothing of slope, curvature and agreement, in [0, 1).
        steps_to_double: b, training steps in which the step size may double, at least 1.
        steps_to_double_fast: The same while mini-batches agree, at least 1.
        confidence: Standard errors, by which the agreement must be above 0 for fast growth.
        first_share: Share of the first step size found at which training starts, in (0, 1].
        backtrack_factor: delta, by which the step size shrinks in the first search, and at most in
            each later one, in (0, 1).
        max_search_interval: Most steps between two searches, at least 1.
        max_trials: Most forward passes of one search, at least 1.
        initial_step_size: Where the first search starts, above 0.
        cool_down: As in `StepSizeRule`.
    """

    state_type: ClassVar[type[RuleState]] = FormerPlusState
    wants_agreement: ClassVar[bool] = True

    c: float = 0.4
    beta3: float = 0.9
    steps_to_double: float = 500
    steps_to_double_fast: float = 12
    confidence: float = 2.0
    first_share: float = 0.1
    backtrack_factor: float = 0.5
    max_search_interval: int = 10
    max_trials: int = 30
    initial_step_size: float = 1.0
    cool_down: float = 0.6

    def first_trial(self, state: FormerPlusState) -> float:
        """Return eta_{k-1} * 2^(n/b), without the fast growth."""
        return grown(state, self.steps_to_double)

    def search(self, state: FormerPlusState, line: Line) -> tuple[SearchRecord, FormerPlusState]:
        """Find the step size from one trial: no backtracking, but for the first search."""
        if not state.step_size_known:
            return self._start(state, line)
        seen = self._observe(state, line)
        trial = self._trial(state, seen)
        steepest = max(abs(line.slope), seen.s / (1 - self.beta3**seen.samples))
        trial_loss, trials = math.nan, 0
        outcome: Outcome = "unresolved"
        if trial * steepest > line.resolution:
            trial_loss, trials = line.loss_at(trial), 1
            while not math.isfinite(trial_loss) and trials < self.max_trials:
                trial *= self.backtrack_factor
                trial_loss, trials = line.loss_at(trial), trials + 1
            outcome = "accepted" if math.isfinite(trial_loss) else "trials"
        if outcome == "accepted":
            # One bad mini-batch, or one step into a wall, must not decide for long.
            sample = 2 * (line.slope - (line.loss - trial_loss) / trial)
            curvature = min(sample, 4 * steepest) / trial
            seen = replace(seen, curvature=moving_average(state.curvature, curvature, self.beta3))
            largest = max(self._bound(seen), self.backtrack_factor * state.step_size)
            searched = seen.accepted(
                step_size=min(trial, largest), search_interval=self._interval(seen)
            )
        else:
            searched = state.failed()
        record = SearchRecord.of(
            line, searched, trial_loss=trial_loss, trials=trials, outcome=outcome
        )
        return record, searched

    def _start(self, state: FormerPlusState, line: Line) -> tuple[SearchRecord, FormerPlusState]:
        """Take the first step size from a search on one mini-batch, and nothing else of it."""
        armijo = SaLSa(
            c=self.c,
            beta3=self.beta3,  # without a past it decides nothing
            steps_to_double=self.steps_to_double,
            backtrack_factor=self.backtrack_factor,
            max_trials=self.max_trials,
        )
        fresh = SaLSaState(state.step_size, steps_since_search=state.steps_since_search)
        record, _ = armijo.search(fresh, line)
        if not record.accepted:
            return replace(record, interval=state.search_interval), state.failed()
        started = state.accepted(step_size=self.first_share * record.step_size)
        return replace(
            record, step_size=started.step_size, interval=started.search_interval
        ), started

    def _observe(self, state: FormerPlusState, line: Line) -> FormerPlusState:
        """Return the state with the averages of slope and agreement moved on."""
        beta = self.beta3
        seen = replace(
            state,
            s=moving_average(state.s, line.slope, beta),
            agreement=moving_average(state.agreement, line.agreement, beta),
            agreement_square=moving_average(
                state.agreement_square, line.agreement * line.agreement, beta
            ),
            samples=state.samples + 1,
        )
        over = seen.samples >= _SAMPLES_OF_AN_AVERAGE and not self._agrees(seen)
        return replace(seen, warm_up_over=state.warm_up_over or over)

    def _trial(self, state: FormerPlusState, seen: FormerPlusState) -> float:
        fast = self._agrees(seen) and not seen.warm_up_over
        return grown(state, self.steps_to_double_fast if fast else self.steps_to_double)

    def _agrees(self, state: FormerPlusState) -> bool:
        """Return whether the agreement is above 0 by more than `confidence` standard errors."""
        if state.samples < _FEWEST_SAMPLES:
            return False
        weight = 1 - self.beta3**state.samples
        mean = state.agreement / weight
        variance = max(0.0, state.agreement_square / weight - mean * mean)
        # So many samples of equal weight have the variance of an exponential average.
        count = min(state.samples, (1 + self.beta3) / (1 - self.beta3))
        return mean > self.confidence * math.sqrt(variance / count)

    def _bound(self, state: FormerPlusState) -> float:
        """Return the largest eta with eta s - eta^2 kappa / 2 >= c eta s, 0 if the loss rises."""
        if state.s <= 0:
            return 0.0
        return 2 * (1 - self.c) * state.s / state.curvature if state.curvature > 0 else math.inf

    def _interval(self, state: FormerPlusState) -> int:
        if not state.warm_up_over:
            return 1
        return min(1 + state.samples // _SEARCHES_PER_INTERVAL, self.max_search_interval)

    def describe(self) -> str:
        """Return how the step size is found, for cards."""
        if self.max_search_interval == 1:
            when = "every step"
        else:
            when = (
                "every step in the beginning, and ever less often later, up to "
                f"{self.max_search_interval} steps apart"
            )
        return (
            f"it finds on the mini-batches themselves: it starts at {self.first_share:.3g} of what "
            f"the first one allows, may double within {_steps(self.steps_to_double_fast)} as long "
            "as new mini-batches want more of the steps that were taken, and within "
            f"{_steps(self.steps_to_double)} ever after, and stays below the bound at which the "
            "loss, a parabola through one trial, falls by at least "
            f"{self.c} of what the slope predicts (after [Kenneweg, Kenneweg, Fumagalli, Hammer, "
            f"IJCNN 2024](https://arxiv.org/abs/2407.20650)). {self.describe_tail()}; the search "
            f"ran at {when}"
        )


def _steps(number: float) -> str:
    return f"{number:.3g} step{'' if number == 1 else 's'}"


class FormerPlusAdam(LineSearchAdam):
    """Adam with the former rule of `salsa_adam_plus`, tested along the direction of the step."""

    rule_type = FormerPlus
    options: ClassVar[dict[str, Any]] = LineSearchAdam.options | _OPTIONS


class FormerPlusSGD(LineSearchSGD):
    """SGD with the former rule of `salsa_sgd_plus`, likewise."""

    rule_type = FormerPlus
    options: ClassVar[dict[str, Any]] = LineSearchSGD.options | _OPTIONS | {"momentum": 0.9}
