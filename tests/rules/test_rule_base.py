"""What every rule shares: state, growth, cool-down, records, lines; and that it is plain floats."""

import dataclasses
import math
import subprocess
import sys

import pytest
from cases import EVERY
from hypothesis import given
from hypothesis import strategies as st

from hf_salsa.rules import (
    Line,
    Plus,
    RuleState,
    SaLSa,
    SaLSaState,
    SearchRecord,
    StepSizeRule,
    grown,
    moving_average,
)

RULES = sorted({case.rule for case in EVERY}, key=lambda rule: rule.__name__)
every_rule = pytest.mark.parametrize("rule", RULES)


def line_for(rule, loss_at):
    """A line that has all that a rule may ask for."""
    line = Line(loss_at, loss=1.0, slope=1.0, resolution=0.0, agreement=0.0)
    return dataclasses.replace(line, look_back=lambda: (1.0, 0.0)) if rule.looks_back else line


def tried_first(rule, settings, state):
    """The step size that a search tries first, on a loss that falls far enough for all."""
    tried = []

    def loss_at(step_size):
        tried.append(step_size)
        return -1e9

    settings.search(state, line_for(rule, loss_at))
    return tried[0]


class Fixed(StepSizeRule[RuleState]):
    """The least that a rule is: it takes `initial_step_size`."""

    def search(self, state, line):
        searched = state.accepted()
        loss = line.loss_at(state.step_size)
        return SearchRecord.of(line, searched, trial_loss=loss, trials=1), searched

    def describe(self):
        return "is fixed"


