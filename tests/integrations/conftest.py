"""Fixtures of the tests with Trainer and its relatives."""

import gc

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from hf_salsa import SaLSaTrainingArguments

pytest.register_assert_rewrite("ecosystem", "trainer_problems")


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Trainer collects garbage when a run begins: not through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def arguments(tmp_path):
    """Makes arguments for six updates on a CPU."""

    def make(cls=SaLSaTrainingArguments, **overrides):
        settings = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "max_steps": 6,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **overrides,
        }
        return cls(**settings)

    return make


@pytest.fixture(scope="module")
def tokenizer():
    from ecosystem import WORDS  # late: its assertions are to be rewritten

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
