"""Translation: T5, and generation for the metric."""

import numpy as np
from tiny import sentences, train_and_evaluate, train_tokenizer
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments  # isort: skip


def main():
    parser = HfArgumentParser((Seq2SeqTrainingArguments,))
    (training_args,) = parser.parse_args_into_dataclasses()
    training_args.predict_with_generate = True
    training_args.generation_max_length = 8
    set_seed(training_args.seed)

    tokenizer = train_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)

    def preprocess(text):
        turned = " ".join(reversed(text.split()))
        return {**tokenizer(text), "labels": tokenizer(text_target=turned)["input_ids"]}

    examples = list(map(preprocess, sentences(40)))
    for example in examples:
        example.pop("token_type_ids", None)

    def compute_metrics(p):
        return {"gen_len": float(np.mean([np.count_nonzero(row > 0) for row in p.predictions]))}

    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=examples[:32],
        eval_dataset=examples[32:],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100),
        compute_metrics=compute_metrics,
    )
    train_and_evaluate(trainer, training_args, tasks="translation", language=["en", "ne"])


if __name__ == "__main__":
    main()
