"""One run of the comparison: what it records and survives."""

import dataclasses
import math

import comparison.runs
import pytest
from comparison.candidates import CANDIDATES
from comparison.loaders import Sources
from comparison.report import write_report
from comparison.rivals import ComparisonTrainer
from comparison.runs import Stopwatch, execute
from comparison_helpers import LABELS, SMOKE, carry_out, prose_run

TIMES = ("seconds", "cpu_seconds", "card")  # the card has the time in its table of versions


@pytest.mark.slow
@pytest.mark.parametrize(
    "candidate",
    [
        *("salsa_adam", "adam", "schedule_free", "prodigy", "authors"),
        *("former_plus", "schedule_free_warmup", "prodigy_cosine"),
    ],
)
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, candidate):
    """What it records is what the straight run records, to the last digit."""
    rate = 1e-3 if candidate in ("adam", "schedule_free_warmup") else None
    straight = carry_out(prose_run(tmp_path / "straight", candidate, rate=rate))
    run = prose_run(tmp_path / "interrupted", candidate, rate=rate)
    first_steps = []

    def interrupt(self, args, state, control, **kwargs):
        first_steps.append(state.global_step)
        if state.global_step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(Stopwatch, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            execute(run, Sources())
    assert not (run.folder / "results.json").exists()

    begun = []
    on_step_begin = Stopwatch.on_step_begin

    def note(self, args, state, control, **kwargs):
        begun.append(state.global_step)
        on_step_begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(Stopwatch, "on_step_begin", note)
    resumed = carry_out(run)
    # The authors' optimizer has its state in no checkpoint: it starts anew.
    assert begun[0] == (0 if candidate == "authors" else 6)
    if candidate != "authors":  # seeds its replay by the clock
        for name in set(straight) - set(TIMES):
            assert resumed[name] == straight[name], name
    assert resumed["updates"] == 12
    assert not (run.folder / "trainer").exists()


def test_the_stopwatch_goes_on_after_a_resume():
    watch = Stopwatch()
    watch.on_step_begin()
    watch.on_step_end()
    assert 0 < watch.seconds < 1
    again = Stopwatch.from_state(watch.state())
    assert (again.seconds, again.cpu_seconds) == (watch.seconds, watch.cpu_seconds)


@pytest.mark.slow
def test_a_failure_is_a_result(tmp_path, monkeypatch):
    def diverge(params):
        raise FloatingPointError("20 steps in a row were skipped")

    broken = dataclasses.replace(CANDIDATES["prodigy"], make_optimizer=diverge)
    monkeypatch.setitem(CANDIDATES, "prodigy", broken)
    results = carry_out(prose_run(tmp_path, "prodigy"))
    assert results["status"] == "failed"
    assert results["error"] == "FloatingPointError: 20 steps in a row were skipped"
    assert "losses" not in results
    carry_out(prose_run(tmp_path, "salsa_sgd"))
    write_report(tmp_path, LABELS, tuple(SMOKE), "command", [], ())
    report = (tmp_path / "README.md").read_text()
    assert "| failed |" in report
    assert "- Prose, prodigy, rate None, seed 0: FloatingPointError: 20 steps" in report


@pytest.mark.slow
def test_the_peak_is_the_best_that_is_finite(tmp_path, monkeypatch):
    """A run that diverges was good before; its final loss is missing, and counts as a failure."""
    evaluate = ComparisonTrainer.evaluate
    losses = iter([3.0, 2.0, math.nan, math.nan])

    def diverging(self, *args, **kwargs):
        metrics = evaluate(self, *args, **kwargs)
        self.state.log_history[-1]["eval_loss"] = next(losses)
        return metrics

    monkeypatch.setattr(ComparisonTrainer, "evaluate", diverging)
    results = carry_out(prose_run(tmp_path, "salsa_sgd"))
    assert [entry["loss"] for entry in results["evaluations"]] == [3.0, 2.0, None, None]
    assert results["peak_metric"] == pytest.approx(2.0, rel=0.2)  # per character
    assert results["final_metric"] is None


def test_a_loss_that_is_not_finite_is_recorded_as_missing():
    recorded = comparison.runs._plain({"losses": [1.0, math.nan, math.inf, 123456.789], "n": 3})
    assert recorded == {"losses": [1.0, None, None, 123460.0], "n": 3}


def test_a_run_records_where_it_searched(tmp_path):
    results = carry_out(prose_run(tmp_path, "salsa_adam"))
    assert len(results["searched_at"]) == results["searches"] > 0
    assert results["searched_at"][0] == 1
    assert set(results["searched_at"]) <= set(range(1, results["updates"] + 1))
    assert carry_out(prose_run(tmp_path, "adam", rate=1e-3))["searched_at"] == []
