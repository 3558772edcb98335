"""Multiple choice: a collator of the script's own."""

from dataclasses import dataclass

import torch
from tiny import SIZES, sentences, train_and_evaluate, train_tokenizer
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    set_seed,
)

from transformers import Trainer, TrainingArguments  # isort: skip


@dataclass
class DataCollatorForChoices:
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, features):
        flat = [dict(choice) for feature in features for choice in feature["choices"]]
        batch = self.tokenizer.pad(flat, return_tensors="pt")
        batch = {name: tensor.view(len(features), 2, -1) for name, tensor in batch.items()}
        batch["labels"] = torch.tensor([feature["label"] for feature in features])
        return batch


def main():
    (training_args,) = HfArgumentParser((TrainingArguments,)).parse_args_into_dataclasses()
    training_args.remove_unused_columns = False
    set_seed(training_args.seed)

    tokenizer = train_tokenizer()
    model = BertForMultipleChoice(BertConfig(vocab_size=len(tokenizer), **SIZES))
    examples = [
        {"choices": [tokenizer(first, end) for end in (first, other)][:: 1 - 2 * (i % 2)]}
        | {"label": i % 2}
        for i, (first, other) in enumerate(zip(sentences(48), sentences(48, seed=1), strict=True))
    ]

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=examples[:32],
        eval_dataset=examples[32:],
        processing_class=tokenizer,
        data_collator=DataCollatorForChoices(tokenizer),
    )
    train_and_evaluate(trainer, training_args, tasks="multiple-choice")


if __name__ == "__main__":
    main()
