"""The task of run_glue.py in a plain Accelerate loop, without `Trainer` and a learning rate.

Embedded data and a small BERT from scratch, no download:
    python scripts/run_glue_no_trainer.py --output_dir runs/loop

A GLUE task (GLUE's own files, or without --glue_dir the copy on the hub), and its baseline:
    python scripts/run_glue_no_trainer.py --task_name mrpc --glue_dir GLUE --output_dir runs/mrpc
    python scripts/run_glue_no_trainer.py --task_name mrpc --glue_dir GLUE --output_dir runs/adamw \
        --optim adamw_torch --learning_rate 2e-5

Two processes, on two GPUs or (with --use_cpu) on one CPU:
    torchrun --nproc_per_node 2 scripts/run_glue_no_trainer.py --output_dir runs/loop --use_cpu
    accelerate launch --multi_gpu --num_processes 2 scripts/run_glue_no_trainer.py \
        --output_dir runs/loop --use_cpu

After Ctrl-C, the same command and:
        --resume_from_checkpoint true

Evaluation and a checkpoint after each epoch; the data flags are those of run_glue.py. Against AdamW
three lines differ, marked (1) to (3): optimizer, `BatchObjective` instead of a scheduler, loss.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from support.checkpoints import STATE_NAME, checkpoints_in
from support.command_line import ScriptArgumentParser, UsageError, check_processes
from support.glue import (
    DEFAULT_MODEL,
    EMBEDDED_NOTICE,
    DataArguments,
    ModelArguments,
    data_name,
    load_data,
    load_model_and_tokenizer,
    make_compute_metrics,
    make_model_and_tokenizer,
    metric_config,
    tokenize,
)
from support.runs import prepare_output_dir
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    TrainerState,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from hf_salsa import OPTIMIZERS, BatchObjective


@dataclass
class LoopArguments:
    """How to train."""

    output_dir: str = field(metadata={"help": "Where model, checkpoint and results go."})
    optim: Literal[
        "salsa_adam",
        "salsa_sgd",
        "sls_adam",
        "sls_sgd",
        "salsa_adam_plus",
        "salsa_sgd_plus",
        "adamw_torch",
    ] = field(
        default="salsa_adam",
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


def save_checkpoint(accelerator: Accelerator, output_dir: Path, state: TrainerState) -> None:
    """Save what a resumed run needs, and remove the checkpoint of before."""
    folder = output_dir / f"checkpoint-{state.global_step}"
    accelerator.save_state(folder)  # each process its random streams
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state.save_to_json(str(folder / STATE_NAME))  # last: it marks a complete checkpoint
        for older in checkpoints_in(output_dir):
            if older != folder:
                shutil.rmtree(older)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line by default."""
    parser = ScriptArgumentParser((ModelArguments, DataArguments, LoopArguments), __file__, __doc__)
    model_args, data_args, args = parser.parse(argv)
    embedded = not data_args.task_name and not data_args.train_file
    with parser.user_errors():
        accelerator = make_accelerator(args)
        data = load_data(data_args)
        set_seed(args.seed)
        if embedded and model_args.model_name_or_path is None:
            model, tokenizer = make_model_and_tokenizer(data)
        else:
            name = model_args.model_name_or_path or DEFAULT_MODEL
            model, tokenizer = load_model_and_tokenizer(name, data)
        args.process_index = accelerator.process_index
        checkpoint = prepare_output_dir(args, data_args.overwrite_output_dir)
    if embedded:
        accelerator.print(EMBEDDED_NOTICE)
    max_length = min(model_args.max_seq_length, tokenizer.model_max_length)
    tokenized = tokenize(data, tokenizer, max_length)
    collator = DataCollatorWithPadding(tokenizer)
    eval_loaders = {
        split.replace("validation", "eval"): accelerator.prepare(
            DataLoader(dataset, args.per_device_eval_batch_size, collate_fn=collator)
        )
        for split, dataset in tokenized.items()
        if split != "train"
    }
    train_loader = DataLoader(
        tokenized["train"], args.per_device_train_batch_size, shuffle=True, collate_fn=collator
    )
    compute_metrics = make_compute_metrics(metric_config(data, data_args.task_name))

    objective = scheduler = None
    if args.optim == "adamw_torch":
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    else:
        optimizer = OPTIMIZERS[args.optim](model.parameters())  # (1)
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    updates = math.ceil(len(train_loader) / accelerator.gradient_accumulation_steps)
    if args.optim == "adamw_torch":
        # Accelerate's scheduler moves on once per process and update.
        steps = updates * args.num_train_epochs * accelerator.num_processes
        scheduler = accelerator.prepare(
            get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
        )
    else:
        objective = BatchObjective(  # (2)
            model, optimizer, gradient_accumulation_steps=accelerator.gradient_accumulation_steps
        )
        optimizer.optimizer.plan(updates * args.num_train_epochs)  # only a cool-down needs it

    def loss_fn(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).loss

    output_dir, state = Path(args.output_dir), TrainerState()
    if checkpoint is not None:
        accelerator.load_state(checkpoint)
        state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_NAME))
    accelerator.print(
        f"{data_name(data_args)} with {args.optim}; processes: {accelerator.num_processes}"
    )
    model.train()
    for epoch in range(int(state.epoch or 0), args.num_train_epochs):
        train_loader.set_epoch(epoch)
        losses = []
        for batch in train_loader:
            with accelerator.accumulate(model):
                loss = objective.record(loss_fn, batch) if objective else loss_fn(batch)  # (3)
                accelerator.backward(loss)
                optimizer.step()
                if scheduler:
                    scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        state.epoch, state.global_step = epoch + 1.0, state.global_step + updates
        entry = {
            "epoch": state.epoch,
            "loss": accelerator.gather(torch.stack(losses)).mean().item(),
            "learning_rate": optimizer.param_groups[0]["lr"],  # of a line search: its step size
            **evaluate(accelerator, model, eval_loaders, compute_metrics),
        }
        if objective:
            entry["salsa/trials"] = optimizer.optimizer.counters.trials
        state.log_history.append(entry)
        accelerator.print(", ".join(f"{key} {value:.4g}" for key, value in entry.items()))
        save_checkpoint(accelerator, output_dir, state)

    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
        results = {**state.log_history[-1], "num_processes": accelerator.num_processes}
        (output_dir / "all_results.json").write_text(json.dumps(results, indent=2) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
