"""What a user may write: names, settings and their defaults, refusals (contract line 19)."""

import inspect
import re
from dataclasses import fields

import pytest
from cases import CASES, EXTRA, every_optimizer
from problems import parameters, point

import hf_salsa
from hf_salsa import (
    OPTIMIZERS,
    SLSSGD,
    SaLSaAdam,
    SaLSaAdamPlus,
    SaLSaSGD,
    SaLSaSGDPlus,
    SLSAdam,
)
from hf_salsa.optimizers import LineSearchAdam, LineSearchOptimizer, LineSearchSGD
from hf_salsa.optimizers.state import RunState
from hf_salsa.rules import Plus, SaLSa

PAPER = {
    "c": 0.3,
    "beta3": 0.99,
    "steps_to_double": 500,
    "backtrack_factor": 0.9,
    "initial_step_size": 1.0,
    "max_search_interval": 10,
    "direction": "gradient",
    "require_decrease": False,
    "max_trials": 30,
    "cool_down": 0.0,
}
SLS = {**PAPER, "c": 0.1, "beta3": 0.0, "max_search_interval": 1}
PLUS = {
    "first_share": Plus.first_share,
    "trust": Plus.trust,
    "steps_to_double": Plus.steps_to_double,
    "initial_step_size": Plus.initial_step_size,
    "max_search_interval": Plus.max_search_interval,
    "direction": "momentum",
    "cool_down": 0.6,
    "head_first": 10,
}
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "head_first": 0}
SGD = {"momentum": 0.0, "weight_decay": 0.0, "head_first": 0}
PUBLISHED = {
    "salsa_adam": (SaLSaAdam, SaLSa, PAPER | ADAM),
    "salsa_sgd": (SaLSaSGD, SaLSa, PAPER | SGD),
    "sls_adam": (SLSAdam, SaLSa, SLS | ADAM),
    "sls_sgd": (SLSSGD, SaLSa, SLS | SGD),
    "salsa_adam_plus": (SaLSaAdamPlus, Plus, ADAM | PLUS),
    "salsa_sgd_plus": (SaLSaSGDPlus, Plus, SGD | PLUS | {"momentum": 0.9}),
}


def test_every_class_is_tested():
    assert {case.name for case in CASES} == OPTIMIZERS.keys()
    assert not {case.cls for case in EXTRA} & {*OPTIMIZERS.values()}


def test_names_and_kinds():
    """Further classes may stand beside them."""
    for name, (cls, rule, _) in PUBLISHED.items():
        assert OPTIMIZERS[name] is cls
        assert cls.rule_type is rule
        assert getattr(hf_salsa, cls.__name__) is cls
        base = LineSearchAdam if cls.base_name == "Adam" else LineSearchSGD
        assert issubclass(cls, base)
        assert issubclass(base, LineSearchOptimizer)


def test_a_plus_optimizer_is_none_of_the_papers():
    """Code that asks for the paper's optimizer must not get another method."""
    assert not issubclass(SaLSaAdamPlus, SaLSaAdam)
    assert not issubclass(SaLSaSGDPlus, SaLSaSGD)
    assert issubclass(SLSAdam, SaLSaAdam)  # beta3 = 0
    assert issubclass(SLSSGD, SaLSaSGD)


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults(name):
    cls, _, expected = PUBLISHED[name]
    signature = inspect.signature(cls).parameters.values()
    assert {p.name: p.default for p in signature if p.name != "params"} == expected | {
        "total_steps": None
    }
    assert cls.default_settings() == expected
    defaults = cls(parameters()).defaults
    assert all(defaults[setting] == value for setting, value in expected.items())
    assert all(type(defaults[setting]) is type(value) for setting, value in expected.items())


@every_optimizer
def test_the_signature_in_the_source_names_every_setting(case):
    """For readers and IDEs: no **settings, nothing that is inherited or made at run time."""
    init = vars(case.cls)["__init__"]
    parameters = dict(inspect.signature(init).parameters)
    of_rule = [field.name for field in fields(case.rule)]
    assert list(parameters)[:2] == ["self", "params"]
    settings = {*of_rule, *case.cls.options, "total_steps"}
    assert parameters.keys() == {"self", "params"} | settings
    assert {parameters[name].kind for name in settings} == {inspect.Parameter.KEYWORD_ONLY}
    source = inspect.getsource(inspect.unwrap(init))
    assert all(re.search(rf"^ +{name}: .* = .*,$", source, re.MULTILINE) for name in settings)
    assert inspect.signature(case.cls).parameters.keys() == parameters.keys() - {"self"}


@every_optimizer
def test_the_signature_is_what_the_optimizer_does(case):
    """A default that is stated and one that is written down are the same."""
    stated = inspect.signature(case.cls).parameters
    defaults = case.cls.default_settings()
    assert defaults == {name: stated[name].default for name in defaults}
    assert case.cls(parameters()).rule == case.rule(
        **{name: value for name, value in defaults.items() if name not in case.cls.options}
    )
    given = {"initial_step_size": 0.7, "cool_down": 0.2, **case.known(c=0.123, max_trials=7)}
    changed = case.make(parameters(), weight_decay=0.5, total_steps=9, **given)
    (group,) = changed.param_groups
    assert {name: getattr(changed.rule, name) for name in given} == given
    assert (group["weight_decay"], group["run_steps"]) == (0.5, 9)


