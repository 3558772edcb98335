"""The phases of a run: a new head alone, then the search, then the tail."""

from bisect import bisect_left
from dataclasses import dataclass

from .optimizers import LineSearchOptimizer
from .optimizers.evaluating import Evaluating


@dataclass(frozen=True)
class Phases:
    """Which update of a run, counted from 1, is the last of a phase.

    Attributes:
        head: Of those that train a new head alone (`head_first`); 0 where none does.
        search: Of those before the tail, in which the step size falls; without a tail the last one
            of the run.
    """

    head: int
    search: int


def phases_of(optimizer: Evaluating, steps: int) -> Phases:
    """Return where the phases of a run end.

    Args:
        optimizer: A line search, or a stock optimizer that trains a new head first.
        steps: Updates of the whole run, as it was planned.
    """
    group = optimizer.param_groups[0]
    head = max(0, group["head_steps"] - group["run_start"])  # the phase may be an earlier run's
    if not isinstance(optimizer, LineSearchOptimizer):
        return Phases(head, steps)
    rule = optimizer.rule
    search = bisect_left(range(steps), True, key=lambda step: rule.factor(step, steps) < 1)
    return Phases(head, search)
