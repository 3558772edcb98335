"""The mixins on the trainers of TRL and sentence-transformers: only the step size is another."""

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_salsa import SaLSaArgumentsMixin, SaLSaTrainerMixin
from hf_salsa.objective import unwrap_optimizer

pytest.importorskip("trl")
pytest.importorskip("sentence_transformers")

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
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


class SaLSaSFTTrainer(SaLSaTrainerMixin, SFTTrainer):
    pass


@dataclass
class SaLSaSFTConfig(SaLSaArgumentsMixin, SFTConfig):
    pass


class SaLSaDPOTrainer(SaLSaTrainerMixin, DPOTrainer):
    pass


@dataclass
class SaLSaDPOConfig(SaLSaArgumentsMixin, DPOConfig):
    pass


class SaLSaKTOTrainer(SaLSaTrainerMixin, KTOTrainer):
    pass


@dataclass
class SaLSaKTOConfig(SaLSaArgumentsMixin, KTOConfig):
    pass


class SaLSaRewardTrainer(SaLSaTrainerMixin, RewardTrainer):
    pass


@dataclass
class SaLSaRewardConfig(SaLSaArgumentsMixin, RewardConfig):
    pass


class SaLSaSentenceTransformerTrainer(SaLSaTrainerMixin, SentenceTransformerTrainer):
    pass


@dataclass
class SaLSaSentenceTransformerArguments(SaLSaArgumentsMixin, SentenceTransformerTrainingArguments):
    pass


WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "on", "under", "tree", "and", "is", "was"]


def sentences(seed, n=32):
    """Sentences of four to eight words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 9, (n,), generator=generator)
    return [
        " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator))
        for length in lengths
    ]


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


@dataclass
class Case:
    """A trainer as its library has it and with the mixins, and what it trains on."""

    trainers: tuple[type[Trainer], type[Trainer]]
    arguments: tuple[type[TrainingArguments], type[TrainingArguments]]
    data: dict[str, list]
    options: dict[str, Any] = field(default_factory=dict)
    loss: Any = None


SFT = (SFTTrainer, SaLSaSFTTrainer), (SFTConfig, SaLSaSFTConfig), {"text": sentences(0)}
PREFERENCES = {"prompt": sentences(0), "chosen": sentences(1), "rejected": sentences(2)}
DPO = (DPOTrainer, SaLSaDPOTrainer), (DPOConfig, SaLSaDPOConfig), PREFERENCES
JUDGED = {
    "prompt": sentences(0),
    "completion": sentences(1),
    "label": [i % 3 > 0 for i in range(32)],
}
ENCODER = (
    (SentenceTransformerTrainer, SaLSaSentenceTransformerTrainer),
    (SentenceTransformerTrainingArguments, SaLSaSentenceTransformerArguments),
)
PAIRS = {"anchor": sentences(0), "positive": sentences(1)}
LABELLED = {**PAIRS, "label": [i % 3 for i in range(32)]}
CASES = {
    "sft": Case(*SFT),
    "sft in float32": Case(*SFT, {"bf16": False, "gradient_checkpointing": False}),
    "sft packed": Case(*SFT, {"packing": True, "max_length": 16}),
    "sft accumulated": Case(*SFT, {"gradient_accumulation_steps": 2}),
    "dpo": Case(*DPO),
    "dpo precomputed": Case(*DPO, {"precompute_ref_log_probs": True}),
    "dpo accumulated": Case(*DPO, {"gradient_accumulation_steps": 2}),
    "kto": Case((KTOTrainer, SaLSaKTOTrainer), (KTOConfig, SaLSaKTOConfig), JUDGED),
    "reward": Case(
        (RewardTrainer, SaLSaRewardTrainer), (RewardConfig, SaLSaRewardConfig), PREFERENCES
    ),
    "encoder": Case(*ENCODER, PAIRS, {}, MultipleNegativesRankingLoss),
    "encoder accumulated": Case(
        *ENCODER, PAIRS, {"gradient_accumulation_steps": 2}, MultipleNegativesRankingLoss
    ),
    "encoder with cached gradients": Case(*ENCODER, PAIRS, {"bf16": True}, cached_ranking_loss),
    "encoder with two losses": Case(*ENCODER, PAIRS, {}, TwoLosses),
    "encoder with trained loss": Case(*ENCODER, LABELLED, {}, softmax_loss),
}


@pytest.fixture(scope="module")
def tokenizer():
    names = ["<pad>", "<eos>", "<unk>", *WORDS]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=32,
    )


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Tiny models with dropout, on disk: some trainers load theirs a second time."""
    set_seed(0)
    size = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    tiny = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, **size)),
        "bert": BertModel(
            BertConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                **size,
            )
        ),
    }
    saved = {}
    for name, model in tiny.items():
        saved[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(saved[name])
        tokenizer.save_pretrained(saved[name])
    return saved


@pytest.fixture
def make(tokenizer, folders, tmp_path):
    """Makes the trainer of a case, the same for every call."""

    def make(case, salsa=True, trainer_options=None, **options):
        trainer_class, args_class = case.trainers[salsa], case.arguments[salsa]
        args = args_class(
            **{
                "output_dir": str(tmp_path / "out"),
                "per_device_train_batch_size": 4,
                "max_steps": 4,
                "use_cpu": True,
                "report_to": "none",
                "save_strategy": "no",
                "disable_tqdm": True,
                "logging_steps": 1,
                **case.options,
                **options,
            }
        )
        set_seed(0)
        if case.loss is not None:
            modules = [Transformer(folders["bert"]), Pooling(16)]
            model = SentenceTransformer(modules=modules, device="cpu")
            trainer_options = {"loss": case.loss(model)}
        else:
            if issubclass(trainer_class, RewardTrainer):
                model = GPT2ForSequenceClassification.from_pretrained(folders["gpt2"], num_labels=1)
            else:
                model = GPT2LMHeadModel.from_pretrained(folders["gpt2"])
            trainer_options = {"processing_class": tokenizer, **(trainer_options or {})}
        data = Dataset.from_dict(case.data)
        return trainer_class(model=model, args=args, train_dataset=data, **trainer_options)

    return make


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def log(trainer):
    """What the library itself logs in training, without the times."""
    return [
        {
            name: value
            for name, value in entry.items()
            if not name.startswith("salsa/") and name not in ("learning_rate", "step_time")
        }
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def assert_same_weights(*trainers):
    first, second = (trainer.model.state_dict() for trainer in trainers)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


class CheckReplay(TrainerCallback):
    """At every search: the objective at w_k is the loss of training, bit for bit."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.checked = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        objective = self.trainer._objective
        assert unwrap_optimizer(self.trainer.optimizer).search_due
        assert torch.equal(objective(), objective.loss)
        self.checked += 1


def test_replay_is_exact_and_silent(make, case):
    trainer = make(case)
    check = CheckReplay(trainer)
    trainer.add_callback(check)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Evaluating the objective again")
        warnings.filterwarnings("error", message="Ignored with SaLSaAdam")  # no rate was set
        trainer.train()
    assert check.checked == 4
    assert unwrap_optimizer(trainer.optimizer).counters.failed_searches == 0


def test_metrics_are_those_of_training(make, case):
    """Forward passes of the search count in no metric: up to the first update all are stock's."""
    stock = make(case, salsa=False)
    stock.train()
    trainer = make(case)
    trainer.train()
    assert unwrap_optimizer(trainer.optimizer).counters.trials > 4
    assert log(trainer)[0] == log(stock)[0]
    for entry, expected in zip(log(trainer), log(stock), strict=True):
        assert entry.get("num_tokens") == expected.get("num_tokens")
        assert entry.keys() == expected.keys()
        if "half" in entry:
            assert entry["half"] == pytest.approx(entry["loss"] / 3, abs=1e-4)


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "reward", "encoder with trained loss"])
def test_a_stock_optimizer_is_stock(make, name):
    """To the checkpoint, for which TRL writes a model card."""
    case = CASES[name]
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    stock = make(case, salsa=False, **options)
    stock.train()
    trainer = make(case, **options)
    trainer.train()
    assert_same_weights(stock, trainer)
    assert log(trainer) == log(stock)


