"""The comparison's grid: complete, in order, and ended by Ctrl-C or with its parent."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import compare
import comparison.grid
import psutil
import pytest
from comparison.candidates import BY_DEFAULT, CALIBRATED, CANDIDATES, HEAD_FIRST
from comparison.grid import best_rate, calibrations, missing
from comparison.plots import PLOTS
from comparison.runs import Run
from comparison_helpers import SMOKE, results_below, write_results
from support.command_line import UsageError

from hf_salsa import OPTIMIZERS

SEARCHING = [name for name in BY_DEFAULT if name in OPTIMIZERS or CANDIDATES[name].optimizer]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The whole grid in miniature, as a user runs it."""
    output_dir = tmp_path_factory.mktemp("comparison")
    result = subprocess.run(
        [
            *(sys.executable, compare.__file__, "--preset", "smoke", "--jobs", "2"),
            *("--output_dir", str(output_dir)),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert f"Report: {output_dir / 'README.md'}" in result.stdout
    return output_dir


@pytest.mark.slow
def test_the_smoke_grid_is_complete(smoke):
    found = results_below(smoke)
    expected = {
        f"{task}/{candidate}/seed_{seed}"
        for task, settings in SMOKE.items()
        for candidate in set(BY_DEFAULT) - {HEAD_FIRST}  # no task has a new head
        for seed in settings.seeds
    } | {
        f"{task}/{CALIBRATED}_at_{rate:g}/seed_{seed}"
        for task, settings in SMOKE.items()
        for rate in settings.rates
        for seed in settings.calibration_seeds
    }
    assert set(found) == expected
    for name, run in found.items():
        assert run["status"] == "finished", (name, run.get("error"))
        assert len(run["losses"]) == len(run["step_sizes"]) == run["updates"]
        assert run["evaluations"][-1]["step"] == run["updates"]
        assert run["seconds"] > 0
        assert (run["extra_forward_passes"] > 0) is (run["candidate"] in (*SEARCHING, "authors"))
        tail = run["losses"][-max(1, run["updates"] // 10) :]
        assert run["final_training_loss"] == pytest.approx(sum(tail) / len(tail), rel=1e-4)
        assert str(smoke) not in json.dumps(run)  # where it ran is nobody's business
    for task, settings in SMOKE.items():
        found_rates = {found[f"{task}/{CALIBRATED}/seed_{seed}"]["rate"] for seed in (0, 1)}
        assert len(found_rates) == 1
        assert found_rates <= set(settings.rates)
    report = (smoke / "README.md").read_text()
    for table in ("Peak metric", "Final training loss", "Time", "AdamW's peak rate", "Budgets"):
        assert f"## {table}" in report
    assert "Failed runs" not in report
    losses = [found[f"prose/salsa_adam/seed_{seed}"]["final_training_loss"] for seed in (0, 1)]
    error = abs(losses[0] - losses[1]) / 2
    assert f"{sum(losses) / 2:.4f} ± {error:.4f}" in report
    for name in PLOTS.values():
        assert (smoke / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in report


@pytest.mark.slow
def test_a_card_of_each_tasks_best_line_search(smoke):
    found = results_below(smoke)
    for task, settings in SMOKE.items():
        card = (smoke / task / "README.md").read_text()
        assert card.startswith("---\n")
        assert "without a learning rate" in card
        assert "## In the comparison" in card
        assert (smoke / task / "step_size_and_loss.png").read_bytes().startswith(b"\x89PNG")
        better = min if settings.lower_is_better else max
        means = {
            name: sum(found[f"{task}/{name}/seed_{seed}"]["peak_metric"] for seed in (0, 1)) / 2
            for name in SEARCHING
        }
        shown = [name for name in means if f"({name}/seed_" in card]
        assert [means[name] for name in shown] == [better(means.values())]


@pytest.mark.slow
def test_what_is_done_is_not_done_again(smoke, monkeypatch, capsys):
    monkeypatch.setattr(comparison.grid, "ProcessPoolExecutor", no_pool)
    before = {path: path.stat().st_mtime_ns for path in smoke.rglob("results.json")}
    compare.main(["--preset", "smoke", "--output_dir", str(smoke)])
    assert {path: path.stat().st_mtime_ns for path in smoke.rglob("results.json")} == before
    capsys.readouterr()


class no_pool:  # noqa: N801
    """A pool that must not get any work."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def submit(self, *args):
        raise AssertionError("a finished run was started again")

    def shutdown(self, **kwargs):
        pass


@pytest.mark.slow
def test_ctrl_c_ends_the_grid_at_once(tmp_path):
    process = subprocess.Popen(
        [
            *(sys.executable, compare.__file__, "--preset", "smoke", "--tasks", "prose"),
            *("--candidates", "salsa_sgd", "sls_sgd", "sgd", "adam"),
            *("--output_dir", str(tmp_path)),
        ],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, as in a terminal
        # A shell's background job would have it ignore Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("results.json")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "Interrupted. The same command goes on from here." in errors
    assert "Traceback" not in errors
    assert 1 <= len(results_below(tmp_path)) < 8


PARENT = """
import os, sys, time
from comparison.grid import open_pool

if __name__ == "__main__":
    with open_pool(jobs=2, threads=1) as pool:
        for run in [pool.submit(time.sleep, 1) for _ in range(2)]:
            run.result()
        for _ in range(2):
            pool.submit(time.sleep, 600)  # a long run each
        print("running", flush=True)
        time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    scripts = os.path.dirname(compare.__file__)
    path = os.pathsep.join([scripts, *filter(None, [os.environ.get("PYTHONPATH")])])
    parent = psutil.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    children = []
    try:
        assert parent.stdout.readline() == b"running\n"
        children = parent.children()
        assert len(children) >= 2
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
    finally:
        for process in (parent, *children):
            if process.is_running():
                process.kill()
        parent.stdout.close()


def test_the_best_rate_is_that_of_the_best_metric_over_the_seeds(tmp_path):
    metrics = {3e-4: (2.0, 2.0), 1e-3: (1.0, 1.8), 3e-3: (1.5, 1.3), 1e-2: (1.4, 1.4)}
    task = dataclasses.replace(SMOKE["prose"], calibration_seeds=(100, 101), rates=(*metrics, 3e-2))
    runs = calibrations("prose", task, CALIBRATED, tmp_path)
    assert len(runs) == 10
    for run in runs:
        of_rate = metrics.get(run.rate)
        values = {"peak_metric": None, "final_training_loss": None}
        if of_rate is not None:
            loss = {1e-2: 0.5}.get(run.rate, 1.0)  # equal metrics: the lower loss decides
            values = {"peak_metric": of_rate[run.seed - 100], "final_training_loss": loss}
        run.folder.mkdir(parents=True)
        (run.folder / "results.json").write_text(json.dumps(values))
    # Sums: 4.0, 2.8, 2.8, 2.8, and the largest rate did not finish.
    assert best_rate(runs) == 1e-2
    for run in runs:
        (run.folder / "results.json").write_text("{}")
    with pytest.raises(UsageError, match="prose: no rate of .* trains AdamW"):
        best_rate(runs)


def test_first_seeds_come_first(tmp_path):
    tasks = {
        "probe": SMOKE["probe"],
        "prose": dataclasses.replace(SMOKE["prose"], seeds=(5,)),
    }
    runs = comparison.grid.comparison(
        tasks,
        ("salsa_adam", CALIBRATED, "adam"),
        {("probe", CALIBRATED): 1, ("prose", CALIBRATED): 2},
        tmp_path,
    )
    assert [(run.task_name, run.candidate_name, run.rate, run.seed) for run in runs] == [
        ("probe", "salsa_adam", None, 0),
        ("probe", CALIBRATED, 1, 0),
        ("probe", "adam", 2e-5, 0),
        ("prose", "salsa_adam", None, 5),
        ("prose", CALIBRATED, 2, 5),
        ("prose", "adam", 1e-3, 5),
        ("probe", "salsa_adam", None, 1),
        ("probe", CALIBRATED, 1, 1),
        ("probe", "adam", 2e-5, 1),
    ]


def test_without_a_new_head_none_is_trained_first(tmp_path):
    """Those runs would be the others once more."""
    tasks = {
        "probe": dataclasses.replace(SMOKE["probe"], seeds=(0,), new_head=True),
        "prose": dataclasses.replace(SMOKE["prose"], seeds=(0,)),
    }
    rates = {("probe", CALIBRATED): 1, ("probe", HEAD_FIRST): 2, ("prose", CALIBRATED): 3}
    runs = comparison.grid.comparison(tasks, (HEAD_FIRST, CALIBRATED), rates, tmp_path)
    assert [(run.task_name, run.candidate_name, run.rate) for run in runs] == [
        ("probe", HEAD_FIRST, 2),
        ("probe", CALIBRATED, 1),
        ("prose", CALIBRATED, 3),
    ]


def test_results_of_other_settings_are_refused(tmp_path):
    write_results(tmp_path, "salsa_adam", 0)
    run = Run("prose", SMOKE["prose"], "salsa_adam", None, 0, tmp_path)
    assert missing([run]) == []
    more_seeds = dataclasses.replace(SMOKE["prose"], seeds=(0, 1, 2))
    assert missing([run._replace(task=more_seeds)]) == []
    longer = dataclasses.replace(SMOKE["prose"], updates=13)
    with pytest.raises(UsageError, match="holds a run with other settings: delete it"):
        missing([run._replace(task=longer)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "mprc"], "preset smoke has no task 'mprc', only probe, prose"),
        (["--candidates", "adm"], "invalid choice: 'adm'"),
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
        (["--preset", "cpu"], "compare.py: error: shakespeare needs --text_file"),
        (
            ["--preset", "cpu", "--tasks", "shakespeare", "--text_file", "nowhere.txt"],
            "compare.py: error: text_file nowhere.txt: no such file",
        ),
        (
            ["--preset", "cpu", "--tasks", "mrpc", "--glue_dir", "nowhere"],
            "compare.py: error: mrpc needs nowhere/MRPC/train.tsv and nowhere/MRPC/dev.tsv",
        ),
        (["report"], "holds no results of compare.py"),
        (["--preset", "smok"], "invalid choice: 'smok'"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_run(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        compare.main(["--preset", "smoke", "--output_dir", str(tmp_path / "out"), *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
