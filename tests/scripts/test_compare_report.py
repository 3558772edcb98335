"""The comparison's tables, plots and report."""

import math

import compare
import pytest
from comparison.candidates import CALIBRATED
from comparison.report import write_report
from comparison.results import Cell, Comparison
from comparison.tables import beside_sweep, loss_table, ranks, sweep_section
from comparison_helpers import LABELS, SMOKE, write_results


def test_a_report_of_another_presets_results_is_refused(tmp_path, capsys):
    write_results(tmp_path, "salsa_adam", 0)
    with pytest.raises(SystemExit):
        compare.main(["report", "--preset", "cpu", "--output_dir", str(tmp_path)])
    assert "holds results of another preset's tasks: prose" in capsys.readouterr().err


def test_mean_and_standard_error():
    cell = Cell.of([{"x": 1.0}, {"x": 2.0}, {"x": 6.0}], "x")
    assert cell.mean == 3.0
    assert cell.error == pytest.approx(math.sqrt(7 / 3))  # variance (4 + 1 + 9) / 2, over 3
    assert cell.show(2) == "3.00 ± 1.53"
    assert Cell.of([{"x": 1.0}], "x").show(2) == "1.00"
    assert Cell.of([{"x": 1.0}, {"x": None}], "x").show(2) == "failed"
    assert Cell.of([{"x": 1.0}, {}], "x").show(2) == "failed"


def test_ranks_share_and_failures_are_last():
    cells = {
        name: Cell(mean, None, 1)
        for name, mean in zip("abcde", [2, 1, 2, math.nan, 5], strict=True)
    }
    assert ranks(cells, lower=True) == {
        "a": 2.5,
        "b": 1,
        "c": 2.5,
        "d": 5,
        "e": 4,
    }
    assert ranks(cells, lower=False) == {
        "a": 2.5,
        "b": 4,
        "c": 2.5,
        "d": 5,
        "e": 1,
    }


def test_tables_by_hand(tmp_path):
    for seed, (adam, salsa) in enumerate([(1.0, 2.0), (2.0, 2.0)]):
        write_results(tmp_path, "adam", seed, peak_metric=adam, final_training_loss=adam)
        write_results(
            tmp_path,
            "salsa_adam",
            seed,
            peak_metric=salsa,
            final_training_loss=salsa,
            extra_forward_passes=7,
        )
    for candidate, accuracy in (("adam", 0.5), ("salsa_adam", 0.75)):
        write_results(
            tmp_path, candidate, 0, task="probe", peak_metric=accuracy, final_training_loss=0.5
        )
    for rate, metric in ((1e-3, 1.25), (3e-3, 1.5)):
        write_results(
            tmp_path,
            CALIBRATED,
            100,
            folder=f"{CALIBRATED}_at_{rate:g}",
            rate=rate,
            peak_metric=metric,
        )
    labels = {"adam": "Adam", "sgd": "SGD", "salsa_adam": "SaLSa", CALIBRATED: "AdamW"}
    write_report(tmp_path, labels, tuple(SMOKE), "the command", [], ())
    report = (tmp_path / "README.md").read_text()
    assert "```bash\nthe command\n```" in report
    tables = {}
    for section in report.split("\n## ")[1:]:
        title, *lines = section.split("\n")
        tables[title] = [line for line in lines if line.startswith("|")]
    assert tables["Peak metric"] == [
        "|  | seeds | Adam | SaLSa |",
        "| --- | --- | --- | --- |",
        "| Bigram shift | 1 | 0.5000 | **0.7500** |",
        "| Prose ↓ | 2 | **1.5000 ± 0.5000** | 2.0000 ± 0.0000 |",
        "| average, losses left out (1 tasks) |  | 0.5000 | 0.7500 |",
        "| average rank (2 tasks) |  | 1.50 | 1.50 |",
    ]
    assert tables["Final training loss"][2:] == [
        "| Bigram shift ↓ | 1 | **0.5000** | **0.5000** |",
        "| Prose ↓ | 2 | **1.5000 ± 0.5000** | 2.0000 ± 0.0000 |",
        "| log-average (2 tasks) |  | 0.8660 | 1.0000 |",
        "| average rank (2 tasks) |  | 1.25 | 1.75 |",
    ]
    assert tables["Time"][3] == "| Prose | 2 | 10 ± 0 / 9 ± 0 | 10 ± 0 / 9 ± 0 (7) |"
    assert tables["AdamW's peak rate"] == [
        "|  | 0.001 | 0.003 |",
        "| --- | --- | --- |",
        "| Prose | 1.2500 / 1.0000 | 1.5000 / 1.0000 |",
    ]


