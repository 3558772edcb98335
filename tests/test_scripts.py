"""The training scripts as their users see them."""

import functools
import json
import math
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import run_clm
import run_glue
import torch
from conftest import SCRIPT_FLAGS, ScriptResult
from embedded_data import bigram_shift_pairs, python_documentation, sentences
from glue_metric import METRIC_NAMES, GlueMetric
from safetensors.torch import load_file
from script_utils import UsageError, check_processes
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    set_seed,
)

from hf_salsa import BatchObjective

SCRIPTS = Path(run_clm.__file__).parent
GLUE_FLAGS = ["--max_train_samples", "32", "--max_eval_samples", "16"]
TINY_GPT2 = "n_layer=1,n_head=2,n_embd=16"
CLM_FLAGS = ["--config_overrides", TINY_GPT2, "--block_size", "32"]


@pytest.fixture
def glue(run_script):
    """Runs run_glue.py's main; flags given later win over the tiny settings."""
    return functools.partial(run_script, run_glue, *GLUE_FLAGS)


@pytest.fixture
def clm(run_script):
    """Runs run_clm.py's main, likewise."""
    return functools.partial(run_script, run_clm, *CLM_FLAGS)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """A tiny BERT with its tokenizer, as `--model_name_or_path` takes it."""
    folder = tmp_path_factory.mktemp("bert")
    set_seed(0)
    _, tokenizer = run_glue.make_model_and_tokenizer(run_glue.load_embedded_data(), vocab_size=500)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=tokenizer.model_max_length,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    """Some English, and characters of two, three and four bytes."""
    path = tmp_path / "text.txt"
    path.write_text(python_documentation()[:9000] + "Größe, naïve, 数字, 😀!\n" * 40, "utf-8")
    return path


# --- The data that the scripts carry


def test_documentation_is_prose_without_markup():
    text = python_documentation()
    assert len(text) > 200_000
    for markup in ("`", ">>>", "::=", "+--", "\t", "  "):
        assert markup not in text
    assert not re.search(r"(?<!\w)\*\*\w[^*\n]*\w\*\*", text)  # **kwargs is none
    lines = text.splitlines()
    assert len(set(lines)) == len(lines)
    letters_and_blanks = sum(c.isalpha() or c == " " for c in text)
    assert letters_and_blanks > 0.92 * len(text)


def test_sentences_are_whole_and_distinct():
    found = sentences(min_words=8, max_words=20)
    assert len(found) > 500
    assert len({sentence.lower() for sentence in found}) == len(found)
    for sentence in found:
        assert sentence[0].isupper()
        assert sentence[-1] in ".?!"
        assert 8 <= len(sentence.split()) <= 20


def test_bigram_shift_pairs_differ_in_two_neighbouring_words():
    rows = bigram_shift_pairs()
    assert len(rows) > 3000
    by_words = {}
    for row in rows:
        by_words.setdefault(tuple(sorted(row["sentence"].split())), {})[row["label"]] = row
    assert len(by_words) == len(rows) / 2  # each has its partner, so the labels are balanced
    originals = set(sentences())
    for pair in by_words.values():
        original, shifted = (pair[label]["sentence"].split() for label in (0, 1))
        differing = [i for i, words in enumerate(zip(original, shifted, strict=True))
                     if words[0] != words[1]]  # fmt: skip
        assert len(differing) == 2
        assert differing[1] == differing[0] + 1
        assert pair[0]["sentence"] in originals
        assert pair[1]["sentence"] not in originals


def test_bigram_shift_splits_share_no_sentence():
    train, validation = (bigram_shift_pairs(split=split) for split in ("train", "validation"))
    assert train
    assert len(validation) == pytest.approx(0.1 * (len(train) + len(validation)), abs=2)
    words = [
        {tuple(sorted(row["sentence"].split())) for row in rows} for rows in (train, validation)
    ]
    assert words[0].isdisjoint(words[1])
    for rows in (train, validation):
        assert sum(row["label"] for row in rows) == len(rows) / 2


def test_bigram_shift_pairs_depend_on_the_seed_alone():
    assert bigram_shift_pairs(seed=3) == bigram_shift_pairs(seed=3)
    assert bigram_shift_pairs(seed=3) != bigram_shift_pairs(seed=4)


