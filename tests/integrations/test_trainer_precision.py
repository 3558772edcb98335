"""Gradient scalers, clipping and weights of low precision (13, 14)."""

import pytest
import torch
from trainer_problems import assert_same_weights, weights
from transformers import TrainerCallback

from hf_salsa import SaLSaTrainer


class Scaled(SaLSaTrainer):
    """Training with a gradient scaler, as fp16 has it, without a device that has fp16."""

    init_scale = 2.0**10

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=self.init_scale, growth_interval=1000
        )
        self.accelerator.unscale_gradients = self.unscale_gradients

    def unscale_gradients(self, optimizer=None):
        """What Accelerate does with fp16 only, before it clips."""
        self.accelerator.scaler.unscale_(self.line_search)


@pytest.mark.slow
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
@pytest.mark.parametrize("optim", ["salsa_adam", "salsa_adam_plus"])
def test_a_gradient_scaler_is_seen_through(arguments, bert, sentences, optim, max_grad_norm):
    """The search sees unscaled gradients: the trajectory is that without a scaler (13)."""
    models = []
    for cls in (SaLSaTrainer, Scaled):
        model = bert()
        args = arguments(optim=optim, max_grad_norm=max_grad_norm)
        cls(model, args, train_dataset=sentences).train()
        models.append(model)
    assert_same_weights(*models)  # scaling by a power of two is exact


@pytest.mark.slow
def test_a_step_that_the_scaler_skips_changes_nothing(arguments, bert, sentences):
    seen = []

    class Collect(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            inner = trainer.line_search
            group = {k: v for k, v in inner.param_groups[0].items() if k != "params"}
            seen.append((optimizer.step_was_skipped, weights(model), group))

    model = bert()
    model.classifier.weight.register_hook(
        lambda grad: grad * torch.inf if len(seen) in (3, 4) else grad
    )
    args = arguments(optim="salsa_adam", max_steps=8)
    trainer = Scaled(model, args, train_dataset=sentences, callbacks=[Collect()])
    trainer.train()
    assert [skipped for skipped, _, _ in seen] == [False] * 3 + [True] * 2 + [False] * 3
    _, values, group = seen[2]
    for _, skipped_values, skipped_group in seen[3:5]:
        assert all(torch.equal(value, values[name]) for name, value in skipped_values.items())
        counted = {"steps", "skipped_steps", "consecutive_skips"}
        assert all(skipped_group[key] == group[key] for key in set(group) - counted)
    optimizer = trainer.line_search
    assert optimizer.counters.skipped_steps == 2
    assert optimizer.counters.searches == 6


@pytest.mark.slow
def test_gradient_clipping_keeps_the_true_slope(arguments, bert, sentences):
    """The first search's slope is <g, -d>: with SGD, clipped by kappa, kappa ||g||^2 (14)."""
    slopes = {}
    for max_grad_norm in (0.0, 0.1):
        args = arguments(
            optim="salsa_sgd", max_grad_norm=max_grad_norm, max_steps=1, logging_steps=1
        )
        trainer = SaLSaTrainer(bert(), args, train_dataset=sentences)
        trainer.train()
        line = trainer.state.log_history[0]
        slopes[max_grad_norm] = (line["salsa/slope"], line["grad_norm"])
    slope, norm = slopes[0.0]
    assert slope == pytest.approx(norm**2, rel=1e-4)
    assert slopes[0.1][0] == pytest.approx(0.1 * norm, rel=1e-4)


@pytest.mark.slow
def test_low_precision_weights_are_warned_of(arguments, bert, sentences):
    with pytest.warns(UserWarning, match="Trainable parameters are bfloat16.*bf16=True"):
        SaLSaTrainer(bert().bfloat16(), arguments(), train_dataset=sentences).train()
