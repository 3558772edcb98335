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


@dataclass(frozen=True, kw_only=True)
class _WithoutGains(Plus):
    def _moved(self, state: PlusState, line: Line, bound: float) -> PlusState:
        return super()._moved(replace(state, foreseen=0.0), line, bound)


class FixedBound(SaLSaAdamPlus):
    """Bounds the change of a step by a share of the loss at the start, whatever a step gains."""

    rule_type = _WithoutGains


@dataclass(frozen=True, kw_only=True)
class _CosineTail(Plus):
    def factor(self, step: int, total_steps: int) -> float:
        return (1 - math.cos(math.pi * super().factor(step, total_steps))) / 2


class CosineTail(SaLSaAdamPlus):
    """Lets the step size fall along half a cosine, over the same share of the run."""

    rule_type = _CosineTail
