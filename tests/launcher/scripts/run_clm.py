"""Causal language modelling on blocks of text, arguments by attribute."""

import transformers
from tiny import sentences, train_and_evaluate, train_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator, set_seed

from transformers import Trainer, TrainingArguments  # isort: skip


def main():
    parser = transformers.HfArgumentParser((TrainingArguments,))
    (training_args,) = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    tokenizer = train_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=1,
        n_head=2,
        n_embd=16,
        n_positions=16,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    model = GPT2LMHeadModel(config)

    tokens = tokenizer(" ".join(sentences(100)))["input_ids"]
    blocks = [tokens[i : i + 12] for i in range(0, len(tokens) - 11, 12)]
    examples = [{"input_ids": block, "labels": block.copy()} for block in blocks]

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=examples[:32],
        eval_dataset=examples[32:],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    train_and_evaluate(trainer, training_args, dataset="sentences")


if __name__ == "__main__":
    main()
