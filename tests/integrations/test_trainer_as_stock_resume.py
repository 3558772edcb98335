"""What transformers' own tests ask of Trainer's checkpoints, asked of every optimizer.

After `tests/trainer/test_trainer_checkpointing.py` (before: in `test_trainer.py`) and
`test_trainer_callback.py` of transformers, in words of our own; `test_trainer_as_stock.py` has the
rest, and lists what does not apply. Of the checkpoints that is:

- the rotation and the order of folders, the hub, tokenizers and processors in a checkpoint: they do
  not ask which optimizer trained. What a run may delete is in `tests/scripts/test_runs.py`.
- `.bin` checkpoints: transformers writes safetensors only.
- several PEFT adapters: frozen weights are here, adapters in `test_peft.py`.
- a checkpoint of another optimizer: refused (`test_trainer_resume.py`).
- checkpoints of several processes: `tests/distributed/`.

Dropout, accumulation, bf16 and a cool-down in one run: `test_trainer_resume.py`; kills and full
disks: `test_killed_runs.py`.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from regression import Line, NoisyLine, PlainLine, logged, make_trainer, points, state_of
from safetensors.torch import load_file, save_file
from trainer_problems import assert_same_weights, weights
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_salsa import OPTIMIZERS
from hf_salsa.run_trace import RunTrace

every_optimizer = pytest.mark.parametrize("optim", OPTIMIZERS)
each_model = pytest.mark.parametrize(
    "model", [Line, pytest.param(PlainLine, marks=pytest.mark.slow)]
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:A line search failed"),  # not the matter here
]
SAVED = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}


def checkpoint_of(trainer, step):
    return Path(trainer.args.output_dir, f"checkpoint-{step}")


def resume(arguments, optim, step, model=None, **options):
    """Return a new trainer that has gone on from the checkpoint of this step."""
    trainer = make_trainer(arguments, optim, model, **{**SAVED, **options})
    trainer.train(resume_from_checkpoint=str(checkpoint_of(trainer, step)))
    return trainer


def assert_same_run(a, b):
    assert_same_weights(a.model, b.model)
    assert state_of(a) == state_of(b)
    assert a.line_search.counters == b.line_search.counters


@every_optimizer
@each_model
def test_what_is_in_a_checkpoint(arguments, optim, model):
    """The files of a stock one; the optimizer's loads as plain tensors and numbers."""
    trainer = make_trainer(arguments, optim, model(), **SAVED)
    trainer.train()
    files = {"model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt"}
    files |= {"trainer_state.json", "rng_state.pth"}
    if model is Line:
        files.add("config.json")
    for step in (3, 6, 9, 12):
        folder = checkpoint_of(trainer, step)
        assert {path.name for path in folder.iterdir()} == files
        torch.load(folder / "optimizer.pt", weights_only=True)
        torch.load(folder / "scheduler.pt", weights_only=True)
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        assert state.log_history == trainer.state.log_history[:step]


@every_optimizer
@each_model
def test_resumed_in_an_epoch_and_after_one(arguments, optim, model):
    straight = make_trainer(arguments, optim, model(), **SAVED)
    straight.train()
    for step in (3, 6):  # an epoch is four
        assert_same_run(straight, resume(arguments, optim, step, model()))


@every_optimizer
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_resumed_where_the_model_draws_numbers(arguments, optim, strategy):
    """From the streams of torch, NumPy and Python, in an epoch and between two."""
    straight = make_trainer(arguments, optim, NoisyLine(), **SAVED | {"save_strategy": strategy})
    straight.train()
    step = 6 if strategy == "steps" else 4
    resumed = resume(arguments, optim, step, NoisyLine(), save_strategy=strategy)
    assert_same_run(straight, resumed)


@every_optimizer
def test_resumed_with_an_uneven_accumulation(arguments, optim):
    """Seven micro-batches an epoch: the last update has one, and the next epoch begins with two."""
    options = {
        "data": points(28),
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
    }
    straight = make_trainer(arguments, optim, **SAVED, **options)
    straight.train()
    assert straight.state.global_step == 12
    for step in (3, 9):
        assert_same_run(straight, resume(arguments, optim, step, **options))


@every_optimizer
def test_resumed_in_the_order_of_the_data(arguments, optim):
    straight = make_trainer(arguments, optim, **SAVED)
    straight.train()
    resumed = resume(arguments, optim, 6)
    assert len(straight.model.given) == 12 * 8
    assert resumed.model.given == straight.model.given[6 * 8 :]


@every_optimizer
def test_resumed_with_frozen_weights(arguments, optim):
    def frozen():
        model = Line()
        model.head.weight.requires_grad_(False)
        return model

    straight = make_trainer(arguments, optim, frozen(), **SAVED)
    straight.train()
    resumed = resume(arguments, optim, 3, frozen())
    assert_same_run(straight, resumed)
    assert not resumed.model.head.weight.requires_grad
    assert torch.equal(resumed.model.head.weight, Line().head.weight)
    assert not torch.equal(resumed.model.head.bias, Line().head.bias)


