"""run_clm.py as its users see it."""

import math

import numpy as np
import pytest
import run_clm
import torch
from running import SCRIPT_FLAGS, TINY_GPT2, ScriptResult
from support.text import DataArguments, load_texts
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_clm_on_embedded_text(clm):
    result = clm("--max_steps", 8, "--logging_steps", 4, "--vocab_size", 512)
    for name in ("step_size_and_loss.png", "model.safetensors", "checkpoint-8/trainer_state.json"):
        assert (result.folder / name).stat().st_size > 0
    assert "this run uses embedded text, the prose of Python's documentation" in result.stdout
    assert "A sample: T" in result.stdout
    before, *_, after = result.log("eval_loss")
    assert before == pytest.approx(math.log(512), abs=0.1)
    assert after < before - 0.02  # the first of the eight is a warm-up, the last five the tail

    metrics = result.json("eval_results.json")
    everything = result.json("all_results.json")
    card = (result.folder / "README.md").read_text()
    report = result.stdout[result.stdout.index("Before training:") :]
    for name in ("loss", "perplexity", "loss_per_character"):
        value = metrics[f"eval_{name}"]
        assert everything[f"eval_{name}"] == value
        assert result.log(f"eval_{name}")[-1] == value
        assert len(result.log(f"eval_{name}")) == 3  # at the start, after the epoch, at the end
        assert f"{name} {value:.4f}" in report
        assert f"{name.replace('_', ' ').title()}: {value:.4f}" in card
    assert "prose of Python's documentation" in card
    for path in ("README.md", "step_size_and_loss.png", "checkpoint-8"):
        assert str(result.folder / path) in report


@pytest.mark.parametrize("flags", [["--tokenizer", "bytes"], ["--vocab_size", "400"]], ids=str)
def test_held_out_metrics_by_hand(clm, text_file, flags):
    """A plain loop over the held-out text: the loss of each token but a block's first."""
    result = clm("--train_file", text_file, *flags, "--block_size", 8)
    model = AutoModelForCausalLM.from_pretrained(result.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    text = text_file.read_text("utf-8")
    held_out = text[round(0.9 * len(text)) :]
    tokens = tokenizer(held_out)["input_ids"]
    assert tokenizer.decode(tokens) == held_out

    # A symbol of byte-level BPE stands for one byte. Of the bytes of a character, all but the first
    # are continuation bytes (10xxxxxx).
    ends = np.cumsum([len(token) for token in tokenizer.convert_ids_to_tokens(tokens)])
    starts = [0, *ends[:-1]]
    first_bytes = [byte & 0b1100_0000 != 0b1000_0000 for byte in held_out.encode()]
    assert ends[-1] == len(first_bytes)
    losses, characters = [], 0
    for start in range(0, len(tokens) - 7, 8):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start : start + 8]])).logits[0]
        for i in range(1, 8):
            losses.append(-logits[i - 1].log_softmax(-1)[tokens[start + i]].item())
            characters += sum(first_bytes[starts[start + i] : ends[start + i]])
    metrics = result.json("eval_results.json")
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert metrics["eval_loss_per_character"] == pytest.approx(sum(losses) / characters, rel=1e-5)
    # Training counts the same tokens: not the first of the 8, which nothing predicts.
    assert result.log("loss")[0] == pytest.approx(result.log("eval_loss")[0], abs=0.1)


def test_clm_fine_tunes_what_it_saved(clm, tmp_path, text_file):
    first = clm("--train_file", text_file, "--vocab_size", 300, output_dir="first")
    flags = ["--output_dir", str(tmp_path / "second"), *SCRIPT_FLAGS, "--optim", "salsa_sgd"]
    run_clm.main(
        [*flags, "--train_file", str(text_file), "--model_name_or_path", str(first.folder)]
    )
    second = ScriptResult(tmp_path / "second", "")
    assert second.log("eval_loss")[0] == pytest.approx(first.log("eval_loss")[-1], rel=1e-6)
    assert second.json("config.json")["n_layer"] == 1
    card = (second.folder / "README.md").read_text()
    assert "first" in card
    assert str(tmp_path) not in card


def test_clm_evaluates_on_its_own_file(clm, tmp_path, text_file):
    other = tmp_path / "other.txt"
    other.write_text("z" * 64)
    flags = ("--train_file", text_file, "--validation_file", other, "--tokenizer", "bytes")
    result = clm(*flags)
    assert "validation 2 blocks of 32 tokens; 1.00 characters a token." in result.stdout
    # The embedded text's own words in the card would be wrong.
    assert "text.txt" in (result.folder / "README.md").read_text()