@pytest.mark.parametrize("name", ["sft", "encoder"])
def test_resumed_run_equals_the_straight_run(make, name):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    straight = make(CASES[name], **options)
    straight.train()
    resumed = make(CASES[name], **options)
    resumed.train(resume_from_checkpoint=os.path.join(straight.args.output_dir, "checkpoint-2"))
    assert_same_weights(straight, resumed)


def test_card_of_a_sentence_encoder_loads_it(make):
    trainer = make(CASES["encoder"], max_steps=1)
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


def test_parameters_of_the_loss_are_trained(make):
    trainer = make(CASES["encoder with trained loss"])
    before = trainer.loss.classifier.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.loss.classifier.weight, before)


def test_a_rate_for_some_parameters_is_refused(make):
    trainer = make(CASES["encoder"], learning_rate_mapping={"embeddings": 1e-3})
    with pytest.raises(ValueError, match=r"lr=0.001 in a parameter group is not allowed"):
        trainer.train()


class SaLSaGRPOTrainer(SaLSaTrainerMixin, GRPOTrainer):
    pass


@dataclass
class SaLSaGRPOConfig(SaLSaArgumentsMixin, GRPOConfig):
    pass


class SaLSaRLOOTrainer(SaLSaTrainerMixin, RLOOTrainer):
    pass


@dataclass
class SaLSaRLOOConfig(SaLSaArgumentsMixin, RLOOConfig):
    pass


@pytest.mark.parametrize(
    ("trainer_class", "args_class"),
    [(SaLSaGRPOTrainer, SaLSaGRPOConfig), (SaLSaRLOOTrainer, SaLSaRLOOConfig)],
    ids=["grpo", "rloo"],
)
def test_online_trainers_are_refused_by_name(make, trainer_class, args_class):
    case = Case(
        (Trainer, trainer_class),
        (TrainingArguments, args_class),
        {"prompt": sentences(0)},
        {"num_generations": 4},
    )
    reward = {"reward_funcs": lambda completions, **kwargs: [1.0] * len(completions)}
    name = trainer_class.__name__.removeprefix("SaLSa")
    with pytest.raises(ValueError, match=f"salsa_adam does not work with {name}: it generates new"):
        make(case, trainer_options=reward)
    make(case, trainer_options=reward, optim="adamw_torch")
