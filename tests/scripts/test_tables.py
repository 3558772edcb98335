"""Files of one's own: csv, tsv and json lines."""

import json

import numpy as np
import pytest
import run_glue
from support.embedded_data import sentences
from support.tables import load_own_files


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
    data = load_own_files(str(path), str(path))
    assert data["train"].features["label"].names == ["neg", "neutral", "pos"]
    assert data["train"]["sentence1"][:] == ["yes, it is", "no", "perhaps"]
    assert data["validation"]["label"][:] == [2, 0, 1]


def test_own_numbers_are_classes_or_values(tmp_path):
    data = load_own_files(*[str(write_own(tmp_path, ".csv", [("a", 10), ("b", 9)]))] * 2)
    assert data["train"].features["label"].names == ["9", "10"]  # in the order of numbers
    data = load_own_files(*[str(write_own(tmp_path, ".csv", [("a", 1.5), ("b", 2)]))] * 2)
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
