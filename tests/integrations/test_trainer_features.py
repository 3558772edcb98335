"""What users do with Trainer works with a line search."""

import math

import pytest
import torch
from torch._dynamo.utils import counters
from trainer_problems import Endless, Recording
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    set_seed,
)

from hf_salsa import SaLSaSeq2SeqTrainer, SaLSaSeq2SeqTrainingArguments, SaLSaTrainer


@pytest.mark.slow
def test_learns(arguments, bert, sentences):
    args = arguments(num_train_epochs=30, max_steps=-1, eval_strategy="epoch")
    trainer = SaLSaTrainer(
        bert(dropout=0.0),
        args,
        train_dataset=sentences,
        eval_dataset=sentences,
        compute_metrics=lambda p: {"accuracy": float((p[0].argmax(-1) == p[1]).mean())},
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_accuracy"] > 0.95


@pytest.mark.slow
def test_second_train_goes_on(arguments, bert, sentences):
    trainer = SaLSaTrainer(bert(), arguments(optim="salsa_adam"), train_dataset=sentences)
    trainer.train()
    first = trainer.line_search
    trainer.train()
    assert trainer.line_search is first
    assert first.counters.searches == 12


@pytest.mark.slow
def test_load_best_model_and_early_stopping(arguments, bert, sentences):
    args = arguments(
        max_steps=12,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        save_total_limit=1,
    )
    trainer = SaLSaTrainer(
        bert(),
        args,
        train_dataset=sentences,
        eval_dataset=sentences[:16],
        callbacks=[EarlyStoppingCallback(early_stopping_patience=4)],
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)


@pytest.mark.slow
def test_auto_find_batch_size(arguments, bert, sentences):
    class TooLarge(bert().__class__):
        def forward(self, input_ids, labels=None, **kwargs):
            if input_ids.shape[0] > 4 and not torch.is_grad_enabled():  # in a trial
                raise RuntimeError("CUDA out of memory.")
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)

    model = TooLarge(bert().config)
    model.load_state_dict(bert().state_dict())
    trainer = SaLSaTrainer(model, arguments(auto_find_batch_size=True), train_dataset=sentences)
    trainer.train()
    assert trainer._train_batch_size == 4
    assert trainer.state.global_step == 6


def test_iterable_dataset(arguments, bert, sentences):
    args = arguments(optim="salsa_adam")
    trainer = SaLSaTrainer(bert(), args, train_dataset=Endless(sentences))
    assert trainer.train().metrics["salsa/searches"] == 6


@pytest.mark.slow
def test_hyperparameter_search(arguments, bert, sentences):
    pytest.importorskip("optuna")
    tried = []

    def space(trial):
        tried.append(trial.suggest_categorical("salsa_cool_down", [0.3, 0.5]))
        return {"salsa_cool_down": tried[-1]}

    used = []

    class Collect(TrainerCallback):
        def on_train_end(self, args, state, control, optimizer=None, **kwargs):
            used.append(trainer.line_search.param_groups[0]["cool_down"])

    trainer = SaLSaTrainer(
        args=arguments(eval_strategy="steps", eval_steps=3),
        train_dataset=sentences,
        eval_dataset=sentences[:16],
        model_init=lambda: bert(),
        callbacks=[Collect()],
    )
    best = trainer.hyperparameter_search(space, n_trials=3, backend="optuna")
    assert used == tried
    assert math.isfinite(best.objective)


@pytest.mark.slow
def test_torch_compile(arguments, gpt2, texts):
    """Inductor draws other dropout masks with and without gradients; without dropout: exact."""
    args = arguments(optim="salsa_adam", torch_compile=True, max_steps=3)
    trainer = Recording(gpt2(dropout=0.0), args, train_dataset=texts)
    metrics = trainer.train().metrics
    assert metrics["salsa/searches"] == 3
    assert not trainer.line_search.param_groups[0]["reevaluate_loss"]


@pytest.mark.slow
def test_torch_compile_adds_one_graph_for_the_trials(arguments, gpt2, texts):
    """The forward pass without gradients is compiled once, however many trials there are."""
    graphs = {}
    for optim, steps in (("adamw_torch", 4), ("salsa_adam", 1), ("salsa_adam", 4)):
        torch._dynamo.reset()
        counters.clear()
        args = arguments(
            optim=optim, torch_compile=True, torch_compile_backend="aot_eager", max_steps=steps
        )
        trainer = SaLSaTrainer(gpt2(dropout=0.0), args, train_dataset=texts)
        trials = trainer.train().metrics.get("salsa/trials")
        graphs[optim, steps] = counters["stats"]["unique_graphs"]
    assert trials > 4
    assert graphs["salsa_adam", 1] == graphs["salsa_adam", 4] == 2 * graphs["adamw_torch", 4]


@pytest.mark.slow
def test_seq2seq(arguments):
    set_seed(0)
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    rows = torch.randint(1, 64, (32, 6))
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = arguments(SaLSaSeq2SeqTrainingArguments, optim="salsa_adam", predict_with_generate=True)
    trainer = SaLSaSeq2SeqTrainer(
        T5ForConditionalGeneration(config), args, train_dataset=data, eval_dataset=data[:8]
    )
    assert isinstance(trainer, Seq2SeqTrainer)
    assert trainer.train().metrics["salsa/searches"] == 6
    assert math.isfinite(trainer.evaluate()["eval_loss"])
