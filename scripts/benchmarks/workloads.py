"""What is measured: models of known shapes on random data, and line searches that came to rest."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from hf_salsa import SaLSaAdamPlus

STEP_SIZE = 1e-6  # so small that the weights stay what they were
OURS = "SaLSaAdam"
PLUS = "SaLSaAdamPlus"
LONG_RUN = 10**6  # steps; the tail of the plus rule is far away
PYPI = "PyPI SaLSA"  # the authors' own release, SaLSa-Optimizer
SEARCHES_TO_REST = 400  # after so many at one step size the next ones are as far apart as may be


class ModelShape(NamedTuple):
    """A model's configuration, and the batch of its training run."""

    model: type[PreTrainedModel]
    config: BertConfig | GPT2Config
    batch_size: int
    sequence_length: int

    def build(self) -> PreTrainedModel:
        return self.model(self.config)

    def examples(self, number: int) -> list[dict[str, Tensor]]:
        """Return random tokens; what can be learned of them is in the labels."""
        generator = torch.Generator().manual_seed(0)
        shape = (number, self.sequence_length)
        tokens = torch.randint(0, self.config.vocab_size, shape, generator=generator)
        if self.model is GPT2LMHeadModel:
            return [{"input_ids": row, "labels": row} for row in tokens]
        labels = (tokens[:, 0] < self.config.vocab_size // 2).long()
        return [
            {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
            for row, label in zip(tokens, labels, strict=True)
        ]


MODELS = {
    "minilm": ModelShape(
        BertForSequenceClassification,
        BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        ),
        batch_size=32,
        sequence_length=64,
    ),
    "bert": ModelShape(BertForSequenceClassification, BertConfig(), 32, 64),
    "gpt2": ModelShape(GPT2LMHeadModel, GPT2Config(), 12, 64),
}


def pypi_optimizer(params: list[nn.Parameter]) -> Any:
    from salsa.SaLSA import SaLSA

    return SaLSA(params)


def at_rest(
    optimizer: Any, step_size: float, *, search_due: bool, decrease: float | None = None
) -> dict[str, Any]:
    """Return what a line search hands from step to step, as after many steps at one step size.

    It is what such steps leave in the parameter groups of a twin: the same optimizer, with the same
    settings, on a single weight. Groups that are updated by it go on from there.

    Args:
        optimizer: Whose groups are to be updated.
        step_size: The step size that every search has accepted at its first trial.
        search_due: Whether the next step searches.
        decrease: What each of them took from the loss; by default as much as the slope of 1
            promises. If it is huge, first trials will be accepted whatever their loss.
    """
    group = optimizer.param_groups[0]
    names = inspect.signature(type(optimizer)).parameters.keys() & group.keys() - {"params"}
    settings = {name: group[name] for name in names}
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    weight.grad = torch.ones_like(weight)
    without_growth = {"initial_step_size": step_size, "steps_to_double": 1e9}
    twin = type(optimizer)([weight], **settings | without_growth)
    taken = step_size if decrease is None else decrease
    while twin.counters.searches < SEARCHES_TO_REST or twin.search_due is not search_due:
        start = weight.item()
        twin.step(lambda start=start: 0.0 if weight.item() == start else -taken, loss=0.0)
    (rested,) = twin.param_groups
    return {name: value for name, value in rested.items() if name not in {"params", *names}}


def plus_before_a_search(step_size: float) -> dict[str, Any]:
    """Return the same of SaLSaAdamPlus as it is one step before a search, when those are rare.

    Args:
        step_size: That the search before it left.
    """
    weight = nn.Parameter(torch.ones((), dtype=torch.float64))
    twin = SaLSaAdamPlus([weight], total_steps=LONG_RUN)
    (group,) = twin.param_groups
    before: dict[str, Any] = {}
    while not (twin.search_due and group["search_interval"] == group["max_search_interval"]):
        before = {name: value for name, value in group.items() if name != "params"}
        weight.grad = 2 * weight.detach()
        twin.step(lambda: 1 + weight * weight)
    return before | {"step_size": step_size, "lr": step_size}


def update_groups(optimizer: Optimizer, values: dict[str, Any]) -> None:
    for group in optimizer.param_groups:
        group.update(values)
