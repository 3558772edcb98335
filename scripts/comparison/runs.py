"""One run: one candidate on one task with one seed, from its arguments to its results."""

import importlib.metadata
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support.runs import last_checkpoint
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_callback import ExportableState

from comparison.candidates import BY_DEFAULT, CANDIDATES
from comparison.loaders import LOADERS, Prepared, Sources
from comparison.results import RESULTS
from comparison.rivals import AuthorsOptimizer
from comparison.tasks import CONSTANT, COSINE, Task
from hf_salsa import SaLSaTrainer, SaLSaTrainingArguments
from hf_salsa.optimizers.head_first import HeadFirst

VERSIONS_OF = ("hf_salsa", "torch", "transformers", "accelerate")
EVALUATIONS = 5  # in a run
DIGITS = 5  # significant ones of what a run records


class Run(NamedTuple):
    """One run of the grid; `rate` is the peak rate, for the candidates that have one."""

    task_name: str
    task: Task
    candidate_name: str
    rate: float | None
    seed: int
    output_dir: Path

    @property
    def folder(self) -> Path:
        """Where it leaves its results; a rate that is being calibrated is part of its name."""
        name = self.candidate_name
        if self.seed in self.task.calibration_seeds:
            name = f"{name}_at_{self.rate:g}"
        return self.output_dir / self.task_name / name / f"seed_{self.seed}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What makes the candidate, as training arguments."""
        arguments = dict(CANDIDATES[self.candidate_name].arguments)
        if self.rate is not None:
            schedule = CONSTANT if self.task.flat else COSINE
            arguments = {"learning_rate": self.rate, **schedule, **arguments}
        return arguments

    @property
    def configuration(self) -> dict[str, Any]:
        """Task and candidate as JSON has them."""
        names = ("kind", "metric", "batch_size", "epochs", "updates", "group_by_length", "settings")
        task = {name: getattr(self.task, name) for name in names}
        candidate = self.arguments | CANDIDATES[self.candidate_name].configuration
        return json.loads(json.dumps({"task": task, "candidate": candidate}))


