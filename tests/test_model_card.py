"""The model card and its plot, from log histories made by hand and from real runs."""

import builtins
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    TrainerState,
    TrainingArguments,
    ViTImageProcessor,
)

from hf_salsa import (
    SLSSGD,
    SaLSaAdam,
    SaLSaAdamPlus,
    SaLSaSGD,
    SaLSaSGDPlus,
    SaLSaTrainer,
    SaLSaTrainingArguments,
    SLSAdam,
    model_card,
)
from hf_salsa.model_card import write_model_card
from hf_salsa.objective import unwrap_optimizer

VERSIONS = {"hf_salsa": "0.1.0", "transformers": "5.23.0", "torch": "2.13.0"}


def train(step, loss, step_size, trials=0):
    return {
        "loss": loss,
        "grad_norm": 1.0,
        "learning_rate": step_size,
        "salsa/searches": step,
        "salsa/trials": trials,
        "epoch": step / 50,
        "step": step,
    }


def evaluation(step, prefix="eval", **metrics):
    return {
        **{f"{prefix}_{name}": value for name, value in metrics.items()},
        f"{prefix}_runtime": 0.5,
        f"{prefix}_samples_per_second": 100.0,
        f"{prefix}_steps_per_second": 10.0,
        f"{prefix}_model_preparation_time": 0.001,
        "epoch": step / 50,
        "step": step,
    }


def end(step, **report):
    defaults = {
        "searches": 60,
        "trials": 90,
        "extra_forward_share": 90 / 190,
        "failed_searches": 2,
        "skipped_steps": 1,
        "median_step_size": 3.14159e-05,
        "final_step_size": 2.5e-05,
    }
    return {
        "train_runtime": 12.5,
        "train_samples_per_second": 64.0,
        "train_steps_per_second": 8.0,
        "total_flos": 1.0,
        "train_loss": 0.6,
        **{f"salsa/{name}": value for name, value in (defaults | report).items()},
        "epoch": step / 50,
        "step": step,
    }


HISTORY = [
    evaluation(0, loss=0.7, accuracy=0.5),
    train(1, 0.71, 0.5),
    train(50, 0.65, 4e-05),
    evaluation(50, loss=0.66, accuracy=0.75),
    train(100, 0.0004321, 2.5e-05),
    evaluation(100, loss=0.61234, accuracy=0.875),
    end(100),
]


@pytest.fixture
def write(tmp_path, bert, monkeypatch):
    """Write a card from a log history; return its text."""
    monkeypatch.setattr(model_card, "_versions", lambda is_adapter: VERSIONS)

    def make(history=HISTORY, *, optimizer=SaLSaAdam, settings=None, state=None, **options):
        folder = tmp_path / "tiny-bert"
        model = options.pop("model", None) or bert()
        arguments = TrainingArguments(
            str(folder),
            **{
                "use_cpu": True,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "max_grad_norm": 0.0,
                **options.pop("arguments", {}),
            },
        )
        steps = max((entry["step"] for entry in history), default=0)
        state = {"global_step": steps, "max_steps": steps, "epoch": steps / 50} | (state or {})
        write_model_card(
            folder,
            state=TrainerState(log_history=history, train_batch_size=4, **state),
            arguments=arguments,
            optimizer=optimizer(model.parameters(), **(settings or {})),
            model=model,
            **options,
        )
        make.folder = folder
        return (folder / "README.md").read_text(encoding="utf-8")

    return make


def section(card, heading):
    """Return the lines of a card below a heading, up to the next one."""
    lines = card.splitlines()
    start = lines.index(heading) + 1
    stop = next((i for i in range(start, len(lines)) if lines[i].startswith("#")), len(lines))
    return [line for line in lines[start:stop] if line]


def table(card):
    lines = section(card, "### Training results")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


# --- A whole card

