"""The Python code of the model card: it is run, and loads the model."""

import ast
import sys

import pytest
import torch
from card_runs import CardWriter
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)


@pytest.fixture
def write(tmp_path, bert):
    return CardWriter(tmp_path / "tiny-bert", bert)


def load(card, folder, monkeypatch):
    """Run the card's Python code beside the model's folder."""
    code = card[card.index("```python\n") + 10 :]
    names = {}
    monkeypatch.chdir(folder.parent)
    exec(code[: code.index("```")], names)
    return names


def test_loading_code_of_a_pretrained_model(write, bert, monkeypatch):
    model = bert()
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


def adapter(model, **options):
    return get_peft_model(model, LoraConfig(target_modules=["query"], **options))


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ("", "an adapter of a model, `BertForSequenceClassification`, trained on"),
        ("/somewhere/my-base", "an adapter of a local model, `my-base`, trained on"),
        ("org/base", "an adapter of [org/base](https://huggingface.co/org/base), trained on"),
    ],
)
@pytest.mark.parametrize("explicit", [False, True])
def test_adapter_is_not_trained_from_scratch(write, bert, base, sentence, explicit):
    model = bert()
    model.config._name_or_path = "" if explicit else base
    card = write(model=adapter(model), finetuned_from=base if explicit else None)
    assert f"This model is {sentence} an unknown dataset, without" in card
    assert "from scratch" not in card
    assert "- peft " in card


def test_adapter_inside_of_the_model_is_one_too(write, bert):
    model = bert()
    model.add_adapter(LoraConfig(target_modules=["query"]))
    card = write(model=model)
    assert "an adapter of a model, `BertForSequenceClassification`, trained on" in card
    assert "from scratch" not in card


def test_adapter_of_a_plain_module(write):
    model = get_peft_model(Tiny(), LoraConfig(target_modules=["linear"]))
    assert "This model is an adapter of a model, `Tiny`, trained on" in write(model=model)


@pytest.mark.parametrize("name", ['a "b"', "it's ```", "back\\slash"])
def test_code_of_an_adapter_holds_any_name(write, bert, name):
    model = bert()
    model.config._name_or_path = f"/somewhere/{name}"
    card = write(model=adapter(model), model_name=name)
    fence = card[card.index("## How to load") :].split("\n", 3)[2].removesuffix("python")
    code = card.split(f"{fence}python\n")[1].split(f"\n{fence}\n")[0]
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert strings == [name, name]


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
