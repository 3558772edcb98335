"""What the model card says, from log histories made by hand."""

import pytest
import torch
from card_runs import HISTORY, CardWriter, end, section
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import BertModel

from hf_salsa import (
    SLSSGD,
    SaLSaAdam,
    SaLSaAdamPlus,
    SaLSaSGD,
    SaLSaSGDPlus,
    SLSAdam,
    model_card,
    model_card_subject,
)

SHORT = [end(10)]  # no plot to draw
VERSIONS = {"hf_salsa": "0.1.0", "transformers": "5.23.0", "torch": "2.13.0"}


@pytest.fixture
def write(tmp_path, bert, monkeypatch):
    monkeypatch.setattr(model_card, "_versions", lambda is_adapter: VERSIONS)
    return CardWriter(tmp_path / "tiny-bert", bert)


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
optim: salsa_adam
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
initial_step_size=1.0, max_search_interval=10, betas=(0.9, 0.999), eps=1e-08, \
weight_decay=0.01, direction=gradient, require_decrease=False, max_trials=30, cool_down=0.0, \
head_first=0
- train_batch_size (per device): 4
- gradient_accumulation_steps: 2
- processes: 1
- total_train_batch_size: 8
- eval_batch_size (per device): 8
- training steps: 100 (2 epochs)
- seed: 42
- mixed_precision: no

### What the search cost

- 60 searches in 100 steps
- 90 extra forward passes, 47.4 % of all forward passes of training
- 2 failed searches, which kept the step size of before
- 1 skipped step, at which the loss or a gradient was not finite
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


@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [
        (SaLSaAdamPlus, "Adam's steps with Nesterov's momentum and a step size"),
        (SaLSaSGDPlus, "SGD's steps with a step size"),
    ],
)
def test_says_how_the_plus_optimizers_find_the_step_size(write, optimizer, steps):
    card = write(optimizer=optimizer)
    procedure = card[card.index("## Training procedure") : card.index("### Training hyperp")]
    assert f"`{optimizer.__name__}` takes {steps} that it finds" in procedure
    for words in (
        "starts at 0.3 of what the first one allows",
        "double within 8 steps while the loss falls",
        "where its steps change little and lower the loss of new mini-batches",
        "(with a new head or adapters, as with SGD: the more slowly, the fewer do)",
        "or a new head was trained first",
        "beside what its gradient foresees by at most 0.9 % of the loss at the start, or, where "
        "the weights were trained before, raises it by at most 2.7 %",
        "over the last 60 % of the run the step size fell linearly to 0",
        "the search ran at every step in the beginning, and ever less often later, up to 20 steps",
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


BASE_CARD = """---
license: other
license_name: my-licence
license_link: https://example.org/licence
language: [en, de]
tags: [of-the-base]
---
# A base
"""


@pytest.fixture(params=["hub", "folder"])
def based(request, write, bert, tmp_path, monkeypatch):
    """Writes the card of a model whose base model, on the hub or in a folder, has a card."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "README.md").write_text(BASE_CARD)
    asked = []

    def download(identifier, name):
        asked.append(identifier)
        if not (folder / name).exists():
            raise FileNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr(model_card_subject, "hf_hub_download", download)
    source = str(folder) if request.param == "folder" else "org/base"

    def make(**options):
        model = bert()
        model.config._name_or_path = source
        data = ModelCard(write(SHORT, model=model, **options)).data.to_dict()
        assert asked == ([source] * len(asked) if request.param == "hub" else [])
        return data

    make.card = folder / "README.md"
    return make


def test_licence_and_languages_of_the_base_model(based):
    data = based()
    assert (data["license"], data["license_name"]) == ("other", "my-licence")
    assert data["license_link"] == "https://example.org/licence"
    assert data["language"] == ["en", "de"]
    assert "of-the-base" not in data["tags"]
    data = based(license="mit", language="fr")  # what the user says holds
    assert (data["license"], data["language"]) == ("mit", ["fr"])
    assert "license_name" not in data
    data = based(finetuned_from="")  # from scratch
    assert not {"license", "language", "license_link"} & data.keys()


@pytest.mark.parametrize("content", ["# No metadata\n", "---\n- [\n---\n", None])
def test_a_base_model_whose_card_says_nothing(based, content):
    if content is None:
        based.card.unlink()
    else:
        based.card.write_text(content)
    assert not {"license", "language"} & based().keys()


def test_the_hub_knows_the_optimizer(write):
    for optimizer, name in ((SLSSGD, "sls_sgd"), (SaLSaAdamPlus, "salsa_adam_plus")):
        assert ModelCard(write(SHORT, optimizer=optimizer)).data.to_dict()["optim"] == name
    assert ModelCard(write(SHORT, optimizer=KeywordOnly)).data.to_dict()["optim"] == "KeywordOnly"


def test_data_sets_are_named(write):
    assert "on an unknown dataset, without" in write()
    assert "on the A and the B datasets" in write(dataset=["A", "B"])
    card = write(dataset=["A", "B"])
    assert ModelCard(card).data.datasets is None
    assert ModelCard(card).data.eval_results[0].dataset_name == "A, B"
    assert ModelCard(card).data.eval_results[0].dataset_type == "unknown"
    assert ModelCard(write()).data.eval_results[0].dataset_name == "unknown"


@pytest.mark.slow
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


def with_head(updates, wanted=10, earlier=0):
    """Makes an optimizer that has trained the last two parameters alone for some updates."""

    def make(params):
        params = list(params)
        groups = [{"params": params[:-2]}, {"params": params[-2:], "head": True}]
        optimizer = SaLSaAdam(groups, head_first=wanted)
        for group in optimizer.param_groups:
            group |= {"head_steps": updates, "run_start": earlier}
        return optimizer

    return make


def test_a_head_that_was_trained_first(write):
    sentence = (
        "trained the new head alone (`classifier`), by a line search of its own along the signs of "
        "its gradient; the optimizer began after that, on all of the model.\n"
    )
    assert f"come to rest. The first 10 updates {sentence}" in write(SHORT, optimizer=with_head(10))
    assert f"come to rest. The first update {sentence}" in write(SHORT, optimizer=with_head(1))
    none = "No new head on a trained body was found, so none was trained first.\n"
    assert none in write(SHORT, optimizer=with_head(0))
    assert "new head" not in write(SHORT, optimizer=with_head(0, wanted=0))
    # The head was trained in an earlier run of the same trainer.
    assert none in write(SHORT, optimizer=with_head(10, earlier=50))


def test_the_search_s_share_of_the_time(write):
    times = {"search_runtime": 1.25, "settled_step_size": 4e-5}
    costs = section(write([*HISTORY[:-1], end(100, **times)]), "### What the search cost")
    assert costs[2] == "- 10.0 % of the time of training"
    assert "- step size: settled 4e-05, median 3.14e-05, final 2.5e-05" in costs


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
    assert "weight_decay=0.01 (0.0 in other parameter groups), direction" in card
    assert "by at least 0.4 of what" in card


class KeywordOnly(SaLSaAdam):
    def __init__(self, params, *, c=0.3, max_search_interval=10):
        super().__init__(params, c=c, max_search_interval=max_search_interval)


class Passing(SaLSaAdam):
    def __init__(self, params, **settings):
        super().__init__(params, **settings)


def test_settings_by_keyword_only(write):
    card = write(optimizer=KeywordOnly, settings={"c": 0.4})
    assert "- optimizer: KeywordOnly with c=0.4, max_search_interval=10, " in card
    everything = "- optimizer: Passing with initial_step_size=1.0, cool_down=0.0, c=0.3, "
    assert everything in write(optimizer=Passing)


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
