"""What the log and the final metrics show, and what is ignored by name (18)."""

import copy
import json

import pytest
import torch
from torch import nn
from trainer_problems import WithBatchNorm
from transformers import TrainerCallback, set_seed

from hf_salsa import OPTIMIZERS, SaLSaAdam, SaLSaSGD, SaLSaTrainer
from hf_salsa.trainer import StepSizeReadout


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_log_shows_the_step_size_applied(arguments, bert, sentences, optim):
    applied, searches = [], []

    class Collect(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            applied.append(trainer.line_search.step_size)
            searches.append(trainer.line_search.counters.searches)

    # Without a tail a step size stays between two searches: then the median is exact.
    args = arguments(optim=optim, logging_steps=1, salsa_cool_down=0.0)
    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences, callbacks=[Collect()])
    metrics = trainer.train().metrics
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in lines] == applied
    assert len(set(applied)) > 1
    for key in ("searches", "trials", "interval", "decrease", "slope"):
        assert f"salsa/{key}" in lines[0]
    assert [entry["salsa/searches"] for entry in lines] == searches
    assert searches[:2] == [1, 2]
    counters = trainer.line_search.counters
    assert metrics["salsa/searches"] == counters.searches == searches[-1]
    assert metrics["salsa/trials"] == counters.trials
    assert metrics["salsa/extra_forward_share"] == counters.trials / (counters.trials + 6)
    assert metrics["salsa/failed_searches"] == metrics["salsa/skipped_steps"] == 0
    assert metrics["salsa/final_step_size"] == applied[-1]
    assert metrics["salsa/median_step_size"] == sorted(applied)[2]  # of an even number the lower
    assert trainer.state.log_history[-1]["salsa/trials"] == counters.trials
    json.dumps(metrics)


def test_extra_forward_passes_are_counted(arguments, sentences):
    set_seed(0)
    model = WithBatchNorm()
    calls = {True: 0, False: 0}
    model.register_forward_pre_hook(
        lambda *_: calls.__setitem__(torch.is_grad_enabled(), calls[torch.is_grad_enabled()] + 1)
    )
    args = arguments(gradient_accumulation_steps=2, per_device_train_batch_size=4)
    metrics = SaLSaTrainer(model, args, train_dataset=sentences).train().metrics
    assert calls[True] == 12
    assert calls[False] == 2 * metrics["salsa/trials"]
    assert metrics["salsa/extra_forward_share"] == calls[False] / sum(calls.values())


@pytest.mark.slow
def test_settings_without_meaning_are_named_once(arguments, bert, sentences):
    args = arguments(learning_rate=2e-5, warmup_steps=0.1, lr_scheduler_type="cosine")
    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences)
    with pytest.warns(UserWarning, match="Ignored with SaLSaAdam") as caught:
        trainer.train()
    messages = [str(w.message) for w in caught if "Ignored" in str(w.message)]
    assert len(messages) == 1
    for name in ("learning_rate=2e-05", "warmup_steps=0.1", "lr_scheduler_type=cosine"):
        assert name in messages[0]
    assert isinstance(trainer.lr_scheduler, StepSizeReadout)


def test_own_scheduler_is_replaced_and_named(arguments, bert, sentences):
    model = bert()
    optimizer = SaLSaAdam(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0.0  # a warm-up starts at nothing
    trainer = SaLSaTrainer(
        model, arguments(), train_dataset=sentences, optimizers=(optimizer, scheduler)
    )
    with pytest.warns(UserWarning, match="the scheduler LambdaLR"):
        trainer.train()
    assert optimizer.counters.searches == 6


def test_readout_only_reads():
    weight = nn.Parameter(torch.ones(2))
    optimizer = SaLSaSGD([weight])
    readout = StepSizeReadout(optimizer)
    assert set(optimizer.param_groups[0]) == set(SaLSaSGD([weight]).param_groups[0])
    for _ in range(3):
        weight.grad = 2 * weight.detach()
        optimizer.step(lambda: weight.square().sum())
        before = copy.deepcopy(optimizer.param_groups[0])
        readout.step()
        assert str(optimizer.param_groups[0]) == str(before)
        assert readout.get_last_lr() == [optimizer.step_size]
