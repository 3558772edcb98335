"""Which parameters are a new head on a trained body: told from the weights, never from names."""

import math

import pytest
import torch
import transformers as hf
from torch import nn

from hf_salsa import head_groups
from hf_salsa.head import find_head, mark_head, plain_name

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 60,
}
SMALL_IMAGES = {"image_size": 16, "patch_size": 8}
SMALL_GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
SMALL_LLAMA = {**SMALL, "num_key_value_heads": 2}
SMALL_T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
SMALL_DISTILBERT = {"vocab_size": 60, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)

# What was trained, what is made of it, and the modules that are new.
NEW = {
    "BERT": ("Bert", SMALL, "Model", "ForSequenceClassification", ["classifier"]),
    "BERT of a masked language model, without its pooler": (
        "Bert",
        SMALL,
        "ForMaskedLM",
        "ForSequenceClassification",
        ["bert.pooler.dense", "classifier"],
    ),
    "tokens": ("Bert", SMALL, "Model", "ForTokenClassification", ["classifier"]),
    "QA": ("Bert", SMALL, "Model", "ForQuestionAnswering", ["qa_outputs"]),
    "DistilBERT": (
        "DistilBert",
        SMALL_DISTILBERT,
        "Model",
        "ForSequenceClassification",
        ["pre_classifier", "classifier"],
    ),
    "RoBERTa": (
        "Roberta",
        SMALL,
        "ForMaskedLM",
        "ForSequenceClassification",
        ["classifier.dense", "classifier.out_proj"],
    ),
    "DeBERTa": (
        "DebertaV2",
        SMALL,
        "Model",
        "ForSequenceClassification",
        ["pooler.dense", "classifier"],
    ),
    "ModernBERT": (
        "ModernBert",
        {**SMALL, **IDS, "pad_token_id": 0},
        "ForMaskedLM",
        "ForSequenceClassification",
        ["classifier"],
    ),
    "ViT": ("ViT", {**SMALL, **SMALL_IMAGES}, "Model", "ForImageClassification", ["classifier"]),
    "GPT-2": ("GPT2", SMALL_GPT2, "LMHeadModel", "ForSequenceClassification", ["score"]),
    "Llama": ("Llama", SMALL_LLAMA, "ForCausalLM", "ForSequenceClassification", ["score"]),
    "T5 encoder": ("T5", SMALL_T5, "EncoderModel", "ForTokenClassification", ["classifier"]),
    "a language model's own": ("Llama", SMALL_LLAMA, "Model", "ForCausalLM", ["lm_head"]),
}


def made(kind, sizes, form):
    config = getattr(hf, f"{kind}Config")(**{k: v for k, v in sizes.items() if k != "vocab"})
    torch.manual_seed(0)
    return getattr(hf, f"{kind}{form}")(config)


def trained(model):
    """Move every weight, as training does."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.01 * torch.randn_like(param))
    return model


def reloaded(kind, sizes, before, after, folder):
    """The model `after` with the weights of a trained model `before`."""
    trained(made(kind, sizes, before)).save_pretrained(folder)
    return getattr(hf, f"{kind}{after}").from_pretrained(folder)


@pytest.mark.parametrize("case", NEW)
def test_a_new_head_on_a_trained_body(case, tmp_path):
    kind, sizes, before, after, modules = NEW[case]
    model = reloaded(kind, sizes, before, after, tmp_path)
    expected = [n for n, _ in model.named_parameters() if n.rpartition(".")[0] in modules]
    assert find_head(model) == expected != []


@pytest.mark.parametrize("case", NEW)
def test_a_model_from_scratch_has_none(case):
    kind, sizes, _, after, _ = NEW[case]
    assert find_head(made(kind, sizes, after)) == []


@pytest.mark.parametrize("case", ["BERT", "GPT-2", "ViT", "RoBERTa"])
def test_a_trained_head_is_none(case, tmp_path):
    kind, sizes, _, after, _ = NEW[case]
    assert find_head(reloaded(kind, sizes, after, after, tmp_path)) == []


def test_a_head_whose_weights_are_the_body_s_is_none(tmp_path):
    assert find_head(reloaded("GPT2", SMALL_GPT2, "LMHeadModel", "LMHeadModel", tmp_path)) == []


def test_a_head_that_was_trained_since_is_none(tmp_path):
    """What training leaves shows it."""
    for kind, before, after in (
        ("Bert", "Model", "ForSequenceClassification"),
        ("GPT2", "Model", "ForSequenceClassification"),
    ):
        sizes = NEW["BERT" if kind == "Bert" else "GPT-2"][1]
        model = reloaded(kind, sizes, before, after, tmp_path)
        assert find_head(model) != []
        with torch.no_grad():
            for name in find_head(model):
                model.get_parameter(name).mul_(2).add_(0.5)
        assert find_head(model) == []


# --- a plain nn.Module --------------------------------------------------------------------------


def body():
    """Three layers with the weights of somebody's training."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)]
    return trained_much(nn.Sequential(*layers))


def trained_much(model):
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(2)
    return model


HEADS = {
    "a linear layer": nn.Linear,
    "a linear layer without bias": lambda i, o: nn.Linear(i, o, bias=False),
    "zeros": lambda i, o: zeros(nn.Linear(i, o)),
    "two layers": lambda i, o: nn.Sequential(nn.Linear(i, i), nn.LayerNorm(i), nn.Linear(i, o)),
}


