"""The search for a first step size on plain floats."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lines import parabola

from hf_salsa.rules import Line, find_first


def first(loss_at, start=2**-7, *, loss=1.0, slope=1.0, resolution=0.0, c=0.4):
    tried = []

    def noting(step_size):
        tried.append(step_size)
        return loss_at(step_size)

    line = Line(noting, loss=loss, slope=slope, resolution=resolution)
    return *find_first(line, start, c), tried


@given(log_edge=st.floats(-25, 10), log_start=st.floats(-20, 5), c=st.floats(0.05, 0.95))
def test_it_is_close_below_the_largest_that_armijo_accepts(log_edge, log_start, c):
    """A parabola accepts up to 2 (1 - c) / curvature."""
    edge = math.exp(log_edge)
    loss_at = parabola(2 * (1 - c) / edge, loss=0.0)
    found, trial_loss, trials, outcome, tried = first(loss_at, math.exp(log_start), loss=0.0, c=c)
    assert outcome == "accepted"
    assert edge / 8**0.25 * (1 - 1e-9) <= found <= edge * (1 + 1e-9)
    assert (trials, trial_loss) == (len(tried), loss_at(found))
    assert tried[0] == math.exp(log_start)


def test_few_forward_passes():
    """From 2^-7 to 1e-4: three are rejected, the fourth is accepted, then two in between."""
    *_, trials, _, _ = first(parabola(1.2 / 1e-4))
    assert trials == 6


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_rejection(broken):
    found, *_ = first(lambda eta: broken if eta > 1e-3 else 1 - eta)
    assert 1e-3 / 8**0.25 <= found <= 1e-3


def test_a_line_without_an_end_ends():
    found, _, trials, outcome, tried = first(lambda eta: 1 - eta)
    assert (trials, outcome) == (30, "accepted")
    assert found == tried[-1] == pytest.approx(2**-7 * 8.0**29)


def test_what_fails():
    assert first(parabola(1.0), slope=0.0)[2:] == (0, "slope", [])
    found, _, trials, outcome, tried = first(lambda eta: 2.0, resolution=1e-5)
    assert (found, outcome, trials) == (0.0, "unresolved", len(tried))
    assert tried[-1] >= 1e-5
    found, _, trials, outcome, _ = first(lambda eta: 2.0)
    assert (found, outcome, trials) == (0.0, "trials", 30)
