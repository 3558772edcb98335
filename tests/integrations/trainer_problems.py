"""What the tests of the trainer share: data, models and callbacks."""

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_salsa import SaLSaTrainer


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


class Endless(IterableDataset):
    """Examples in their own order, whatever the seed."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        yield from self.examples


class WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3))
        self.head = nn.Linear(16, 2)
        self.drawn = []

    def forward(self, input_ids, labels=None):
        if torch.is_grad_enabled():
            self.drawn.append((torch.rand(()).item(), input_ids.sum().item()))
        else:
            torch.rand(())
        logits = self.head(self.body(input_ids.float() / 64))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class CheckReplay(TrainerCallback):
    """At every search: the objective at w_k is what training_step differentiated, bit for bit."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.checked = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        objective = self.trainer._objective
        if self.trainer.line_search.search_due:
            assert torch.equal(objective.loss, self.trainer.differentiated)
            assert torch.equal(objective(), self.trainer.differentiated)
            self.checked += 1


class Recording(SaLSaTrainer):
    """Adds up what training_step returns, apart from what the objective records."""

    differentiated = None

    def training_step(self, model, inputs, num_items_in_batch=None):
        first = all(p.grad is None for p in model.parameters())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.differentiated = loss if first else self.differentiated + loss
        return loss
