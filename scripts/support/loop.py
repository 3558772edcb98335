"""What a plain Accelerate loop needs around it: arguments, batches, evaluation, checkpoints."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainerState,
)

from hf_salsa import OPTIMIZERS, SaLSaTrainingArguments
from support.checkpoints import STATE_NAME, checkpoints_in
from support.command_line import UsageError, check_processes


@dataclass
class LoopArguments:
    """How to train."""

    output_dir: str = field(metadata={"help": "Where model, checkpoint and results go."})
    optim: Literal[(*OPTIMIZERS, "adamw_torch")] = field(
        default=SaLSaTrainingArguments.optim,
        metadata={"help": "A line search, or for comparison AdamW (10 %% warm-up, cosine decay)."},
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak rate of adamw_torch. A line search has none."}
    )
    num_train_epochs: int = field(default=5, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(
        default=32, metadata={"help": "Examples of one forward pass of one process."}
    )
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "The same in evaluation."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Forward passes of each process for one update."}
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = field(
        default="no", metadata={"help": "Autocast to this type; fp16 needs a GPU."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU."})
    seed: int = field(default=42, metadata={"help": "Of weights, dropout and order of the data."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "true: the last one in output_dir; or a folder."}
    )
    process_index: int = field(init=False, default=0)  # for prepare_output_dir

    def __post_init__(self) -> None:
        for name in (
            "num_train_epochs",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.optim in OPTIMIZERS and self.learning_rate is not None:
            raise ValueError(f"learning_rate has no meaning with optim={self.optim}: leave it out")
        if self.optim not in OPTIMIZERS and self.learning_rate is None:
            raise ValueError(f"optim={self.optim} needs a learning_rate, for example 2e-5")


def make_accelerator(args: LoopArguments) -> Accelerator:
    """Return the accelerator, or raise a `UsageError` where it would train something else."""
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # The order of the data is a function of seed and epoch, so that a resumed run repeats it.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    check_processes(accelerator.num_processes)
    if args.mixed_precision == "fp16" and accelerator.scaler is None:
        raise UsageError("mixed_precision=fp16 needs a GPU; bf16 works on a CPU as well")
    return accelerator


def make_loaders(
    args: LoopArguments, data: Mapping[str, Dataset], collator: DataCollatorWithPadding
) -> tuple[DataLoader, dict[str, DataLoader]]:
    """Return the batches to train on and, by name, those of each validation set."""
    train = DataLoader(
        data["train"], args.per_device_train_batch_size, shuffle=True, collate_fn=collator
    )
    validation = {
        split.replace("validation", "eval"): DataLoader(
            rows, args.per_device_eval_batch_size, collate_fn=collator
        )
        for split, rows in data.items()
        if split != "train"
    }
    return train, validation


def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    loaders: Mapping[str, DataLoader],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
) -> dict[str, float]:
    """Return the metrics of each validation set over the examples of all processes."""
    metrics = {}
    model.eval()
    for name, loader in loaders.items():
        logits, labels = [], []
        for batch in loader:
            with torch.no_grad():
                outputs = model(**batch)
            # Leaves out the examples that fill up the last batch of some processes.
            gathered = accelerator.gather_for_metrics((outputs.logits, batch["labels"]))
            logits.append(gathered[0].cpu().numpy())
            labels.append(gathered[1].cpu().numpy())
        prediction = EvalPrediction(np.concatenate(logits), np.concatenate(labels))
        for key, value in compute_metrics(prediction).items():
            metrics[f"{name}_{key}"] = float(value)
    model.train()
    return metrics


def load_checkpoint(accelerator: Accelerator, checkpoint: str | None) -> TrainerState:
    """Load what `save_checkpoint` saved; return how far the run is, which may be at its start."""
    if checkpoint is None:
        return TrainerState()
    accelerator.load_state(checkpoint)
    return TrainerState.load_from_json(str(Path(checkpoint) / STATE_NAME))


def save_checkpoint(accelerator: Accelerator, args: LoopArguments, state: TrainerState) -> None:
    """Save what a resumed run needs, and remove the checkpoint of before."""
    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    accelerator.save_state(folder)  # each process its random streams
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state.save_to_json(str(folder / STATE_NAME))  # last: it marks a complete checkpoint
        for older in checkpoints_in(args.output_dir):
            if older != folder:
                shutil.rmtree(older)


def save_model(
    accelerator: Accelerator,
    args: LoopArguments,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    state: TrainerState,
) -> None:
    """Save the finished model, its tokenizer, and the last entry of the log as the results."""
    if accelerator.is_main_process:
        output_dir = Path(args.output_dir)
        accelerator.unwrap_model(model).save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
        results = {**state.log_history[-1], "num_processes": accelerator.num_processes}
        (output_dir / "all_results.json").write_text(json.dumps(results, indent=2) + "\n")