def test_bigram_shift_pairs_refuse_nonsense():
    with pytest.raises(ValueError, match="split must be 'train', 'validation' or None, got 'test'"):
        bigram_shift_pairs(split="test")
    with pytest.raises(ValueError, match=r"validation_fraction must be in \(0, 1\), got 1"):
        bigram_shift_pairs(validation_fraction=1)


# --- The metrics of GLUE, by hand


@pytest.mark.parametrize(
    ("task", "predictions", "references", "expected"),
    [
        # 2 true and 1 false positive, 1 true and 1 false negative
        ("cola", [1, 1, 0, 0, 1], [1, 0, 0, 1, 1], {"matthews_correlation": 1 / 6}),
        ("mrpc", [1, 1, 0, 0, 1], [1, 0, 0, 1, 1], {"accuracy": 3 / 5, "f1": 2 / 3}),
        ("qqp", [1, 0], [0, 0], {"accuracy": 1 / 2, "f1": 0.0}),
        ("mnli", [0, 1, 2, 2], [0, 1, 2, 1], {"accuracy": 3 / 4}),
        (
            "stsb",
            [1.0, 2.0, 3.0, 4.0],
            [1.0, 2.0, 10.0, 3.0],
            {"pearson": 7 / math.sqrt(250), "spearmanr": 0.8},
        ),
        ("regression", [2.0, 2.0], [1.0, 3.0], {"pearson": 0.0, "spearmanr": 0.0}),
        ("classification", [2, 0], [2, 1], {"accuracy": 1 / 2}),
    ],
)
def test_glue_metric(task, predictions, references, expected):
    metric = GlueMetric(task, keep_in_memory=True)
    result = metric.compute(predictions=predictions, references=references)
    assert result == pytest.approx(expected)


def test_glue_metric_of_an_unknown_task():
    with pytest.raises(ValueError, match="config_name='glue' is not one of cola, sst2"):
        GlueMetric("glue")


# --- run_glue.py: what a run leaves behind


def test_glue_on_embedded_data(glue):
    result = glue("--logging_steps", 1, "--per_device_train_batch_size", 16)
    for name in ("step_size_and_loss.png", "trainer_state.json", "checkpoint-2/trainer_state.json"):
        assert (result.folder / name).stat().st_size > 0
    assert "this run uses the embedded bigram-shift probe" in result.stdout
    metrics = result.json("eval_results.json")
    everything = result.json("all_results.json")
    assert everything["eval_accuracy"] == metrics["eval_accuracy"]
    assert everything["salsa/searches"] == 2
    assert len(result.log("eval_loss")) == 3  # at the start, after the epoch, at the end

    card = (result.folder / "README.md").read_text()
    assert "SaLSaAdam" in card
    assert f"Accuracy: {metrics['eval_accuracy']:.4f}" in card
    report = result.stdout[result.stdout.index("Before training:") :]
    assert f"accuracy {metrics['eval_accuracy']:.4f}" in report
    assert f"{everything['salsa/trials']} extra forward passes" in report
    for path in ("README.md", "step_size_and_loss.png", "checkpoint-2"):
        assert str(result.folder / path) in report

    # The folder holds the model that was evaluated, ready for the hub's classes.
    model = AutoModelForSequenceClassification.from_pretrained(result.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    rows = bigram_shift_pairs(split="validation")[:16]
    right = 0
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(row["sentence"], return_tensors="pt")).logits
        label = model.config.id2label[logits.argmax().item()]
        right += label == ("original", "shifted")[row["label"]]
    assert right / 16 == metrics["eval_accuracy"]


class TaskFiles(NamedTuple):
    """A GLUE task's files: their header and two lines, and what these say."""

    folder: str
    header: str | None
    lines: list[str]
    examples: list[dict]
    label_names: list[str] | None


