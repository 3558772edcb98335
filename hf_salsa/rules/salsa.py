"""The paper's rule: Armijo backtracking with both sides of the criterion smoothed.

Equation numbers: Kenneweg, Kenneweg, Fumagalli, Hammer, "No learning rates needed: Introducing
SALSA - Stable Armijo Line Search Adaptation" (IJCNN 2024).
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from .rule import Line, Outcome, RuleState, SearchRecord, StepSizeRule, grown, moving_average


@dataclass(frozen=True)
class SaLSaState(RuleState):
    """What `SaLSa` hands to the next step besides.

    Attributes:
        h: h_{k-1}, the smoothed decrease of the loss (Eq. 5).
        s: s_{k-1}, the smoothed slope (Eq. 5, 7).
        step_size_average_fast: etabar(0.9) of Eq. 8.
        step_size_average_slow: etabar(0.99) of Eq. 8.
    """

    units: ClassVar[dict[str, tuple[int, int]]] = RuleState.units | {
        "h": (1, 0),
        "s": (1, -1),
        "step_size_average_fast": (0, 1),
        "step_size_average_slow": (0, 1),
    }

    h: float = 0.0
    s: float = 0.0
    step_size_average_fast: float = 0.0
    step_size_average_slow: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SaLSa(StepSizeRule[SaLSaState]):
    """The largest of the trial step sizes that satisfies the smoothed Armijo criterion.

        tried:    eta_{k-1} 2^(n/b) delta^j, j = 0, 1, 2, ..., n steps since the last one (Alg. 1)
        smoothed: h_k = beta3 h_{k-1} + (1 - beta3) (f_k(w_k) - f_k(w_k + eta d_k))         (Eq. 5)
                  s_k = beta3 s_{k-1} + (1 - beta3) slope_k                              (Eq. 5, 7)
        accepted: h_k >= c eta s_k                              (Eq. 6; Eq. 1 and 3 with beta3 = 0)
        interval: L_k of Eq. 8-11, steps until the next search

    Where acceptance is monotone in j the answer is that of trying j one by one; j = 0, 1, 2, 4, 8,
    ... and then bisection find it in O(log j) evaluations.

    Args:
        c: Share of the first-order decrease that must be reached, in (0, 1).
        beta3: Smoothing of both sides of the criterion, in [0, 1).
        steps_to_double: b, training steps in which the step size may double, at least 1.
        backtrack_factor: delta, by which a rejected step size shrinks, in (0, 1).
        max_search_interval: Most steps between two searches, at least 1.
        require_decrease: The loss must not rise either, the extra condition of Theorem 1.
        max_trials: Most forward passes of one search, at least 1.
        initial_step_size: eta_0, above 0.
        cool_down: As in `StepSizeRule`; 0 is the paper's method.
    """

    state_type: ClassVar[type[RuleState]] = SaLSaState
    clips_gradients: ClassVar[bool] = False  # the paper's runs do not

    c: float = 0.3
    beta3: float = 0.99
    steps_to_double: float = 500
    backtrack_factor: float = 0.9
    max_search_interval: int = 10
    require_decrease: bool = False
    max_trials: int = 30

    def first_trial(self, state: SaLSaState) -> float:
        """Return eta_{k-1} * 2^(n/b)."""
        return grown(state, self.steps_to_double)

    def search(self, state: SaLSaState, line: Line) -> tuple[SearchRecord, SaLSaState]:
        """Find the largest trial step size that is accepted.

        Step sizes whose first-order decrease lies below the loss's resolution are not tried.
        """
        first = self.first_trial(state)
        losses: dict[int, float] = {}

        def step_size(j: int) -> float:
            return first * self.backtrack_factor**j

        def accepts(j: int) -> bool:
            losses[j] = line.loss_at(step_size(j))
            return self.accepts(state, step_size(j), line.loss - losses[j], line.slope)

        best: int | None = None
        outcome: Outcome
        if line.slope <= 0:
            outcome = "slope"
        elif first * line.slope < line.resolution:
            outcome = "unresolved"
        else:
            smallest = max(line.resolution / line.slope, sys.float_info.min)
            shrinkage = math.log(smallest) - math.log(first)  # the quotient itself may underflow
            last = max(0, math.floor(shrinkage / math.log(self.backtrack_factor)))
            best, outcome = _largest_accepted(accepts, last, self.max_trials)

        if best is None:
            searched, trial_loss = state.failed(), list(losses.values())[-1] if losses else math.nan
        else:
            chosen, trial_loss = step_size(best), losses[best]
            fast = moving_average(state.step_size_average_fast, chosen, 0.9)  # Eq. 8
            slow = moving_average(state.step_size_average_slow, chosen, 0.99)
            searched = state.accepted(
                step_size=chosen,
                h=moving_average(state.h, line.loss - trial_loss, self.beta3),  # Eq. 5
                s=moving_average(state.s, line.slope, self.beta3),
                step_size_average_fast=fast,
                step_size_average_slow=slow,
                search_interval=search_interval(fast, slow, self.max_search_interval),
            )
        record = SearchRecord.of(
            line, searched, trial_loss=trial_loss, trials=len(losses), outcome=outcome
        )
        return record, searched

    def accepts(self, state: SaLSaState, step_size: float, decrease: float, slope: float) -> bool:
        """Return whether h_k >= c * eta_k * s_k (Eq. 6; Eq. 7 for Adam; Eq. 1, 3 for beta3 = 0).

        With `require_decrease` the loss must not rise either. A trial loss that is not finite
        rejects.
        """
        if not math.isfinite(decrease) or (self.require_decrease and decrease < 0):
            return False
        h = moving_average(state.h, decrease, self.beta3)
        s = moving_average(state.s, slope, self.beta3)
        return h >= self.c * step_size * s

    def describe(self) -> str:
        """Return how the step size is found, for cards."""
        averaged = ", both averaged over the steps" if self.beta3 else ""
        if self.max_search_interval == 1:
            when = "every step"
        else:
            when = (
                "every step as long as the step size moved, and up to "
                f"{self.max_search_interval} steps apart where it had come to rest"
            )
        return (
            "a line search finds on the mini-batch itself: the largest of those tried at which the "
            f"loss falls by at least {self.c} of what the slope predicts{averaged} ([Kenneweg, "
            "Kenneweg, Fumagalli, Hammer, IJCNN 2024](https://arxiv.org/abs/2407.20650)). "
            f"{self.describe_tail()}; the search ran at {when}"
        )


def search_interval(average_fast: float, average_slow: float, max_search_interval: int) -> int:
    """Return L_k, the number of steps from this search to the next (Eq. 9-11).

    r = etabar(0.9) / etabar(0.99) shows how much the step size moves; rbar = max(r, 1/r);
    L_k is the nearest integer of 1 / (rbar - 1), clamped to [1, max_search_interval].
    """
    movement = max(average_fast / average_slow, average_slow / average_fast) - 1  # Eq. 9, 10
    if movement * max_search_interval <= 1:  # no division by zero for a step size at rest
        return max_search_interval
    return max(1, math.floor(1 / movement + 0.5))  # Eq. 11


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