EXPECTED = """\
---
base_model: google/bert_uncased_L-2_H-128_A-2
datasets:
- nyu-mll/glue
language:
- en
library_name: transformers
license: apache-2.0
metrics:
- accuracy
tags:
- tiny
- generated_from_trainer
- hf_salsa
model-index:
- name: tiny-bert
  results:
  - task:
      type: text-classification
      name: Text Classification
    dataset:
      name: GLUE MRPC
      type: nyu-mll/glue
      args: mrpc
    metrics:
    - type: loss
      value: 0.61234
      name: Loss
    - type: accuracy
      value: 0.875
      name: Accuracy
---

<!-- This model card was written by hf_salsa from what the trainer knew. Proofread and complete \
it, then remove this comment. -->

# tiny-bert

This model is a fine-tuned version of [google/bert_uncased_L-2_H-128_A-2]\
(https://huggingface.co/google/bert_uncased_L-2_H-128_A-2) on the GLUE MRPC dataset, without a \
learning rate.

Results on the evaluation set after step 100 of 100:

- Loss: 0.6123
- Accuracy: 0.8750

![Training loss and step size over the training steps](step_size_and_loss.png)

## How to load the model

```python
from transformers import BertForSequenceClassification

model = BertForSequenceClassification.from_pretrained("tiny-bert")
```

## Training procedure

`SaLSaAdam` takes Adam's steps with a step size that a line search finds on the mini-batch itself: \
the largest of those tried at which the loss falls by at least 0.3 of what the slope predicts, \
both averaged over the steps ([Kenneweg, Kenneweg, Fumagalli, Hammer, IJCNN 2024]\
(https://arxiv.org/abs/2407.20650)). No rate and no schedule was set; the search ran at every step \
as long as the step size moved, and up to 10 steps apart where it had come to rest.

### Training hyperparameters

- optimizer: SaLSaAdam with c=0.3, beta3=0.99, steps_to_double=500, backtrack_factor=0.9, \
initial_step_size=1.0, max_search_interval=10, direction=gradient, require_decrease=False, \
betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, max_trials=30, \
cool_down=0.0
- train_batch_size (per device): 4
- gradient_accumulation_steps: 2
- processes: 1
- total_train_batch_size: 8
- eval_batch_size (per device): 8
- training steps: 100 (2 epochs)
- seed: 42
- mixed_precision: no

### What the search cost

- searches: 60 in 100 steps
- extra forward passes: 90, 47.4 % of all forward passes of training
- failed searches, which keep the step size of before: 2
- skipped steps, at which the loss or a gradient was not finite: 1
- step size: median 3.14e-05, final 2.5e-05

The median step size is the rate to try in a plain AdamW run.

### Training results

| Epoch | Step | Training Loss | Step Size | Validation Loss | Accuracy |
|------:|-----:|--------------:|----------:|----------------:|---------:|
|     0 |    0 |        No log |    No log |          0.7000 |   0.5000 |
|     1 |   50 |        0.6500 |     4e-05 |          0.6600 |   0.7500 |
|     2 |  100 |      0.000432 |   2.5e-05 |          0.6123 |   0.8750 |

### Framework versions

- hf_salsa 0.1.0
- transformers 5.23.0
- torch 2.13.0

## Citation

```bibtex
@inproceedings{kenneweg2024salsa,
  title     = {No learning rates needed: Introducing {SALSA} - Stable {Armijo} Line Search \
Adaptation},
  author    = {Kenneweg, Philip and Kenneweg, Tristan and Fumagalli, Fabian and Hammer, Barbara},
  booktitle = {International Joint Conference on Neural Networks (IJCNN)},
  year      = {2024}
}
```
"""


def test_whole_card(write):
    card = write(
        settings={"weight_decay": 0.01},
        finetuned_from="google/bert_uncased_L-2_H-128_A-2",
        language="en",
        license="apache-2.0",
        tags="tiny",
        dataset_tags="nyu-mll/glue",
        dataset="GLUE MRPC",
        dataset_args="mrpc",
    )
    assert card == EXPECTED


def test_the_hub_reads_the_metadata(write):
    data = ModelCard(
        write(
            finetuned_from="org/base",
            dataset_tags=["org/a", "org/b"],
            dataset=["A"],
            language=["en", "de"],
            license="mit",
            tags=["tiny", "hf_salsa"],
            model_name="My model",
        )
    ).data
    assert data.library_name == "transformers"
    assert data.base_model == "org/base"
    assert data.license == "mit"
    assert data.language == ["en", "de"]
    assert data.tags == ["tiny", "hf_salsa", "generated_from_trainer"]
    assert data.datasets == ["org/a", "org/b"]
    assert data.metrics == ["accuracy"]
    assert data.model_name == "My model"
    assert [
        (r.task_type, r.dataset_type, r.dataset_name, r.metric_type, r.metric_value)
        for r in data.eval_results
    ] == [
        ("text-classification", "org/a", "A", "loss", 0.61234),
        ("text-classification", "org/a", "A", "accuracy", 0.875),
        ("text-classification", "org/b", "org/b", "loss", 0.61234),
        ("text-classification", "org/b", "org/b", "accuracy", 0.875),
    ]


