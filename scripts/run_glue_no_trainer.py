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
three lines differ, marked (1) to (3): optimizer, `BatchObjective` instead of a scheduler, loss. The
objective clips the gradients, too.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from accelerate import Accelerator
from support import glue, loop, runs
from support.command_line import ScriptArgumentParser
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    TrainerState,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from hf_salsa import OPTIMIZERS, BatchObjective, head_groups

ARGUMENTS = (glue.ModelArguments, glue.DataArguments, loop.LoopArguments)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line by default."""
    # Parse
    parser = ScriptArgumentParser(ARGUMENTS, __file__, __doc__)
    model_args, data_args, args = parser.parse(argv)

    # Load
    with parser.user_errors():
        accelerator = loop.make_accelerator(args)
        data = glue.load_data(data_args)
        set_seed(args.seed)
        model, tokenizer = glue.model_and_tokenizer(model_args, data_args, data)
        args.process_index = accelerator.process_index
        checkpoint = runs.prepare_output_dir(args, data_args.overwrite_output_dir)
    if glue.is_embedded(data_args):
        accelerator.print(glue.EMBEDDED_NOTICE)
    tokenized = glue.tokenize(data, tokenizer, model_args.max_seq_length)
    train_loader, eval_loaders = loop.make_loaders(
        args, tokenized, DataCollatorWithPadding(tokenizer)
    )
    eval_loaders = {name: accelerator.prepare(loader) for name, loader in eval_loaders.items()}
    compute_metrics = glue.make_compute_metrics(glue.metric_config(data, data_args.task_name))

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        return loop.evaluate(accelerator, model, eval_loaders, compute_metrics)

    # Train
    accelerator.print(
        f"{glue.data_name(data_args)} with {args.optim}; processes: {accelerator.num_processes}"
    )
    model, state = train(args, accelerator, model, train_loader, evaluate, checkpoint)

    # Save
    loop.save_model(accelerator, args, model, tokenizer, state)
    accelerator.end_training()


def train(
    args: loop.LoopArguments,
    accelerator: Accelerator,
    model: torch.nn.Module,
    train_loader: DataLoader,
    evaluate: Callable[[torch.nn.Module], dict[str, float]],
    checkpoint: str | None,
) -> tuple[torch.nn.Module, TrainerState]:
    """Train, with an evaluation and a checkpoint after each epoch; return the model and the log."""
    objective = scheduler = None
    if args.optim == "adamw_torch":
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    else:
        optimizer = OPTIMIZERS[args.optim](head_groups(model))  # (1)
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    updates = math.ceil(len(train_loader) / accelerator.gradient_accumulation_steps)
    if args.optim == "adamw_torch":
        # Accelerate's scheduler moves on once per process and update.
        steps = updates * args.num_train_epochs * accelerator.num_processes
        scheduler = accelerator.prepare(
            get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
        )
    else:
        objective = BatchObjective(model, optimizer)  # (2)
        optimizer.optimizer.plan(updates * args.num_train_epochs)  # warm-up and cool-down need it

    clip, clips = partial(accelerator.clip_grad_norm_, list(model.parameters())), True
    if objective:  # the search must know the factor; the paper's methods go without
        clip, clips = objective.clip_grad_norm_, objective.line_search.rule_type.clips_gradients

    def loss_fn(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).loss

    state = loop.load_checkpoint(accelerator, checkpoint)
    model.train()
    for epoch in range(int(state.epoch or 0), args.num_train_epochs):
        train_loader.set_epoch(epoch)
        losses = []
        for batch in train_loader:
            with accelerator.accumulate(model):
                loss = objective.record(loss_fn, batch) if objective else loss_fn(batch)  # (3)
                accelerator.backward(loss)
                if clips and accelerator.sync_gradients:
                    clip(1.0)
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
            **evaluate(model),
        }
        if objective:
            entry["salsa/trials"] = optimizer.optimizer.counters.trials
        state.log_history.append(entry)
        accelerator.print(", ".join(f"{key} {value:.4g}" for key, value in entry.items()))
        loop.save_checkpoint(accelerator, args, state)
    return model, state


if __name__ == "__main__":
    main()
