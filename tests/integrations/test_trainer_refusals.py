"""What is refused, by name and with the alternative (5, 12, 19)."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from trainer_problems import WithBatchNorm, weights
from transformers import Trainer

from hf_salsa import SaLSaTrainer, SaLSaTrainerMixin


def test_empty_dataset_is_refused(arguments, bert):
    with pytest.raises(
        ValueError, match="salsa_adam_plus does not work with an empty train_dataset"
    ):
        SaLSaTrainer(bert(), arguments(), train_dataset=[])


def test_online_trainers_are_refused_by_name(arguments, bert, sentences):
    class GRPOTrainer(Trainer):
        pass

    class SaLSaGRPOTrainer(SaLSaTrainerMixin, GRPOTrainer):
        pass

    with pytest.raises(ValueError, match="GRPOTrainer: it generates new data"):
        SaLSaGRPOTrainer(bert(), arguments(), train_dataset=sentences)
    SaLSaGRPOTrainer(bert(), arguments(optim="adamw_torch"), train_dataset=sentences)


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP version 1")],
)
def test_set_ups_that_come_out_wrong_are_refused(arguments, bert, sentences, attribute, reason):
    class Launched(Trainer):
        """As `accelerate launch` with a configuration of its own would make it."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            setattr(self, attribute, True)
            self.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)

    class SaLSaLaunched(SaLSaTrainerMixin, Launched):
        pass

    with pytest.raises(ValueError, match=f"does not work with {reason}.*FSDP2"):
        SaLSaLaunched(bert(), arguments(save_strategy="no"), train_dataset=sentences)


def test_data_parallel_is_refused(arguments, bert, sentences):
    args = arguments()
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"nn.DataParallel.*torchrun --nproc_per_node"):
        SaLSaTrainer(bert(), args, train_dataset=sentences)


def test_model_without_loss(arguments, sentences):
    class NoLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 2)

        def forward(self, input_ids, labels):
            return {"logits": self.head(input_ids.float())}

    with pytest.raises(ValueError, match="did not return a loss"):
        SaLSaTrainer(NoLoss(), arguments(), train_dataset=sentences).train()


def test_losses_that_are_not_finite_end_the_run_with_a_reason(arguments, sentences):
    class NotFinite(WithBatchNorm):
        def forward(self, input_ids, labels=None):
            outputs = super().forward(input_ids, labels)
            outputs["loss"] = outputs["loss"] * math.nan
            return outputs

    model = NotFinite()
    before = weights(model)
    trainer = SaLSaTrainer(model, arguments(max_steps=40), train_dataset=sentences)
    with pytest.raises(FloatingPointError, match="20 steps in a row"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
