"""Sequence classification of pairs, with a metric and early arguments from JSON."""

import os
import sys
from dataclasses import dataclass, field

import numpy as np
from tiny import SIZES, sentences, train_and_evaluate, train_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from transformers import Trainer, TrainingArguments  # isort: skip


@dataclass
class DataTrainingArguments:
    task_name: str | None = field(default=None, metadata={"help": "The name of the task."})
    max_seq_length: int = field(default=16)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Here a word, there a path."})


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        parsed = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        parsed = parser.parse_args_into_dataclasses()
    _, data_args, training_args = parsed
    set_seed(training_args.seed)

    tokenizer = train_tokenizer()
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **SIZES))

    def preprocess(first, second):
        coded = tokenizer(first, second, max_length=data_args.max_seq_length, truncation=True)
        return {**coded, "label": int("dog" in first)}

    examples = list(map(preprocess, sentences(48), sentences(48, seed=1)))

    def compute_metrics(p):
        return {"accuracy": (np.argmax(p.predictions, axis=1) == p.label_ids).mean().item()}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=examples[:32],
        eval_dataset=examples[32:],
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    train_and_evaluate(trainer, training_args, tasks="text-classification")


if __name__ == "__main__":
    main()
