"""Checks that the loss of the search is the one whose gradient is used."""

from ..rules import Line, RuleState, SearchRecord
from . import messages

# Shares of the loss by which it should fall at the trial steps of the check, the likeliest first.
_DECREASES = (1e-3, 1e-4, 1e-2)
_CLEAR = 100  # times the loss's resolution: such a decrease shows
_RIGHT = (0.7, 1.4)  # what decrease over eta * slope may be
_ALIKE = 1.3  # ratios that differ by no more show a straight line
_HOPELESS = 20  # searches without any success


def check_derivative(line: Line) -> None:
    """Compare the loss's decrease at a small step with what the gradient predicts, eta * slope.

    Costs one forward pass where they agree, at most three.

    Raises:
        RuntimeError: The loss falls along a straight line, but not by what the gradient says.
    """
    ratios: list[float] = []
    for share in _DECREASES:
        decrease = share * abs(line.loss)
        if line.slope <= 0 or decrease <= _CLEAR * line.resolution:
            continue
        ratios.append((line.loss - line.loss_at(decrease / line.slope)) / decrease)
        if _RIGHT[0] <= ratios[-1] <= _RIGHT[1]:
            return
    lowest, highest = min(map(abs, ratios), default=0.0), max(map(abs, ratios), default=0.0)
    same_sign = all(r > 0 for r in ratios) or all(r < 0 for r in ratios)
    if len(ratios) > 1 and same_sign and highest <= _ALIKE * lowest:
        raise RuntimeError(messages.WRONG_DERIVATIVE.format(ratio=ratios[0]))


def refuse_hopeless(record: SearchRecord, state: RuleState, line: Line) -> None:
    """Raise a `RuntimeError` after 20 searches without a success on a loss that shows its slope."""
    shows = state.step_size * line.slope > _CLEAR * line.resolution
    if state.searches >= _HOPELESS and not state.step_size_known and shows:
        raise RuntimeError(messages.HOPELESS.format(searches=state.searches, slope=record.slope))
