"""Every candidate against the sweep, over all tasks."""

import math

import pytest
from comparison.against import against, against_section, average_ranks
from comparison.results import Comparison
from comparison_helpers import SMOKE, write_results

NAMES = {"salsa_adam": "SaLSa", "adam": "Adam", "sgd": "SGD"}


def test_by_hand(tmp_path):
    # Seed 2 has no counterpart. Small losses count as 0.02.
    for seed, (loss, metric) in enumerate([(2.0, 0.8), (0.001, 0.6), (9.0, 0.1)]):
        values = {"final_training_loss": loss, "peak_metric": metric, "seconds": 20.0}
        write_results(tmp_path, "salsa_adam", seed, task="probe", extra_forward_passes=8, **values)
    for seed, (loss, metric) in enumerate([(1.0, 0.9), (0.01, 0.9)]):
        values = {"final_training_loss": loss, "peak_metric": metric}
        write_results(tmp_path, "adam", seed, task="probe", **values)
    write_results(tmp_path, "adam", 0, final_training_loss=1.0)
    write_results(tmp_path, "salsa_adam", 0, final_training_loss=4.0)
    write_results(tmp_path, "sgd", 0, final_training_loss=None, peak_metric=None)
    comparison = Comparison(
        tmp_path, NAMES, tuple(SMOKE), {}, {("digits", "sgd"): "adam"}, {"probe": 0.5}
    )
    found = against(comparison, "probe", "salsa_adam", "adam")
    assert found.ratio == pytest.approx(math.sqrt(2.0 * 1.0))
    assert found.ahead == pytest.approx(-0.2 / 0.1)  # standard errors 0.1 and 0
    assert (found.seconds, found.cpu_seconds, found.passes) == pytest.approx((2.0, 1.0, 2.0))
    assert (found.at_chance, found.runs) == (0, 2)
    assert against(comparison, "probe", "sgd", "adam") is None
    _, words, table = against_section(comparison, ("authors", "adam"))
    assert "At chance" in words
    rows = table.split("\n")[2:]
    ratio = f"{math.sqrt(4 * math.sqrt(2)):.3f}"
    assert rows == [
        f"| SaLSa | 2 | {ratio} | 4.00 (Prose) | -1.0 | 2.00 | 1.75 | 1.41 / 1.00 | 1.00 "
        "| 0 of 3 |",
        "| Adam | 2 | 1.000 | 1.00 (Bigram shift) | +0.0 | 1.00 | 1.25 | 1.00 / 1.00 | 0.00 "
        "| 0 of 3 |",
        "| SGD | 1 | failed | failed (Prose) |  |  |  | 1.00 / 1.00 | 0.00 | 0 of 1 |",
    ]
    assert against_section(comparison, ("authors",)) == []


@pytest.mark.parametrize(
    ("metric", "sweep", "count"), [(0.53, 0.9, 1), (0.55, 0.9, 0), (0.5, 0.51, 0)]
)
def test_runs_at_chance_where_the_sweep_is_not(tmp_path, metric, sweep, count):
    """A tenth of the way from 0.5 to 0.9 is 0.54."""
    write_results(tmp_path, "adam", 0, task="probe", peak_metric=sweep)
    write_results(tmp_path, "salsa_adam", 0, task="probe", peak_metric=metric)
    comparison = Comparison(tmp_path, NAMES, tuple(SMOKE), {}, chances={"probe": 0.5})
    assert against(comparison, "probe", "salsa_adam", "adam").at_chance == count
    without = Comparison(tmp_path, NAMES, tuple(SMOKE), {})
    assert against(without, "probe", "salsa_adam", "adam").at_chance == 0


def test_runs_of_another_candidate_count_for_one_that_does_the_same(tmp_path):
    for name, loss in (("adam", 1.0), ("sgd", 2.0)):
        write_results(tmp_path, name, 0, task="probe", final_training_loss=loss)
    write_results(tmp_path, "adam", 0, final_training_loss=3.0)
    comparison = Comparison(tmp_path, NAMES, tuple(SMOKE), {}, {("prose", "sgd"): "adam"})
    assert against(comparison, "prose", "sgd", "adam").ratio == 1.0
    assert average_ranks(comparison, "final_training_loss") == {"adam": 1.25, "sgd": 1.75}