def test_rules_and_settings_import_no_torch():
    """A rule knows plain floats only, and `--help` need not wait."""
    code = (
        "import sys, hf_salsa.rules, hf_salsa.settings; "
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- averages, growth, when to search -----------------------------------------------------------


def test_moving_average():
    assert moving_average(4.0, 8.0, 0.75) == 5.0  # dyadic numbers: no rounding
    assert moving_average(4.0, 8.0, 0.0) == 8.0
    assert moving_average(0.0, 8.0, 0.5) == 4.0  # started at 0, not at the first value


def test_a_search_is_due_after_the_interval():
    due = [RuleState(1.0, search_interval=3, steps_since_search=n).search_due for n in range(4)]
    assert due == [False, False, True, True]


@given(step_size=st.floats(1e-12, 1e12), n=st.integers(0, 100), doubling=st.floats(1, 1000))
def test_growth_is_by_the_step(step_size, n, doubling):
    """However many steps there were since the last search."""
    state = RuleState(step_size, steps_since_search=n)
    assert grown(state, doubling) == pytest.approx(step_size * 2 ** ((n + 1) / doubling))


def test_growth_never_overflows():
    state = RuleState(sys.float_info.max, steps_since_search=10**6)
    assert grown(state, 1) == sys.float_info.max
    assert grown(RuleState(1e-3, steps_since_search=10**6), 1) < math.inf


@every_rule
def test_the_first_trial_is_announced(rule):
    """It is written while the slope is measured: no search may be dearer for it."""
    settings = rule()
    states = [rule.state_type(0.5), rule.state_type(0.5, searches=1, steps_since_search=3)]
    for state in states[:1] if rule.looks_back else states:  # looking back it tries nothing
        assert tried_first(rule, settings, state) == settings.first_trial(state)


def test_the_first_trial_of_the_paper_has_grown():
    for settings in (SaLSa(), SaLSa(steps_to_double=50)):
        for state in (SaLSaState(0.5), SaLSaState(0.5, searches=1, steps_since_search=3)):
            found = tried_first(SaLSa, settings, state)
            assert found == grown(state, settings.steps_to_double) > state.step_size


# --- what a search returns ----------------------------------------------------------------------


def test_a_state_counts_its_searches():
    state = SaLSaState(0.5, h=1.0, searches=4, failed_searches=1, steps_since_search=7)
    accepted = state.accepted(step_size=0.25, h=2.0)
    assert accepted == SaLSaState(0.25, h=2.0, searches=5, failed_searches=1)
    assert state.failed() == SaLSaState(0.5, h=1.0, searches=5, failed_searches=2)
    assert type(accepted) is type(state.failed()) is SaLSaState
    known = [RuleState(1.0, searches=n, failed_searches=1).step_size_known for n in (1, 2)]
    assert known == [False, True]


def test_a_record_says_what_was_seen_and_decided():
    line = Line(lambda eta: 3.0 - eta, loss=3.0, slope=2.0, resolution=0.0)
    record, state = Fixed(initial_step_size=0.5).search(RuleState(0.5, search_interval=4), line)
    assert record == SearchRecord(
        step_size=0.5,
        loss=3.0,
        trial_loss=2.5,
        decrease=0.5,
        slope=2.0,
        trials=1,
        outcome="accepted",
        interval=4,
    )
    assert record.accepted
    assert not dataclasses.replace(record, outcome="slope").accepted
    assert state.searches == 1


def test_a_line_that_cannot_look_back_says_so():
    line = Line(lambda eta: 0.0, loss=1.0, slope=1.0, resolution=0.0)
    assert line.agreement == 0.0  # not asked for: it must not look like a number that is not finite
    with pytest.raises(RuntimeError, match="looks_back = True"):
        line.look_back()


# --- rules are frozen records of settings -------------------------------------------------------


@every_rule
def test_a_rule_is_a_frozen_record_of_settings_by_name(rule):
    settings = rule()
    with pytest.raises(TypeError, match="positional"):
        rule(0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.cool_down = 0.5
    assert settings == rule(**vars(settings))
    assert settings != dataclasses.replace(settings, cool_down=0.123)


@every_rule
def test_a_rule_refuses_what_is_out_of_range(rule):
    for name in vars(rule()):
        with pytest.raises(ValueError, match=rf"^{name}=None is not allowed: it must be "):
            rule(**{name: None})


@every_rule
def test_a_search_leaves_state_and_settings_alone(rule):
    settings, state = rule(), rule.state_type(0.5, searches=1)
    before = dataclasses.asdict(settings), dataclasses.asdict(state)
    line = line_for(rule, lambda eta: 1 - eta)
    results = [settings.search(state, line) for _ in range(2)]
    assert results[0] == results[1]
    assert (dataclasses.asdict(settings), dataclasses.asdict(state)) == before


@every_rule
def test_state_is_plain_scalars_with_names_of_their_own(rule):
    """They stand beside the settings in `param_groups`, in checkpoints."""
    state = rule.state_type(0.5)
    assert {type(value) for value in vars(state).values()} <= {bool, int, float}
    assert not vars(state).keys() & vars(rule()).keys()


@every_rule
def test_a_rule_describes_itself(rule):
    """It completes "a step size that ..."; a cool-down is told."""
    settings = rule(cool_down=0.0)
    text = settings.describe()
    assert text
    assert text[0].islower()
    assert not text.endswith(".")
    assert "No rate and no schedule was set" in text
    cooled = dataclasses.replace(settings, cool_down=0.25).describe()
    assert "over the last 25 % of the run the step size fell linearly to 0" in cooled
    assert "No rate" not in cooled.replace("No rate was set", "")


@pytest.mark.parametrize(
    ("rule", "told", "changed"),
    [
        (SaLSa, "at least 0.3 of what the slope predicts", {"c": 0.123}),
        (
            Plus,
            f"it starts at {Plus.first_share:.3g} of what the first one allows",
            {"first_share": 0.123, "trust": 0.0123, "steps_to_double": 123},
        ),
    ],
)
def test_what_the_settings_change_is_told(rule, told, changed):
    settings = rule(cool_down=0.0)
    text = settings.describe()
    assert told in text
    assert f"{settings.max_search_interval} steps apart" in text
    changed = {"cool_down": 0.25, **changed, "max_search_interval": 1}
    others = [dataclasses.replace(settings, **{name: value}) for name, value in changed.items()]
    assert len({other.describe() for other in [settings, *others]}) == 1 + len(others)
    assert others[-1].describe().endswith("the search ran at every step")


def test_what_sets_the_rules_apart():
    assert (SaLSa.clips_gradients, Plus.clips_gradients) == (False, True)
    assert (SaLSa.looks_back, Plus.looks_back) == (False, True)
    assert not SaLSa.wants_agreement
    assert not Plus.wants_agreement
    assert "both averaged over the steps" in SaLSa().describe()
    assert "averaged" not in SaLSa(beta3=0.0).describe()


# --- cooling down -------------------------------------------------------------------------------


@every_rule
@given(
    cool_down=st.floats(0.01, 1),
    total=st.integers(1, 10_000),
    steps=st.tuples(*[st.floats(0, 1)] * 2),
)
def test_the_factor_falls_in_a_straight_line_at_the_end(rule, cool_down, total, steps):
    factor_at = rule(cool_down=cool_down).factor
    early, late = sorted(int(step * (total - 1)) for step in steps)
    factors = [factor_at(step, total) for step in (early, late)]
    assert 1 >= factors[0] >= factors[1] > 0
    for step, factor in zip((early, late), factors, strict=True):
        if step <= (1 - cool_down) * total:
            assert factor == pytest.approx(1)
        if factor < 1:
            assert factor == pytest.approx((total - step) / (cool_down * total))
    assert factor_at(total + 5, total) == factor_at(total - 1, total)


@every_rule
@pytest.mark.parametrize(("cool_down", "total"), [(0.0, 100), (0.5, 0), (1.0, 0)])
def test_nothing_cools_without_a_share_or_a_length(rule, cool_down, total):
    assert [rule(cool_down=cool_down).factor(step, total) for step in (0, 99, 1000)] == [1.0] * 3
