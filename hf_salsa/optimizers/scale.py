"""The scale of an update's loss: how many micro-batches it is a sum of.

Fewer of them, as in the last update of an epoch, or more, after a resume with another accumulation,
are another scale of the loss, if each has the weight that it had before. Then the state of the rule
is carried over (`RuleState.rescaled`).
"""

import math
from dataclasses import dataclass

# Instead of a factor, where backward does not show it:
NOT_KNOWN = 0.0  # not measured yet
NOT_A_SUM = -1.0  # the loss is divided by something that grows with the micro-batches
SUM = -2.0  # it is not

_ROUNDINGS = 1e-6  # by which the same factor may differ, as a mean over processes


@dataclass(frozen=True)
class Parts:
    """What the loss of one update is a sum of.

    Attributes:
        micro_batches: How many were differentiated, the mean over the processes; times the
            processes, where each loss is multiplied by them. 0 if nothing is known.
        factor: What each of them was multiplied by, above 0; or `NOT_KNOWN`, `NOT_A_SUM`, `SUM`.
    """

    micro_batches: float
    factor: float

    def growth_since(self, earlier: "Parts") -> float:
        """Return by what the scale of the loss changed, 1 where that is not known.

        Known is a change of the number alone. Where the factor changes too, it may undo that
        (`loss / n`), or belong to losses that are sums over tokens: no guess is made.
        """
        same_factor = (
            math.isclose(self.factor, earlier.factor, rel_tol=_ROUNDINGS)
            # Nobody asked while there was one micro-batch only.
            or (self.factor == SUM and earlier.factor == NOT_KNOWN)
        )
        if not same_factor or self.factor in (NOT_KNOWN, NOT_A_SUM) or not earlier.micro_batches:
            return 1.0
        return self.micro_batches / earlier.micro_batches
