"""Fine-tune a model on a GLUE task, or on sentences of your own, without a learning rate.

Embedded data and a small BERT from scratch, no download:
    python scripts/run_glue.py --output_dir runs/probe

GLUE's own files (MRPC/train.tsv, MRPC/dev.tsv, ...), or without --glue_dir the copy on the hub:
    python scripts/run_glue.py --task_name mrpc --glue_dir GLUE --output_dir runs/mrpc

The baseline through the same script:
    python scripts/run_glue.py --task_name mrpc --glue_dir GLUE --output_dir runs/mrpc_adamw \
        --optim adamw_torch --learning_rate 2e-5 --lr_scheduler_type cosine --warmup_steps 0.1

Your own data (csv, tsv or json lines) and any model of the hub or a folder:
    python scripts/run_glue.py --train_file train.csv --validation_file dev.csv \
        --model_name_or_path google-bert/bert-base-cased --output_dir runs/own

After Ctrl-C, the same command and:
        --resume_from_checkpoint true

The settings may come from a file: python scripts/run_glue.py settings.yaml

Defaults are the paper's (5 epochs, batches of 32, 256 tokens, BERT-base), evaluation and a
checkpoint after each epoch.
"""

from collections.abc import Sequence

from support.command_line import COMMON_DEFAULTS, ScriptArgumentParser, check_processes
from support.glue import (
    DEFAULT_MODEL,
    EMBEDDED_NOTICE,
    DataArguments,
    ModelArguments,
    card_settings,
    data_name,
    load_data,
    load_model_and_tokenizer,
    make_compute_metrics,
    make_model_and_tokenizer,
    metric_config,
    select,
    tokenize,
    validation_sets,
)
from support.glue_metric import METRIC_NAMES
from support.runs import (
    evaluation_at_start,
    prepare_output_dir,
    print_closing_report,
    train_and_evaluate,
)
from transformers import DataCollatorWithPadding, set_seed

from hf_salsa import SaLSaTrainer, SaLSaTrainingArguments

# Where the script differs from SaLSaTrainingArguments: the paper's settings.
DEFAULTS = {
    **COMMON_DEFAULTS,
    "num_train_epochs": 5.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line by default."""
    parser = ScriptArgumentParser(
        (ModelArguments, DataArguments, SaLSaTrainingArguments), __file__, __doc__, **DEFAULTS
    )
    model_args, data_args, training_args = parser.parse(argv)
    with parser.user_errors():
        check_processes(training_args.world_size)
        data = load_data(data_args)
    embedded = not data_args.task_name and not data_args.train_file
    model_name = model_args.model_name_or_path or (None if embedded else DEFAULT_MODEL)
    set_seed(training_args.seed)
    if model_name is None:
        model, tokenizer = make_model_and_tokenizer(data)
    else:
        with parser.user_errors():
            model, tokenizer = load_model_and_tokenizer(model_name, data)
    with parser.user_errors():  # after all else that may be wrong: it deletes an earlier run
        checkpoint = prepare_output_dir(training_args, data_args.overwrite_output_dir)
    if training_args.process_index == 0:
        if embedded:
            print(EMBEDDED_NOTICE)
        sizes = ", ".join(f"{split} {len(dataset)}" for split, dataset in data.items())
        print(f"Data: {data_name(data_args)}, {sizes} examples.")
        print(
            f"Model: {model_name or 'a small BERT from scratch'}, "
            f"{model.num_parameters():,} parameters."
        )
    max_length = min(model_args.max_seq_length, tokenizer.model_max_length)
    tokenized = tokenize(data, tokenizer, max_length)
    config_name = metric_config(data, data_args.task_name)
    with parser.user_errors(ValueError):  # a set-up in which a line search comes out wrong
        trainer = SaLSaTrainer(
            model=model,
            args=training_args,
            train_dataset=tokenized["train"],
            eval_dataset=validation_sets(tokenized),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=make_compute_metrics(config_name),
        )

    train_metrics, metrics = train_and_evaluate(trainer, checkpoint)
    trainer.create_model_card(**card_settings(data_args))

    shown = ("loss", *METRIC_NAMES[config_name])
    print_closing_report(
        trainer,
        train_metrics,
        before=select(evaluation_at_start(trainer), shown),
        after=select(metrics, shown),
    )


if __name__ == "__main__":
    main()
