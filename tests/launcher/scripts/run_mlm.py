"""Masked language modelling: the collator draws masks."""

from tiny import SIZES, sentences, train_and_evaluate, train_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    set_seed,
)

from transformers import Trainer, TrainingArguments  # isort: skip


def main():
    (training_args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    set_seed(training_args.seed)

    tokenizer = train_tokenizer()
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SIZES))
    examples = [tokenizer(text, return_special_tokens_mask=True) for text in sentences(48)]

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=examples[:32],
        eval_dataset=examples[32:],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
    )
    train_and_evaluate(trainer, training_args, tasks="fill-mask")


if __name__ == "__main__":
    main()
