"""run_glue.py as its users see it."""

import math
import re
import warnings

import pytest
import run_glue
import torch
from glue_files import PAIR_LINE, TASK_FILES, write_glue
from support.embedded_data import bigram_shift_pairs
from support.glue import load_glue_files
from support.glue_metric import METRIC_NAMES, GlueMetric
from transformers import AutoModelForSequenceClassification, AutoTokenizer


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
    assert "SaLSaAdamPlus" in card
    assert f"Accuracy: {metrics['eval_accuracy']:.4f}" in card
    report = result.stdout[result.stdout.index("Before training:") :]
    assert f"accuracy {metrics['eval_accuracy']:.4f}" in report
    # What the search found is said once, by the trainer.
    assert result.stdout.count(f" with {everything['salsa/trials']} extra forward passes.\n") == 1
    assert result.stdout.count("Step size: ") == 1
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


@pytest.mark.slow
@pytest.mark.parametrize("task", TASK_FILES)
def test_glue_task(glue, tmp_path, bert_folder, task):
    write_glue(tmp_path, task)
    expected = TASK_FILES[task]
    data = load_glue_files(task, tmp_path)
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
    data = load_glue_files("qqp", tmp_path)
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
    assert "Search: " not in result.stdout
    card = (result.folder / "README.md").read_text()
    assert "2e-05" in card
    assert "salsa" not in card.lower()


def test_the_new_head_is_named(glue, bert_folder):
    flags = ("--salsa_head_first", 1, "--logging_steps", 1)
    result = glue(*flags, "--model_name_or_path", bert_folder)
    line = "The new head is trained first, alone: classifier.weight, classifier.bias.\n"
    assert result.stdout.count(line) == 1
    first, second = re.findall(r"^step (\d)/2: loss [\d.]+, step size (.*)e", result.stdout, re.M)
    assert first[0] == "1"
    assert first[1].startswith("of the head alone ")
    assert "head" not in second[1]
    card = (result.folder / "README.md").read_text()
    assert "The first update trained the new head alone (`classifier`), by a line search" in card


def test_learning_rate_is_ignored_with_one_warning(glue, bert_folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        glue(
            "--learning_rate", "2e-5", "--optim", "salsa_adam", "--model_name_or_path", bert_folder
        )
    messages = [str(warning.message) for warning in caught]
    about_it = [message for message in messages if "learning_rate" in message]
    assert len(about_it) == 1
    assert "learning_rate=2e-05" in about_it[0]
