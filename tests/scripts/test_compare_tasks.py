"""Tasks of the comparison that differ in kind: what is predicted, what is trained."""

import dataclasses

import pytest
import torch
from comparison import loaders
from comparison.candidates import CANDIDATES
from comparison.grid import be_quiet
from comparison.loaders import Sources, load_tags, load_text
from comparison.rivals import ScheduleFreeTrainer
from comparison.runs import Run, make_trainer
from comparison.tasks import PRESETS
from comparison_helpers import SMOKE, carry_out
from transformers import AutoTokenizer, EvalPrediction

from hf_salsa.head import find_head


def test_words_have_the_tag_of_how_they_were_written(bert_folder):
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    row = loaders._tagged('The "list" of Python, it says, is unbounded.', tokenizer)
    words, tags = [], []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label == -100 and words:
            words[-1] += tokenizer.convert_ids_to_tokens(token).removeprefix("##")
        elif label != -100:
            words.append(tokenizer.convert_ids_to_tokens(token))
            tags.append(loaders.TAGS[label])
    assert tags[0] == "capital"
    assert tags[-6:] == ["plain", "both", "plain", "punctuation", "plain", "punctuation"]
    assert not any(character in "".join(words[:-1]) for character in ",.LTP")


def test_tagging_scores_every_tag_alike():
    """Of two tags one is found in half of the words that have it, and nowhere else."""
    wanted = torch.tensor([[0, 0, 1, 1, -100]]).numpy()
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 0, 0, 1, 1]]), 2).numpy()
    score = loaders.macro_f1(EvalPrediction(logits, wanted))
    assert score == {"macro_f1": pytest.approx((2 * 2 / 5 + 2 * 1 / 3) / 2)}


def test_a_tagger_has_a_new_head(bert_folder):
    prepared = load_tags(Sources(), model=str(bert_folder), max_train_samples=8)
    assert find_head(prepared.make_model()) == ["classifier.weight", "classifier.bias"]
    assert len(prepared.make_train(0)[0]) == 8
    shares = torch.tensor([tag for row in prepared.validation["labels"] for tag in row])
    counts = torch.bincount(shares[shares >= 0], minlength=4)
    share = float(counts.max() / counts.sum())
    # The same tag for every word: its own F1, and three of 0.
    assert PRESETS["cpu"]["chunks"].chance == pytest.approx(share / (1 + share) / 2, abs=0.005)


def test_adapters_are_all_that_is_trained(tmp_path):
    settings = SMOKE["prose"].settings | {"lora": PRESETS["cpu"]["lora_lm"].settings["lora"]}
    model = load_text(Sources(), **settings).make_model()
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert len(trained) == 2
    assert all("c_attn.lora" in name for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize("candidate", ["former_plus_head_first", "adamw_head_first"])
def test_a_pretrained_network_of_images_trains(tmp_path, candidate):
    be_quiet()
    task = PRESETS["cpu"]["efficientnet"]
    few = {"max_train_samples": 64, "max_eval_samples": 32}
    task = dataclasses.replace(task, updates=20, settings=task.settings | few)
    rate = 1e-3 if candidate == "adamw_head_first" else None
    run = Run("efficientnet", task, candidate, rate, 0, tmp_path)
    run.folder.mkdir(parents=True)
    results = carry_out(run)
    assert results["status"] == "finished", results["error"]
    assert results["losses"][-1] < results["losses"][0]
    assert ("card" in results) is (candidate != "adamw_head_first")


@pytest.mark.slow
def test_schedule_free_finds_statistics_at_the_weights_that_it_evaluates(tmp_path, monkeypatch):
    be_quiet()
    few = {"max_train_samples": 32, "max_eval_samples": 16}
    digits = SMOKE["digits"]
    task = dataclasses.replace(digits, updates=3, settings=digits.settings | few)
    run = Run("digits", task, "schedule_free_warmup", 1e-2, 0, tmp_path)
    prepared = loaders.load_images(Sources(), **task.settings)
    found = {}
    for batches in (0, 50):
        monkeypatch.setattr(ScheduleFreeTrainer, "BATCHES", batches)
        trainer = make_trainer(run, prepared)
        assert trainer.args.warmup_steps == 1  # a tenth of three, rounded up
        trainer.train()
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        found[batches] = weights, trainer.evaluate()["eval_loss"]
    for name, weight in found[0][0].items():  # training knows nothing of it
        assert torch.equal(weight, found[50][0][name])
    assert found[0][1] != found[50][1]
    assert CANDIDATES["schedule_free"].trainer is not ScheduleFreeTrainer
