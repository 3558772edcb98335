"""A script whose workers are spawned: they import it anew and get its data, arguments and all."""

import multiprocessing
from dataclasses import dataclass

import torch
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, set_seed

from transformers import Trainer, TrainingArguments  # isort: skip


@dataclass
class Arguments(TrainingArguments):
    words: int = 6


class Words(torch.utils.data.Dataset):
    def __init__(self, args):
        self.args = args

    def __len__(self):
        return 32

    def __getitem__(self, i):
        assert isinstance(self.args, TrainingArguments)
        assert self.args.optim == "salsa_sgd"
        assert torch.utils.data.get_worker_info() is not None
        return {"input_ids": torch.arange(i, i + self.args.words), "labels": i % 2}


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    trainer = Trainer(BertForSequenceClassification(config), args, train_dataset=Words(args))
    trainer.train()
    trainer.save_state()
