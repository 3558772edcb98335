"""The tasks of GLUE and sentences of one's own: arguments, data, models, metrics."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import BertWordPieceTokenizer
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from support.command_line import UsageError, check_sample_limits, overwrite_flag
from support.embedded_data import bigram_shift_pairs
from support.glue_metric import METRIC_NAMES, GlueMetric
from support.glue_tasks import TASKS
from support.tables import load_own_files, position_of, read_delimited, to_dataset

BIGRAM_LABELS = ("original", "shifted")
DEFAULT_MODEL = "google-bert/bert-base-uncased"
EMBEDDED_NOTICE = (
    "No data was given: this run uses the embedded bigram-shift probe, real sentences of Python's\n"
    "own documentation against the same sentences with two neighbouring words swapped."
)
HUB_DATASET = "nyu-mll/glue"


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A model of the hub or a folder. Default: the paper's "
            f"{DEFAULT_MODEL}; for the embedded data a small BERT from scratch."
        },
    )
    max_seq_length: int = field(
        default=256, metadata={"help": "Tokens after which an example is cut off."}
    )

    def __post_init__(self) -> None:
        if self.max_seq_length < 8:
            raise ValueError(f"max_seq_length must be at least 8, got {self.max_seq_length}")


@dataclass
class DataArguments:
    """Which data to train on: a GLUE task, files of one's own, or (neither) the embedded data."""

    task_name: str | None = field(
        default=None, metadata={"help": f"A GLUE task: {', '.join(TASKS)}."}
    )
    glue_dir: str | None = field(
        default=None,
        metadata={
            "help": "The folder of GLUE's own files (MRPC/train.tsv, ...). Without it a task comes "
            f"from the hub ({HUB_DATASET})."
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "Own data: .csv, .tsv (no quoting) or .jsonl (one object a line)."},
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Own data to evaluate on, likewise."}
    )
    text_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "The one or two text columns of own data. Default: sentence1 and sentence2, or "
            "sentence."
        },
    )
    label_column: str = field(
        default="label",
        metadata={
            "help": "The label column of own data. Numbers of which some have a decimal point are "
            "values to predict (regression); anything else names classes."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first so many examples only."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first so many examples only."}
    )
    overwrite_output_dir: bool = overwrite_flag()

    def __post_init__(self) -> None:
        if self.task_name is not None and self.task_name not in TASKS:
            raise ValueError(
                f"task_name={self.task_name!r} is not a GLUE task: choose from {', '.join(TASKS)}"
            )
        if self.glue_dir and not self.task_name:
            raise ValueError("glue_dir needs a task_name")
        if self.task_name and (self.train_file or self.validation_file):
            raise ValueError("give a task_name or files of your own, not both")
        if bool(self.train_file) != bool(self.validation_file):
            raise ValueError("own data needs both a train_file and a validation_file")
        if self.text_columns and len(self.text_columns) > 2:
            raise ValueError(f"text_columns takes one or two columns, got {self.text_columns}")
        check_sample_limits(self)


def is_embedded(args: DataArguments) -> bool:
    """Return whether no data was given."""
    return not args.task_name and not args.train_file


# Every loader below returns the splits train and validation (MNLI: validation_matched and
# validation_mismatched) with the columns sentence1, sentence2 (of pairs) and label, whose feature
# says the rest: a ClassLabel with its names, or a float to predict. They raise a UsageError.


def load_data(args: DataArguments) -> DatasetDict:
    """Return the data that `args` ask for."""
    if args.task_name and args.glue_dir:
        data = load_glue_files(args.task_name, args.glue_dir)
    elif args.task_name:
        data = load_glue_from_hub(args.task_name)
    elif args.train_file and args.validation_file:
        data = load_own_files(
            args.train_file, args.validation_file, args.text_columns, args.label_column
        )
    else:
        data = load_embedded_data()
    for split, dataset in data.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit is not None:
            data[split] = dataset.select(range(min(limit, len(dataset))))
    return data