@every_optimizer
def test_resumed_from_shards(arguments, optim):
    """As a large model is saved: a file for each weight, and an index."""
    straight = make_trainer(arguments, optim, **SAVED)
    straight.train()
    folder = checkpoint_of(straight, 3)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-{i}-of-{len(tensors)}.safetensors" for i, key in enumerate(tensors, 1)}
    assert len(names) == 2
    for key, name in names.items():
        save_file({key: tensors[key]}, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_run(straight, resume(arguments, optim, 3))


def test_resumed_with_other_arguments(arguments):
    """What is logged, evaluated and saved, and how often, is no part of the trajectory.

    Which of the arguments hold then, the new ones or the checkpoint's, stock Trainer says.
    """
    others = {"logging_steps": 4, "save_steps": 5, "eval_strategy": "steps", "eval_steps": 2}

    def resumed(**settings):
        straight = make_trainer(arguments, **settings, **SAVED)
        straight.train()
        trainer = make_trainer(arguments, **settings, **SAVED | others)
        trainer.train(resume_from_checkpoint=str(checkpoint_of(straight, 3)))
        assert_same_weights(straight.model, trainer.model)
        entries = [(e["step"], "loss" in e) for e in trainer.state.log_history]
        return entries, sorted(path.name for path in Path(trainer.args.output_dir).iterdir())

    expected = resumed(optim="adamw_torch", kind=Trainer)
    for optim in OPTIMIZERS:
        assert resumed(optim=optim) == expected, optim


@every_optimizer
def test_resumed_with_another_batch_size(arguments, optim):
    """The new one holds; the step size goes on from the checkpoint's."""
    first = make_trainer(arguments, optim, per_device_train_batch_size=2, max_steps=3, **SAVED)
    first.train()
    resumed = resume(arguments, optim, 3, per_device_train_batch_size=4, max_steps=6)
    assert resumed._train_batch_size == 4
    assert len(resumed.model.given) == 3 * 4
    assert resumed.line_search.param_groups[0]["steps"] == 6
    assert resumed.line_search.counters.searches >= first.line_search.counters.searches


@every_optimizer
def test_resumed_without_skipping_data(arguments, optim):
    """`ignore_data_skip`: the epoch of the checkpoint begins again, in as many updates."""
    straight = make_trainer(arguments, optim, **SAVED)
    straight.train()
    resumed = resume(arguments, optim, 6, ignore_data_skip=True)
    assert resumed.state.global_step == resumed.line_search.param_groups[0]["steps"]
    assert resumed.model.given[: 4 * 8] == straight.model.given[4 * 8 : 8 * 8]
    assert logged(resumed)[:6] == logged(straight)[:6]
    assert logged(resumed, "salsa/searches") == sorted(logged(resumed, "salsa/searches"))


@every_optimizer
def test_resumed_from_the_weights_alone(arguments, optim):
    """`save_only_model`: as in stock Trainer the optimizer begins anew, and so does its search."""
    straight = make_trainer(arguments, optim, save_only_model=True, **SAVED)
    straight.train()
    assert not (checkpoint_of(straight, 6) / "optimizer.pt").exists()
    resumed = resume(arguments, optim, 6)
    assert resumed.state.global_step == 12
    assert resumed.line_search.param_groups[0]["steps"] == 6
    assert 0 < resumed.line_search.counters.searches <= 6
    assert all(number >= 0 for number in logged(resumed, "salsa/searches"))


@every_optimizer
def test_of_a_second_run_from_the_weights_alone(arguments, optim):
    """What the first run searched, which no process knows any more, is not subtracted."""
    twice = make_trainer(arguments, optim, save_only_model=True, **SAVED)
    twice.train()
    twice.train()
    resumed = resume(arguments, optim, 6)
    assert resumed.line_search.counters.searches > 0
    assert all(number >= 0 for number in logged(resumed, "salsa/searches"))
    assert logged(resumed, "salsa/extra_forward_share")[-1] > 0


@every_optimizer
def test_a_run_that_was_shorter_goes_on(arguments, optim):
    """Stopped after two updates of three micro-batches; then to the end of the epoch."""
    options = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}
    make_trainer(arguments, optim, max_steps=2, **{**SAVED, "save_steps": 1}, **options).train()
    resumed = resume(arguments, optim, 2, num_train_epochs=1, **options)
    assert resumed.state.global_step == 6  # 16 micro-batches
    assert resumed.state.epoch == 1.0
    assert checkpoint_of(resumed, 6).exists()


@every_optimizer
def test_resume_from_checkpoint_false_is_a_new_run(arguments, optim):
    runs = []
    for _ in range(2):  # the second finds the checkpoints of the first
        trainer = make_trainer(arguments, optim, **SAVED)
        trainer.train(resume_from_checkpoint=False)
        runs.append(trainer)
    assert_same_run(*runs)


