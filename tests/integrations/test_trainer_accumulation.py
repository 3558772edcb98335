"""Equivalent ways to train give one trajectory (11, 20)."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from trainer_problems import Endless, assert_same_weights, weights
from transformers import Trainer, set_seed

from hf_salsa import BatchObjective, SaLSaAdam, SaLSaTrainer


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["salsa_adam", "salsa_sgd", "salsa_adam_plus", "salsa_sgd_plus"])
def test_accumulation_gives_the_same_trajectory(arguments, gpt2, texts, optim):
    """Of a model whose stock loss is the same however a batch is cut."""
    runs = []
    for accumulation in (1, 2, 8):
        net = gpt2(dropout=0.0)
        args = arguments(
            optim=optim,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation,
            logging_steps=1,
            max_steps=10,
        )
        trainer = SaLSaTrainer(net, args, train_dataset=texts)
        trainer.train()
        sizes = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((sizes, losses, weights(net)))
    for sizes, losses, net in runs[1:]:
        assert sizes == pytest.approx(runs[0][0], rel=1e-4)
        assert losses == pytest.approx(runs[0][1], rel=1e-4)
        for name, expected in runs[0][2].items():
            torch.testing.assert_close(net[name], expected, rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_the_loss_is_that_of_a_stock_run(arguments, bert, sentences, accumulation):
    """Stock Trainer adds up what BERT's classification returns: so do the log and the search."""
    logged = []
    for cls, optim in ((Trainer, "adamw_torch"), (SaLSaTrainer, "salsa_adam")):
        args = arguments(
            optim=optim,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation,
            logging_steps=1,
            max_steps=1,
        )
        trainer = cls(bert(), args, train_dataset=sentences)
        trainer.train()
        logged.append(trainer.state.log_history[0]["loss"])
    assert logged[0] == logged[1]
    assert trainer.line_search.last_search.loss == pytest.approx(logged[1], abs=1e-4)


@pytest.mark.slow
def test_a_search_does_not_depend_on_the_scale_of_the_loss(arguments, bert, sentences):
    """Cut into 8, BERT's loss is 8 times as large (11): Adam takes the same steps up to eps."""
    sizes = []
    for accumulation in (1, 8):
        args = arguments(
            optim="salsa_adam",
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation,
            logging_steps=1,
        )
        trainer = SaLSaTrainer(bert(dropout=0.0), args, train_dataset=sentences)
        trainer.train()
        entries = trainer.state.log_history
        sizes.append([entry["learning_rate"] for entry in entries if "loss" in entry])
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-2)


def test_plain_loop_accelerate_loop_and_trainer_agree(arguments, bert, sentences):
    """Three ways to write the same training, dropout on: one trajectory, bit for bit (19)."""

    def loss_fn(batch):
        return model(**batch).loss

    models, sizes = [], []
    for kind in ("plain", "accelerate", "trainer"):
        model = bert()
        optimizer = SaLSaAdam(model.parameters())
        if kind == "trainer":
            set_seed(7)
            trainer = SaLSaTrainer(
                model,
                arguments(seed=7),
                train_dataset=Endless(sentences[:48]),
                optimizers=(optimizer, None),
            )
            trainer.train()
        else:
            prepared = optimizer
            accelerator = None
            if kind == "accelerate":
                accelerator = Accelerator(cpu=True)
                model, prepared = accelerator.prepare(model, optimizer)
            objective = BatchObjective(model, prepared)
            set_seed(7)
            for batch in DataLoader(Endless(sentences[:48]), batch_size=8):
                loss = objective.record(loss_fn, batch)
                if accelerator is None:
                    loss.backward()
                else:
                    accelerator.backward(loss)
                prepared.step()
                prepared.zero_grad()
        assert optimizer.counters.searches == 6
        models.append(model)
        sizes.append(optimizer.step_size)
    assert sizes[0] == sizes[1] == sizes[2]
    assert_same_weights(models[0], models[1])
    assert_same_weights(models[0], models[2])


def test_accelerate_accumulates(bert, sentences):
    """`accelerator.accumulate` with 2 x 4 is 1 x 8."""
    ends = []
    for accumulation in (1, 2):
        model = bert(dropout=0.0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        loader = DataLoader(sentences, batch_size=8 // accumulation)
        optimizer = SaLSaAdam(model.parameters())
        model, prepared, loader = accelerator.prepare(model, optimizer, loader)
        objective = BatchObjective(model, prepared)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = objective.record(lambda batch, model=model: model(**batch).loss, batch)
                accelerator.backward(loss)
                prepared.step()
                prepared.zero_grad()
        assert optimizer.counters.searches == 8
        ends.append((optimizer.step_size, weights(model)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    for name, value in ends[0][1].items():
        torch.testing.assert_close(value, ends[1][1][name], rtol=0, atol=1e-3)
