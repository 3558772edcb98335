"""Every optimizer class, and what the tests must know of it: a new class is one line of `CASES`."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from hf_salsa import OPTIMIZERS
from hf_salsa.rules import Plus, SaLSa


@dataclass(frozen=True)
class Direction:
    """What belongs to a class by its direction.

    Attributes:
        state: Names of the state of a parameter.
        momentum: The one of them that holds the momentum, and the share of the newest gradient.
        groups: Options of two parameter groups, each with its own.
    """

    state: set[str]
    momentum: tuple[str, float]
    groups: tuple[dict[str, Any], dict[str, Any]]


DIRECTIONS = {
    "Adam": Direction(
        state={"step", "exp_avg", "exp_avg_sq"},
        momentum=("exp_avg", 0.1),
        groups=(
            {"betas": (0.8, 0.99), "weight_decay": 0.1},
            {"betas": (0.95, 0.999), "eps": 1e-4},
        ),
    ),
    "SGD": Direction(
        state={"momentum_buffer"},
        momentum=("momentum_buffer", 1.0),
        groups=({"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.5}),
    ),
}

# Rule -> state in which its next searches will be as far apart as `max_search_interval` allows.
AT_REST = {
    SaLSa: lambda step_size: {
        "step_size_average_fast": step_size,
        "step_size_average_slow": step_size,
    },
    Plus: lambda step_size: {"warm_up_over": True, "samples": 1000},
}


@dataclass(frozen=True)
class Case:
    """One optimizer class.

    Attributes:
        name: Its name in `OPTIMIZERS`.
        settings: What the tests make it with; it must run in a loop of unknown length.
        variants: Settings of the search whose trajectory is worth a test of its own.
        note: What sets it apart from another case of the same class.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    note: str = ""

    def __str__(self):
        return f"{self.name} {self.note}".strip()

    @property
    def cls(self):
        return OPTIMIZERS[self.name]

    @property
    def rule(self):
        return self.cls.rule_type

    @property
    def family(self):
        """The class whose checkpoints these are: SLS is SaLSa with other settings."""
        return self.cls.__name__.replace("SLS", "SaLSa").replace("SaSaLSa", "SaLSa")

    @property
    def adam(self):
        return self.cls.base_name == "Adam"

    @property
    def has_momentum(self):
        return {**self.cls.default_settings(), **self.settings}.get("momentum", 0.9) > 0

    @property
    def state_names(self):
        return DIRECTIONS[self.cls.base_name].state if self.has_momentum else set()

    @property
    def momentum(self):
        return DIRECTIONS[self.cls.base_name].momentum

    @property
    def groups(self):
        return DIRECTIONS[self.cls.base_name].groups

    def make(self, params, **changed):
        return self.cls(params, **{**self.settings, **changed})

    def torchs_own(self, params, weight_decay):
        """The torch optimizer whose step this one takes; torch's SGD has no decoupled decay."""
        plain = all(p.is_contiguous() and not p.is_complex() for p in params)
        kernel = {"fused": plain, "foreach": not plain}
        if self.adam:
            return torch.optim.AdamW(params, weight_decay=weight_decay, **kernel)
        momentum = 0.9 if self.has_momentum else 0.0
        rival = torch.optim.SGD(params, momentum=momentum, **kernel)
        if momentum:
            for param in params:  # the fused kernel fails where a gradient comes late
                rival.state[param]["momentum_buffer"] = torch.zeros_like(param)
        return rival

    def settle(self, optimizer, interval):
        """Go on as if the step size had been at rest for long: searches grow rare."""
        for group in optimizer.param_groups:
            group.update(AT_REST[self.rule](optimizer.step_size), search_interval=interval)


MOMENTUM = {"momentum": 0.9}
NO_TAIL = {"cool_down": 0.0}
PAPER = {
    "defaults": {},
    "rare searches": {"max_search_interval": 10},
    "all others": {
        "c": 0.4,
        "steps_to_double": 50,
        "backtrack_factor": 0.8,
        "initial_step_size": 0.1,
        "max_search_interval": 10,
        "require_decrease": True,
    },
}
PLUS = {"defaults": {}, "others": {"c": 0.9, "confidence": 0.5, "beta3": 0.8}}

CASES = [
    Case("salsa_adam", variants=PAPER),
    Case("salsa_sgd", MOMENTUM, PAPER),
    Case("salsa_sgd", note="without momentum"),
    Case("sls_adam", variants=PAPER),
    Case("sls_sgd", MOMENTUM, PAPER),
    Case("sls_sgd", note="without momentum"),
    Case("salsa_adam_plus", NO_TAIL, PLUS),
    Case("salsa_sgd_plus", NO_TAIL, PLUS),
]


def each(cases):
    """Run a test once for each of these, as its argument `case`."""
    return pytest.mark.parametrize("case", cases, ids=str)


every_optimizer = each(CASES)
with_momentum = each([case for case in CASES if case.has_momentum])
of_the_paper = each([case for case in CASES if case.rule is SaLSa])
of_plus = each([case for case in CASES if case.rule is Plus])
both_directions = pytest.mark.parametrize("direction", ["gradient", "momentum"])

silent = pytest.mark.filterwarnings("error")
failures_expected = pytest.mark.filterwarnings("ignore:A line search failed")
low_precision_expected = pytest.mark.filterwarnings("ignore:Trainable parameters are")
