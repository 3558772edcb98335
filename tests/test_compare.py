"""The comparison: its grid, what a run records and survives, its tables."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial

import compare
import comparison_report
import pytest
import torch
from compare import CALIBRATED, CANDIDATES, PRESETS, Run, Sources
from comparison_report import Cell, Comparison
from script_utils import UsageError

from hf_salsa import OPTIMIZERS, SaLSaAdamPlus

SMOKE = PRESETS["smoke"]
BY_DEFAULT = compare.parse_args(["--preset", "smoke"]).candidates
LABELS = {name: CANDIDATES[name].label for name in BY_DEFAULT}


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


def results_below(output_dir):
    paths = sorted(output_dir.glob("*/*/seed_*/results.json"))
    return {
        path.parent.relative_to(output_dir).as_posix(): json.loads(path.read_text())
        for path in paths
    }


@pytest.mark.slow
def test_the_smoke_grid_is_complete(smoke):
    found = results_below(smoke)
    expected = {
        f"{task}/{candidate}/seed_{seed}"
        for task, settings in SMOKE.items()
        for candidate in BY_DEFAULT
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
        assert (run["extra_forward_passes"] > 0) is (run["candidate"] in (*OPTIMIZERS, "authors"))
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
    for name in comparison_report.PLOTS.values():
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
            for name in OPTIMIZERS
        }
        shown = [name for name in means if f"({name}/seed_" in card]
        assert [means[name] for name in shown] == [better(means.values())]


@pytest.mark.slow
def test_what_is_done_is_not_done_again(smoke, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ProcessPoolExecutor", no_pool)
    before = {path: path.stat().st_mtime_ns for path in smoke.rglob("results.json")}
    compare.main(["--preset", "smoke", "--output_dir", str(smoke)])
    assert {path: path.stat().st_mtime_ns for path in smoke.rglob("results.json")} == before
    capsys.readouterr()


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


# --- one run ------------------------------------------------------------------------------------


def prose_run(output_dir, candidate, seed=0, rate=None):
    compare.be_quiet()
    run = Run("prose", SMOKE["prose"], candidate, rate, seed, output_dir)
    run.folder.mkdir(parents=True)
    return run


def carry_out(run):
    outcome = compare.execute(run, Sources())
    results = json.loads((run.folder / "results.json").read_text())
    assert results["status"] == outcome
    return results


TIMES = ("seconds", "cpu_seconds", "card")  # the card has the time in its table of versions


@pytest.mark.parametrize("candidate", ["salsa_adam", "adam", "schedule_free", "prodigy", "authors"])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, candidate):
    """What it records is what the straight run records, to the last digit."""
    rate = 1e-3 if candidate == "adam" else None
    straight = carry_out(prose_run(tmp_path / "straight", candidate, rate=rate))
    run = prose_run(tmp_path / "interrupted", candidate, rate=rate)
    first_steps = []

    def interrupt(self, args, state, control, **kwargs):
        first_steps.append(state.global_step)
        if state.global_step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(compare.Stopwatch, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compare.execute(run, Sources())
    assert not (run.folder / "results.json").exists()

    begun = []
    on_step_begin = compare.Stopwatch.on_step_begin

    def note(self, args, state, control, **kwargs):
        begun.append(state.global_step)
        on_step_begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(compare.Stopwatch, "on_step_begin", note)
    resumed = carry_out(run)
    # The authors' optimizer has its state in no checkpoint: it starts anew.
    assert begun[0] == (0 if candidate == "authors" else 6)
    if candidate != "authors":  # seeds its replay by the clock
        for name in set(straight) - set(TIMES):
            assert resumed[name] == straight[name], name
    assert resumed["updates"] == 12
    assert not (run.folder / "trainer").exists()


def test_the_stopwatch_goes_on_after_a_resume():
    watch = compare.Stopwatch()
    watch.on_step_begin()
    watch.on_step_end()
    assert 0 < watch.seconds < 1
    again = compare.Stopwatch.from_state(watch.state())
    assert (again.seconds, again.cpu_seconds) == (watch.seconds, watch.cpu_seconds)


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
    comparison_report.write_report(tmp_path, LABELS, tuple(SMOKE), "command", {}, ())
    report = (tmp_path / "README.md").read_text()
    assert "| failed |" in report
    assert "- Prose, prodigy, rate None, seed 0: FloatingPointError: 20 steps" in report


def test_the_peak_is_the_best_that_is_finite(tmp_path, monkeypatch):
    """A run that diverges was good before; its final loss is missing, and counts as a failure."""
    evaluate = compare.ComparisonTrainer.evaluate
    losses = iter([3.0, 2.0, math.nan, math.nan])

    def diverging(self, *args, **kwargs):
        metrics = evaluate(self, *args, **kwargs)
        self.state.log_history[-1]["eval_loss"] = next(losses)
        return metrics

    monkeypatch.setattr(compare.ComparisonTrainer, "evaluate", diverging)
    results = carry_out(prose_run(tmp_path, "salsa_sgd"))
    assert [entry["loss"] for entry in results["evaluations"]] == [3.0, 2.0, None, None]
    assert results["peak_metric"] == pytest.approx(2.0, rel=0.2)  # per character
    assert results["final_metric"] is None


def test_a_loss_that_is_not_finite_is_recorded_as_missing():
    recorded = compare._plain({"losses": [1.0, math.nan, math.inf, 123456.789], "n": 3})
    assert recorded == {"losses": [1.0, None, None, 123460.0], "n": 3}


def test_the_authors_package_searches_and_logs_its_step_size(tmp_path):
    results = carry_out(prose_run(tmp_path, "authors"))
    assert results["losses"][-1] < 0.8 * results["losses"][0]
    assert results["extra_forward_passes"] >= results["updates"]
    assert len(set(results["step_sizes"])) > 3
    assert all(0 < size < 1.1 for size in results["step_sizes"])


def test_prodigys_rate_is_the_one_it_found(tmp_path):
    sizes = carry_out(prose_run(tmp_path, "prodigy"))["step_sizes"]
    assert sizes[0] == pytest.approx(1e-6)
    assert sizes[-1] > 10 * sizes[0]


ABLATIONS = {
    "plus_slow_growth": {"confidence": 1e9},
    "plus_any_growth": {"confidence": -1e9},
    "plus_full_start": {"first_share": 1.0},
    "plus_gradient": {"direction": "gradient"},
    "plus_no_averages": {"beta3": 0.0},
    "plus_no_cool_down": {"cool_down": 0.0},
}


def test_ablations_are_salsa_adam_plus_without_one_part(tmp_path):
    assert {*ABLATIONS, "plus_no_clipping"} == compare.ABLATIONS.keys()
    assert {*compare.ABLATIONS, *compare.TRIED, *BY_DEFAULT} == set(CANDIDATES)
    assert not {*compare.ABLATIONS, *compare.TRIED} & set(BY_DEFAULT)
    whole = SaLSaAdamPlus([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    for name, changed in ABLATIONS.items():
        run = prose_run(tmp_path, name)
        prepared = compare.prepare(run.task.kind, json.dumps(run.task.settings), Sources())
        trainer = compare.make_trainer(run, prepared)
        assert type(trainer.optimizer) is SaLSaAdamPlus
        (group,) = trainer.optimizer.param_groups
        assert {k: v for k, v in group.items() if k != "params" and v != whole[k]} == changed
        assert run.configuration["candidate"] == {"optim": "salsa_adam_plus", **changed}
        assert trainer.args.max_grad_norm == 1.0
    unclipped = compare.ABLATIONS["plus_no_clipping"].arguments
    assert unclipped == {"optim": "salsa_adam_plus", "max_grad_norm": 0.0}


def test_the_study_is_of_the_rules_that_were_tried():
    candidates = compare.parse_args(["--preset", "study"]).candidates
    assert compare.TRIED.keys() == set(candidates) - {
        *(CALIBRATED, "schedule_free", "salsa_adam", "salsa_adam_plus")
    }
    named = compare.parse_args(["--preset", "study", "--candidates", "plus_gradient"]).candidates
    assert named == ["plus_gradient"]
    used = {seed for task in PRESETS["cpu"].values() for seed in (*task.seeds, 100, 101)}
    for task in PRESETS["study"].values():
        assert not used & {*task.seeds, *task.calibration_seeds}


@pytest.mark.filterwarnings("error:Ignored with")
def test_an_ablation_knows_the_length_of_its_run(tmp_path):
    results = carry_out(prose_run(tmp_path, "plus_slow_growth"))
    assert results["status"] == "finished"
    sizes = results["step_sizes"]
    assert sizes[-1] < 0.2 * max(sizes)
    assert sizes[0] == pytest.approx(max(sizes), rel=0.1)


def test_paper_candidates_follow_the_papers_schedule(tmp_path):
    task = PRESETS["cpu"]["mrpc"]
    arguments = Run("mrpc", task, "adam", task.adam_rate, 0, tmp_path).arguments
    assert arguments == {
        "optim": "adamw_torch_fused",
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
    }
    flat = dataclasses.replace(task, flat=True)
    arguments = Run("mrpc", flat, "sgd", 0.1, 0, tmp_path).arguments
    assert arguments == {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    # The calibrated baseline warms up and decays everywhere; line searches have neither.
    arguments = Run("mrpc", flat, CALIBRATED, 1e-4, 0, tmp_path).arguments
    assert arguments["lr_scheduler_type"] == "cosine"
    assert Run("mrpc", task, "salsa_sgd", None, 0, tmp_path).arguments == {"optim": "salsa_sgd"}


def test_fine_tuning_starts_from_weights_of_the_other_half(tmp_path, monkeypatch):
    compare.be_quiet()
    settings = SMOKE["prose"].settings | {
        "pretraining": {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    }
    sources = Sources(pretrained_dir=str(tmp_path))
    scratch = compare.load_text(sources, **SMOKE["prose"].settings)
    prepared = compare.load_text(sources, **settings)
    (folder,) = tmp_path.iterdir()
    assert folder.is_dir()
    with monkeypatch.context() as context:
        context.setattr(compare, "Trainer", None)  # it is not trained again
        again = compare.load_text(sources, **settings)
    weights = [prepared.make_model().state_dict(), again.make_model().state_dict()]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    def loss(model):
        inputs = torch.tensor(prepared.validation["input_ids"][:])
        with torch.no_grad():
            return model.eval()(input_ids=inputs, labels=inputs).loss.item()

    assert loss(prepared.make_model()) < loss(scratch.make_model()) - 0.1
    train, _ = prepared.make_train(0)
    text = compare.run_clm.load_texts(compare.run_clm.DataArguments())[0]
    second_half = text[: SMOKE["prose"].settings["max_characters"]][10_000:]
    vocabulary = prepared.arguments["processing_class"]
    assert vocabulary.decode(train["input_ids"][0]) == second_half[:32]
    assert len(train) == len(second_half) // 32
    other = settings | {"pretraining": settings["pretraining"] | {"max_steps": 3}}
    compare.load_text(sources, **other)
    assert len(list(tmp_path.iterdir())) == 2


# --- the grid -----------------------------------------------------------------------------------


def write_results(output_dir, candidate, seed, *, folder=None, task="prose", **values):
    run = Run(task, SMOKE[task], candidate, values.get("rate"), seed, output_dir)
    path = output_dir / task / (folder or candidate) / f"seed_{seed}"
    path.mkdir(parents=True)
    results = {
        "task": task,
        "title": SMOKE[task].title,
        "candidate": candidate,
        "seed": seed,
        "rate": None,
        "calibration": seed in SMOKE[task].calibration_seeds,
        "configuration": run.configuration,
        "versions": {"torch": "2"},
        "device": "CPU, 1 thread",
        "status": "finished",
        "updates": 4,
        "final_training_loss": 1.0,
        "peak_metric": 1.0,
        "seconds": 10.0,
        "cpu_seconds": 9.0,
        "extra_forward_passes": 0,
        "evaluations": [{"step": 2, "loss": 1.0, "metric": 1.0}],
        "losses": [4.0, 3.0, None, 1.0],
        "step_sizes": [0.0, 1.0, 1.0, 0.5],
        **values,
    }
    (path / "results.json").write_text(json.dumps(results))


def test_the_best_rate_is_that_of_the_best_metric_over_the_seeds(tmp_path):
    metrics = {3e-4: (2.0, 2.0), 1e-3: (1.0, 1.8), 3e-3: (1.5, 1.3), 1e-2: (1.4, 1.4)}
    task = dataclasses.replace(SMOKE["prose"], calibration_seeds=(100, 101), rates=(*metrics, 3e-2))
    runs = compare.calibrations("prose", task, tmp_path)
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
    assert compare.best_rate(runs) == 1e-2
    for run in runs:
        (run.folder / "results.json").write_text("{}")
    with pytest.raises(UsageError, match="prose: no rate of .* trains AdamW"):
        compare.best_rate(runs)


def test_first_seeds_come_first(tmp_path):
    tasks = {
        "probe": SMOKE["probe"],
        "prose": dataclasses.replace(SMOKE["prose"], seeds=(5,)),
    }
    runs = compare.comparison(
        tasks, ("salsa_adam", CALIBRATED, "adam"), {"probe": 1, "prose": 2}, tmp_path
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


def test_results_of_other_settings_are_refused(tmp_path):
    write_results(tmp_path, "salsa_adam", 0)
    run = Run("prose", SMOKE["prose"], "salsa_adam", None, 0, tmp_path)
    assert compare.missing([run]) == []
    more_seeds = dataclasses.replace(SMOKE["prose"], seeds=(0, 1, 2))
    assert compare.missing([run._replace(task=more_seeds)]) == []
    longer = dataclasses.replace(SMOKE["prose"], updates=13)
    with pytest.raises(UsageError, match="holds a run with other settings: delete it"):
        compare.missing([run._replace(task=longer)])


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


def test_a_report_of_another_presets_results_is_refused(tmp_path, capsys):
    write_results(tmp_path, "salsa_adam", 0)
    with pytest.raises(SystemExit):
        compare.main(["report", "--preset", "cpu", "--output_dir", str(tmp_path)])
    assert "holds results of another preset's tasks: prose" in capsys.readouterr().err


def test_commands_that_repeat_a_comparison():
    assert compare.command_of("smoke") == "python scripts/compare.py --preset smoke"
    assert compare.command_of("cpu").endswith(" --glue_dir GLUE --text_file shakespeare.txt")


def test_a_missing_rival_is_named(tmp_path, monkeypatch, capsys):
    missing = dataclasses.replace(CANDIDATES["prodigy"], package="no-such-package")
    monkeypatch.setitem(CANDIDATES, "prodigy", missing)
    with pytest.raises(SystemExit):
        compare.main(["--preset", "smoke", "--output_dir", str(tmp_path)])
    assert "prodigy needs no-such-package: pip install hf_salsa[compare]" in capsys.readouterr().err


# --- tables -------------------------------------------------------------------------------------


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
    assert comparison_report.ranks(cells, lower=True) == {
        "a": 2.5,
        "b": 1,
        "c": 2.5,
        "d": 5,
        "e": 4,
    }
    assert comparison_report.ranks(cells, lower=False) == {
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
    comparison_report.write_report(tmp_path, labels, tuple(SMOKE), "the command", {}, ())
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
    (table,) = comparison_report.loss_table(comparison)
    assert "log-average (1 tasks)" in table
    assert "| Prose ↓ | 1 | **1.0000** |  |" in table


def test_an_average_rank_of_the_candidates_that_ran_everywhere(tmp_path):
    for task, losses in {"probe": (3.0, 2.0, 1.0), "prose": (1.0, 2.0, None)}.items():
        for candidate, loss in zip(("adam", "sgd", "salsa_adam"), losses, strict=True):
            if loss is not None:
                write_results(tmp_path, candidate, 0, task=task, final_training_loss=loss)
    names = {"adam": "Adam", "sgd": "SGD", "salsa_adam": "SaLSa"}
    (table,) = comparison_report.loss_table(Comparison(tmp_path, names, tuple(SMOKE), {}))
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
        write_results(tmp_path, candidate, 0, **of_probe)
    # The metric of prose is a loss: less is better, and one seed has no standard error.
    write_results(tmp_path, CALIBRATED, 0, peak_metric=2.0, final_training_loss=2.0)
    write_results(tmp_path, "sgd", 0, peak_metric=2.01, final_training_loss=2.0)
    write_results(tmp_path, "salsa_adam", 0, peak_metric=1.5, final_training_loss=2.1)
    write_results(tmp_path, CALIBRATED, 0, task="digits", final_training_loss=None)
    write_results(tmp_path, "sgd", 0, task="digits")
    comparison = Comparison(tmp_path, names, tuple(SMOKE), {})
    heading, text, table = comparison_report.sweep_section(comparison)
    assert heading == "## Beside a sweep"
    assert "beside AdamW" in text
    assert table.split("\n") == [
        "|  | SGD | SaLSa | Adam |",
        "| --- | --- | --- | --- |",
        "| Bigram shift | **1.04 / -0.0900** | 0.50 / -0.1100 | failed |",
        "| Prose | 1.00 / +0.0100 | **1.05 / -0.5000** |  |",
        "| stands | 1 of 2 | 1 of 2 | 0 of 1 |",
    ]


def test_ablations_are_a_table_of_their_own(tmp_path):
    write_results(tmp_path, "adam", 0)
    write_results(tmp_path, "adam", 0, task="probe")
    ablations = {"salsa_adam_plus": "plus", "plus_gradient": "along the gradient"}
    for candidate, loss in (("salsa_adam_plus", 1.0), ("plus_gradient", 2.0)):
        write_results(tmp_path, candidate, 0, final_training_loss=loss, peak_metric=loss + 0.5)
        write_results(tmp_path, candidate, 1, final_training_loss=loss, peak_metric=loss + 0.5)
    comparison_report.write_report(tmp_path, LABELS, tuple(SMOKE), "the command", ablations, ())
    report = (tmp_path / "README.md").read_text()
    assert report.count("along the gradient") == 1
    assert "|  | seeds | plus | along the gradient |" in report
    row = "1.0000 ± 0.0000 / 1.5000 ± 0.0000 | 2.0000 ± 0.0000 / 2.5000 ± 0.0000"
    assert f"| Prose | 2 | {row} |" in report
    assert "| Prose ↓ | 1-2 | **1.0000** | **1.0000 ± 0.0000** |" in report


@pytest.mark.parametrize("chosen", [("salsa_adam",), ("sgd",)])
def test_step_sizes_are_drawn_apart_of_what_has_run(tmp_path, chosen):
    write_results(tmp_path, "salsa_adam", 0)
    comparison_report.write_report(tmp_path, LABELS, tuple(SMOKE), "the command", {}, chosen)
    has_run = chosen == ("salsa_adam",)
    assert (tmp_path / "chosen_step_sizes.png").is_file() is has_run
    assert ("(chosen_step_sizes.png)" in (tmp_path / "README.md").read_text()) is has_run


def test_no_table_of_ablations_without_one(tmp_path):
    write_results(tmp_path, "salsa_adam_plus", 0)
    ablations = {"salsa_adam_plus": "plus", "plus_gradient": "along the gradient"}
    comparison_report.write_report(tmp_path, LABELS, tuple(SMOKE), "the command", ablations, ())
    assert "Without one of its parts" not in (tmp_path / "README.md").read_text()


def test_a_report_of_calibrations_alone(tmp_path):
    """While the grid is being filled."""
    folder = f"{CALIBRATED}_at_0.001"
    write_results(tmp_path, CALIBRATED, 100, folder=folder, rate=1e-3, peak_metric=1.25)
    comparison_report.write_report(tmp_path, LABELS, tuple(SMOKE), "the command", {}, ())
    report = (tmp_path / "README.md").read_text()
    assert "| Prose | 1.2500 / 1.0000 |" in report
    write_results(tmp_path, "salsa_adam", 0, task="digits")
    comparison_report.write_report(tmp_path, LABELS, tuple(SMOKE), "the command", {}, ())
    assert "| Digits | 1 | **1.0000** |" in (tmp_path / "README.md").read_text()
