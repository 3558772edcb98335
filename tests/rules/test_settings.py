"""Every setting once: its range, its words, its field of the arguments (contract line 19)."""

import math
import re
from dataclasses import fields

import pytest

from hf_salsa.settings import SETTINGS, SettingFields, check_setting

OPEN_UNIT = "strictly between 0 and 1"
# Setting -> how its range reads, the ends and what lies between, what lies outside.
RANGES = {
    "c": (OPEN_UNIT, [1e-9, 0.3, 0.999], [0, 1, 0.0, 1.0, -0.1, 2]),
    "beta3": ("in [0, 1)", [0, 0.0, 0.999], [1, 1.0, -0.01]),
    "steps_to_double": (
        "a finite number of steps, at least 1",
        [1, 1.5, 500],
        [0, 0.5, -500],
    ),
    "first_share": ("a number in (0, 1]", [1e-9, 0.1, 1, 1.0], [0, 0.0, -0.1, 1.1]),
    "trust": ("a finite number above 0", [1e-9, 0.01, 5], [0, -0.01]),
    "backtrack_factor": (OPEN_UNIT, [0.01, 0.9], [0, 1, 1.1]),
    "initial_step_size": ("a finite number above 0", [1, 1e-30, 1e30], [0, -1.0]),
    "max_search_interval": (
        "a whole number of steps, at least 1",
        [1, 10, 10**6],
        [0, -1, 10.0],
    ),
    "require_decrease": ("True or False", [True, False], [0, 1, "True", None, 1.0, math.nan]),
    "max_trials": ("a whole number of forward passes, at least 1", [1, 30], [0, -5, 30.0]),
    "cool_down": ("a share of the run, a number in [0, 1]", [0, 0.0, 0.5, 1], [-0.1, 1.1, 2]),
    "total_steps": ("a whole number of steps, at least 1", [1, 10**9], [0, -1, 10.0]),
    "direction": (
        "'gradient' or 'momentum'",
        ["gradient", "momentum"],
        ["Gradient", "", b"gradient", True, None, 1],
    ),
    "betas": (
        "two numbers in [0, 1)",
        [(0, 0), (0.9, 0.999), [0.9, 0.999]],
        [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9,), (0.9, 0.9, 0.9), ()]
        + [0.9, {0.9, 0.99}, (math.nan, 0.9), (0.9, math.inf)]
        + [("0.9", 0.99), (0.9, None), (False, 0.9)],
    ),
    "eps": ("a finite number above 0", [1e-30, 1], [0, -1e-8]),
    "momentum": ("in [0, 1)", [0, 0.0, 0.99], [1, 1.0, -0.9]),
    "weight_decay": ("a finite number, at least 0", [0, 0.0, 10], [-0.01]),
    "head_first": ("a whole number of updates, at least 0", [0, 1, 10**6], [-1, 10.0]),
    "step_size_factor": (
        "finite number above 0",
        [0.1, 1, 16.0],
        [0, -1.0, math.inf, math.nan, "1", True],
    ),
    "head": ("True or False", [True, False], [0, 1, "True", None, 1.0, math.nan]),
}
NO_NUMBER = ("direction", "require_decrease", "head")
NO_NUMBERS = [True, False, math.nan, "0.5", None, [0.5], 1j]
NOT_FINITE = [math.inf, -math.inf]


every_range = pytest.mark.parametrize("name", [name for name in SETTINGS if name in RANGES])


def refused(name):
    _, _, outside = RANGES[name]
    if name in NO_NUMBER:
        return outside
    return outside + NO_NUMBERS + NOT_FINITE


def test_every_setting_is_tested():
    assert SETTINGS.keys() - RANGES.keys() == set(), "settings without a range in RANGES"
    assert RANGES.keys() - SETTINGS.keys() == set(), "ranges of no setting"


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in SETTINGS if name in RANGES for value in refused(name)],
    ids=str,
)
def test_a_refusal_names_setting_value_and_range(name, value):
    words, _, _ = RANGES[name]
    start = re.escape(f"{name}={value!r} is not allowed: it must be ")
    with pytest.raises(ValueError, match=f"^{start}.*{re.escape(words)}.*\\.$"):
        check_setting(name, value)
    assert not SETTINGS[name].allows(value)


@every_range
def test_the_ends_of_the_ranges_are_allowed(name):
    _, inside, _ = RANGES[name]
    for value in inside:
        check_setting(name, value)
        assert SETTINGS[name].allows(value)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_words_of_a_setting_fit_where_they_are_used(name):
    """The meaning stands in `--help`, the range after "it must be" and before a full stop."""
    setting = SETTINGS[name]
    assert not setting.meaning.endswith(".")
    assert setting.allowed[0].islower() or name in NO_NUMBER
    assert not setting.allowed.endswith(".")


def test_a_refusal_uses_the_name_the_user_wrote():
    with pytest.raises(ValueError, match=r"^salsa_c=2 is not allowed: it must be a number"):
        check_setting("c", 2, argument="salsa_c")


def test_a_setting_of_somebody_elses_rule_is_that_rules_to_check():
    check_setting("patience", -math.inf)


def test_every_field_of_the_arguments_is_a_setting_left_to_the_optimizer():
    for entry in fields(SettingFields):
        assert entry.name.removeprefix("salsa_") in SETTINGS
        assert entry.name.startswith("salsa_")
        assert entry.default is None