PAIR = {"sentence1": '"A cat sat.', "sentence2": "It sat."}
PAIR_LINE = '"A cat sat.\tIt sat.'  # GLUE's files know no quoting
# fmt: off
TASK_FILES = {
    "cola": TaskFiles(
        "CoLA", None, ["gj04\t1\t\tHe said so.", "gj04\t0\t*\tHe so said."],
        [{"sentence1": "He said so.", "label": 1}, {"sentence1": "He so said.", "label": 0}],
        ["unacceptable", "acceptable"],
    ),
    "sst2": TaskFiles(
        "SST-2", "sentence\tlabel", ["a \"joy \t1", "dull \t0"],
        [{"sentence1": "a \"joy ", "label": 1}, {"sentence1": "dull ", "label": 0}],
        ["negative", "positive"],
    ),
    "mrpc": TaskFiles(
        "MRPC", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        [f"1\t10\t11\t{PAIR_LINE}", f"0\t12\t13\t{PAIR_LINE}"],
        [{**PAIR, "label": 1}, {**PAIR, "label": 0}], ["not_equivalent", "equivalent"],
    ),
    "stsb": TaskFiles(
        "STS-B", "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
        "\tscore",
        [f"0\tg\tf\t2012\t0\tnone\tnone\t{PAIR_LINE}\t4.750",
         f"1\tg\tf\t2012\t1\tnone\tnone\t{PAIR_LINE}\t0.000"],
        [{**PAIR, "label": 4.75}, {**PAIR, "label": 0.0}], None,
    ),
    "qqp": TaskFiles(
        "QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        [f"0\t1\t2\t{PAIR_LINE}\t0", f"1\t3\t4\t{PAIR_LINE}\t1"],
        [{**PAIR, "label": 0}, {**PAIR, "label": 1}], ["not_duplicate", "duplicate"],
    ),
    "mnli": TaskFiles(
        "MNLI", "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse"
        "\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        [f"0\t1\t1n\tg\t(\t(\t(\t(\t{PAIR_LINE}\tneutral\tcontradiction",
         f"1\t2\t2e\tg\t(\t(\t(\t(\t{PAIR_LINE}\tneutral\tentailment"],
        [{**PAIR, "label": 2}, {**PAIR, "label": 0}],
        ["entailment", "neutral", "contradiction"],
    ),
    "qnli": TaskFiles(
        "QNLI", "index\tquestion\tsentence\tlabel",
        [f"0\t{PAIR_LINE}\tentailment", f"1\t{PAIR_LINE}\tnot_entailment"],
        [{**PAIR, "label": 0}, {**PAIR, "label": 1}], ["entailment", "not_entailment"],
    ),
    "rte": TaskFiles(
        "RTE", "index\tsentence1\tsentence2\tlabel",
        [f"0\t{PAIR_LINE}\tnot_entailment", f"1\t{PAIR_LINE}\tentailment"],
        [{**PAIR, "label": 1}, {**PAIR, "label": 0}], ["entailment", "not_entailment"],
    ),
    "wnli": TaskFiles(
        "WNLI", "index\tsentence1\tsentence2\tlabel",
        [f"0\t{PAIR_LINE}\t1", f"1\t{PAIR_LINE}\t0"],
        [{**PAIR, "label": 1}, {**PAIR, "label": 0}], ["not_entailment", "entailment"],
    ),
}
# fmt: on
MNLI_DEV_HEADER = TASK_FILES["mnli"].header.replace(
    "label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5"
)


def write_glue(glue_dir, task):
    """Write the files of a task as GLUE spells them: 8 examples to train on, 4 in each other."""
    files = TASK_FILES[task]
    folder = glue_dir / files.folder
    folder.mkdir(parents=True)
    header = [] if files.header is None else [files.header]
    (folder / "train.tsv").write_text("\n".join([*header, *files.lines * 4, ""]))
    if task == "mnli":  # with the labels of five annotators before the one of gold
        lines = [line.replace("\tneutral\t", "\t-" * 5 + "\t") for line in files.lines * 2]
        for name in ("dev_matched.tsv", "dev_mismatched.tsv"):
            (folder / name).write_text("\n".join([MNLI_DEV_HEADER, *lines, ""]))
    else:
        (folder / "dev.tsv").write_text("\n".join([*header, *files.lines * 2, ""]))


@pytest.mark.parametrize("task", TASK_FILES)
def test_glue_task(glue, tmp_path, bert_folder, task):
    write_glue(tmp_path, task)
    expected = TASK_FILES[task]
    data = run_glue.load_glue_files(task, tmp_path)
    label = data["train"].features["label"]
    assert getattr(label, "names", None) == expected.label_names
    assert list(data["train"]) == expected.examples * 4
    validation = {split: list(rows) for split, rows in data.items() if split != "train"}
    splits = ["_matched", "_mismatched"] if task == "mnli" else [""]
    assert validation == {f"validation{split}": expected.examples * 2 for split in splits}

    flags = ("--task_name", task, "--glue_dir", tmp_path, "--model_name_or_path", bert_folder)
    result = glue(*flags, "--max_steps", 1)
    metrics = result.json("eval_results.json")
    sets = ["matched_", "mismatched_"] if task == "mnli" else [""]
    for name in ("loss", *METRIC_NAMES[task]):
        for prefix in sets:
            value = metrics[f"eval_{prefix}{name}"]
            assert math.isfinite(value)
            assert f"{prefix}{name} {value:.4f}" in result.stdout  # the closing report
    config = result.json("config.json")
    if task == "stsb":
        assert config["problem_type"] == "regression"
        assert list(config["id2label"]) == ["0"]
    else:
        assert list(config["id2label"].values()) == expected.label_names
    assert f"GLUE {task.upper()}" in (result.folder / "README.md").read_text()


def test_glue_leaves_out_broken_lines_and_says_so(tmp_path, capsys):
    write_glue(tmp_path, "qqp")
    path = tmp_path / "QQP" / "train.tsv"
    path.write_text(path.read_text() + "7\t8\t9\tHalf a line\n10\n")
    data = run_glue.load_glue_files("qqp", tmp_path)
    assert list(data["train"]) == TASK_FILES["qqp"].examples * 4
    assert f"{path}: left out 2 of 10 lines, which lack columns" in capsys.readouterr().out


def test_glue_missing_file_is_named(error, tmp_path):
    write_glue(tmp_path, "rte")
    path = tmp_path / "RTE" / "train.tsv"
    path.unlink()
    message = error(run_glue, "--task_name", "rte", "--glue_dir", tmp_path)
    assert f"rte needs {path}: no such file" in message


def test_glue_empty_file_is_named(error, tmp_path):
    write_glue(tmp_path, "rte")
    path = tmp_path / "RTE" / "train.tsv"
    for content in ("", f"{TASK_FILES['rte'].header}\n"):
        path.write_text(content)
        message = error(run_glue, "--task_name", "rte", "--glue_dir", tmp_path)
        assert f"{path} holds no examples" in message


def test_glue_unknown_label_is_named(error, tmp_path):
    write_glue(tmp_path, "rte")
    path = tmp_path / "RTE" / "dev.tsv"
    path.write_text(path.read_text() + f"9\t{PAIR_LINE}\tmaybe\n")
    message = error(run_glue, "--task_name", "rte", "--glue_dir", tmp_path)
    assert f"{path}, line 6: unknown label 'maybe'" in message
    assert "the labels are entailment, not_entailment" in message


def test_glue_hub_out_of_reach(error):
    message = error(run_glue, "--task_name", "mrpc")
    assert "mrpc did not load from the hub" in message
    assert "--glue_dir reads GLUE's own files" in message


# --- run_glue.py: data of one's own


def write_own(folder, suffix, rows):
    """Write `rows`, whose columns are sentence and label, in the format that `suffix` names."""
    path = folder / f"own{suffix}"
    if suffix == ".jsonl":
        lines = [json.dumps({"sentence": sentence, "label": label}) for sentence, label in rows]
    elif suffix == ".csv":
        lines = ["sentence,label", *(f'"{sentence}",{label}' for sentence, label in rows)]
    else:
        lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_own_classes(tmp_path, suffix):
    rows = [("yes, it is", "pos"), ("no", "neg"), ("perhaps", "neutral")]
    path = write_own(tmp_path, suffix, rows)
    data = run_glue.load_own_files(str(path), str(path))
    assert data["train"].features["label"].names == ["neg", "neutral", "pos"]
    assert data["train"]["sentence1"][:] == ["yes, it is", "no", "perhaps"]
    assert data["validation"]["label"][:] == [2, 0, 1]


def test_own_numbers_are_classes_or_values(tmp_path):
    data = run_glue.load_own_files(*[str(write_own(tmp_path, ".csv", [("a", 10), ("b", 9)]))] * 2)
    assert data["train"].features["label"].names == ["9", "10"]  # in the order of numbers
    data = run_glue.load_own_files(*[str(write_own(tmp_path, ".csv", [("a", 1.5), ("b", 2)]))] * 2)
    assert data["train"]["label"][:] == [1.5, 2.0]


def test_own_columns_by_name(glue, tmp_path, bert_folder):
    path = tmp_path / "own.csv"
    path.write_text("premise,claim,verdict\n" + "one,two,yes\nthree,four,no\n" * 4)
    result = glue(
        *("--train_file", path, "--validation_file", path, "--text_columns", "premise", "claim"),
        *("--label_column", "verdict", "--model_name_or_path", bert_folder),
    )
    assert list(result.json("config.json")["id2label"].values()) == ["no", "yes"]
    assert "own.csv" in (result.folder / "README.md").read_text()


def test_own_regression_trains(glue, tmp_path, bert_folder):
    path = write_own(tmp_path, ".tsv", [(text, i / 2) for i, text in enumerate(sentences()[:16])])
    flags = ("--train_file", path, "--validation_file", path, "--model_name_or_path", bert_folder)
    result = glue(*flags, "--max_steps", 4)
    assert {"eval_pearson", "eval_spearmanr"} <= result.json("eval_results.json").keys()
    before, *_, after = result.log("eval_loss")
    # Mean squared error of about 4.5^2 while the model says 0.
    assert before == pytest.approx(np.mean([(i / 2) ** 2 for i in range(16)]), rel=0.2)
    assert after < before


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("own.txt", "sentence\n", "the name must end in .csv, .tsv, .jsonl or .json"),
        ("own.csv", "", "holds no examples"),
        ("own.csv", "text,label\na,1\nb,2\n", "has no column 'sentence', only text, label"),
        ("own.csv", "sentence,label\na,1\nb\n", "line 3: 1 values for the 2 columns"),
        ("own.csv", "sentence,label\na,1\n,2\n", "line 3: no value for 'sentence'"),
        ("own.csv", "sentence,label\na,1\nb,1\n", "every label is '1', nothing to tell apart"),
        ("own.csv", 'sentence,label\n"a,1\nb,2\n', "unexpected end of data"),
        ("own.jsonl", '{"sentence": "a", "label": 1}\n{"sent', "line 2: Unterminated string"),
        ("own.jsonl", "[1]\n", "line 1: not a JSON object"),
        (
            "own.jsonl",
            '{"sentence": "a", "label": 1}\n{"sentence": "a"}\n',
            "line 2: no value for 'label'",
        ),
        ("own.jsonl", "\n", "holds no examples"),
    ],
)
def test_own_data_mistakes(error, tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_text(content)
    message = error(run_glue, "--train_file", path, "--validation_file", path)
    assert str(path) in message
    assert complaint in message


# --- Errors that both scripts report alike: one line, status 2, nothing started


@pytest.mark.parametrize(
    ("flags", "complaints"),
    [
        (["--optim", "salsa_adma"], ["optim='salsa_adma'", "Did you mean 'salsa_adam'?"]),
        (["--salsa_c", "1.5"], ["salsa_c", "1.5", "between 0 and 1"]),
        (["--salsa_beta3", "1"], ["salsa_beta3", "[0, 1)"]),
        (["--salsa_c", "much"], ["--salsa_c", "'much'"]),
        (["--salsa_intial_step_size", "1"], ["--salsa_intial_step_size",
                                             "Did you mean --salsa_initial_step_size?"]),
        (["--max_stepss=3"], ["unknown argument --max_stepss", "Did you mean --max_steps?"]),
        (["--max_step", "3"], ["unknown argument --max_step", "Did you mean --max_steps?"]),
        (["--deepspeed", "x.json"], ["deepspeed", "FSDP2", "DDP", "stock optimizer"]),
        (["--resume_from_checkpoint", "true"], ["no checkpoint to resume from"]),
        (["--resume_from_checkpoint", "nowhere"], ["nowhere is no complete checkpoint"]),
        (["--model_name_or_path", "nowhere/at-all"], ["nowhere/at-all did not load"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)  # fmt: skip
@pytest.mark.parametrize("script", [run_glue, run_clm], ids=["glue", "clm"])
def test_wrong_flags(error, script, flags, complaints):
    message = error(script, *flags)
    for complaint in complaints:
        assert complaint in message


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--task_name", "squad"], "task_name='squad' is not a GLUE task: choose from cola"),
        (["--glue_dir", "GLUE"], "glue_dir needs a task_name"),
        (["--task_name", "rte", "--train_file", "a.csv"], "not both"),
        (["--train_file", "a.csv"], "needs both a train_file and a validation_file"),
        (["--train_file", "a.csv", "--validation_file", "b.csv"], "a.csv: no such file"),
        (["--text_columns", "a", "b", "c"], "one or two columns"),
        (["--max_train_samples", "0"], "max_train_samples must be at least 1, got 0"),
        (["--max_seq_length", "4"], "max_seq_length must be at least 8, got 4"),
    ],
)
def test_wrong_glue_flags(error, flags, complaint):
    assert complaint in error(run_glue, *flags)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("max_stepss: 1", "unknown argument --max_stepss. Did you mean --max_steps?"),
        ("salsa_c: 1.5", "salsa_c"),
        ("- 1", "settings.yaml holds no names with values"),
        ("a: [", "settings.yaml: while parsing"),
        (None, "settings.yaml"),
    ],
)
def test_wrong_settings_file(tmp_path, capsys, content, complaint):
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as exit_:
        run_glue.main([str(path)])
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message.startswith("run_glue.py: error: ")
    assert message.count("\n") == 1
    assert complaint in message


# --- Settings, warnings and the baseline


def messages(caught):
    return [str(warning.message) for warning in caught]


def test_settings_from_a_yaml_file(tmp_path, capsys, bert_folder):
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"output_dir: {tmp_path / 'out'}\nmodel_name_or_path: {bert_folder}\noptim: salsa_sgd\n"
        "max_train_samples: 16\nmax_eval_samples: 8\nmax_steps: 5\nuse_cpu: true\n"
        "salsa_c: 0.2\neval_on_start: false\ndisable_tqdm: true\n"
    )
    run_glue.main([str(settings), "--max_steps", "1"])  # a flag wins
    result = ScriptResult(tmp_path / "out", capsys.readouterr().out)
    assert result.json("trainer_state.json")["global_step"] == 1
    assert "Before training" not in result.stdout
    assert "SaLSaSGD with c=0.2" in (result.folder / "README.md").read_text()