def test_a_task_that_is_not_complete_counts_in_no_average(tmp_path):
    write_results(tmp_path, "adam", 0)
    write_results(tmp_path, "adam", 0, task="probe")
    write_results(tmp_path, "salsa_adam", 0, task="probe")
    comparison = Comparison(tmp_path, {"adam": "Adam", "salsa_adam": "SaLSa"}, tuple(SMOKE), {})
    (table,) = loss_table(comparison)
    assert "log-average (1 tasks)" in table
    assert "| Prose ↓ | 1 | **1.0000** |  |" in table


def test_an_average_rank_of_the_candidates_that_ran_everywhere(tmp_path):
    for task, losses in {"probe": (3.0, 2.0, 1.0), "prose": (1.0, 2.0, None)}.items():
        for candidate, loss in zip(("adam", "sgd", "salsa_adam"), losses, strict=True):
            if loss is not None:
                write_results(tmp_path, candidate, 0, task=task, final_training_loss=loss)
    names = {"adam": "Adam", "sgd": "SGD", "salsa_adam": "SaLSa"}
    (table,) = loss_table(Comparison(tmp_path, names, tuple(SMOKE), {}))
    assert "| average rank (1 tasks) |  | 3.00 | 2.00 | 1.00 |" in table
    assert "| average rank of 2 (2 tasks) |  | 1.50 | 1.50 |  |" in table


def test_what_stands_beside_a_sweep(tmp_path):
    names = {"sgd": "SGD", "salsa_adam": "SaLSa", "adam": "Adam", CALIBRATED: "AdamW"}
    folder = f"{CALIBRATED}_at_0.001"
    write_results(tmp_path, CALIBRATED, 100, folder=folder, rate=1e-3)
    for seed, metric in enumerate((0.7, 0.9)):  # 0.8 with a standard error of 0.1
        of_probe = {"task": "probe", "peak_metric": metric, "final_training_loss": 0.5}
        write_results(tmp_path, CALIBRATED, seed, **of_probe)
    for candidate, metric, loss in (
        ("sgd", 0.71, 0.52),
        ("salsa_adam", 0.69, 0.25),
        ("adam", None, 0.5),
    ):
        of_probe = {"task": "probe", "peak_metric": metric, "final_training_loss": loss}
        for seed in (0, 1):
            write_results(tmp_path, candidate, seed, **of_probe)
    # The metric of prose is a loss: less is better, and one seed has no standard error.
    write_results(tmp_path, CALIBRATED, 0, peak_metric=2.0, final_training_loss=2.0)
    write_results(tmp_path, "sgd", 0, peak_metric=2.01, final_training_loss=2.0)
    write_results(tmp_path, "salsa_adam", 0, peak_metric=1.5, final_training_loss=2.1)
    write_results(tmp_path, CALIBRATED, 0, task="digits", final_training_loss=None)
    write_results(tmp_path, "sgd", 0, task="digits")
    comparison = Comparison(tmp_path, names, tuple(SMOKE), {})
    heading, text, table = sweep_section(comparison)
    assert heading == "## Beside a sweep"
    assert "beside AdamW" in text
    assert table.split("\n") == [
        "|  | SGD | SaLSa | Adam |",
        "| --- | --- | --- | --- |",
        "| Bigram shift | **1.04 / -0.0900** | 0.50 / -0.1100 | failed |",
        "| Prose | 1.00 / +0.0100 | **1.05 / -0.5000** |  |",
        "| stands | 1 of 2 | 1 of 2 | 0 of 1 |",
    ]


