"""Checkpoints: a resumed run equals the uninterrupted one (8, 15)."""

import itertools
import os

import pytest
import torch
from torch import nn
from trainer_problems import assert_same_weights, weights
from transformers import TrainerCallback

from hf_salsa import OPTIMIZERS, SaLSaTrainer


@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_resumed_run_equals_the_straight_run(request, arguments, sentences, texts, model, optim):
    data = {"bert": sentences, "gpt2": texts}[model]
    make = request.getfixturevalue(model)
    args = arguments(
        optim=optim,
        bf16=True,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        weight_decay=0.01,
        max_steps=14,
        save_strategy="steps",
        save_steps=5,
        logging_steps=1,
        salsa_cool_down=0.8,
    )
    straight = SaLSaTrainer(make(), args, train_dataset=data)
    straight.train()
    resumed = SaLSaTrainer(make(), args, train_dataset=data)
    resumed.train(resume_from_checkpoint=os.path.join(args.output_dir, "checkpoint-5"))
    assert_same_weights(straight.model, resumed.model)
    a, b = (t.line_search for t in (straight, resumed))
    assert a.counters == b.counters
    strip = {"params"}
    assert [{k: v for k, v in g.items() if k not in strip} for g in a.param_groups] == [
        {k: v for k, v in g.items() if k not in strip} for g in b.param_groups
    ]
    keys = ("loss", "learning_rate", "salsa/searches", "salsa/trials", "salsa/decrease")
    logs = [
        [[entry.get(key) for key in keys] for entry in t.state.log_history if "loss" in entry]
        for t in (straight, resumed)
    ]
    assert logs[0] == logs[1]


class InterruptedModel(nn.Module):
    """Raises KeyboardInterrupt in the middle of a trial."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        # An iterator: an evaluation puts back numbers, not where an iterator is.
        self.trials_left = itertools.repeat(True)

    def forward(self, input_ids, labels):
        if not torch.is_grad_enabled() and not next(self.trials_left, False):
            raise KeyboardInterrupt
        return self.model(input_ids=input_ids, labels=labels)


def test_ctrl_c_inside_a_search_loses_nothing(arguments, bert, sentences):
    args = arguments(
        max_steps=12, save_strategy="steps", save_steps=4, logging_steps=1, optim="sls_adam"
    )
    straight = SaLSaTrainer(InterruptedModel(bert()), args, train_dataset=sentences)
    straight.train()
    counts = [e["salsa/trials"] for e in straight.state.log_history if "loss" in e]
    model = InterruptedModel(bert())
    model.trials_left = itertools.repeat(True, counts[6])  # in the search of the eighth step
    interrupted = SaLSaTrainer(model, args, train_dataset=sentences)
    states = []

    class Snapshot(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            states.append(weights(model))

    interrupted.add_callback(Snapshot())
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert interrupted.state.global_step == 7
    now = weights(model)
    assert all(torch.equal(now[name], value) for name, value in states[-1].items())
    resumed = SaLSaTrainer(InterruptedModel(bert()), args, train_dataset=sentences)
    resumed.train(resume_from_checkpoint=os.path.join(args.output_dir, "checkpoint-4"))
    assert_same_weights(straight.model, resumed.model)


def test_checkpoint_of_another_optimizer_is_refused(arguments, bert, sentences):
    args = arguments(optim="adamw_torch", save_strategy="steps", save_steps=3)
    SaLSaTrainer(bert(), args, train_dataset=sentences).train()
    trainer = SaLSaTrainer(bert(), arguments(), train_dataset=sentences)
    with pytest.raises(ValueError, match="was not written by SaLSaAdamPlus"):
        trainer.train(resume_from_checkpoint=os.path.join(args.output_dir, "checkpoint-3"))