def test_learning_rate_is_ignored_with_one_warning(glue, bert_folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        glue(
            "--learning_rate", "2e-5", "--optim", "salsa_adam", "--model_name_or_path", bert_folder
        )
    about_it = [message for message in messages(caught) if "learning_rate" in message]
    assert len(about_it) == 1
    assert "learning_rate=2e-05" in about_it[0]


def test_gradient_clipping(glue, bert_folder):
    result = glue("--max_grad_norm", 1, "--max_steps", 4, "--model_name_or_path", bert_folder)
    assert "max_grad_norm: 1.0" in (result.folder / "README.md").read_text()
    assert math.isfinite(result.log("eval_loss")[-1])
    assert result.json("all_results.json")["salsa/failed_searches"] == 0


def test_baseline(glue, bert_folder):
    """A stock optimizer in the same script: its own schedule, and no word of a line search."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Ignored with")
        result = glue(
            *("--optim", "adamw_torch", "--learning_rate", "2e-5", "--logging_steps", 1),
            *("--lr_scheduler_type", "cosine", "--warmup_steps", 0.1, "--max_steps", 4),
            *("--model_name_or_path", bert_folder),
        )
    cosine = [0.5 * (1 + math.cos(math.pi * k / 3)) for k in range(3)]
    assert result.log("learning_rate") == pytest.approx([0, *(2e-5 * f for f in cosine)])
    history = result.json("trainer_state.json")["log_history"]
    assert not [key for entry in history for key in entry if key.startswith("salsa/")]
    assert "Before training" in result.stdout
    assert "Line search" not in result.stdout
    card = (result.folder / "README.md").read_text()
    assert "2e-05" in card
    assert "salsa" not in card.lower()


# --- Interrupting, resuming, starting anew


def interrupt_in_trial(patch, update):
    """Let Ctrl-C arrive while the search of an update (1, 2, ...) evaluates a trial."""
    record, evaluate = BatchObjective.record, BatchObjective.__call__
    updates = []

    def counting_record(self, *args):
        updates.append(1)
        return record(self, *args)

    def interrupted_evaluate(self):
        if len(updates) == update:
            raise KeyboardInterrupt
        return evaluate(self)

    patch.setattr(BatchObjective, "record", counting_record)
    patch.setattr(BatchObjective, "__call__", interrupted_evaluate)


def without_times(history):
    return [
        {
            key: value
            for key, value in entry.items()
            if "runtime" not in key and "per_second" not in key
        }
        for entry in history
    ]


@pytest.mark.parametrize("job", ["glue", "clm"])
def test_interrupted_and_resumed_equals_the_straight_run(
    request, tmp_path, capsys, monkeypatch, bert_folder, text_file, job
):
    run = request.getfixturevalue(job)
    flags = [*("--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2)]
    flags += [*("--logging_steps", 1, "--per_device_train_batch_size", 4)]
    if job == "glue":
        flags += ["--model_name_or_path", bert_folder]
    else:
        flags += ["--train_file", text_file, "--vocab_size", 400]
    straight = run(*flags, output_dir="straight")

    with monkeypatch.context() as patch:
        interrupt_in_trial(patch, update=3)
        with pytest.raises(SystemExit) as exit_:
            run(*flags)
    assert exit_.value.code == 130
    message = capsys.readouterr().err
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert f"Interrupted at step 2. The last checkpoint is {checkpoint}; to resume" in message
    assert "the same command with --resume_from_checkpoint true" in message

    resumed = run(*flags, "--resume_from_checkpoint", "true")
    a, b = (load_file(result.folder / "model.safetensors") for result in (straight, resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    histories = [
        without_times(result.json("trainer_state.json")["log_history"])
        for result in (straight, resumed)
    ]
    for history in histories:
        history[-2].pop("train_loss")  # of the part that ran last
    assert histories[0] == histories[1]
    assert "Before training" in resumed.stdout  # from the checkpoint's log


def test_interrupted_before_the_first_checkpoint(clm, capsys, monkeypatch, text_file):
    interrupt_in_trial(monkeypatch, update=1)
    with pytest.raises(SystemExit) as exit_:
        clm("--train_file", text_file, "--tokenizer", "bytes")
    assert exit_.value.code == 130
    message = capsys.readouterr().err
    assert "Interrupted at step 0. No checkpoint was saved yet" in message
    assert "--save_steps" in message
    assert "--overwrite_output_dir" in message


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(tmp_path, glue, bert_folder):
    folder = tmp_path / "out"
    flags = ["--model_name_or_path", str(bert_folder), "--save_strategy", "steps"]
    flags += ["--save_steps", "2", "--eval_strategy", "no"]
    process = subprocess.Popen(
        [
            *(sys.executable, str(SCRIPTS / "run_glue.py"), "--output_dir", str(folder)),
            *(*SCRIPT_FLAGS, *GLUE_FLAGS, *flags, "--max_steps", "1000000"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job would have it ignore Ctrl-C.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not list(folder.glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in message
    assert "to resume, give the same command with --resume_from_checkpoint true" in message

    (checkpoint,) = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    step = int(checkpoint.name.split("-")[1])
    result = glue(*flags, "--max_steps", step + 1, "--resume_from_checkpoint", "true")
    assert result.json("trainer_state.json")["global_step"] == step + 1


@pytest.fixture
def earlier_run(tmp_path):
    """The output folder of a run that went before, and a file of the user's in it."""
    folder = tmp_path / "out"
    for checkpoint in ("checkpoint-7", "checkpoints-7-and-8"):
        (folder / checkpoint).mkdir(parents=True)
        (folder / checkpoint / "trainer_state.json").write_text("{}")
    for name in ("trainer_state.json", "predict_results.json", "notes.txt"):
        (folder / name).write_text("{}")
    return folder


def files_in(folder):
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", [run_glue, run_clm], ids=["glue", "clm"])
def test_output_dir_in_use_is_refused(earlier_run, capsys, script):
    before = files_in(earlier_run)
    with pytest.raises(SystemExit) as exit_:
        script.main(["--output_dir", str(earlier_run), *SCRIPT_FLAGS])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert f"output_dir {earlier_run} is not empty" in message
    assert "--resume_from_checkpoint true" in message
    assert "--overwrite_output_dir" in message
    assert files_in(earlier_run) == before


def test_overwrite_deletes_the_earlier_run_and_nothing_else(clm, earlier_run, text_file):
    result = clm("--train_file", text_file, "--tokenizer", "bytes", "--overwrite_output_dir")
    assert not (earlier_run / "checkpoint-7").exists()
    assert not (earlier_run / "predict_results.json").exists()
    assert (earlier_run / "checkpoints-7-and-8").exists()
    assert (earlier_run / "notes.txt").exists()
    assert result.json("trainer_state.json")["global_step"] == 2


@pytest.mark.parametrize("script", [run_glue, run_clm], ids=["glue", "clm"])
def test_overwrite_waits_until_the_data_is_there(earlier_run, capsys, script):
    before = files_in(earlier_run)
    with pytest.raises(SystemExit):
        script.main(
            [
                *("--output_dir", str(earlier_run), *SCRIPT_FLAGS, "--overwrite_output_dir"),
                *("--train_file", "no.csv"),
                *(["--validation_file", "no.csv"] if script is run_glue else []),
            ]
        )
    assert "no.csv: no such file" in capsys.readouterr().err
    assert files_in(earlier_run) == before


def test_overwrite_has_no_effect_on_a_resumed_run(clm, text_file):
    flags = ("--train_file", text_file, "--tokenizer", "bytes", "--overwrite_output_dir")
    clm(*flags)
    result = clm(*flags, "--max_steps", 4, "--resume_from_checkpoint", "true")
    history = result.json("trainer_state.json")["log_history"]
    assert history[0]["step"] == 0  # of the first run
    assert history[-1]["step"] == 4


def test_half_written_checkpoint_is_not_resumed_from(clm, tmp_path, text_file, error):
    flags = ("--train_file", text_file, "--tokenizer", "bytes")
    clm(*flags)
    half = tmp_path / "out" / "checkpoint-9"
    half.mkdir()
    result = clm(*flags, "--max_steps", 3, "--resume_from_checkpoint", "true")
    assert result.json("trainer_state.json")["global_step"] == 3
    (tmp_path / "out" / "trainer_state.json").unlink()
    message = error(run_clm, *flags, "--resume_from_checkpoint", half)
    assert f"{half} is no complete checkpoint" in message


def test_processes_that_would_train_alone_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    check_processes(2)
    with pytest.raises(UsageError, match="2 processes .* need --use_cpu true"):
        check_processes(1)


def test_output_dir_that_is_a_file(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    assert f"output_dir {path} is a file" in error(run_clm, "--output_dir", path)


# --- run_clm.py: what a run leaves behind


def test_clm_on_embedded_text(clm):
    result = clm("--max_steps", 8, "--logging_steps", 4, "--vocab_size", 512)
    for name in ("step_size_and_loss.png", "model.safetensors", "checkpoint-8/trainer_state.json"):
        assert (result.folder / name).stat().st_size > 0
    assert "this run uses embedded text, the prose of Python's documentation" in result.stdout
    assert "A sample: T" in result.stdout
    before, *_, after = result.log("eval_loss")
    assert before == pytest.approx(math.log(512), abs=0.1)
    assert after < before - 0.05

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
    args = run_clm.DataArguments(train_file=str(path), validation_fraction=0.1)
    train, validation = run_clm.load_texts(args)
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
    assert "Line search" not in result.stdout
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


# --- run_clm.py: mistakes


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


@pytest.mark.slow
def test_mistake_in_a_real_process():
    command = [sys.executable, str(SCRIPTS / "run_clm.py"), "--train_file", "nowhere.txt"]
    process = subprocess.run([*command, *SCRIPT_FLAGS], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr == "run_clm.py: error: nowhere.txt: no such file\n"