@every_optimizer
def test_checkpoints_that_are_not_there(arguments, optim):
    trainer = make_trainer(arguments, optim)
    with pytest.raises(ValueError, match="Can't find a valid checkpoint at"):
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-7")
    os.makedirs(trainer.args.output_dir, exist_ok=True)
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        trainer.train(resume_from_checkpoint=True)


class TooLarge(TrainerCallback):
    """Memory runs out with batches of eight."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.train_batch_size >= 8:
            raise RuntimeError("CUDA out of memory.")


@every_optimizer
def test_the_batch_size_found_is_resumed_with(arguments, optim):
    options = {"auto_find_batch_size": True, "max_steps": 3, **SAVED}
    first = make_trainer(arguments, optim, callbacks=[TooLarge()], **options)
    first.train()
    found = first._train_batch_size
    assert found < 8
    resumed = make_trainer(arguments, optim, **options | {"max_steps": 6})
    assert resumed._train_batch_size == 8
    resumed.train(resume_from_checkpoint=True)
    assert resumed._train_batch_size == found
    assert resumed.state.global_step == 6


@every_optimizer
@pytest.mark.parametrize("greater", [False, True])
def test_the_best_model_is_loaded(arguments, optim, greater):
    """By the metric asked for, among all checkpoints; also after the run was resumed."""
    options = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": greater,
        **SAVED,
    }
    straight = make_trainer(arguments, optim, **options)
    straight.train()
    losses = logged(straight, "eval_loss")
    best = (max if greater else min)(losses)
    assert straight.state.best_metric == best
    assert straight.state.best_global_step == 3 * (losses.index(best) + 1)
    folder = checkpoint_of(straight, straight.state.best_global_step)
    tensors = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensors[name], value) for name, value in weights(straight.model).items())
    assert straight.evaluate()["eval_loss"] == best
    resumed = resume(arguments, optim, 6, **options)
    assert_same_weights(straight.model, resumed.model)
    assert resumed.state.best_metric == best


@every_optimizer
def test_states_of_callbacks_are_restored(arguments, optim):
    """`restore_callback_states_from_checkpoint` makes new ones: the trace of the searches, too."""
    options = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
        "restore_callback_states_from_checkpoint": True,
        **SAVED,
    }
    patient = EarlyStoppingCallback(early_stopping_patience=9, early_stopping_threshold=0.2)
    straight = make_trainer(arguments, optim, callbacks=[patient], **options)
    straight.train()
    resumed = resume(arguments, optim, 6, callbacks=[EarlyStoppingCallback()], **options)
    callbacks = resumed.callback_handler.callbacks
    (stopping,) = [c for c in callbacks if isinstance(c, EarlyStoppingCallback)]
    assert (stopping.early_stopping_patience, stopping.early_stopping_threshold) == (9, 0.2)
    assert sum(isinstance(c, RunTrace) for c in callbacks) == 1
    assert resumed.run_trace.points == straight.run_trace.points
    assert logged(resumed, "salsa/searches") == logged(straight, "salsa/searches")
    assert_same_weights(straight.model, resumed.model)


class AsksToSave(TrainerCallback):
    """As `SIGTERM` does a few seconds later: the coming end of a step saves and stops."""

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 5:
            self.just_in_time.jit_manager.is_checkpoint_requested = True


@every_optimizer
def test_a_checkpoint_just_in_time(arguments, optim):
    straight = make_trainer(arguments, optim, **SAVED)
    straight.train()
    shutil.rmtree(straight.args.output_dir)
    asks = AsksToSave()
    stopped = make_trainer(
        arguments, optim, callbacks=[asks], enable_jit_checkpoint=True, **SAVED | {"save_steps": 9}
    )
    callbacks = stopped.callback_handler.callbacks
    (asks.just_in_time,) = [c for c in callbacks if isinstance(c, JITCheckpointCallback)]
    stopped.train()
    assert stopped.state.global_step == 6
    resumed = resume(arguments, optim, 6)
    assert_same_weights(straight.model, resumed.model)
    assert resumed.line_search.counters == straight.line_search.counters


def test_a_checkpoint_of_stock_trainer_is_gone_on_with(arguments):
    """With a stock optimizer, as stock Trainer would; and its own checkpoints after it."""
    ends = []
    for kind in (Trainer, None):
        make_trainer(arguments, "adamw_torch", kind=Trainer, max_steps=3, **SAVED).train()
        options = {"kind": kind} if kind else {}
        resumed = resume(arguments, "adamw_torch", 3, **options)
        assert checkpoint_of(resumed, 6).exists()
        ends.append(resume(arguments, "adamw_torch", 6, **options).model)
    assert_same_weights(*ends)