@pytest.mark.parametrize("optimizer", [SaLSaAdam, SaLSaSGD, SLSAdam, SLSSGD])
def test_claims_nothing_that_was_not_used(write, optimizer):
    card = write(optimizer=optimizer)
    procedure = card[card.index("## Training procedure") : card.index("### What the search cost")]
    for word in ("learning_rate", "AdamW", "lr_scheduler", "warmup", "max_grad_norm"):
        assert word not in procedure
    adam, salsa = optimizer in (SaLSaAdam, SLSAdam), optimizer in (SaLSaAdam, SaLSaSGD)
    assert procedure.count(optimizer.__name__) == 2
    assert ("takes Adam's steps" in procedure) == adam
    assert ("takes SGD's steps" in procedure) == (not adam)
    assert ("averaged over the steps" in procedure) == salsa
    assert ("ran at every step." in procedure) == (not salsa)
    assert ("momentum=0.0" in procedure) == (not adam)
    assert f"rate to try in a plain {'AdamW' if adam else 'SGD'} run." in card


@pytest.mark.parametrize(("optimizer", "base"), [(SaLSaAdamPlus, "Adam"), (SaLSaSGDPlus, "SGD")])
def test_says_how_the_plus_optimizers_find_the_step_size(write, optimizer, base):
    card = write(optimizer=optimizer)
    procedure = card[card.index("## Training procedure") : card.index("### Training hyperp")]
    assert (
        f"`{optimizer.__name__}` takes {base}'s steps with a step size that it finds" in procedure
    )
    for words in (
        "starts at 0.1 of what the first one allows",
        "double within 12 steps as long as new",
        "within 500 steps ever after",
        "by at least 0.4 of what the slope predicts (after",
        "over the last 60 % of the run the step size fell linearly to 0",
        "the search ran at every step in the beginning, and ever less often later, up to 10 steps",
    ):
        assert words in procedure
    assert "the largest of those tried" not in procedure
    assert "in the beginning" not in write(optimizer=SaLSaAdam)


# --- What was trained, on what


def test_base_model_is_where_the_model_was_loaded_from(write, bert, tmp_path):
    (tmp_path / "secret" / "my-base").mkdir(parents=True)
    sources = {
        "": "was trained from scratch on",
        "org/base": "version of [org/base](https://huggingface.co/org/base) on",
        str(tmp_path / "secret" / "my-base"): "version of a local model, `my-base`, on",
        "/not/here/any-more": "version of a local model, `any-more`, on",
    }
    for source, sentence in sources.items():
        model = bert()
        model.config._name_or_path = source
        card = write(model=model)
        assert f"This model {'' if not source else 'is a fine-tuned '}{sentence} an" in card
        assert ModelCard(card).data.base_model == (source if source == "org/base" else None)
        assert "secret" not in card
    model.config._name_or_path = "org/base"
    assert "trained from scratch" in write(model=model, finetuned_from="")


def test_data_sets_are_named(write):
    assert "on an unknown dataset, without" in write()
    assert "on the A and the B datasets" in write(dataset=["A", "B"])
    card = write(dataset=["A", "B"])
    assert ModelCard(card).data.datasets is None
    assert ModelCard(card).data.eval_results[0].dataset_name == "A, B"
    assert ModelCard(card).data.eval_results[0].dataset_type == "unknown"
    assert ModelCard(write()).data.eval_results[0].dataset_name == "unknown"


