"""The trainer tells the optimizer how long a run is, for the cool-down at its end."""

import copy
import os

import pytest
from trainer_problems import assert_same_weights
from transformers import TrainerCallback, set_seed

from hf_salsa import SaLSaTrainer


def applied(trainer):
    """The step size of each update, as it is logged."""
    return [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]


class Factors(TrainerCallback):
    """Collects by which factor the step size found was applied, in each run."""

    def __init__(self):
        self.runs = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.runs.append([])

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        line_search = optimizer.optimizer
        self.runs[-1].append(line_search.step_size / line_search.param_groups[0]["step_size"])


@pytest.mark.slow
def test_the_trainer_knows_when_to_cool_down(arguments, bert, sentences):
    """At the end of each run, of a second one too."""
    args = arguments(salsa_cool_down=0.5, logging_steps=1, gradient_accumulation_steps=2)
    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences)
    for _ in range(2):
        trainer.train()
        line_search = trainer.line_search
        lines = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(lines) == 6
        found = line_search.param_groups[0]["step_size"]
        assert lines[-1]["learning_rate"] == line_search.step_size == pytest.approx(found / 3)


@pytest.mark.slow
@pytest.mark.parametrize("second_steps", [4, 6, 10])
def test_a_second_run_has_a_cool_down_of_its_own(arguments, bert, sentences, second_steps):
    args = arguments(salsa_cool_down=0.5, logging_steps=1)
    factors = Factors()
    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences, callbacks=[factors])
    trainer.train()
    args.max_steps = second_steps
    trainer.train()
    for run, steps in zip(factors.runs, (6, second_steps), strict=True):
        falling = [min(1.0, (steps - k) / (0.5 * steps)) for k in range(steps)]
        assert run == pytest.approx(falling, rel=1e-12)


@pytest.mark.slow
def test_a_second_run_is_that_of_a_fresh_plan(arguments, bert, sentences):
    """As a new trainer's that goes on with the weights and the optimizer's state of the first."""
    args = arguments(salsa_cool_down=0.5, logging_steps=1)
    first = SaLSaTrainer(bert(), args, train_dataset=sentences)
    first.train()
    args.max_steps = 10
    fresh = SaLSaTrainer(copy.deepcopy(first.model), args, train_dataset=sentences)
    fresh.create_optimizer().load_state_dict(copy.deepcopy(first.line_search.state_dict()))
    for trainer in (first, fresh):
        set_seed(3)
        trainer.train()
    assert len(applied(first)) == 10
    assert applied(first) == applied(fresh)
    assert_same_weights(first.model, fresh.model)


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "others"), [(1, 3), (3, 1)], ids=["longer", "shorter"])
@pytest.mark.parametrize("optim", ["salsa_adam", "salsa_adam_plus"])
def test_resuming_with_other_epochs_plans_anew(arguments, bert, sentences, optim, epochs, others):
    """The cool-down is that of the new length, as if it had been known from the start.

    At the checkpoint, after four of eight updates an epoch, neither has begun to cool down.
    """

    def trainer_for(length):
        args = arguments(
            optim=optim,
            salsa_cool_down=0.5,
            num_train_epochs=length,
            max_steps=-1,
            logging_steps=1,
            save_strategy="steps",
            save_steps=4,
        )
        return SaLSaTrainer(bert(), args, train_dataset=sentences)

    straight = trainer_for(others)
    straight.train()
    assert len(applied(straight)) == 8 * others
    trainer_for(epochs).train()  # overwrites the checkpoints
    resumed = trainer_for(others)
    checkpoint = os.path.join(resumed.args.output_dir, "checkpoint-4")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert applied(resumed) == applied(straight)
    assert resumed.line_search.counters == straight.line_search.counters
    assert_same_weights(resumed.model, straight.model)
