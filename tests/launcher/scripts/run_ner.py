"""Token classification, logits turned to classes before they are gathered."""

from tiny import SIZES, sentences, train_and_evaluate, train_tokenizer
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    HfArgumentParser,
    set_seed,
)

from transformers import Trainer, TrainingArguments  # isort: skip


def main():
    parser = HfArgumentParser((TrainingArguments,))
    (training_args,) = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    tokenizer = train_tokenizer()
    model = BertForTokenClassification(BertConfig(vocab_size=len(tokenizer), num_labels=2, **SIZES))

    def preprocess(text):
        coded = tokenizer(text.split(), is_split_into_words=True)
        words = coded.word_ids()
        labels = [-100 if i is None else int(text.split()[i] in ("dog", "cat")) for i in words]
        return {**coded, "labels": labels}

    examples = list(map(preprocess, sentences(48)))

    def compute_metrics(p):
        known = p.label_ids != -100
        return {"accuracy": (p.predictions == p.label_ids)[known].mean().item()}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=examples[:32],
        eval_dataset=examples[32:],
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    train_and_evaluate(trainer, training_args, tasks="token-classification")


if __name__ == "__main__":
    main()
