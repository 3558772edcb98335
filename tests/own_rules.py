"""A rule that is not the package's, and its optimizers: they go through all tests as its own do.

The least that a rule is: the two settings that every rule has, no state of its own, one trial per
search. So no test over all optimizers can take for granted what SaLSa and Plus have besides.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_salsa.optimizers import LineSearchAdam, LineSearchSGD
from hf_salsa.optimizers.signature import explicit_signature
from hf_salsa.rules import RuleState, SearchRecord, StepSizeRule


@dataclass(frozen=True, kw_only=True)
class OneTrial(StepSizeRule[RuleState]):
    """A tenth more where the loss falls by a tenth of what the slope predicts, else half."""

    initial_step_size: float = 0.01

    def search(self, state, line):
        trial, loss, outcome = state.step_size, math.nan, "accepted"
        if line.slope <= 0:
            outcome = "slope"
        elif trial * line.slope < line.resolution:
            outcome = "unresolved"
        else:
            loss = line.loss_at(trial)
            outcome = "accepted" if math.isfinite(loss) else "trials"
        if outcome == "accepted":
            falls = line.loss - loss >= 0.1 * trial * line.slope
            searched = state.accepted(step_size=trial * (1.1 if falls else 0.5))
        else:
            searched = state.failed()
        trials = int(outcome in ("accepted", "trials"))
        record = SearchRecord.of(line, searched, trial_loss=loss, trials=trials, outcome=outcome)
        return record, searched


class OneTrialAdam(LineSearchAdam):
    rule_type: ClassVar[type[StepSizeRule[Any]]] = OneTrial

    @explicit_signature
    def __init__(
        self,
        params: Any,
        *,
        initial_step_size: float = OneTrial.initial_step_size,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        direction: str = "gradient",
        weight_decay: float = 0.0,
        cool_down: float = OneTrial.cool_down,
        head_first: int = 0,
        total_steps: int | None = None,
    ) -> None: ...


class OneTrialSGD(LineSearchSGD):
    rule_type: ClassVar[type[StepSizeRule[Any]]] = OneTrial

    @explicit_signature
    def __init__(
        self,
        params: Any,
        *,
        initial_step_size: float = OneTrial.initial_step_size,
        momentum: float = 0.9,
        direction: str = "gradient",
        weight_decay: float = 0.0,
        cool_down: float = OneTrial.cool_down,
        head_first: int = 0,
        total_steps: int | None = None,
    ) -> None: ...
