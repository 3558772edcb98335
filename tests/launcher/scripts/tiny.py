"""Words, a tokenizer and sizes for the scripts beside, and what they do with a trainer."""

import random

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import PreTrainedTokenizerFast

TEXT = "a big red dog sees the small old cat under one tall green tree near my house"
WORDS = TEXT.split()
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


def sentences(count, seed=0):
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=6)) for _ in range(count)]


def train_tokenizer():
    core = Tokenizer(WordLevel(unk_token=SPECIAL["unk"]))
    core.pre_tokenizer = Whitespace()
    core.train_from_iterator(
        [TEXT], WordLevelTrainer(special_tokens=[*SPECIAL.values()], show_progress=False)
    )
    ends = [(SPECIAL[name], core.token_to_id(SPECIAL[name])) for name in ("cls", "sep")]
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    named = {f"{name}_token": token for name, token in SPECIAL.items()}
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


def train_and_evaluate(trainer, training_args, **card):
    """What every script does from here on."""
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card(finetuned_from="tiny", **card)
