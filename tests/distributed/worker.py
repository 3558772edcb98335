"""Trains tiny models under whatever launcher started it, and writes what came out, per rank.

Usage: worker.py OUT_DIR CONFIGURATIONS (a JSON list of dictionaries)
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, PartialState
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    set_seed,
)

from hf_salsa import BatchObjective, SaLSaSGD, SaLSaTrainer, SaLSaTrainingArguments
from hf_salsa.accelerated import unwrap_evaluating

torch.set_num_threads(1)


class WithBatchNorm(nn.Module):
    """Keeps running statistics, and has a parameter that no forward pass uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict:
        logits = self.layers(input_ids.float() / 64)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def count_all_reduces() -> list[int]:
    """Let every all-reduce that Python asks for from now on count in the one entry returned."""
    calls, all_reduce = [0], torch.distributed.all_reduce

    def counting(*args, **kwargs):
        calls[0] += 1
        return all_reduce(*args, **kwargs)

    torch.distributed.all_reduce = counting
    return calls


def with_new_head(trained: BertForSequenceClassification) -> BertForSequenceClassification:
    """Return the body of a trained model with a new head, as `from_pretrained` makes it."""
    set_seed(0)
    return BertForSequenceClassification.from_pretrained(
        None, config=trained.config, state_dict=trained.bert.state_dict()
    )


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model of which no number is as it was made."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.01 * torch.randn_like(param))
    return model


def make_model(kind: str, dropout: float) -> torch.nn.Module:
    set_seed(0)
    if kind == "new head":
        return with_new_head(make_model("bert", dropout))
    if kind == "trained gpt2":
        return moved(make_model("gpt2", dropout))
    if kind == "batchnorm":
        return WithBatchNorm()
    if kind == "bert":
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=32, max_position_embeddings=16, hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
        )  # fmt: skip
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=16, resid_pdrop=dropout,
            embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def make_data(kind: str) -> list[dict]:
    tokens = torch.randint(0, 64, (64, 8), generator=torch.Generator().manual_seed(1))
    if kind == "batchnorm":
        tokens = tokens[:61]  # the last batch is not full
    if kind in ("bert", "batchnorm", "new head"):
        return [{"input_ids": row, "labels": int(row[0] < 32)} for row in tokens]
    examples = [{"input_ids": row, "labels": row.clone()} for row in tokens]
    for i, example in enumerate(examples):
        example["labels"][: i % 6] = -100
    return examples


class WithFactors(SaLSaTrainer):
    """Lets the body take a share of the steps that the head takes.

    Args:
        body_factor: That share.
    """

    def __init__(self, *args, body_factor: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.body_factor = body_factor

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        for group in optimizer.param_groups:
            group["step_size_factor"] = 1.0 if group["head"] else self.body_factor
        return optimizer


class Lengthen(TrainerCallback):
    """Makes the steps after an update far too long."""

    def __init__(self, trainer: SaLSaTrainer, step: int) -> None:
        self.trainer, self.step = trainer, step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            of_rule, of_run = self.trainer.line_search._read()
            longer = replace(of_rule, step_size=1e4 * of_rule.step_size)
            self.trainer.line_search._write(longer, of_run)


def plain_loop(configuration: dict) -> dict:
    """Train in a loop without Trainer; the loss may call DDP's wrapper or what it wraps."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    model, optimizer = accelerator.prepare(net, SaLSaSGD(net.parameters()))
    objective = BatchObjective(model, optimizer)

    def loss_fn(x: torch.Tensor) -> torch.Tensor:
        past_wrapper = configuration["trials"] == "bare" and not torch.is_grad_enabled()
        return ((net if past_wrapper else model)(x) - x.sum(1, keepdim=True)).square().mean()

    generator = torch.Generator().manual_seed(accelerator.process_index)
    for _ in range(20):
        with accelerator.accumulate(model):
            loss = objective.record(loss_fn, torch.randn(16, 6, generator=generator))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return {
        "world_size": accelerator.num_processes,
        "rank": accelerator.process_index,
        "step_size": objective.line_search.step_size,
        "weights": [p.tolist() for p in net.parameters()],
        "buffers": [b.tolist() for b in net.buffers()],
    }


def run(configuration: dict, folder: Path) -> dict:
    """Train; with "resume" a second time, from the checkpoint of that step of the first run."""
    if configuration["model"] == "plain loop":
        return plain_loop(configuration)
    result = train(configuration, folder)
    if "resume" in configuration:
        checkpoint = str(folder / f"checkpoint-{configuration['resume']}")
        result["resumed"] = train(configuration, folder, checkpoint)
    return result


def train(configuration: dict, folder: Path, checkpoint: str | None = None) -> dict:
    args = SaLSaTrainingArguments(
        str(folder),
        optim=configuration.get("optim", "salsa_adam"),
        max_steps=configuration["steps"],
        per_device_train_batch_size=configuration["batch"],
        gradient_accumulation_steps=configuration["accumulation"],
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="steps" if "resume" in configuration else "no",
        save_steps=configuration.get("resume", 500),
        disable_tqdm=True,
        log_level="error",
        **configuration.get("arguments", {}),
    )
    if configuration.get("arguments", {}).get("fsdp"):
        # Accelerate shards on accelerators only and would fall back to DDP here without a word.
        PartialState().distributed_type = DistributedType.MULTI_GPU
    model = make_model(configuration["model"], configuration["dropout"])
    data = make_data(configuration["model"])[: configuration.get("examples")]
    if "body_factor" in configuration:
        factor = configuration["body_factor"]
        trainer = WithFactors(model, args, train_dataset=data, body_factor=factor)
    else:
        trainer = SaLSaTrainer(model, args, train_dataset=data)
    if "lengthen" in configuration:
        trainer.add_callback(Lengthen(trainer, configuration["lengthen"]))
    all_reduces = count_all_reduces()
    trainer.train(resume_from_checkpoint=checkpoint)
    optimizer = unwrap_evaluating(trainer.optimizer)
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in parameters])
    buffers = [b.double().flatten() for b in model.buffers()]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "world_size": args.world_size,
        "step_sizes": [entry["learning_rate"] for entry in history],
        "returns": history[-1].get("salsa/returns"),
        "losses": [entry["loss"] for entry in history],
        "searches": optimizer.counters.searches,
        "trials": optimizer.counters.trials,
        "head_steps": optimizer.param_groups[0]["head_steps"],
        "all_trained": optimizer.param_groups[0].get("all_trained"),  # of the plus optimizers
        "factors": [[g["head"], g.get("step_size_factor")] for g in optimizer.param_groups],
        "all_reduces": all_reduces[0],
        "weights": hashlib.sha256(flat.numpy().tobytes()).hexdigest(),
        "buffers": torch.cat(buffers).tolist() if buffers else [],
        "sum": flat.double().sum().item(),
        "norm": flat.double().norm().item(),
        "rank": args.process_index,
        "sharded": any(isinstance(p, DTensor) for p in model.parameters()),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    results = [run(configuration, folder) for configuration in json.loads(sys.argv[2])]
    (folder / f"rank{results[0]['rank']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
