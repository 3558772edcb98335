"""Text for language models: arguments, data, tokenizers, models, the trainer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.trainer_utils import EvalLoopOutput

from hf_salsa import SaLSaTrainer
from support.command_line import UsageError, did_you_mean, overwrite_flag
from support.embedded_data import python_documentation

EMBEDDED_NAME = "prose of Python's documentation"
EMBEDDED_NOTICE = (
    f"No data was given: this run uses embedded text, the {EMBEDDED_NAME},\n"
    "which every Python installation carries."
)
SMALL_GPT2 = {"n_layer": 4, "n_head": 4, "n_embd": 128}
BYTES = 256  # the symbols of a byte-level tokenizer without merges
DEFAULT_VOCAB_SIZE = 2048
SMALL_BLOCK = 128
LONGEST_DEFAULT_BLOCK = 1024
METRICS = ("loss", "perplexity", "loss_per_character")


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A model of the hub or a folder to fine-tune. Default: a small GPT-2 from "
            "scratch (4 layers, 4 heads, 128 dimensions)."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "From scratch: settings of GPT2Config, such as "
            "n_layer=4,n_head=4,n_embd=128,resid_pdrop=0."
        },
    )
    tokenizer: Literal["bpe", "bytes"] = field(
        default="bpe",
        metadata={
            "help": "From scratch: bpe trains a byte-level BPE on the training text, bytes makes "
            "each byte a token."
        },
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": f"From scratch: tokens of the BPE. Default: {DEFAULT_VOCAB_SIZE}."},
    )
    block_size: int | None = field(
        default=None,
        metadata={
            "help": f"Tokens of a training example. Default: {SMALL_BLOCK} from scratch, else as "
            f"many as the model has positions, at most {LONGEST_DEFAULT_BLOCK}."
        },
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path:
            for name, default in (
                ("config_overrides", None),
                ("tokenizer", "bpe"),
                ("vocab_size", None),
            ):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} is for a model from scratch: leave it out, or model_name_or_path"
                    )
        if self.vocab_size is not None and self.tokenizer == "bytes":
            raise ValueError(f"tokenizer=bytes has {BYTES} symbols: leave vocab_size out")
        if self.vocab_size is not None and self.vocab_size <= BYTES:
            raise ValueError(
                f"vocab_size must be above {BYTES}, one for each byte, got {self.vocab_size}; "
                "--tokenizer bytes needs no more"
            )
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {self.block_size}")
        self.overrides = _parse_overrides(self.config_overrides or "")


def _parse_overrides(text: str) -> dict[str, Any]:
    """Return the settings in `text`, name=value separated by commas."""
    known = [name for name in GPT2Config.__annotations__ if name != "vocab_size"]
    overrides = {}
    for entry in filter(None, text.split(",")):
        name, _, value = entry.partition("=")
        if name == "vocab_size":
            raise ValueError("config_overrides: the tokenizer sets vocab_size; use --vocab_size")
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"config_overrides: GPT2Config has no setting {name!r}.{hint}")
        try:
            overrides[name] = json.loads(value)
        except json.JSONDecodeError:
            overrides[name] = value  # a word; GPT2Config checks the type
    return overrides


@dataclass
class DataArguments:
    """Which text to train on: a file, a data set of the hub, or (neither) the embedded text."""

    train_file: str | None = field(default=None, metadata={"help": "A text file (UTF-8)."})
    validation_file: str | None = field(
        default=None, metadata={"help": "A text file to evaluate on."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": 'A data set of the hub with a column "text". Held in memory as a whole.'},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Which configuration of it."}
    )
    validation_fraction: float = field(
        default=0.1,
        metadata={"help": "The share of the text, at its end, that is held out if no other is."},
    )
    overwrite_output_dir: bool = overwrite_flag()

    def __post_init__(self) -> None:
        if self.train_file and self.dataset_name:
            raise ValueError("give a train_file or a dataset_name, not both")
        if self.validation_file and not self.train_file:
            raise ValueError("validation_file needs a train_file")
        if self.dataset_config_name and not self.dataset_name:
            raise ValueError("dataset_config_name needs a dataset_name")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must be between 0 and 1, got {self.validation_fraction}"
            )


def is_embedded(args: DataArguments) -> bool:
    """Return whether no data was given."""
    return not args.train_file and not args.dataset_name


def data_name(args: DataArguments) -> str:
    """Return what people call the text that `args` ask for."""
    return args.dataset_name or Path(args.train_file or EMBEDDED_NAME).name


# What loads text raises a UsageError.


def load_texts(args: DataArguments) -> tuple[str, str]:
    """Return the text to train on and the text held out, as `args` ask for them."""
    validation = None
    if args.dataset_name:
        train, validation = load_from_hub(args.dataset_name, args.dataset_config_name)
    elif args.train_file:
        train = _read_text(args.train_file)
        if args.validation_file:
            validation = _read_text(args.validation_file)
    else:
        train = python_documentation()
    if validation is None:
        cut = round(len(train) * (1 - args.validation_fraction))
        train, validation = train[:cut], train[cut:]
    return train, validation


def load_from_hub(name: str, config_name: str | None) -> tuple[str, str | None]:
    """Return the splits train and validation (None if there is none) of a data set of the hub."""
    try:
        data = datasets.load_dataset(name, config_name)
    except (OSError, ValueError) as error:  # no network, no such data set or configuration
        raise UsageError(
            f"{name} did not load from the hub ({error}); --train_file reads a text file"
        ) from error
    if "train" not in data or "text" not in data["train"].column_names:
        raise UsageError(f'{name} has no split train with a column "text"')
    texts = {
        split: "".join(row if row.endswith("\n") else f"{row}\n" for row in data[split]["text"])
        for split in ("train", "validation")
        if split in data
    }
    return texts["train"], texts.get("validation")


def _read_text(file: str) -> str:
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    if not text.strip():
        raise UsageError(f"{path} holds no text")
    return text


class Blocks(NamedTuple):
    """A text as examples of one length.

    The first token of each block is context only: `characters_per_token` is about the others, which
    are predicted.
    """

    dataset: Dataset
    characters_per_token: float


def make_blocks(
    text: str, tokenizer: PreTrainedTokenizerBase, block_size: int, text_name: str
) -> Blocks:
    """Cut the tokens of `text` into blocks, and leave out the few at the end that fill none."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = len(encoding["input_ids"])
    rows = tokens // block_size
    if rows == 0:
        raise UsageError(
            f"{text_name} has {tokens} tokens, which fill no block of {block_size}: give more "
            "text or a smaller --block_size"
        )

    def cut(values: Sequence[int]) -> np.ndarray:
        return np.array(values[: rows * block_size]).reshape(rows, block_size)

    input_ids = cut(encoding["input_ids"])
    # Where each token ends in the text. A token's characters are those since the one before it
    # ended: a character of several bytes counts once, blanks that a tokenizer drops count too.
    ends = cut([end for _, end in encoding["offset_mapping"]])
    characters = int((ends[:, -1] - ends[:, 0]).sum())
    return Blocks(
        Dataset.from_dict({"input_ids": input_ids, "labels": input_ids}),
        characters_per_token=characters / (rows * (block_size - 1)),
    )