@pytest.mark.parametrize(
    ("builder", "split", "tag"),
    [("imdb", "test", "imdb"), ("imdb", None, "imdb"), ("csv", "test", None), (None, None, None)],
)
def test_hub_data_set_names_itself(write, builder, split, tag):
    data = Dataset.from_dict({"x": [1]}, split=split)
    data.info.builder_name, data.info.config_name = builder, "plain_text"
    card = ModelCard(write(data=data))
    assert card.data.datasets == ([tag] if tag else None)
    result = card.data.eval_results[0]
    if tag:
        assert "on the imdb dataset" in card.text
        assert (result.dataset_config, result.dataset_split) == ("plain_text", split)
        named = ModelCard(write(data=data, dataset_tags="org/mine"))
        assert named.data.datasets == ["org/mine"]
    else:
        assert "on an unknown dataset" in card.text
        assert result.dataset_config is None


def test_tags_of_the_card_that_is_there_are_kept(write):
    write(tags=["mine"])
    assert ModelCard(write(tags="new")).data.tags == [
        "new",
        "mine",
        "generated_from_trainer",
        "hf_salsa",
    ]


def test_no_results_for_the_hub_without_a_task(write, bert):
    model = BertModel(bert().config)
    card = ModelCard(write(model=model))
    assert card.data.eval_results is None
    assert "model_name" not in card.data.to_dict()
    assert "- Accuracy: 0.8750" in card.text
    card = ModelCard(write(model=model, tasks=["text-ranking", "text-classification"]))
    found = {(r.task_type, r.task_name) for r in card.data.eval_results}
    assert found == {
        ("text-ranking", None),
        ("text-classification", "Text Classification"),
    }


# --- How to load it: the code is run


def load(card, folder, monkeypatch):
    """Run the card's Python code beside the model's folder."""
    code = card[card.index("```python\n") + 10 :]
    names = {}
    monkeypatch.chdir(folder.parent)
    exec(code[: code.index("```")], names)
    return names


def test_loading_code_of_a_pretrained_model(write, bert, monkeypatch):
    model = bert(num_labels=None, problem_type=None) if False else bert()
    vocabulary = WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), unk_token="[UNK]")
    card = write(model=model, processing_class=tokenizer)
    model.save_pretrained(write.folder)
    tokenizer.save_pretrained(write.folder)
    names = load(card, write.folder, monkeypatch)
    assert type(names["model"]) is BertForSequenceClassification
    assert torch.equal(names["model"].classifier.weight, model.classifier.weight)
    assert names["tokenizer"]("a")["input_ids"] == [1]


def test_loading_code_with_a_processor(write):
    card = write(processing_class=ViTImageProcessor())
    assert "from transformers import AutoProcessor, BertForSequenceClassification\n" in card
    assert 'processor = AutoProcessor.from_pretrained("tiny-bert")' in card


def test_loading_code_names_the_hub(write):
    card = write(arguments={"hub_model_id": "me/tiny"})
    assert 'BertForSequenceClassification.from_pretrained("me/tiny")' in card


@pytest.mark.parametrize("labels", [2, 3])
def test_loading_code_of_an_adapter(write, bert, monkeypatch, tmp_path, labels):
    base = bert()
    if labels != 2:
        config = base.config
        config.num_labels = labels
        base = BertForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False))
    card = write(model=model)
    assert ModelCard(card).data.library_name == "peft"
    assert ModelCard(card).data.eval_results[0].task_type == "text-classification"
    assert (f"num_labels={labels}" in card) == (labels != 2)
    model.save_pretrained(write.folder)
    loaded = load(card, write.folder, monkeypatch)["model"]
    tokens = torch.tensor([[1, 2, 3]])
    model.eval()
    loaded.eval()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


class Tiny(nn.Module):
    def __init__(self, *_):
        super().__init__()
        self.linear = nn.Linear(2, 2)


def test_loading_code_of_a_plain_module(write, monkeypatch):
    model = Tiny()
    monkeypatch.setattr(Tiny, "__module__", "my_models")
    monkeypatch.setitem(sys.modules, "my_models", sys.modules[__name__])
    card = write(model=model)
    assert ModelCard(card).data.library_name is None
    assert "This model was trained from scratch" in card
    save_file(model.state_dict(), write.folder / "model.safetensors")
    loaded = load(card, write.folder, monkeypatch)["model"]
    assert torch.equal(loaded.linear.weight, model.linear.weight)
    monkeypatch.setattr(Tiny, "__module__", "__main__")
    assert "from your_script import Tiny" in write(model=model)


# --- Special log histories


