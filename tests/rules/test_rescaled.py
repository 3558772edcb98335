"""The state of a rule at another scale of the loss: the same search, at that scale (line 11)."""

from dataclasses import fields, replace

import pytest
from lines import parabola
from own_rules import OneTrial

from hf_salsa.rules import Line, Plus, PlusState, RuleState, SaLSa, SaLSaState

SEARCHED = {"step_size": 0.25, "search_interval": 3, "searches": 7, "failed_searches": 1}
AVERAGES = {"step_size_average_fast": 0.2, "step_size_average_slow": 0.3}
PLUS = PlusState(
    **SEARCHED,
    first_losses=6.0,
    first_squares=6.5,
    loss=0.8,
    longer_loss=0.7,
    longer_squares=0.6,
    change=0.001,
    progress=-0.2,
    samples=6,
    started_at=2,
    warm_up_to=0.125,
)
STATES = {
    "salsa": (SaLSa(), SaLSaState(**SEARCHED, h=0.02, s=0.9, **AVERAGES)),
    "salsa that must shrink": (SaLSa(c=0.9), SaLSaState(**SEARCHED, h=0.02, s=0.9, **AVERAGES)),
    "plus": (Plus(), PLUS),
    "plus that warms up": (Plus(), replace(PLUS, warming_up=True)),
    "plus that has not started": (Plus(), PlusState(0.25)),
    "own": (OneTrial(), RuleState(**SEARCHED)),
}


@pytest.mark.parametrize("growth", [4.0, 0.5])
@pytest.mark.parametrize("degree", [0, 1], ids=["Adam", "SGD"])
@pytest.mark.parametrize("name", STATES)
def test_a_search_is_the_same_at_another_scale(name, degree, growth):
    """Bit for bit, since powers of two round nothing."""
    rule, state = STATES[name]
    shrinkage = growth**-degree
    loss_at = parabola(5.0)
    line = Line(
        loss_at,
        loss=1.0,
        slope=1.0,
        resolution=2**-20,
        agreement=0.5,
        look_back=lambda: (1.25, -0.247),
        step=9,
    )
    other = Line(
        lambda eta: growth * loss_at(eta / shrinkage),
        loss=growth,
        slope=growth / shrinkage,
        resolution=growth * 2**-20,
        agreement=growth / shrinkage * 0.5,
        look_back=lambda: (growth * 1.25, growth * -0.247),
        step=9,
    )
    record, expected = rule.search(state, line)
    record_there, found = rule.search(state.rescaled(growth, shrinkage), other)
    assert record.accepted
    assert found == expected.rescaled(growth, shrinkage)
    assert record_there.step_size == shrinkage * record.step_size
    assert record_there.trials == record.trials


@pytest.mark.parametrize("name", [name for name in STATES if name != "plus that has not started"])
def test_counts_have_no_scale(name):
    _, state = STATES[name]
    assert set(state.units) <= {entry.name for entry in fields(state)}
    rescaled = state.rescaled(3.0, 0.5)
    for entry in fields(state):
        value, now = getattr(state, entry.name), getattr(rescaled, entry.name)
        votes = entry.name == "progress"
        assert (now != value) == (entry.type in (float, "float") and not votes)
