"""`salsa_adam_plus` without parts that no setting takes away, or with others."""

import math
from dataclasses import dataclass, replace

from hf_salsa import SaLSaAdamPlus
from hf_salsa.rules import Line, Plus, PlusState, SearchRecord


@dataclass(frozen=True, kw_only=True)
class _Measured(Plus):
    def _start(self, state: PlusState, line: Line) -> tuple[SearchRecord, PlusState]:
        return super()._start(state, replace(line, usual_step_size=0.0, matrix_scale=0.0))


class MeasuredStart(SaLSaAdamPlus):
    """Starts at a share of what the first mini-batch accepts, whatever the weights are."""

    rule_type = _Measured


class PlainMomentum(SaLSaAdamPlus):
    """Takes the steps of Adam itself."""

    nesterov = False


@dataclass(frozen=True, kw_only=True)
class _CosineTail(Plus):
    def factor(self, step: int, total_steps: int) -> float:
        return (1 - math.cos(math.pi * super().factor(step, total_steps))) / 2


class CosineTail(SaLSaAdamPlus):
    """Lets the step size fall along half a cosine, over the same share of the run."""

    rule_type = _CosineTail