def test_run_without_evaluation(write):
    card = write([entry for entry in HISTORY if "eval_loss" not in entry])
    assert "Results on" not in card
    assert "### Training results" not in card
    assert "(step_size_and_loss.png)" in card
    data = ModelCard(card).data
    assert (data.eval_results, data.metrics, data.model_name) == (None, None, None)


def test_evaluation_after_training_only(write):
    """`trainer.train(); trainer.evaluate()`."""
    history = [entry for entry in HISTORY if "eval_loss" not in entry]
    card = write([*history, evaluation(100, loss=0.5)])
    assert "Results on the evaluation set after step 100 of 100:\n\n- Loss: 0.5000\n\n" in card
    row = {"Epoch": "2", "Step": "100", "Training Loss": "0.000432", "Step Size": "2.5e-05"}
    assert table(card) == [row | {"Validation Loss": "0.5000"}]


def test_without_logs_no_plot(write):
    write()
    assert (write.folder / "step_size_and_loss.png").exists()
    card = write([evaluation(100, loss=0.5), end(100)])  # logging_strategy="no"
    assert not (write.folder / "step_size_and_loss.png").exists()
    assert "![" not in card
    assert "png" not in card
    row = {"Epoch": "2", "Step": "100", "Training Loss": "No log", "Step Size": "No log"}
    assert table(card) == [row | {"Validation Loss": "0.5000"}]
    assert "- searches: 60 in 100 steps" in section(card, "### What the search cost")


def test_interrupted_run(write):
    """Ctrl-C: totals as far as they were logged."""
    history = [train(1, 0.7, 0.5, trials=15), train(40, 0.6, 1e-4, trials=55)]
    card = write(history, state={"max_steps": 100})
    assert section(card, "### What the search cost") == [
        "- searches: 40 in 40 steps",
        "- extra forward passes: 55",
    ]
    assert "- training steps: 40 of 100 planned (0.8 epochs)" in card
    card = write([])
    assert section(card, "### What the search cost") == [
        "The run ended before its totals were logged."
    ]
    assert "- training steps: 0 (0 epochs)" in card


def test_resumed_run(write):
    """The history goes on; the totals are those of the last leg, which count all."""
    history = [
        train(10, 0.7, 1e-3),
        evaluation(10, loss=0.7),
        end(10, searches=10, trials=30),
        evaluation(10, loss=0.7),
        train(20, 0.6, 1e-4),
        evaluation(20, loss=0.6),
        end(20, searches=12, trials=33),
    ]
    card = write(history)
    assert "- searches: 12 in 20 steps" in card
    assert [(row["Step"], row["Training Loss"], row["Step Size"]) for row in table(card)] == [
        ("10", "0.7000", "0.001"),
        ("20", "0.6000", "0.0001"),
    ]
    assert "Results on the evaluation set after step 20 of 20:\n\n- Loss: 0.6000\n" in card


def test_best_checkpoint_is_what_the_results_are_of(write):
    options = {
        "arguments": {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 50,
            "save_steps": 50,
        },
        "state": {"best_global_step": 50, "best_model_checkpoint": "out/checkpoint-50"},
    }
    sentence = (
        "Results on the evaluation set after step 50 of 100 (the best checkpoint, which was loaded "
        "at the end):\n\n- Loss: 0.6600\n- Accuracy: 0.7500\n"
    )
    assert sentence in write(**options)
    # An evaluation after training sees the weights of step 50, whatever step its log line has.
    after = [*HISTORY, evaluation(100, loss=0.66, accuracy=0.75)]
    card = write(after, **options)
    assert sentence in card
    assert [row["Accuracy"] for row in table(card)] == ["0.5000", "0.7500", "0.8750"]
    assert [row["Epoch"] for row in table(card)] == ["0", "1", "2"]
    # Interrupted, the run kept the last weights.
    assert "after step 100 of 100:\n\n- Loss: 0.6123" in write(HISTORY[:-1], **options)
    options["state"] = {"best_global_step": 50}
    assert "after step 100 of 100:\n\n- Loss: 0.6123" in write(**options)


