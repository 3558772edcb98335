import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub must fail
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    set_seed,
)

torch.set_num_threads(1)  # tiny models: threads only cost
# The same examples in every run, however slow the machine.
hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None)
hypothesis.settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def quiet_logger():
    """The scripts print what the package logs; what runs after them must not."""
    logger = logging.getLogger("hf_salsa")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def bert():
    """A tiny BERT classifier with dropout, the same weights for every call."""

    def make(dropout=0.1, **overrides):
        set_seed(0)
        config = BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=2,
            **overrides,
        )
        return BertForSequenceClassification(config)

    return make


@pytest.fixture
def gpt2():
    """A tiny GPT-2 with dropout, the same weights for every call."""

    def make(dropout=0.1, **overrides):
        set_seed(0)
        config = GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=16,
            vocab_size=64,
            n_positions=16,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
            **overrides,
        )
        return GPT2LMHeadModel(config)

    return make


@pytest.fixture
def sentences():
    """Classification examples that a tiny model can learn: is the first token below 32?"""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (64, 8), generator=generator)
    return [{"input_ids": row, "labels": int(row[0] < 32)} for row in tokens]


@pytest.fixture
def texts():
    """Language-modelling examples of one length whose labels are partly masked, raggedly."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 64, (64, 8), generator=generator)
    examples = []
    for i, row in enumerate(tokens):
        labels = row.clone()
        labels[: i % 6] = -100
        examples.append({"input_ids": row, "labels": labels})
    return examples
