"""Every setting of the line searches, once: its words, its range, its field of the arguments.

Words and ranges serve `--help`, the errors and the docs. A default stands in the signature of the
class that has the setting, since it differs from rule to rule. This module imports nothing of the
package.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        meaning: What it does, in words.
        allowed: Which values are allowed, in words.
        test: Whether a value of the right type is allowed.
        types: The types of the values.
    """

    meaning: str
    allowed: str
    test: Callable[[Any], bool]
    types: type | tuple[type, ...] = (int, float)

    def allows(self, value: Any) -> bool:
        """Return whether `value` is allowed."""
        # bool is an int to Python, but `c=True` is a mistake.
        right_type = isinstance(value, self.types) and (
            self.types is bool or not isinstance(value, bool)
        )
        return right_type and bool(self.test(value))


def _is_beta(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


SETTINGS = {
    # --- of the rules
    "c": Setting(
        "Share of the first-order decrease that a step must reach, c of the Armijo criterion",
        "a number strictly between 0 and 1 (0.3 to 0.5 works well)",
        lambda x: 0 < x < 1,
    ),
    "beta3": Setting(
        "Smoothing of the criterion over the steps",
        "a number in [0, 1) (0.9 to 0.999 works well, 0 is SLS)",
        lambda x: 0 <= x < 1,
    ),
    "steps_to_double": Setting(
        "Steps in which the step size may double",
        "a finite number of steps, at least 1",
        lambda x: 1 <= x < math.inf,
    ),
    "first_share": Setting(
        "Share of the first step size found at which training starts",
        "a number in (0, 1]",
        lambda x: 0 < x <= 1,
    ),
    "trust": Setting(
        "Change of the loss, beside what its gradient foresees, that a step may make, as a share "
        "of the loss at the start",
        "a finite number above 0 (0.009 works well)",
        lambda x: 0 < x < math.inf,
    ),
    "backtrack_factor": Setting(
        "By what a rejected step size shrinks",
        "a number strictly between 0 and 1",
        lambda x: 0 < x < 1,
    ),
    "initial_step_size": Setting(
        "Step size at which the first search starts",
        "a finite number above 0",
        lambda x: 0 < x < math.inf,
    ),
    "max_search_interval": Setting(
        "Most steps from one search to the next",
        "a whole number of steps, at least 1",
        lambda x: x >= 1,
        int,
    ),
    "require_decrease": Setting(
        "Accept no step on which the loss of the mini-batch rises",
        "True or False",
        lambda x: True,
        bool,
    ),
    "max_trials": Setting(
        "Most forward passes of one search",
        "a whole number of forward passes, at least 1",
        lambda x: x >= 1,
        int,
    ),
    "cool_down": Setting(
        "Share of the run over which at its end the step size falls linearly to 0",
        "a share of the run, a number in [0, 1]",
        lambda x: 0 <= x <= 1,
    ),
    # --- of the optimizers
    "head_first": Setting(
        "Updates at the start, at most a tenth of the run, that train a new head alone",
        "a whole number of updates, at least 0 (10 works well, 0 trains all from the start)",
        lambda x: x >= 0,
        int,
    ),
    "step_size_factor": Setting(
        "By which a parameter group's step size differs from the one that the search finds",
        "a finite number above 0",
        lambda x: 0 < x < math.inf,
    ),
    "head": Setting(
        "Whether a parameter group is the new head", "True or False", lambda x: True, bool
    ),
    "total_steps": Setting(
        "Steps of the run",
        "a whole number of steps, at least 1",
        lambda x: x >= 1,
        int,
    ),
    "direction": Setting(
        "Direction that is tested: the gradient's, as in the paper, or the one with momentum in "
        "which the step goes",
        "'gradient' or 'momentum'",
        lambda x: x in ("gradient", "momentum"),
        str,
    ),
    "betas": Setting(
        "beta1 and beta2 of Adam",
        "two numbers in [0, 1)",
        lambda x: len(x) == 2 and all(map(_is_beta, x)),
        (tuple, list),
    ),
    "eps": Setting(
        "Added to Adam's denominator", "a finite number above 0", lambda x: 0 < x < math.inf
    ),
    "momentum": Setting("Momentum of SGD", "a number in [0, 1)", lambda x: 0 <= x < 1),
    "weight_decay": Setting(
        "Decoupled weight decay", "a finite number, at least 0", lambda x: 0 <= x < math.inf
    ),
}


@dataclass
class SettingFields:
    """The settings that have a field of their own in `SaLSaTrainingArguments`.

    `salsa_NAME` is the setting NAME; None is the optimizer's own default. Settings without a field
    are reached by `--optim_args NAME=VALUE`.
    """

    salsa_head_first: int | None = None
    salsa_c: float | None = None
    salsa_beta3: float | None = None
    salsa_steps_to_double: float | None = None
    salsa_backtrack_factor: float | None = None
    salsa_initial_step_size: float | None = None
    salsa_max_search_interval: int | None = None
    salsa_direction: str | None = None
    salsa_require_decrease: bool | None = None
    salsa_cool_down: float | None = None


def check_setting(name: str, value: Any, argument: str | None = None) -> None:
    """Raise a `ValueError` that names the argument, its value and what is allowed.

    Args:
        name: The setting, as the optimizers call it (`"c"`, `"beta3"`, ...). What `SETTINGS` does
            not know, a setting of somebody else's rule, is that rule's to check.
        value: What the user gave.
        argument: The name under which the user gave it, where that differs (`"salsa_c"`).
    """
    setting = SETTINGS.get(name)
    if setting is not None and not setting.allows(value):
        raise ValueError(
            f"{argument or name}={value!r} is not allowed: it must be {setting.allowed}."
        )
