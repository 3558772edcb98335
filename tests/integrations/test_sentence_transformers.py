"""The mixins on sentence-transformers' trainer: only the step size is another."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers")

from datasets import Dataset
from ecosystem import (
    Case,
    case_arguments,
    check_metrics,
    check_replay,
    check_resume,
    check_stock,
    sentences,
)
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
    SoftmaxLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import nn
from transformers import set_seed

from hf_salsa import SaLSaArgumentsMixin, SaLSaTrainerMixin


class SaLSaSentenceTransformerTrainer(SaLSaTrainerMixin, SentenceTransformerTrainer):
    pass


@dataclass
class SaLSaSentenceTransformerArguments(SaLSaArgumentsMixin, SentenceTransformerTrainingArguments):
    pass


class TwoLosses(nn.Module):
    """A loss in parts, which the trainer adds up and logs one by one."""

    def __init__(self, model):
        super().__init__()
        self.ranking = MultipleNegativesRankingLoss(model)

    def forward(self, features, labels):
        loss = self.ranking(features, labels)
        return {"whole": loss, "half": loss / 2}


def cached_ranking_loss(model):
    return CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)


def softmax_loss(model):
    return SoftmaxLoss(model, 16, num_labels=3)


ENCODER = (
    (SentenceTransformerTrainer, SaLSaSentenceTransformerTrainer),
    (SentenceTransformerTrainingArguments, SaLSaSentenceTransformerArguments),
)
PAIRS = {"anchor": sentences(0), "positive": sentences(1)}
LABELLED = {**PAIRS, "label": [i % 3 for i in range(32)]}
CASES = {
    "plain": Case(*ENCODER, PAIRS, {}, MultipleNegativesRankingLoss),
    "accumulated": Case(
        *ENCODER, PAIRS, {"gradient_accumulation_steps": 2}, MultipleNegativesRankingLoss
    ),
    "with cached gradients": Case(*ENCODER, PAIRS, {"bf16": True}, cached_ranking_loss),
    "with two losses": Case(*ENCODER, PAIRS, {}, TwoLosses),
    "with trained loss": Case(*ENCODER, LABELLED, {}, softmax_loss),
}


@pytest.fixture
def make(folders, tmp_path):
    """Makes the trainer of a case, the same for every call."""

    def make(case, salsa=True, **options):
        args = case_arguments(case, tmp_path / "out", salsa, **options)
        set_seed(0)
        modules = [Transformer(folders["bert"]), Pooling(16)]
        model = SentenceTransformer(modules=modules, device="cpu")
        return case.trainers[salsa](
            model=model,
            args=args,
            train_dataset=Dataset.from_dict(case.data),
            loss=case.loss(model),
        )

    return make


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_encoder_replay_is_exact_and_silent(make, case):
    check_replay(make, case)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_encoder_metrics_are_those_of_training(make, name):
    check_metrics(make, CASES[name], trained_loss=name == "with trained loss")


@pytest.mark.slow
def test_a_stock_optimizer_trains_an_encoder_as_stock(make):
    check_stock(make, CASES["with trained loss"])


@pytest.mark.slow
def test_a_resumed_encoder_equals_the_straight_run(make):
    check_resume(make, CASES["plain"])


def test_card_of_a_sentence_encoder_loads_it(make):
    trainer = make(CASES["plain"], max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name=trainer.args.output_dir, dataset_name="words")
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "library_name: sentence-transformers" in card
    assert "on the words dataset" in card
    loaded = {}
    exec(card.split("```python")[1].split("```")[0], loaded)
    texts = sentences(3)
    assert (loaded["model"].encode(texts) == trainer.model.encode(texts)).all()


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
def test_parameters_of_the_loss_are_trained(make, max_grad_norm):
    """And clipped as the model's are: else the slope of the search were that of no gradient."""
    trainer = make(CASES["with trained loss"], max_grad_norm=max_grad_norm)
    before = trainer.loss.classifier.weight.detach().clone()
    norms = []

    def clipped(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm([g for g in grads if g is not None]).item())

    trainer.create_optimizer().register_step_pre_hook(clipped)
    trainer.train()
    assert not torch.equal(trainer.loss.classifier.weight, before)
    assert len(norms) == trainer.state.global_step
    if max_grad_norm:
        assert norms == pytest.approx([max_grad_norm] * len(norms), rel=1e-3)
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert min(logged) > 0.01
    if not max_grad_norm:
        assert logged == pytest.approx(norms, rel=1e-3)


def test_parameters_of_the_loss_are_refused_in_several_processes(make, monkeypatch):
    """DDP averages the gradients of the model alone."""
    trainer = make(CASES["with trained loss"])
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    with pytest.raises(ValueError, match="SaLSaAdam.* does not work with parameters beside the"):
        trainer.train()


def test_a_rate_for_some_parameters_is_refused(make):
    trainer = make(CASES["plain"], learning_rate_mapping={"embeddings": 1e-3})
    with pytest.raises(ValueError, match=r"lr=0.001 in a parameter group is not allowed"):
        trainer.train()
