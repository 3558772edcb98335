"""The mixins on TRL's trainers: only the step size is another."""

from dataclasses import dataclass

import pytest

pytest.importorskip("trl")

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
from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
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

from hf_salsa import SaLSaArgumentsMixin, SaLSaTrainerMixin

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


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


SFT = (SFTTrainer, SaLSaSFTTrainer), (SFTConfig, SaLSaSFTConfig), {"text": sentences(0)}
PREFERENCES = {"prompt": sentences(0), "chosen": sentences(1), "rejected": sentences(2)}
DPO = (DPOTrainer, SaLSaDPOTrainer), (DPOConfig, SaLSaDPOConfig), PREFERENCES
JUDGED = {
    "prompt": sentences(0),
    "completion": sentences(1),
    "label": [i % 3 > 0 for i in range(32)],
}
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
}


@pytest.fixture
def make(tokenizer, folders, tmp_path):
    """Makes the trainer of a case, the same for every call."""

    def make(case, salsa=True, trainer_options=None, **options):
        trainer_class = case.trainers[salsa]
        args = case_arguments(case, tmp_path / "out", salsa, **options)
        set_seed(0)
        if issubclass(trainer_class, RewardTrainer):
            model = GPT2ForSequenceClassification.from_pretrained(folders["gpt2"], num_labels=1)
        else:
            model = GPT2LMHeadModel.from_pretrained(folders["gpt2"])
        return trainer_class(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict(case.data),
            processing_class=tokenizer,
            **(trainer_options or {}),
        )

    return make


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_replay_is_exact_and_silent(make, case):
    check_replay(make, case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_metrics_are_those_of_training(make, case):
    check_metrics(make, case)


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "reward"])
def test_a_stock_optimizer_is_stock(make, name):
    check_stock(make, CASES[name])


@pytest.mark.slow
def test_resumed_run_equals_the_straight_run(make):
    check_resume(make, CASES["sft"])


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
    with pytest.raises(ValueError, match=f"salsa_adam_plus does not work with {name}: it"):
        make(case, trainer_options=reward)
    make(case, trainer_options=reward, optim="adamw_torch")
