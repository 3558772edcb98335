"""Extractive question answering with a trainer from the module beside."""

import numpy as np
from tiny import SIZES, sentences, train_and_evaluate, train_tokenizer
from trainer_qa import QuestionAnsweringTrainer
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from transformers import Trainer, TrainingArguments  # isort: skip


def main():
    (training_args,) = HfArgumentParser((TrainingArguments,)).parse_args_into_dataclasses()
    set_seed(training_args.seed)

    tokenizer = train_tokenizer()
    model = BertForQuestionAnswering(BertConfig(vocab_size=len(tokenizer), **SIZES))

    def preprocess(text):
        words = text.split()
        coded = tokenizer(words[3], text)
        return {**coded, "start_positions": 3 + words.index(words[3]), "end_positions": 6}

    texts = sentences(48)
    examples = list(map(preprocess, texts))

    def post_process(asked, predictions):
        starts, _ = predictions
        return {"exact_match": float(np.mean(starts.argmax(1)[: len(asked)] == 3))}

    trainer = QuestionAnsweringTrainer(
        model=model,
        args=training_args,
        train_dataset=examples[:32],
        eval_dataset=examples[32:],
        eval_examples=texts[32:],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        post_process_function=post_process,
    )
    assert isinstance(trainer, Trainer)
    train_and_evaluate(trainer, training_args, tasks="question-answering")


if __name__ == "__main__":
    main()