def test_clm_holds_out_the_end_of_the_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, range(32, 122))) + "0123456789")
    args = DataArguments(train_file=str(path), validation_fraction=0.1)
    train, validation = load_texts(args)
    assert validation == "0123456789"
    assert train + validation == path.read_text()


def test_clm_nano_gpt_set_up(clm, text_file):
    result = clm(
        *("--train_file", text_file, "--tokenizer", "bytes", "--config_overrides"),
        "n_layer=4,n_head=4,n_embd=128,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0",
        *("--block_size", 64, "--per_device_train_batch_size", 12, "--max_steps", 1),
    )
    config = result.json("config.json")
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 64, "vocab_size": 256}
    assert config.items() >= shape.items()
    assert {config["resid_pdrop"], config["embd_pdrop"], config["attn_pdrop"]} == {0}


def test_clm_baseline(clm, text_file):
    result = clm(
        *("--train_file", text_file, "--tokenizer", "bytes", "--optim", "adamw_torch"),
        *("--learning_rate", "1e-3", "--lr_scheduler_type", "cosine", "--warmup_steps", 0.1),
    )
    assert "Search: " not in result.stdout
    card = (result.folder / "README.md").read_text()
    assert "0.001" in card
    assert "salsa" not in card.lower()


def test_clm_block_size_by_default(text_file, clm, tmp_path):
    flags = ("--train_file", text_file, "--tokenizer", "bytes", "--max_steps", "1")
    scratch = [*SCRIPT_FLAGS, "--config_overrides", TINY_GPT2, *map(str, flags)]
    run_clm.main(["--output_dir", str(tmp_path / "scratch"), *scratch])
    result = ScriptResult(tmp_path / "scratch", "")
    assert result.json("config.json")["n_positions"] == 128
    assert result.json("tokenizer_config.json")["model_max_length"] == 128


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--config_overrides", "n_layr=2"], "GPT2Config has no setting 'n_layr'. Did you mean "
                                             "n_layer?"),
        (["--config_overrides", "n_layer=2.5"], "'n_layer' expected int, got float (value: 2.5)"),
        (["--config_overrides", "n_layer"], "'n_layer' expected int, got str (value: '')"),
        (["--config_overrides", "use_cache=maybe"], "'use_cache' expected bool, got str"),
        (["--config_overrides", "n_embd=128,n_head=3"], "divisible by num_heads"),
        (["--config_overrides", "activation_function=gulu"], "gulu"),
        (["--config_overrides", "vocab_size=9"], "use --vocab_size"),
        (["--config_overrides", "n_positions=16", "--block_size", "32"],
         "block_size 32 exceeds the model's 16 positions"),
        (["--tokenizer", "words"], "invalid choice: 'words'"),
        (["--tokenizer", "bytes", "--vocab_size", "300"], "leave vocab_size out"),
        (["--vocab_size", "256"], "vocab_size must be above 256, one for each byte, got 256"),
        (["--block_size", "1"], "block_size must be at least 2, got 1"),
        (["--model_name_or_path", "gpt2", "--tokenizer", "bytes"],
         "tokenizer is for a model from scratch"),
        (["--model_name_or_path", "gpt2", "--config_overrides", "n_layer=1"],
         "config_overrides is for a model from scratch"),
        (["--train_file", "a.txt"], "a.txt: no such file"),
        (["--train_file", "a.txt", "--dataset_name", "b"], "not both"),
        (["--validation_file", "a.txt"], "validation_file needs a train_file"),
        (["--dataset_config_name", "a"], "dataset_config_name needs a dataset_name"),
        (["--validation_fraction", "1"], "validation_fraction must be between 0 and 1, got 1.0"),
        (["--dataset_name", "Salesforce/wikitext", "--dataset_config_name", "wikitext-2-raw-v1"],
         "Salesforce/wikitext did not load from the hub"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_clm_flags(error, flags, complaint):
    assert complaint in error(run_clm, *flags)


def test_clm_text_too_short(error, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("x" * 100)
    flags = ("--train_file", path, "--tokenizer", "bytes")
    message = error(run_clm, *flags, "--block_size", 95)
    assert "the training text has 90 tokens, which fill no block of 95" in message
    message = error(run_clm, *flags, "--block_size", 11)
    assert "the held-out text has 10 tokens, which fill no block of 11" in message
    assert "give more text or a smaller --block_size" in message


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe\x00"], ids=str)
def test_clm_file_without_text(error, tmp_path, content):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    message = error(run_clm, "--train_file", path)
    assert str(path) in message
    assert "can't decode" in message if b"\xff" in content else "holds no text" in message
