"""The search for a first step size: up or down from where it starts, then in between."""

import math

from .rule import Line, Outcome

_STRIDE = 8  # by which a step size shrinks or grows until acceptance is known on both sides
_BISECTIONS = 2
_MOST_TRIALS = 30


def find_first(line: Line, start: float, c: float) -> tuple[float, float, int, Outcome]:
    """Return about the largest step size that Armijo's criterion accepts, up to a factor of 1.7.

        f(w) - f(w + eta d) >= c eta slope                                               (Eq. 1)

    From 2^-7 to 1e-4 it takes six forward passes.

    Args:
        line: The loss along the tested direction.
        start: Where it begins, above 0.
        c: Share of the first-order decrease that must be reached, in (0, 1).

    Returns:
        The step size, 0 if the search failed; its loss, or that of the last trial if it failed, NaN
        without one; the number of trials; the outcome as in `SearchRecord`.
    """
    step_size, trial_loss, trials = start, math.nan, 0
    accepted, rejected, bisections = 0.0, math.inf, 0
    accepted_loss = math.nan
    if line.slope <= 0:
        return 0.0, trial_loss, 0, "slope"
    while bisections < _BISECTIONS:
        if step_size * line.slope < line.resolution:
            return 0.0, trial_loss, trials, "unresolved"
        if trials == _MOST_TRIALS:
            break
        between = accepted > 0 and rejected < math.inf
        trial_loss, trials = line.loss_at(step_size), trials + 1
        decrease = line.loss - trial_loss
        if math.isfinite(decrease) and decrease >= c * step_size * line.slope:
            accepted, accepted_loss = step_size, trial_loss
        else:
            rejected = step_size
        bisections += between
        if accepted and rejected < math.inf:
            step_size = math.sqrt(accepted * rejected)
        else:
            step_size *= _STRIDE if accepted else 1 / _STRIDE
    if not accepted:
        return 0.0, trial_loss, trials, "trials"
    return accepted, accepted_loss, trials, "accepted"