def zeros(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@pytest.mark.parametrize("kind", ["a linear layer", "a linear layer without bias", "zeros"])
def test_a_plain_module(kind):
    torch.manual_seed(0)
    model = nn.Sequential(body(), HEADS[kind](16, 2))
    assert find_head(model) == [name for name, _ in model.named_parameters() if name[0] == "1"]
    trained_much(model[1])
    if kind == "zeros":
        nn.init.ones_(model[1].bias)
        model[1].weight.data += 1
    assert find_head(model) == []


def test_half_of_a_plain_module_is_no_head():
    torch.manual_seed(0)
    assert find_head(nn.Sequential(body(), HEADS["two layers"](16, 2))) == []
    assert find_head(nn.Sequential(body(), body(), HEADS["two layers"](16, 2))) == [
        *("2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias", "2.2.weight", "2.2.bias"),
    ]
    assert find_head(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))) == []


@pytest.mark.parametrize(
    "last",
    [
        *(nn.LayerNorm(16), nn.LayerNorm((4, 16)), nn.RMSNorm(16), nn.BatchNorm1d(16)),
        nn.Embedding(4, 16),
    ],
)
def test_a_normalisation_or_an_embedding_alone_is_none(last):
    assert find_head(nn.Sequential(body(), last)) == []


def test_parameters_that_are_all_ones_are_none():
    model = nn.Sequential(body(), nn.Linear(16, 1), nn.Linear(1, 1))
    assert find_head(model) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
    assert find_head(model) == []


def test_what_is_frozen_is_not_trained_first():
    model = nn.Sequential(body(), nn.Linear(16, 2))
    model[1].bias.requires_grad_(False)
    assert find_head(model) == ["1.weight"]


def test_a_module_with_weights_of_its_own_kind_is_none():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    assert find_head(nn.Sequential(body(), Scale())) == []


# --- PEFT ---------------------------------------------------------------------------------------


def lora(model, tmp_path, saved_whole):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=saved_whole)
    return peft.get_peft_model(model, config)


def test_peft_s_head_is_what_is_new_of_modules_to_save(tmp_path):
    model = reloaded("Bert", SMALL, "Model", "ForSequenceClassification", tmp_path)
    model = lora(model, tmp_path, ["classifier", "word_embeddings", "pooler"])
    found = find_head(model)
    assert found == [
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    ]
    with torch.no_grad():
        model.get_parameter(found[1]).add_(1)  # an adapter that was trained before
    assert find_head(model) == []


def test_the_factors_of_lora_are_no_head(tmp_path):
    model = reloaded("Bert", SMALL, "Model", "ForSequenceClassification", tmp_path)
    assert find_head(lora(model, tmp_path, None)) == []


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["1."], ["1.weight", "1.bias"], "1"])
def test_names_or_how_they_begin(names):
    assert find_head(nn.Sequential(body(), trained_much(nn.Linear(16, 2))), names) == [
        "1.weight",
        "1.bias",
    ]


def test_a_name_that_is_none():
    model = nn.Sequential(body(), nn.Linear(16, 2))
    message = r"head='2' is not allowed: no .* The last ones are .*1\.weight, 1\.bias\.$"
    with pytest.raises(ValueError, match=message):
        find_head(model, ["1", "2"])
    model[1].requires_grad_(False)
    with pytest.raises(ValueError, match="head='1' is not allowed: no trainable parameter"):
        find_head(model, ["1"])


def test_names_of_all():
    with pytest.raises(ValueError, match="it is all that is trained, so that no body is left"):
        find_head(nn.Sequential(body(), nn.Linear(16, 2)), ["0", "1"])


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.a.weight", "a.weight"),
        ("_orig_mod.module.a.b", "a.b"),
        ("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.c", "a.b.c"),
        ("modules.a", "modules.a"),
    ],
)
def test_names_without_wrappers(name, plain):
    assert plain_name(name) == plain


# --- groups -------------------------------------------------------------------------------------


def test_groups_keep_options_and_order():
    model = nn.Sequential(body(), nn.Linear(16, 2), nn.Linear(2, 2))
    params = list(model.parameters())
    wrapped = nn.ModuleDict({"module": model})
    groups = mark_head(
        [{"params": params[:7], "lr": 1.0}, {"params": params[7:], "lr": 2.0}, {"params": []}],
        wrapped,
        ["1.weight", "1.bias"],
    )
    assert [(len(g["params"]), g["lr"], g["head"]) for g in groups] == [
        *((6, 1.0, False), (1, 1.0, True), (1, 2.0, True), (2, 2.0, False)),
    ]
    joined = [param for group in groups for param in group["params"]]
    assert all(a is b for a, b in zip(joined, params, strict=True))


def test_head_groups():
    model = nn.Sequential(body(), nn.Linear(16, 2))
    model[0][0].weight.requires_grad_(False)
    groups = head_groups(model, weight_decay=0.1)
    assert [(len(g["params"]), g["head"], g["weight_decay"]) for g in groups] == [
        *((5, False, 0.1), (2, True, 0.1)),
    ]
    (group,) = head_groups(trained_much(model))
    assert not group["head"]
    assert math.isclose(len(group["params"]), 7)
    assert [g["head"] for g in head_groups(model, ["1"])] == [False, True]
