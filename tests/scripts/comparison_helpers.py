"""What the tests of the comparison share: one short run, results by hand, what lies in a folder."""

import json

from comparison.candidates import BY_DEFAULT, CANDIDATES
from comparison.grid import be_quiet
from comparison.loaders import Sources
from comparison.runs import Run, execute
from comparison.tasks import PRESETS

SMOKE = PRESETS["smoke"]
LABELS = {name: CANDIDATES[name].label for name in BY_DEFAULT}


def prose_run(output_dir, candidate, seed=0, rate=None):
    be_quiet()
    run = Run("prose", SMOKE["prose"], candidate, rate, seed, output_dir)
    run.folder.mkdir(parents=True)
    return run


def carry_out(run):
    outcome = execute(run, Sources())
    results = json.loads((run.folder / "results.json").read_text())
    assert results["status"] == outcome
    return results


def results_below(output_dir):
    paths = sorted(output_dir.glob("*/*/seed_*/results.json"))
    return {
        path.parent.relative_to(output_dir).as_posix(): json.loads(path.read_text())
        for path in paths
    }


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