def test_a_candidate_is_put_beside_the_sweep_on_the_seeds_of_both(tmp_path):
    write_results(tmp_path, CALIBRATED, 100, folder=f"{CALIBRATED}_at_0.001", rate=1e-3)
    for seed, metric in ((0, 2.0), (1, 1.0)):  # a loss, with a standard error of 0.5
        write_results(
            tmp_path, CALIBRATED, seed, peak_metric=metric, final_training_loss=3 - metric
        )
    write_results(tmp_path, "adam", 1, peak_metric=1.4, final_training_loss=2.0)
    write_results(tmp_path, "sgd", 0, peak_metric=2.6, final_training_loss=1.0)
    write_results(tmp_path, "salsa_adam", 2)
    names = {"adam": "Adam", "sgd": "SGD", "salsa_adam": "SaLSa", CALIBRATED: "AdamW"}
    found = beside_sweep(Comparison(tmp_path, names, tuple(SMOKE), {}), "prose")
    assert found.keys() == {"adam", "sgd"}
    assert found["adam"] == pytest.approx((1.0, 0.4, True))
    assert found["sgd"] == pytest.approx((1.0, 0.6, False))


@pytest.mark.parametrize(("loss", "stands"), [(0.021, True), (0.0211, False), (1e-9, True)])
def test_small_losses_count_as_the_same(tmp_path, loss, stands):
    write_results(tmp_path, CALIBRATED, 100, folder=f"{CALIBRATED}_at_0.001", rate=1e-3)
    write_results(tmp_path, CALIBRATED, 0, final_training_loss=0.001)
    write_results(tmp_path, "adam", 0, final_training_loss=loss)
    comparison = Comparison(tmp_path, {"adam": "Adam", CALIBRATED: "AdamW"}, tuple(SMOKE), {})
    (found,) = beside_sweep(comparison, "prose").values()
    assert found.stands == stands
    assert found.ratio == pytest.approx(max(loss, 0.02) / 0.02)


def test_ablations_are_a_table_of_their_own(tmp_path):
    write_results(tmp_path, "adam", 0)
    write_results(tmp_path, "adam", 0, task="probe")
    ablations = {"former_plus": "plus", "former_gradient": "along the gradient"}
    for candidate, loss in (("former_plus", 1.0), ("former_gradient", 2.0)):
        write_results(tmp_path, candidate, 0, final_training_loss=loss, peak_metric=loss + 0.5)
        write_results(tmp_path, candidate, 1, final_training_loss=loss, peak_metric=loss + 0.5)
    # A seed that only one of them has says nothing of the part.
    write_results(tmp_path, "former_plus", 2, final_training_loss=9.0, peak_metric=9.0)
    write_report(tmp_path, LABELS, tuple(SMOKE), "the command", [ablations], ())
    report = (tmp_path / "README.md").read_text()
    assert report.count("along the gradient") == 1
    assert "|  | seeds | plus | along the gradient |" in report
    row = "1.0000 ± 0.0000 / 1.5000 ± 0.0000 | 2.0000 ± 0.0000 / 2.5000 ± 0.0000"
    assert f"| Prose | 2 | {row} |" in report
    assert "| Prose ↓ | 1-3 | **1.0000** |" in report


@pytest.mark.parametrize("chosen", [("salsa_adam",), ("sgd",)])
def test_step_sizes_are_drawn_apart_of_what_has_run(tmp_path, chosen):
    write_results(tmp_path, "salsa_adam", 0)
    write_report(tmp_path, LABELS, tuple(SMOKE), "the command", [], chosen)
    has_run = chosen == ("salsa_adam",)
    assert (tmp_path / "chosen_step_sizes.png").is_file() is has_run
    assert ("(chosen_step_sizes.png)" in (tmp_path / "README.md").read_text()) is has_run


def test_no_table_of_ablations_without_one(tmp_path):
    write_results(tmp_path, "former_plus", 0)
    ablations = {"former_plus": "plus", "former_gradient": "along the gradient"}
    write_report(tmp_path, LABELS, tuple(SMOKE), "the command", [ablations], ())
    assert "Without one of its parts" not in (tmp_path / "README.md").read_text()


def test_a_report_of_calibrations_alone(tmp_path):
    """While the grid is being filled."""
    folder = f"{CALIBRATED}_at_0.001"
    write_results(tmp_path, CALIBRATED, 100, folder=folder, rate=1e-3, peak_metric=1.25)
    write_report(tmp_path, LABELS, tuple(SMOKE), "the command", [], ())
    report = (tmp_path / "README.md").read_text()
    assert "| Prose | 1.2500 / 1.0000 |" in report
    write_results(tmp_path, "salsa_adam", 0, task="digits")
    write_report(tmp_path, LABELS, tuple(SMOKE), "the command", [], ())
    assert "| Digits | 1 | **1.0000** |" in (tmp_path / "README.md").read_text()