def load_glue_files(task_name: str, glue_dir: str | Path) -> DatasetDict:
    """Return a GLUE task from the folder of GLUE's own files."""
    task = TASKS[task_name]
    folder = Path(glue_dir) / task.folder
    paths = {"train": folder / "train.tsv"}
    for suffix in task.validation_suffixes:
        paths[f"validation{suffix}"] = folder / f"dev{suffix}.tsv"
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise UsageError(f"{task_name} needs {' and '.join(missing)}: no such file")
    spelling = task.file_labels or task.labels
    label_ids = {text: i for i, text in enumerate(spelling)} if spelling else None
    splits = {}
    for split, path in paths.items():
        table = read_delimited(path, task.header)
        needed = [position_of(table, name) for name in (*task.text_columns, task.label_column)]
        # QQP's training file has some broken lines, which the copy on the hub leaves out as well.
        complete = [row for row in table.rows if len(row.values) > max(needed)]
        if len(complete) < len(table.rows):
            broken = len(table.rows) - len(complete)
            print(f"{path}: left out {broken} of {len(table.rows)} lines, which lack columns")
        splits[split] = to_dataset(table._replace(rows=complete), needed, label_ids, task.labels)
    return DatasetDict(splits)


def load_glue_from_hub(task_name: str) -> DatasetDict:
    """Return a GLUE task from the hub."""
    task = TASKS[task_name]
    try:
        data = datasets.load_dataset(HUB_DATASET, task_name)
    except OSError as error:  # includes what datasets raises without a network
        raise UsageError(
            f"{task_name} did not load from the hub ({error}); --glue_dir reads GLUE's own files"
        ) from error
    names = dict(zip(task.hub_text_columns, ("sentence1", "sentence2"), strict=False))
    return DatasetDict(
        {
            split: dataset.select_columns([*names, "label"]).rename_columns(
                {old: new for old, new in names.items() if old != new}
            )
            for split, dataset in data.items()
            if not split.startswith("test")  # their labels are not public
        }
    )


def load_embedded_data() -> DatasetDict:
    """Return the bigram-shift probe on the prose of Python's documentation."""
    features = Features(
        {"sentence1": Value("string"), "label": ClassLabel(names=list(BIGRAM_LABELS))}
    )
    splits = {}
    for split in ("train", "validation"):
        rows = bigram_shift_pairs(split=split)
        splits[split] = Dataset.from_dict(
            {
                "sentence1": [row["sentence"] for row in rows],
                "label": [row["label"] for row in rows],
            },
            features=features,
        )
    return DatasetDict(splits)


def is_regression(data: DatasetDict) -> bool:
    """Return whether the label is a number to predict."""
    return not isinstance(data["train"].features["label"], ClassLabel)


