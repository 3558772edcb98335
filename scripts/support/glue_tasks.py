"""The tasks of GLUE: where each has its columns and how its files spell the labels."""

from typing import NamedTuple


class GlueTask(NamedTuple):
    """Where a task's columns are in GLUE's own files and in the copy on the hub."""

    folder: str
    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...] | None  # their names in GLUE's order; None: a number
    hub_text_columns: tuple[str, ...]
    file_labels: tuple[str, ...] | None = None  # as the files spell them, if not by name
    header: tuple[str, ...] | None = None  # where the files have none
    validation_suffixes: tuple[str, ...] = ("",)  # of dev<suffix>.tsv and validation<suffix>


_ZERO_ONE = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": GlueTask(
        "CoLA",
        ("sentence",),
        "label",
        ("unacceptable", "acceptable"),
        ("sentence",),
        _ZERO_ONE,
        header=("source", "label", "star", "sentence"),
    ),
    "sst2": GlueTask(
        "SST-2", ("sentence",), "label", ("negative", "positive"), ("sentence",), _ZERO_ONE
    ),
    "mrpc": GlueTask(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        ("not_equivalent", "equivalent"),
        _PAIR,
        _ZERO_ONE,
    ),
    "stsb": GlueTask("STS-B", _PAIR, "score", None, _PAIR),
    "qqp": GlueTask(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("not_duplicate", "duplicate"),
        ("question1", "question2"),
        _ZERO_ONE,
    ),
    "mnli": GlueTask(
        "MNLI",
        _PAIR,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("premise", "hypothesis"),
        validation_suffixes=("_matched", "_mismatched"),
    ),
    "qnli": GlueTask(
        "QNLI", ("question", "sentence"), "label", _ENTAILMENT, ("question", "sentence")
    ),
    "rte": GlueTask("RTE", _PAIR, "label", _ENTAILMENT, _PAIR),
    "wnli": GlueTask("WNLI", _PAIR, "label", ("not_entailment", "entailment"), _PAIR, _ZERO_ONE),
}
