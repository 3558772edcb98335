"""Summarization: BART, and arguments derived from those of transformers."""

from dataclasses import dataclass, field

from tiny import sentences, train_and_evaluate, train_tokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    set_seed,
)

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments  # isort: skip


@dataclass
class SummaryArguments(Seq2SeqTrainingArguments):
    words: int = field(default=2, metadata={"help": "How many words make a summary."})

    def __post_init__(self):
        super().__post_init__()
        if self.words < 1:
            raise ValueError("No summary has less than one word.")


def main():
    (training_args,) = HfArgumentParser((SummaryArguments,)).parse_args_into_dataclasses()
    set_seed(training_args.seed)

    tokenizer = train_tokenizer()
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.sep_token_id,
        forced_eos_token_id=tokenizer.sep_token_id,
        **sides,
    )
    model = BartForConditionalGeneration(config)

    def preprocess(text):
        summary = " ".join(text.split()[: training_args.words])
        coded = tokenizer(text, return_token_type_ids=False)
        return {**coded, "labels": tokenizer(text_target=summary)["input_ids"]}

    examples = list(map(preprocess, sentences(40)))

    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=examples[:32],
        eval_dataset=examples[32:],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    train_and_evaluate(trainer, training_args, tasks="summarization")


if __name__ == "__main__":
    main()
