"""Every optimizer class, and what the tests must know of it: a new class is one line of `CASES`."""

from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from own_rules import OneTrialAdam, OneTrialSGD

from hf_salsa import OPTIMIZERS
from hf_salsa.optimizers import LineSearchOptimizer
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

# Rule -> state in which its next searches will be as far apart as `max_search_interval` allows;
# nothing for a rule that is not here.
AT_REST = {
    SaLSa: lambda step_size: {
        "step_size_average_fast": step_size,
        "step_size_average_slow": step_size,
    },
    Plus: lambda step_size: {"started_at": -(10**6)},
}


@dataclass(frozen=True)
class Case:
    """One optimizer class.

    Attributes:
        name: Its name in `OPTIMIZERS`.
        settings: What the tests make it with; it must run in a loop of unknown length.
        variants: Settings of the search whose trajectory is worth a test of its own.
        note: What sets it apart from another case of the same class.
        own: The class, where it is not the package's.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    note: str = ""
    own: type[LineSearchOptimizer] | None = None

    def __str__(self):
        return f"{self.name} {self.note}".strip()

    @property
    def cls(self):
        return self.own or OPTIMIZERS[self.name]

    @property
    def rule(self):
        return self.cls.rule_type

    @property
    def family(self):
        """The class that its checkpoints are said to be of: the first one with such a state.

        SLS is SaLSa with other settings.
        """
        classes = LineSearchOptimizer.__subclasses__()
        for cls in classes:
            classes += cls.__subclasses__()
        return next(c.__name__ for c in classes if _checkpoint(c) == _checkpoint(self.cls))

    def has(self, setting):
        """Whether the class has a setting of this name."""
        return setting in self.cls.default_settings()

    def known(self, **settings):
        """Those of these settings that the class has."""
        return {name: value for name, value in settings.items() if self.has(name)}

    @property
    def some_setting(self):
        """A setting of its rule that takes any number strictly between 0 and 1."""
        return "c" if self.has("c") else "initial_step_size"

    @property
    def backtracks(self):
        return self.has("backtrack_factor")

    @property
    def state_of_rule(self):
        return {entry.name for entry in fields(self.rule.state_type)}

    @property
    def adam(self):
        return self.cls.base_name == "Adam"

    @property
    def has_momentum(self):
        return {**self.cls.default_settings(), **self.settings}.get("momentum", 0.9) > 0

    @property
    def state_names(self):
        of_direction = DIRECTIONS[self.cls.base_name].state if self.has_momentum else set()
        return of_direction | ({"previous"} if self.rule.looks_back else set())

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
            kind = NesterovAdamW if self.cls.nesterov else torch.optim.AdamW
            return kind(params, weight_decay=weight_decay, **kernel)
        momentum = 0.9 if self.has_momentum else 0.0
        rival = torch.optim.SGD(params, momentum=momentum, **kernel)
        if momentum:
            for param in params:  # the fused kernel fails where a gradient comes late
                rival.state[param]["momentum_buffer"] = torch.zeros_like(param)
        return rival

    def settle(self, optimizer, interval):
        """Go on as if the step size had been at rest for long: searches grow rare."""
        at_rest = AT_REST.get(self.rule, lambda step_size: {})
        for group in optimizer.param_groups:
            group.update(at_rest(optimizer.step_size), search_interval=interval)


class NesterovAdamW(torch.optim.AdamW):
    """Torch's kernel with n_k = beta1^2 m_{k-1} + (1 - beta1^2) g_k, and m_k put back after it."""

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        group["betas"] = (beta1**2, beta2)
        super().step()
        group["betas"] = (beta1, beta2)
        for param in group["params"]:
            if param.grad is not None:
                self.state[param]["exp_avg"].lerp_(param.grad, 1 - 1 / beta1)


def _checkpoint(cls):
    """The names by which a checkpoint of a class is known; None for a class without a rule."""
    if not hasattr(cls, "rule_type"):
        return None
    return {*cls.options, *(entry.name for entry in fields(cls.rule_type.state_type))}


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
PLUS = {
    "defaults": {},
    "all others": {
        "first_share": 0.8,
        "trust": 0.003,
        "steps_to_double": 3,
        "initial_step_size": 0.1,
        "max_search_interval": 6,
        "cool_down": 0.4,
        "total_steps": 300,
    },
}

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

# A rule of one's own: what holds for every optimizer holds for these. Not in `OPTIMIZERS`.
EXTRA = [
    Case("own_adam", own=OneTrialAdam),
    Case("own_sgd", own=OneTrialSGD),
    Case("own_sgd", {"momentum": 0.0}, note="without momentum", own=OneTrialSGD),
]
EVERY = [*CASES, *EXTRA]


def each(cases):
    """Run a test once for each of these, as its argument `case`."""
    return pytest.mark.parametrize("case", cases, ids=str)


every_optimizer = each(EVERY)
with_momentum = each([case for case in EVERY if case.has_momentum])
that_backtrack = each([case for case in EVERY if case.backtracks])
with_rare_searches = each([case for case in EVERY if case.has("max_search_interval")])
of_the_paper = each([case for case in CASES if case.rule is SaLSa])
of_plus = each([case for case in CASES if case.rule is Plus])
both_directions = pytest.mark.parametrize("direction", ["gradient", "momentum"])

silent = pytest.mark.filterwarnings("error")
failures_expected = pytest.mark.filterwarnings("ignore:A line search failed")
low_precision_expected = pytest.mark.filterwarnings("ignore:Trainable parameters are")
