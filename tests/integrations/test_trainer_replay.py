"""The loss that is tested is the loss that is differentiated, and leaves no trace (6, 7)."""

import warnings

import pytest
import torch
from torch import nn
from trainer_problems import CheckReplay, Recording, WithBatchNorm
from transformers import Trainer, set_seed

from hf_salsa import BatchObjective, SaLSaSGD, SaLSaTrainer, SaLSaTrainerMixin


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("bert", {}),
        ("bert", {"gradient_accumulation_steps": 3}),
        ("bert", {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}),
        ("bert", {"bf16": True}),
        ("bert", {"gradient_checkpointing": True}),
        ("gpt2", {}),
        ("gpt2", {"gradient_accumulation_steps": 2}),
        ("gpt2", {"gradient_accumulation_steps": 2, "bf16": True}),
        ("gpt2", {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2}),
        ("gpt2", {"label_smoothing_factor": 0.1}),
        ("gpt2", {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
        ("gpt2", {"neftune_noise_alpha": 5.0}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
def test_replay_is_exact(request, arguments, sentences, texts, model, options):
    data = {"bert": sentences, "gpt2": texts}[model]
    args = arguments(**options, optim="salsa_adam", per_device_train_batch_size=4)
    trainer = Recording(request.getfixturevalue(model)(), args, train_dataset=data)
    check = CheckReplay(trainer)
    trainer.add_callback(check)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Evaluating the objective again")
        trainer.train()
    assert check.checked == 6


class OwnObjective(BatchObjective):
    """Somebody's own, from outside of the package."""


@pytest.mark.parametrize("objective", [BatchObjective, OwnObjective])
def test_trials_are_forward_passes_only(arguments, bert, sentences, monkeypatch, objective):
    """Each micro-batch is differentiated once, and no trial builds a graph."""
    monkeypatch.setattr("hf_salsa.trainer.BatchObjective", objective)
    args = arguments(
        optim="salsa_adam", gradient_accumulation_steps=2, per_device_train_batch_size=4
    )
    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences)
    forward, backward, in_trial = [], [], []
    trainer.model.register_forward_hook(lambda *_: forward.append(torch.is_grad_enabled()))
    trainer.model.register_forward_hook(lambda *_: in_trial.append(trainer.in_trial))
    next(trainer.model.parameters()).register_hook(backward.append)
    trainer.train()
    assert type(trainer._objective) is objective
    assert trainer.line_search.counters.searches == 6
    assert len(backward) == 6 * 2
    assert forward.count(True) == 6 * 2
    assert forward.count(False) == 2 * trainer.line_search.counters.trials
    assert in_trial == [not with_graph for with_graph in forward]


def test_replay_is_exact_with_compute_loss_func(arguments, bert, sentences):
    def compute_loss(outputs, labels, num_items_in_batch=None):
        loss = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
        return loss / num_items_in_batch

    args = arguments(
        optim="salsa_adam", gradient_accumulation_steps=2, per_device_train_batch_size=4
    )
    trainer = Recording(bert(), args, train_dataset=sentences, compute_loss_func=compute_loss)
    check = CheckReplay(trainer)
    trainer.add_callback(check)
    trainer.train()
    assert check.checked == 6


def test_searching_draws_the_same_data_and_masks(arguments, sentences):
    """A run that searches at every step sees what a run that hardly searches sees (7)."""
    runs = []
    for interval in (1, 10):
        set_seed(0)
        model = WithBatchNorm()
        optimizer = SaLSaSGD(model.parameters(), initial_step_size=1e-4, steps_to_double=1e9)
        for group in optimizer.param_groups:
            group["search_interval"] = interval
            group["max_search_interval"] = interval
            # As after a long run at rest: L_k stays where it is.
            group["searches"] = 1
            group["step_size_average_fast"] = group["step_size_average_slow"] = 1e-4
        trainer = SaLSaTrainer(
            model,
            arguments(max_steps=20),
            train_dataset=sentences,
            optimizers=(optimizer, None),
        )
        trainer.train()
        runs.append((optimizer.counters.searches, model))
    assert [searches for searches, _ in runs] == [1 + 20, 1 + 2]
    assert runs[0][1].drawn == runs[1][1].drawn
    for name, buffer in runs[0][1].named_buffers():
        torch.testing.assert_close(buffer, dict(runs[1][1].named_buffers())[name])
    assert int(runs[0][1].body[1].num_batches_tracked) == 20


def test_mixin_on_a_trainer_with_its_own_loss(arguments, bert, sentences):
    class Doubled(Trainer):
        losses = 0

        def compute_loss(self, model, inputs, **kwargs):
            self.losses += 1
            inputs.pop("labels")  # as sentence-transformers and TRL do
            return model(**inputs).logits.square().mean()

    class SaLSaDoubled(SaLSaTrainerMixin, Doubled):
        pass

    trainer = SaLSaDoubled(bert(), arguments(), train_dataset=sentences)
    trainer.train()
    assert trainer.losses == 6  # as without a search


def test_plain_module_with_tuple_outputs(arguments, sentences):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 2)

        def forward(self, input_ids, labels):
            logits = self.head(input_ids.float() / 64)
            return nn.functional.cross_entropy(logits, labels), logits

    set_seed(0)
    args = arguments(gradient_accumulation_steps=2)
    assert SaLSaTrainer(Plain(), args, train_dataset=sentences).train().training_loss > 0
