"""How the tests run a script: flags, what a run leaves behind, Ctrl-C at a step of one's choice."""

import json
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import run_clm
from datasets import ClassLabel
from PIL import Image
from transformers import BertConfig

from hf_salsa import BatchObjective

SCRIPTS = Path(run_clm.__file__).parent
SCRIPT_FLAGS = ["--use_cpu", "true", "--disable_tqdm", "true", "--max_steps", "2"]
GLUE_FLAGS = ["--max_train_samples", "32", "--max_eval_samples", "16"]
TINY_GPT2 = "n_layer=1,n_head=2,n_embd=16"
CLM_FLAGS = ["--config_overrides", TINY_GPT2, "--block_size", "32"]


class ScriptResult(NamedTuple):
    """What one run of a script left behind."""

    folder: Path
    stdout: str

    def json(self, name):
        return json.loads((self.folder / name).read_text())

    def log(self, key):
        """The values of `key` in the log, in order."""
        history = self.json("trainer_state.json")["log_history"]
        return [entry[key] for entry in history if key in entry]


def tiny_bert_config(tokenizer, **overrides):
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=tokenizer.model_max_length,
        **overrides,
    )


def interrupt_in_trial(patch, update):
    """Let Ctrl-C arrive while the search of an update (1, 2, ...) evaluates a trial."""
    record, evaluate = BatchObjective.record_step, BatchObjective.__call__
    updates = []

    def counting_record(self, *args):
        updates.append(1)
        return record(self, *args)

    def interrupted_evaluate(self):
        if len(updates) == update:
            raise KeyboardInterrupt
        return evaluate(self)

    patch.setattr(BatchObjective, "record_step", counting_record)
    patch.setattr(BatchObjective, "__call__", interrupted_evaluate)


def without_times(history):
    return [
        {
            key: value
            for key, value in entry.items()
            if "runtime" not in key and "per_second" not in key
        }
        for entry in history
    ]


CIFAR100 = {  # columns of the hub's copy
    "img": datasets.Image(),
    "fine_label": ClassLabel(names=["apple", "bear"]),
    "coarse_label": ClassLabel(names=["fruit", "animal"]),
}


def colour(red, blue, size=(16, 12), seed=0):
    """A noisy image of one colour."""
    noise = np.random.default_rng(seed).integers(0, 40, (size[1], size[0], 3))
    return Image.fromarray((noise + np.array([red, 60, blue])).astype(np.uint8))
