"""Supervised fine-tuning with TRL and without a learning rate: two classes of two lines.

    python scripts/examples/trl_sft.py

A tiny GPT-2 learns to answer "3 plus 4 is" by "7". DPO, KTO and reward trainers work likewise.
"""

from dataclasses import dataclass

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from hf_salsa import SaLSaArgumentsMixin, SaLSaTrainerMixin


class SaLSaSFTTrainer(SaLSaTrainerMixin, SFTTrainer):
    """`SFTTrainer` with a line search."""


@dataclass
class SaLSaSFTConfig(SaLSaArgumentsMixin, SFTConfig):
    """`SFTConfig` that knows the line searches."""


set_seed(0)
words = ["<pad>", "<eos>", "plus", "is", *map(str, range(19))]
by_words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
by_words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=by_words, pad_token="<pad>", eos_token="<eos>", model_max_length=16
)
size = {"vocab_size": len(words), "n_layer": 2, "n_head": 4, "n_embd": 64, "resid_pdrop": 0}
model = GPT2LMHeadModel(GPT2Config(pad_token_id=0, bos_token_id=1, eos_token_id=1, **size))
sums = [(a, b) for a in range(10) for b in range(10)]
prompts, completions = [f"{a} plus {b} is" for a, b in sums], [f" {a + b}" for a, b in sums]
args = SaLSaSFTConfig(
    "runs/trl_sft",
    num_train_epochs=60,
    per_device_train_batch_size=25,
    bf16=False,  # TRL's default is True, whose rounding hides small decreases from the search
    gradient_checkpointing=False,
    save_strategy="no",
    disable_tqdm=True,
    logging_steps=40,
)
data = Dataset.from_dict({"prompt": prompts, "completion": completions})
trainer = SaLSaSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
metrics = trainer.train().metrics
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
step_size, searches = metrics["salsa/median_step_size"], metrics["salsa/searches"]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, step size {step_size:.1e}, {searches} searches")
