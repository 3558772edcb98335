"""`salsa_go_back`: a run that breaks down goes back to good weights; log, card and checkpoints."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from trainer_problems import WithBatchNorm, assert_same_weights
from transformers import TrainerCallback, set_seed

from hf_salsa import SaLSaTrainer

BROKEN_AT = 24


class Lengthen(TrainerCallback):
    """Makes the steps after one update far too long: what no search would do."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == BROKEN_AT:
            line_search = self.trainer.line_search
            state, run = line_search._read()
            line_search._write(replace(state, step_size=1e5 * state.step_size), run)


def trained(arguments, data, checkpoint=None, **overrides):
    settings = {"optim": "salsa_adam_plus", "max_steps": 60, "salsa_go_back": True}
    args = arguments(**{**settings, "logging_steps": 1, **overrides})
    set_seed(0)
    callback = Lengthen()
    trainer = SaLSaTrainer(WithBatchNorm(), args, train_dataset=data, callbacks=[callback])
    callback.trainer = trainer
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def returns(trainer):
    entries = [e for e in trainer.state.log_history if "salsa/returns" in e]
    return [entry["salsa/returns"] for entry in entries]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_broken_run_goes_back_and_says_so(arguments, sentences):
    alone = trained(arguments, sentences, salsa_go_back=False)
    trainer = trained(arguments, sentences)
    assert not returns(alone)
    assert returns(trainer)[BROKEN_AT - 1] == 0
    assert returns(trainer)[-1] == trainer.state.log_history[-1]["salsa/returns"] == 1
    assert losses(trainer)[:BROKEN_AT] == losses(alone)[:BROKEN_AT]
    assert max(losses(trainer)[-10:]) < 2 < max(losses(alone)[-10:])
    trainer.create_model_card()
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert "Training broke down once, and went back to the weights of its lowest" in card
    alone.create_model_card()
    assert "went back" not in Path(alone.args.output_dir, "README.md").read_text()


@pytest.mark.parametrize("stop", [20, BROKEN_AT, 30, 50])
def test_a_resumed_run_goes_back_as_the_straight_one(arguments, sentences, stop):
    saved = {"save_strategy": "steps", "save_steps": stop}
    straight = trained(arguments, sentences, **saved)
    checkpoint = os.path.join(straight.args.output_dir, f"checkpoint-{stop}")
    resumed = trained(arguments, sentences, checkpoint, **saved)
    assert_same_weights(straight.model, resumed.model)
    assert losses(straight) == losses(resumed)
    assert returns(straight) == returns(resumed)
    assert returns(straight)[-1] >= 1


def test_a_checkpoint_without_good_weights_begins_to_keep_them(arguments, sentences):
    saved = {"save_strategy": "steps", "save_steps": 10}
    first = trained(arguments, sentences, salsa_go_back=False, **saved)
    checkpoint = Path(first.args.output_dir, "checkpoint-10")
    assert not list(checkpoint.glob("salsa_good*"))
    resumed = trained(arguments, sentences, str(checkpoint), **saved)
    assert returns(resumed)[-1] == 1


def test_a_second_run_of_a_trainer_keeps_its_own(arguments, sentences):
    trainer = trained(arguments, sentences)
    trainer.train()
    assert returns(trainer)[0] == 0  # of this run
    assert trainer._watch.good_weights is None  # its memory is free


def test_good_weights_of_an_earlier_run_in_the_folder_are_gone(arguments, sentences):
    saved = {"save_strategy": "steps", "save_steps": 20, "max_steps": 20}
    file = Path(trained(arguments, sentences, **saved).args.output_dir, "checkpoint-20")
    file = file / "salsa_good_weights.pt"
    assert file.is_file()
    trained(arguments, sentences, salsa_go_back=False, **saved)
    assert not file.exists()


@pytest.mark.parametrize("broken_at", [14, 41])
def test_an_incomplete_update_does_not_make_broken_weights_good(
    arguments, sentences, broken_at, monkeypatch
):
    """The last update of an epoch has fewer micro-batches."""
    monkeypatch.setattr(sys.modules[__name__], "BROKEN_AT", broken_at)
    batches = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 8}
    trainer = trained(arguments, sentences, max_steps=90, **batches)
    assert 1 <= returns(trainer)[-1] <= 3
    assert max(losses(trainer)[-10:]) < 2


@pytest.mark.parametrize("optim", ["salsa_adam", "sls_sgd", "adamw_torch"])
def test_optimizers_that_know_no_range_of_the_loss_are_refused(arguments, optim):
    match = f"salsa_go_back=True is not allowed with optim='{optim}'.*salsa_adam_plus"
    with pytest.raises(ValueError, match=match):
        arguments(optim=optim, salsa_go_back=True)
