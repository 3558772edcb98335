"""Step-size rules: plain floats, no tensors. `StepSizeRule` says what a rule is."""

from .first import find_first
from .plus import Plus, PlusState
from .rule import Line, Outcome, RuleState, SearchRecord, StepSizeRule, grown, moving_average
from .salsa import SaLSa, SaLSaState

__all__ = [
    "Line",
    "Outcome",
    "Plus",
    "PlusState",
    "RuleState",
    "SaLSa",
    "SaLSaState",
    "SearchRecord",
    "StepSizeRule",
    "find_first",
    "grown",
    "moving_average",
]
