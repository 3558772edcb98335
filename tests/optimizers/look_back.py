"""A rule of one's own that looks back, and the two optimizers with it."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from hf_salsa.optimizers import LineSearchAdam, LineSearchSGD
from hf_salsa.rules import RuleState, SearchRecord, StepSizeRule


@dataclass(frozen=True)
class Seen(RuleState):
    """What the latest search saw when it looked back."""

    loss_before: float = 0.0
    slope_before: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LookBack(StepSizeRule[Seen]):
    """Step sizes that tell every step from the others, and a note of what was seen.

    Args:
        period: Steps from one search to the next.
        order: Whether the search looks back before its trial, after it, or both.
    """

    state_type: ClassVar[type[RuleState]] = Seen
    looks_back: ClassVar[bool] = True

    initial_step_size: float = 0.01
    period: int = 1
    order: str = "before"

    def search(self, state, line):
        step_size = self.initial_step_size * (1 + state.searches % 3)
        looks = [line.look_back()] if self.order != "after" else []
        trial_loss = line.loss_at(step_size)
        looks += [line.look_back()] if self.order != "before" else []
        assert looks[0] == looks[-1]
        loss_before, slope_before = looks[0]
        searched = state.accepted(
            step_size=step_size,
            search_interval=self.period,
            loss_before=loss_before,
            slope_before=slope_before,
        )
        record = SearchRecord.of(
            line, searched, trial_loss=trial_loss, trials=1, outcome="accepted"
        )
        return record, searched

    def describe(self):
        return "is one of three"


class LookBackAdam(LineSearchAdam):
    rule_type = LookBack


class LookBackSGD(LineSearchSGD):
    rule_type = LookBack


OPTIONS = {LookBackAdam: {"weight_decay": 0.1}, LookBackSGD: {"weight_decay": 0.1, "momentum": 0.9}}
both_kinds = pytest.mark.parametrize("cls", OPTIONS)


def make(cls, params, **settings):
    return cls(params, **OPTIONS[cls], **settings)


def seen(optimizer):
    group = optimizer.param_groups[0]
    return group["loss_before"], group["slope_before"]