def model_and_tokenizer(
    args: ModelArguments, train_text: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
    """Return the model that `args` ask for, its tokenizer, and the tokens of a block."""
    if args.model_name_or_path:
        model, tokenizer = load_model_and_tokenizer(args.model_name_or_path)
        positions = model.config.max_position_embeddings
        block_size = args.block_size or min(positions, LONGEST_DEFAULT_BLOCK)
    else:
        vocab_size = args.vocab_size or DEFAULT_VOCAB_SIZE
        tokenizer = make_tokenizer(train_text, BYTES if args.tokenizer == "bytes" else vocab_size)
        block_size = args.block_size or SMALL_BLOCK
        model = make_model(len(tokenizer), block_size, args.overrides)
        positions = tokenizer.model_max_length = model.config.n_positions
    if block_size > positions:
        raise UsageError(f"block_size {block_size} exceeds the model's {positions} positions")
    # Trainer counts the predicted tokens of an update by this, which GPT-2's class leaves unset.
    model.loss_type = "ForCausalLM"
    return model, tokenizer, block_size


def make_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """Return a byte-level BPE trained on `text`; with a vocabulary of 256 it knows bytes only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def make_model(vocab_size: int, block_size: int, overrides: dict[str, Any]) -> PreTrainedModel:
    """Return a GPT-2 with random weights: a small one, but for `overrides`.

    Raises:
        UsageError: There is no GPT-2 with these overrides.
    """
    settings = {
        **SMALL_GPT2,
        "vocab_size": vocab_size,
        "n_positions": block_size,
        "bos_token_id": None,
        "eos_token_id": None,
        **overrides,
    }
    try:
        return GPT2LMHeadModel(GPT2Config(**settings))
    # A value of the wrong type; what the layers make of 3 heads on 128 dimensions, an unknown
    # activation function, no heads.
    except (StrictDataclassError, ValueError, KeyError, ZeroDivisionError) as error:
        raise UsageError(f"config_overrides make no GPT-2: {error!r}") from error


def load_model_and_tokenizer(name_or_path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a pretrained model and its tokenizer.

    Raises:
        UsageError: There is no such model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=torch.float32,  # in half precision small steps round away; --bf16 is autocast
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"model {name_or_path} did not load: {error}") from error
    return model, tokenizer


class LanguageModelTrainer(SaLSaTrainer):
    """`SaLSaTrainer` that also reports the perplexity and the loss per character.

    Args:
        characters_per_token: Of the evaluation data.
    """

    def __init__(self, *args: Any, characters_per_token: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.characters_per_token = characters_per_token

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; all examples have one length, so that the loss is the mean over tokens."""
        output = super().evaluation_loop(*args, **kwargs)
        loss = output.metrics["eval_loss"]
        # By torch: the exponential of a run that diverged is infinite, not an error.
        output.metrics["eval_perplexity"] = torch.tensor(loss, dtype=torch.float64).exp().item()
        output.metrics["eval_loss_per_character"] = loss / self.characters_per_token
        return output


def sample_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return some tokens that the model makes up, after a first one."""
    length = min(60, model.config.max_position_embeddings - 1)
    prompt = tokenizer("T", return_tensors="pt").to(model.device)
    tokens = model.generate(**prompt, max_new_tokens=length, do_sample=True, top_k=20)
    return tokenizer.decode(tokens[0])


def card_settings(args: DataArguments) -> dict[str, str]:
    """Return what the model card says about the data, for `Trainer.create_model_card`."""
    settings = {"tasks": "text-generation", "dataset": data_name(args)}
    if args.dataset_name:
        settings["dataset_tags"] = args.dataset_name
        if args.dataset_config_name:
            settings["dataset_args"] = args.dataset_config_name
    elif is_embedded(args):
        settings["language"] = "en"
    return settings


def describe(
    args: DataArguments,
    train: Blocks,
    validation: Blocks,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Return the lines that say what is about to be trained on what."""
    block_size = len(train.dataset[0]["input_ids"])
    lines = [
        f"Data: {data_name(args)}, train {len(train.dataset)}, validation "
        f"{len(validation.dataset)} blocks of {block_size} tokens; "
        f"{validation.characters_per_token:.2f} characters a token.",
        f"Model: {model.name_or_path or 'a GPT-2 from scratch'}, "
        f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens.",
    ]
    return "\n".join([EMBEDDED_NOTICE, *lines] if is_embedded(args) else lines)
