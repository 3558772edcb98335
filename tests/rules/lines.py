"""Lines for the rules to search on: losses along a direction, as plain functions."""

import math
import sys

from hypothesis import strategies as st

from hf_salsa.rules import Line, SaLSaState

EPSILON = sys.float_info.epsilon


def search(rule, state, loss_at, *, loss=1.0, slope=1.0, resolution=EPSILON, agreement=math.nan):
    """One search: its record, the next state, and the step sizes tried in their order."""
    tried = []

    def noting(step_size):
        tried.append(step_size)
        return loss_at(step_size)

    line = Line(noting, loss=loss, slope=slope, resolution=resolution, agreement=agreement, step=1)
    return *rule.search(state, line), tried


def accepts_up_to(threshold, rejected=math.nan):
    """A loss that falls far enough for every criterion up to `threshold`, and is bad beyond."""
    return lambda step_size: -1e9 if step_size <= threshold else rejected


def parabola(curvature, loss=1.0, slope=1.0):
    return lambda eta: loss - slope * eta + curvature * eta**2 / 2


states_of_the_paper = st.builds(
    SaLSaState,
    step_size=st.floats(1e-6, 10),
    h=st.floats(-10, 10),
    s=st.floats(0, 10),
    step_size_average_fast=st.floats(1e-6, 10),
    step_size_average_slow=st.floats(1e-6, 10),
    steps_since_search=st.integers(0, 19),
)