def test_several_evaluation_sets(write):
    history = [
        train(1, 0.7, 1e-3),
        train(50, 0.6, 1e-4),
        evaluation(50, "eval_matched", loss=0.5, accuracy=0.7),
        evaluation(50, "eval_mis_matched", loss=0.6, accuracy=0.6),
        train(100, 0.5, 1e-4),
        evaluation(100, "eval_matched", loss=0.4, accuracy=0.8),
        end(100),
        evaluation(100, "test", loss=0.3),
    ]
    card = write(history, dataset_tags="org/nli")
    for sentence in (
        "the evaluation set matched after step 100 of 100:\n\n- Loss: 0.4000\n- Accuracy: 0.8000\n",
        "the evaluation set mis_matched after step 50 of 100:\n\n- Loss: 0.6000\n- Accuracy: 0.60",
        "the evaluation set test after step 100 of 100:\n\n- Loss: 0.3000\n\n",
    ):
        assert sentence in card
    rows = table(card)
    assert [row["Loss (mis_matched)"] for row in rows] == ["0.6000", ""]
    assert [row["Accuracy (matched)"] for row in rows] == ["0.7000", "0.8000"]
    assert [row["Loss (test)"] for row in rows] == ["", "0.3000"]
    assert [
        (r.dataset_type, r.dataset_split, r.metric_type, r.metric_value)
        for r in ModelCard(card).data.eval_results
    ] == [
        ("org/nli", "matched", "loss", 0.4),
        ("org/nli", "matched", "accuracy", 0.8),
        ("org/nli", "mis_matched", "loss", 0.6),
        ("org/nli", "mis_matched", "accuracy", 0.6),
        ("org/nli", "test", "loss", 0.3),
    ]


def test_values_that_are_not_finite(write):
    history = [
        train(1, math.nan, 0.5),
        train(2, 0.7, math.nan),
        train(3, math.inf, 1e-4),
        train(4, 0.6, 1e-4),
        evaluation(4, loss=math.nan, f1=math.inf, accuracy=0.5),
        end(4, median_step_size=math.nan),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        card = write(history)
    assert "- Loss: nan\n- F1: inf\n- Accuracy: 0.5000\n" in card
    assert "median nan, final 2.5e-05" in card
    assert "(step_size_and_loss.png)" in card
    (result,) = ModelCard(card).data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.5)


def test_metrics_that_are_no_numbers(write):
    metrics = {
        "confusion": [[1, 2], [3, 4]],
        "report": "a | b\nc",
        "long": "x" * 200,
        "ok": True,
        "count": 12,
        "perplexity": np.float32(123.5),
        "hits": np.int64(7),
        "huge": 1.5e7,
        "zero": 0.0,
        "rouge1": 0.25,
        "my_runtime": 3.0,
    }
    card = write([evaluation(10, **metrics), end(10)])
    lines = card[card.index("Results on") : card.index("## How to load")].splitlines()[2:-1]
    assert lines == [
        "- Confusion: [[1, 2], [3, 4]]",
        "- Report: a | b c",
        f"- Long: {'x' * 77}...",
        "- Ok: True",
        "- Count: 12",
        "- Perplexity: 123.5000",
        "- Hits: 7",
        "- Huge: 1.5e+07",
        "- Zero: 0.0000",
        "- Rouge1: 0.2500",
    ]
    assert r"a \| b c" in section(card, "### Training results")[2]
    data = ModelCard(card).data
    assert data.metrics == ["rouge"]
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {
        "count": 12,
        "perplexity": 123.5,
        "hits": 7,
        "huge": 1.5e7,
        "zero": 0.0,
        "rouge": 0.25,
    }


def test_losses_that_a_subclass_logged_are_no_steps(write):
    """Only Trainer's own line of an update has loss and step size."""
    card = write([{"loss": 0.1, "epoch": 2.0, "step": 100}, *HISTORY[:-1], HISTORY[-1]])
    assert table(card) == table(write())


# --- Hyperparameters


def test_hyperparameters_are_those_that_had_an_effect(write):
    card = write(
        arguments={
            "max_grad_norm": 1.0,
            "label_smoothing_factor": 0.1,
            "bf16": True,
            "seed": 7,
            "per_device_train_batch_size": 64,  # 4 were found by auto_find_batch_size
        }
    )
    lines = section(card, "### Training hyperparameters")
    assert lines[1] == "- train_batch_size (per device): 4"
    assert lines[-4:] == [
        "- seed: 7",
        "- mixed_precision: bf16",
        "- max_grad_norm: 1.0",
        "- label_smoothing_factor: 0.1",
    ]
    # On a CPU, Trainer's fp16 is float32.
    assert "- mixed_precision: no" in write(arguments={"fp16": True})


