"""Classification with several labels, and a trainer with a loss of its own."""

from dataclasses import dataclass, field

import torch
from tiny import SIZES, WORDS, sentences, train_and_evaluate, train_tokenizer
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, set_seed

from transformers import Trainer, TrainingArguments  # isort: skip

WEIGHTS = torch.tensor([1.0, 2.0, 4.0])


@dataclass
class DataTrainingArguments:
    shuffle_train_dataset: bool = field(default=False)


class WeightedTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            outputs.logits, labels, pos_weight=WEIGHTS
        )
        return (loss, outputs) if return_outputs else loss


def main():
    parser = HfArgumentParser((DataTrainingArguments, TrainingArguments))
    _, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    tokenizer = train_tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), num_labels=3, **SIZES)
    model = BertForSequenceClassification(config)
    texts = sentences(48)
    examples = [
        {**coded, "labels": [float(word in text) for word in WORDS[1:4]]}
        for text, coded in zip(texts, map(tokenizer, texts), strict=True)
    ]

    trainer = WeightedTrainer(
        model=model,
        args=training_args,
        train_dataset=examples[:32],
        eval_dataset=examples[32:],
        processing_class=tokenizer,
    )
    train_and_evaluate(trainer, training_args)


if __name__ == "__main__":
    main()
