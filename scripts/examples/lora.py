"""LoRA with PEFT and without a learning rate: only the adapters are copied and searched.

    python scripts/examples/lora.py

A tiny GPT-2 first learns to count in steps of 1, 2 and 4; then its weights are frozen, and adapters
teach it steps of 3.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_salsa import SaLSaTrainer, SaLSaTrainingArguments


def counting(*steps):
    """Sequences of 16 numbers modulo 64, from every start in every one of these steps."""
    rows = [(start + step * torch.arange(16)) % 64 for step in steps for start in range(64)]
    return [{"input_ids": row, "labels": row} for row in rows]


def train(model, data, epochs):
    args = SaLSaTrainingArguments(
        "runs/lora",
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=40,
    )
    trainer = SaLSaTrainer(model, args, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    metrics = trainer.train().metrics
    after = trainer.evaluate()["eval_loss"]
    searches, step_size = metrics["salsa/searches"], metrics["salsa/median_step_size"]
    return f"loss {before:.3f} -> {after:.3f}, step size {step_size:.1e}, {searches} searches"


set_seed(0)
size = {"vocab_size": 64, "n_positions": 16, "n_layer": 2, "n_head": 4, "n_embd": 64}
base = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **size))
print("base:", train(base, counting(1, 2, 4), epochs=20))

lora = LoraConfig(
    task_type="CAUSAL_LM", r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
)
model = get_peft_model(base, lora)
model.print_trainable_parameters()
print("adapters:", train(model, counting(3), epochs=40))