def test_a_cool_down_is_a_schedule(write):
    card = write(optimizer=lambda params: SaLSaAdam(params, cool_down=0.25))
    assert (
        "No rate was set; over the last 25 % of the run the step size fell linearly to 0;" in card
    )
    assert "no schedule" not in card


def test_settings_of_parameter_groups(write, bert):
    def optimizer(params):
        weights = list(params)
        return SaLSaAdam(
            [{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.0}],
            weight_decay=0.01,
            c=0.4,
        )

    card = write(optimizer=optimizer)
    assert "weight_decay=0.01 (0.0 in other parameter groups), max_trials" in card
    assert "by at least 0.4 of what" in card


def test_versions(monkeypatch):
    versions = model_card._versions(is_adapter=True)
    assert list(versions) == [
        "hf_salsa",
        "transformers",
        "torch",
        "accelerate",
        "datasets",
        "tokenizers",
        "peft",
    ]
    assert versions["torch"] == torch.__version__
    real = model_card.importlib.metadata.version

    def version(name):
        if name == "datasets":
            raise model_card.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(model_card.importlib.metadata, "version", version)
    assert set(versions) - set(model_card._versions(is_adapter=False)) == {"datasets", "peft"}


# --- The plot


def test_plot_shows_the_curves(write, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: [figures.append(self), save(self, *args, **kw)]
    )
    before = sys.modules.get("matplotlib.pyplot")
    write()
    assert sys.modules.get("matplotlib.pyplot") is before  # no global state
    top, bottom = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in top.lines}
    assert lines == {
        "training": [[1, 0.71], [50, 0.65], [100, 0.0004321]],
        "evaluation": [[0, 0.7], [50, 0.66], [100, 0.61234]],
    }
    assert bottom.lines[0].get_xydata().tolist() == [[1, 0.5], [50, 4e-05], [100, 2.5e-05]]
    assert bottom.get_yscale() == "log"
    assert bottom.get_shared_x_axes().joined(top, bottom)
    assert (top.get_ylabel(), bottom.get_ylabel()) == ("loss", "step size (log scale)")
    assert bottom.get_xlabel() == "training step (updates of the weights)"
    png = (write.folder / "step_size_and_loss.png").read_bytes()
    assert png.startswith(b"\x89PNG")


def test_without_matplotlib(write, monkeypatch):
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.warns(UserWarning, match=r"pip install hf_salsa\[plots\]") as caught:
        card = write()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "![" not in card
    assert not list(write.folder.glob("*.png"))
    assert "### Training results" in card
    # Where there is nothing to plot nothing is missing.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write([end(10)])


# --- A real run


def test_card_of_a_real_resumed_run(tmp_path, bert, sentences):
    """Three steps, then three more from the checkpoint."""

    def run(steps, resume):
        args = SaLSaTrainingArguments(
            str(tmp_path / "run"),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=8,
            max_steps=steps,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=3,
            save_steps=3,
            weight_decay=0.1,
        )
        trainer = SaLSaTrainer(
            bert(),
            args,
            train_dataset=sentences,
            eval_dataset={"a": sentences[:8], "b": sentences[8:16]},
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    run(3, False)
    trainer = run(6, True)
    optimizer = unwrap_optimizer(trainer.optimizer)
    write_model_card(
        tmp_path / "run",
        state=trainer.state,
        arguments=trainer.args,
        optimizer=optimizer,
        model=trainer.model,
    )
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"- searches: {optimizer.counters.searches} in 6 steps" in card
    assert f"- extra forward passes: {optimizer.counters.trials}, " in card
    assert f"final {optimizer.step_size:.3g}\n" in card
    rows = table(card)
    assert [row["Step"] for row in rows] == ["3", "6"]
    assert all(0 < float(row["Step Size"]) < 1 for row in rows)
    assert float(rows[1]["Loss (b)"]) > 0
    assert "weight_decay=0.1 (0.0 in other parameter groups)" in card
    assert {r.dataset_split for r in ModelCard(card).data.eval_results} == {"a", "b"}
    assert (tmp_path / "run" / "step_size_and_loss.png").exists()
