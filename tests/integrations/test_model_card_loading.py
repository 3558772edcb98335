"""The Python code of the model card: it is run, and loads the model."""

import ast
import importlib
import sys

import pytest
import torch
import transformers
from card_runs import CardWriter, end, evaluation
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BlipImageProcessor,
    BlipProcessor,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
    Wav2Vec2FeatureExtractor,
)
from transformers.modelcard import TASK_MAPPING


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
    tokenizer = words()
    card = write(model=model, processing_class=tokenizer)
    model.save_pretrained(write.folder)
    tokenizer.save_pretrained(write.folder)
    names = load(card, write.folder, monkeypatch)
    assert type(names["model"]) is BertForSequenceClassification
    assert torch.equal(names["model"].classifier.weight, model.classifier.weight)
    assert names["tokenizer"]("a")["input_ids"] == [1]


def words():
    vocabulary = WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), unk_token="[UNK]")


def images():
    return ViTImageProcessor(size={"height": 8, "width": 8})


def images_and_words():
    return BlipProcessor(BlipImageProcessor(size={"height": 8, "width": 8}), words())


def sounds():
    return Wav2Vec2FeatureExtractor()


SHORT = [evaluation(10, loss=0.5), end(10)]  # no plot to draw
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
WORDS = {**BERT, "vocab_size": 32}
VIT = {**BERT, "image_size": 8, "patch_size": 4}
SOUNDS = {
    **WORDS,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 4),
    "conv_stride": (2, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}
GPT2 = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 32}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
PROJECTED = {"text_config": WORDS, "vision_config": VIT, "projection_dim": 8}
RESNET = {
    **{"model_type": "resnet", "num_channels": 3, "embedding_size": 8},
    **{"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_type": "basic"},
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
DETR = {
    **{"d_model": 128, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 2},
    **{"encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_ffn_dim": 16},
    **{"decoder_ffn_dim": 16, "use_timm_backbone": False, "use_pretrained_backbone": False},
    **{"backbone": None, "backbone_config": RESNET},
}
# Task of the hub, class, its configuration with settings, what is saved with it.
USUAL = [
    ("text-generation", "GPT2LMHeadModel", "GPT2Config", GPT2, words),
    ("image-classification", "ViTForImageClassification", "ViTConfig", VIT, images),
    ("fill-mask", "BertForMaskedLM", "BertConfig", WORDS, words),
    ("question-answering", "BertForQuestionAnswering", "BertConfig", WORDS, words),
    ("text2text-generation", "T5ForConditionalGeneration", "T5Config", T5, words),
    ("text-classification", "BertForSequenceClassification", "BertConfig", WORDS, words),
    ("token-classification", "BertForTokenClassification", "BertConfig", WORDS, words),
    (None, "BertForMultipleChoice", "BertConfig", WORDS, words),
]
OTHERS = [
    ("audio-classification", "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", SOUNDS, sounds),
    ("automatic-speech-recognition", "Wav2Vec2ForCTC", "Wav2Vec2Config", SOUNDS, sounds),
    ("object-detection", "YolosForObjectDetection", "YolosConfig", VIT | {"image_size": [8, 8]},
     images),
    ("image-segmentation", "DetrForSegmentation", "DetrConfig", DETR, images),
    ("table-question-answering", "TapasForQuestionAnswering", "TapasConfig", WORDS, words),
    ("zero-shot-image-classification", "CLIPModel", "CLIPConfig", PROJECTED, words),
    ("image-text-to-text", "BlipForConditionalGeneration", "BlipConfig", PROJECTED,
     images_and_words),
]  # fmt: skip


def test_every_task_that_transformers_knows_is_tested():
    assert {task for task, *_ in [*USUAL, *OTHERS]} - {None} == set(TASK_MAPPING)


@pytest.mark.parametrize(
    ("task", "cls", "config", "settings", "processing"),
    [*USUAL, *(pytest.param(*entry, marks=pytest.mark.slow) for entry in OTHERS)],
    ids=lambda value: value if isinstance(value, str) and "-" in value else "",
)
def test_loading_code_of_each_task(write, monkeypatch, task, cls, config, settings, processing):
    configuration = getattr(transformers, config)(**settings)
    model = getattr(transformers, cls)(configuration)
    card = write(SHORT, model=model, processing_class=processing())
    data = ModelCard(card).data
    assert (data.eval_results[0].task_type if task else data.eval_results) == task
    model.save_pretrained(write.folder)
    processing().save_pretrained(write.folder)
    names = load(card, write.folder, monkeypatch)
    assert type(names["model"]) is type(model)
    loaded = names["model"].state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    kind = names["tokenizer"] if processing is words else names["processor"]
    assert type(kind).__name__.startswith(type(processing()).__name__)


CODE = """
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

class OwnConfig(BertConfig):
    model_type = "own-bert"

class OwnBert(BertForSequenceClassification):
    config_class = OwnConfig

OwnConfig.register_for_auto_class()
OwnBert.register_for_auto_class("AutoModelForSequenceClassification")
"""


def test_loading_code_of_a_model_with_code_of_its_own(write, monkeypatch, tmp_path):
    """Its class is in no package: the hub has the code beside the weights."""
    (tmp_path / "own_bert.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "c"))
    own = importlib.import_module("own_bert")
    own.OwnBert(own.OwnConfig(**WORDS)).save_pretrained(tmp_path / "theirs")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "theirs", trust_remote_code=True
    )
    assert type(model).__module__.startswith("transformers_modules.")
    card = write(SHORT, model=model)
    model.save_pretrained(write.folder)
    loaded = load(card, write.folder, monkeypatch)["model"]
    assert type(loaded).__name__ == "OwnBert"
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


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


def test_loading_code_of_an_adapter_inside_of_the_model(write, bert, monkeypatch, tmp_path):
    bert().save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(target_modules=["query"], init_lora_weights=False))
    card = write(SHORT, model=model)
    model.save_pretrained(write.folder)
    loaded = load(card, write.folder, monkeypatch)["model"]
    assert_same_logits(loaded, model)


@pytest.mark.parametrize("names", [["default", "second"], ["first", "second"], ["first"]])
def test_loading_code_of_adapters_with_names(write, bert, monkeypatch, tmp_path, names):
    bert().save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    card = write(SHORT, model=model)
    several = f"a set of 2 adapters (`{names[0]}`, `second`)" if len(names) == 2 else "an adapter"
    assert f"This model is {several} of a local model, `base`, trained on an unknown" in card
    assert "from scratch" not in card
    model.save_pretrained(write.folder)
    loaded = load(card, write.folder, monkeypatch)["model"]
    for name in names:
        loaded.set_adapter(name)
        model.set_adapter(name)
        assert_same_logits(loaded, model)


def assert_same_logits(a, b):
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(a.eval()(tokens).logits, b.eval()(tokens).logits)


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