def tokenize(
    data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> DatasetDict:
    """Replace the text columns by the tokenizer's, cut off at `max_seq_length` tokens.

    Or where the model's positions end, if that is before.
    """
    max_length = min(max_seq_length, tokenizer.model_max_length)
    text_columns = [name for name in ("sentence1", "sentence2") if name in data["train"].features]

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [batch[name] for name in text_columns]
        return tokenizer(*texts, truncation=True, max_length=max_length)

    return data.map(encode, batched=True, remove_columns=text_columns)


def validation_sets(data: DatasetDict) -> Dataset | dict[str, Dataset]:
    """Return the validation split, or those of MNLI by name, as `Trainer` takes them."""
    if "validation" in data:
        return data["validation"]
    return {
        split.removeprefix("validation_"): dataset
        for split, dataset in data.items()
        if split != "train"
    }


def model_and_tokenizer(
    model_args: ModelArguments, data_args: DataArguments, data: DatasetDict
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model that the arguments ask for, and its tokenizer."""
    if model_args.model_name_or_path is None and is_embedded(data_args):
        return make_model_and_tokenizer(data)
    return load_model_and_tokenizer(model_args.model_name_or_path or DEFAULT_MODEL, data)


def load_model_and_tokenizer(
    name_or_path: str, data: DatasetDict
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a pretrained model with a new head for the labels of `data`, and its tokenizer.

    Raises:
        UsageError: There is no such model.
    """
    label = data["train"].features["label"]
    if is_regression(data):
        head = {"num_labels": 1, "problem_type": "regression"}
    else:
        head = {
            "num_labels": label.num_classes,
            "id2label": dict(enumerate(label.names)),
            "label2id": {name: i for i, name in enumerate(label.names)},
            "problem_type": "single_label_classification",
        }
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        model = AutoModelForSequenceClassification.from_pretrained(
            name_or_path,
            config=AutoConfig.from_pretrained(name_or_path, **head),
            ignore_mismatched_sizes=True,  # a model fine-tuned on other labels gets a new head
            dtype=torch.float32,  # in half precision small steps round away; --bf16 is autocast
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"model {name_or_path} did not load: {error}") from error
    if tokenizer.pad_token is None:  # GPT-2 and its kind
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def make_model_and_tokenizer(
    data: DatasetDict, vocab_size: int = 4000
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a small BERT with random weights and a WordPiece tokenizer trained on `data`.

    Args:
        data: What `load_embedded_data` returns.
        vocab_size: The number of word pieces.
    """
    texts = data["train"]["sentence1"]
    # The trainer would number the pieces that continue a word in the random order of a hash map,
    # and break ties by number: each process would get another vocabulary.
    characters = {character for text in texts for character in text.lower() if character.isalnum()}
    word_pieces = BertWordPieceTokenizer()
    word_pieces.train_from_iterator(
        texts,
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[
            *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
            *(f"##{character}" for character in sorted(characters)),
        ],
    )
    tokenizer = BertTokenizer(vocab=word_pieces.get_vocab(), model_max_length=128)
    names = data["train"].features["label"].names
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return BertForSequenceClassification(config), tokenizer


def make_compute_metrics(config_name: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the function that `Trainer` takes.

    Args:
        config_name: A key of `glue_metric.METRIC_NAMES`.
    """
    metric = GlueMetric(config_name, keep_in_memory=True)
    continuous = "pearson" in METRIC_NAMES[config_name]

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        if isinstance(logits, tuple):  # some models return more than logits
            logits = logits[0]
        return metric.compute(
            predictions=logits.squeeze(-1) if continuous else logits.argmax(-1),
            references=prediction.label_ids,
        )

    return compute_metrics


def metric_config(data: DatasetDict, task_name: str | None) -> str:
    """Return the `GlueMetric` configuration of a task, or of data that is none of GLUE's."""
    return task_name or ("regression" if is_regression(data) else "classification")


def metric_names(data: DatasetDict, config_name: str) -> list[str]:
    """Return what an evaluation reports: the loss and the metrics, of MNLI for each of its sets."""
    sets = validation_sets(data)
    prefixes = [f"{name}_" for name in sets] if isinstance(sets, dict) else [""]
    names = ("loss", *METRIC_NAMES[config_name])
    return [f"{prefix}{name}" for prefix in prefixes for name in names]


def data_name(args: DataArguments) -> str:
    """Return what people call the data that `args` ask for."""
    if args.task_name:
        return f"GLUE {args.task_name.upper()}"
    if args.train_file:
        return Path(args.train_file).name
    return "bigram shift (sentences of Python's documentation)"


def card_settings(args: DataArguments) -> dict[str, str]:
    """Return what the model card says about the data, for `Trainer.create_model_card`."""
    settings = {"tasks": "text-classification", "dataset": data_name(args)}
    if args.task_name:
        settings |= {"dataset_tags": HUB_DATASET, "dataset_args": args.task_name}
    if not args.train_file:
        settings["language"] = "en"
    return settings


def describe(args: DataArguments, data: DatasetDict, model: PreTrainedModel) -> str:
    """Return the lines that say what is about to be trained on what."""
    sizes = ", ".join(f"{split} {len(dataset)}" for split, dataset in data.items())
    lines = [
        f"Data: {data_name(args)}, {sizes} examples.",
        f"Model: {model.name_or_path or 'a small BERT from scratch'}, "
        f"{model.num_parameters():,} parameters.",
    ]
    return "\n".join([EMBEDDED_NOTICE, *lines] if is_embedded(args) else lines)
