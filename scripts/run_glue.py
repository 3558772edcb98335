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

Defaults are the paper's (5 epochs, batches of 32, 256 tokens, BERT-base), but for the optimizer:
the paper's is --optim salsa_adam. Evaluation and a checkpoint after each epoch.
"""

from collections.abc import Sequence

from support import glue, runs
from support.command_line import COMMON_DEFAULTS, ScriptArgumentParser
from transformers import DataCollatorWithPadding, set_seed

from hf_salsa import SaLSaTrainer, SaLSaTrainingArguments

ARGUMENTS = (glue.ModelArguments, glue.DataArguments, SaLSaTrainingArguments)
# Where the script differs from SaLSaTrainingArguments: the paper's settings.
DEFAULTS = {
    **COMMON_DEFAULTS,
    "num_train_epochs": 5.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line by default."""
    # Parse
    parser = ScriptArgumentParser(ARGUMENTS, __file__, __doc__, **DEFAULTS)
    model_args, data_args, training_args = parser.parse(argv)

    # Load
    with parser.user_errors():
        data = glue.load_data(data_args)
        set_seed(training_args.seed)
        model, tokenizer = glue.model_and_tokenizer(model_args, data_args, data)
        # After all else that may be wrong: it deletes an earlier run.
        checkpoint = runs.prepare_output_dir(training_args, data_args.overwrite_output_dir)
    if training_args.process_index == 0:
        print(glue.describe(data_args, data, model))
    tokenized = glue.tokenize(data, tokenizer, model_args.max_seq_length)
    metric = glue.metric_config(data, data_args.task_name)

    # Train
    with parser.user_errors(ValueError):  # a set-up in which a line search comes out wrong
        trainer = SaLSaTrainer(
            model=model,
            args=training_args,
            train_dataset=tokenized["train"],
            eval_dataset=glue.validation_sets(tokenized),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=glue.make_compute_metrics(metric),
        )
    metrics = runs.train_and_evaluate(trainer, checkpoint)

    # Save the card; the model and the metrics are saved by now
    trainer.create_model_card(**glue.card_settings(data_args))
    runs.print_closing_report(trainer, metrics, glue.metric_names(data, metric))


if __name__ == "__main__":
    main()