@every_optimizer
def test_names_of_state_are_none_of_settings(case):
    """They share the parameter groups."""
    of_state = [f.name for record in (case.rule.state_type, RunState) for f in fields(record)]
    of_rule = [field.name for field in fields(case.rule)]
    names = [*of_state, *of_rule, *case.cls.options, "lr", "params", "total_steps"]
    assert len(names) == len(set(names))
    assert not set(names) & {"previous", "step", "exp_avg", "exp_avg_sq", "momentum_buffer"}


@every_optimizer
def test_every_rule_describes_itself(case):
    assert case.cls(parameters()).rule.describe()


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "settings", "given"),
    [
        ((1e-3,), {}, "0.001 as a positional argument"),
        ((0.3, 0.99), {}, "0.3 as a positional argument"),
        ((), {"lr": 5e-5}, "lr=5e-05"),
        ((), {"lr": None}, "lr=None"),
        ((), {"lr": 1.0, "c": 0.3}, "lr=1.0"),
    ],
)
@every_optimizer
def test_there_is_no_learning_rate(case, args, settings, given):
    """A number that AdamW takes as its learning rate must not become a setting of the search."""
    name = case.cls.__name__
    message = f"{name} got {given}, but there is no learning rate: the line search finds the step"
    with pytest.raises(TypeError, match=re.escape(message)) as refused:
        case.cls(parameters(), *args, **settings)
    assert f"Write {name}(params)" in str(refused.value)
    assert f"{name}(params, c=0.3)" in str(refused.value)


@pytest.mark.parametrize("base", [LineSearchAdam, LineSearchSGD])
def test_there_is_no_learning_rate_in_a_class_of_ones_own(base):
    class Own(base):
        rule_type = SaLSa

    for args, settings in (((1e-3,), {}), ((), {"lr": 1e-3})):
        with pytest.raises(TypeError, match="Own got .* there is no learning rate.*Own\\(params"):
            Own(parameters(), *args, **settings)
    with pytest.raises(TypeError, match="Own has no setting 'typo'"):
        Own(parameters(), typo=1)
    assert Own.default_settings() == vars(SaLSa()) | base.options
    assert Own(parameters(), c=0.2).rule == SaLSa(c=0.2)


@pytest.mark.parametrize("unknown", ["backtrack_facto", "nesterov", "amsgrad", "searches", "h"])
@every_optimizer
def test_an_unknown_setting_is_refused(case, unknown):
    with pytest.raises(TypeError, match=f"has no setting '{unknown}'") as refused:
        case.cls(parameters(), **{unknown: 1})
    assert all(name in str(refused.value) for name in [*case.cls.default_settings(), "total_steps"])


@every_optimizer
def test_parameters_are_needed(case):
    with pytest.raises(TypeError, match="params"):
        case.cls()
    param = point(1.0)
    assert case.cls(params=[param]).param_groups[0]["params"] == [param]


BAD = {
    "c": 1.0,
    "beta3": 1.0,
    "steps_to_double": 0,
    "first_share": 0.0,
    "trust": 0.0,
    "backtrack_factor": 1.0,
    "initial_step_size": 0.0,
    "max_search_interval": 0,
    "direction": "adam",
    "require_decrease": "yes",
    "max_trials": 0,
    "cool_down": 1.1,
    "head_first": -1,
    "total_steps": 0,
    "weight_decay": -1.0,
    "betas": (0.9, 1.0),
    "eps": 0.0,
    "momentum": 1.0,
}


@pytest.mark.parametrize("option", BAD)
@every_optimizer
def test_bad_arguments_are_refused(case, option):
    value = BAD[option]
    if option not in inspect.signature(case.cls).parameters:
        with pytest.raises(TypeError, match=option):
            case.cls(parameters(), **{option: value})
        return
    with pytest.raises(ValueError, match=rf"^{option}=.* is not allowed: it must be .*\.$"):
        case.cls(parameters(), **{option: value})


@every_optimizer
def test_every_setting_is_checked(case):
    lacking = {*case.cls.default_settings(), "total_steps"} - BAD.keys()
    assert lacking == set(), "BAD lacks a value that is refused"


@pytest.mark.parametrize(
    ("cls", "option", "value"),
    [
        (SaLSaSGDPlus, "first_share", 1.5),
        (SaLSaSGDPlus, "cool_down", -0.1),
        (SaLSaAdamPlus, "trust", -0.01),
        (SaLSaAdamPlus, "steps_to_double", "8"),
    ],
)
def test_bad_arguments_of_the_plus_optimizers_are_refused(cls, option, value):
    with pytest.raises(ValueError, match=rf"^{option}=.* is not allowed: .*\.$"):
        cls(parameters(), **{option: value})