class Stopwatch(TrainerCallback, ExportableState):
    """Seconds inside training steps, evaluations and checkpoints left out; goes on after a resume.

    Attributes:
        seconds: By the clock.
        cpu_seconds: Of this process on all its threads.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._started = (0.0, 0.0)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        attributes = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        return {"args": {}, "attributes": attributes}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds += time.perf_counter() - self._started[0]
        self.cpu_seconds += time.process_time() - self._started[1]


@lru_cache
def prepare(kind: str, settings: str, sources: Sources) -> Prepared:
    """Load the data of a task, once for all of its runs in this process."""
    return LOADERS[kind](sources, **json.loads(settings))


def make_trainer(run: Run, prepared: Prepared) -> SaLSaTrainer:
    """Return the trainer of a run, ready to train."""
    task, candidate = run.task, CANDIDATES[run.candidate_name]
    train_data, callbacks = prepared.make_train(run.seed)
    per_epoch = math.ceil(len(train_data) / task.batch_size)
    updates = task.updates or math.ceil(task.epochs * per_epoch)
    checkpoints = {"save_strategy": "steps", "save_total_limit": 1} if candidate.resumes else {}
    arguments = run.arguments
    if "warmup_steps" in arguments:  # a share, which Schedule-Free would take for a number
        arguments["warmup_steps"] = math.ceil(arguments["warmup_steps"] * updates)
    args = SaLSaTrainingArguments(
        output_dir=str(run.folder / "trainer"),
        seed=run.seed,
        max_steps=updates,
        per_device_train_batch_size=task.batch_size,
        train_sampling_strategy="group_by_length" if task.group_by_length else "random",
        per_device_eval_batch_size=64,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite is a result
        eval_strategy="steps",
        eval_steps=math.ceil(updates / EVALUATIONS),
        **{"save_strategy": "no", "save_steps": math.ceil(updates / EVALUATIONS), **checkpoints},
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        **arguments,
    )
    set_seed(run.seed)
    model = prepared.make_model()
    own: dict[str, Any] = {}
    if candidate.optimizer is not None:
        own["optimizer_cls_and_kwargs"] = (candidate.optimizer, dict(candidate.options))
    if candidate.make_optimizer is not None:
        optimizer = candidate.make_optimizer(model.parameters(), **candidate.options)
        own["optimizers"] = (optimizer, None)
    trainer = candidate.trainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=prepared.validation,
        callbacks=[*callbacks, Stopwatch()],
        **own,
        **prepared.arguments,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(run: Run, prepared: Prepared) -> dict[str, Any]:
    """Train, from the last checkpoint if there is one, and return what the run records."""
    trainer = make_trainer(run, prepared)
    checkpoint = last_checkpoint(trainer.args.output_dir)
    metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    history = trainer.state.log_history
    if not any("eval_loss" in e and e["step"] == trainer.state.global_step for e in history):
        trainer.evaluate()
    record = _record(trainer, run.task, metrics, prepared.characters_per_token)
    if trainer.line_search is not None and run.candidate_name in BY_DEFAULT:
        name = f"{run.task_name}-{run.candidate_name}-seed-{run.seed}"
        trainer.create_model_card(model_name=name, **prepared.card)
        record["card"] = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    optimizer = trainer.optimizer.optimizer
    if isinstance(optimizer, AuthorsOptimizer):
        state = optimizer.package.state
        record["extra_forward_passes"] = state["n_forwards"] - state["step"]
    elif isinstance(optimizer, HeadFirst):
        record["extra_forward_passes"] = optimizer.counters.trials
    return record


def _record(
    trainer: SaLSaTrainer,
    task: Task,
    metrics: Mapping[str, float],
    characters_per_token: float | None,
) -> dict[str, Any]:
    """Return what the log and the metrics of a trainer say of its run."""
    evaluations = []
    for entry in trainer.state.log_history:
        if "eval_loss" in entry:
            loss = entry["eval_loss"]
            if characters_per_token is not None:
                entry["eval_loss_per_character"] = loss / characters_per_token
            value = entry[f"eval_{task.metric}"]
            evaluations.append({"step": entry["step"], "loss": loss, "metric": value})
    logged = trainer.state.log_history
    updates = [entry for entry in logged if "learning_rate" in entry and "loss" in entry]
    losses = [entry["loss"] for entry in updates]
    last_tenth = losses[-max(1, len(losses) // 10) :]
    best = min if task.lower_is_better else max
    finite = filter(math.isfinite, (e["metric"] for e in evaluations))
    (stopwatch,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Stopwatch))
    return {
        "updates": trainer.state.global_step,
        "final_training_loss": sum(last_tenth) / len(last_tenth),
        "peak_metric": best(finite, default=None),
        "final_metric": evaluations[-1]["metric"],
        "seconds": stopwatch.seconds,
        "cpu_seconds": stopwatch.cpu_seconds,
        "extra_forward_passes": metrics.get("salsa/trials", 0),
        "searches": metrics.get("salsa/searches", 0),
        "failed_searches": metrics.get("salsa/failed_searches", 0),
        "evaluations": evaluations,
        "losses": losses,
        "step_sizes": [entry["learning_rate"] for entry in updates],
        "searched_at": _rises([entry.get("salsa/searches", 0) for entry in updates]),
    }


def _rises(counts: Sequence[int]) -> list[int]:
    """Return where a counter that starts at 0 rises, 1 for the first place."""
    return [k for k, (a, b) in enumerate(itertools.pairwise([0, *counts]), start=1) if b > a]


def execute(run: Run, sources: Sources) -> str:
    """Carry out a run and write its results; return its outcome, `finished` or `failed`."""
    trainer_dir = run.folder / "trainer"
    if not CANDIDATES[run.candidate_name].resumes:
        shutil.rmtree(trainer_dir, ignore_errors=True)
    prepared = prepare(run.task.kind, json.dumps(run.task.settings), sources)
    results: dict[str, Any] = {
        "task": run.task_name,
        "candidate": run.candidate_name,
        "title": run.task.title,
        "seed": run.seed,
        "rate": run.rate,
        "calibration": run.seed in run.task.calibration_seeds,
        "configuration": run.configuration,
        "versions": _versions(CANDIDATES[run.candidate_name].package),
        "device": _device(),
    }
    try:
        results |= {"status": "finished", **train(run, prepared)}
    # Whatever ends a run is the run's result: a diverged rival must not end the grid.
    except Exception as error:
        results |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    lines = (f"{json.dumps(name)}: {json.dumps(_plain(value))}" for name, value in results.items())
    unfinished = run.folder / f"{RESULTS}.unfinished"
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    unfinished.rename(run.folder / RESULTS)
    shutil.rmtree(trainer_dir, ignore_errors=True)  # there is none if it failed early
    return results["status"]


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it: rounded, and None for what is not finite."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _versions(package: str | None) -> dict[str, str]:
    names = [*VERSIONS_OF, *([package] if package else [])]
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{name: importlib.metadata.version(name) for name in names}}


def _device() -> str:
    if torch.accelerator.is_available():
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "accelerator"
    return f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
