"""Checks: is there a step to take, a line to search, and is its loss the differentiated one."""

import math
from typing import Any

from torch import Tensor

from ..rules import Line, Outcome, RuleState, SearchRecord, StepSizeRule
from . import messages
from .evaluation import Closure

# Shares of the loss by which it should fall at the trial steps of the check, the likeliest first;
# the smallest is for gradients that are far too small, the largest for losses that are noisy.
_DECREASES = (1e-3, 1e-4, 1e-6, 1e-2)
_CLEAR = 100  # times the loss's resolution: such a change shows
_RIGHT = (0.7, 1.4)  # what decrease over eta * slope may be
_ALIKE = 1.3  # ratios that differ by no more show a straight line
_HOPELESS = 20  # searches without any success


def differentiated(closure: Closure | None, params: list[Tensor], name: str) -> Closure:
    """Return a closure, if it is one and there are gradients to go with it.

    Args:
        closure: What `step()` was given, or the objective.
        params: The parameters that have a gradient.
        name: Of the optimizer, for readers.

    Raises:
        TypeError: It is no function.
        RuntimeError: There is none, or no gradient, or a sparse one.
    """
    if closure is not None and not callable(closure):
        raise TypeError(messages.NO_FUNCTION.format(kind=type(closure).__name__))
    if closure is None:
        raise RuntimeError(messages.NO_LOSS.format(name=name))
    if not params:
        raise RuntimeError(messages.NO_GRADIENTS.format(name=name))
    if any(p.grad.is_sparse for p in params if p.grad is not None):
        raise RuntimeError(messages.SPARSE.format(name=name))
    return closure


def unusable(line: Line) -> Outcome | None:
    """Return why no rule can search a line, or None."""
    if not math.isfinite(line.loss):
        return "loss"
    if not math.isfinite(line.slope) or not line.agreement <= math.inf:
        return "slope"
    return None


def ask(rule: StepSizeRule[Any], state: RuleState, line: Line) -> tuple[SearchRecord, RuleState]:
    """Let a rule search; the search fails on a line that is unusable and where numbers overflow."""
    outcome = unusable(line)
    if outcome is None:
        record, searched = rule.search(state, line)
        if all(map(math.isfinite, vars(searched).values())):
            return record, searched
        outcome = "overflow"
    failed = state.failed()
    return SearchRecord.of(line, failed, outcome=outcome), failed


def check_derivative(line: Line) -> None:
    """Compare the loss's decrease at a small step with what the gradient predicts, eta * slope.

    Costs one forward pass where they agree, at most five. Elsewhere smaller steps are tried, and
    one back: at a kink the two sides differ, with a wrong gradient they are alike.

    Raises:
        RuntimeError: The loss falls along a straight line, but not by what the gradient says.
    """
    if line.slope <= 0 or _DECREASES[0] * abs(line.loss) <= _CLEAR * line.resolution:
        return
    ratios: dict[float, float] = {}
    for share in _DECREASES:
        step_size = share * abs(line.loss) / line.slope
        ratio = _ratio(line, step_size)
        if ratio is not None and _RIGHT[0] <= ratio <= _RIGHT[1]:
            return
        if ratio is not None:
            ratios[step_size] = ratio
    if len(ratios) < 2:
        return
    smallest, second = sorted(ratios)[:2]
    back = _ratio(line, -smallest)
    if _alike(ratios[smallest], ratios[second]) and _alike(ratios[smallest], back):
        raise RuntimeError(messages.WRONG_DERIVATIVE.format(ratio=ratios[smallest]))


def _ratio(line: Line, step_size: float) -> float | None:
    """Return decrease over eta * slope, None where the change of the loss does not show."""
    decrease = line.loss - line.loss_at(step_size)
    if not math.isfinite(decrease) or abs(decrease) <= _CLEAR * line.resolution:
        return None
    return decrease / (step_size * line.slope)


def _alike(first: float, second: float | None) -> bool:
    if second is None or first * second <= 0:
        return False
    return max(abs(first), abs(second)) <= _ALIKE * min(abs(first), abs(second))


def refuse_hopeless(record: SearchRecord, state: RuleState, line: Line) -> None:
    """Raise a `RuntimeError` after 20 searches without a success on a loss that shows its slope."""
    shows = state.step_size * line.slope > _CLEAR * line.resolution
    if state.searches >= _HOPELESS and not state.step_size_known and shows:
        raise RuntimeError(messages.HOPELESS.format(searches=state.searches, slope=record.slope))
