"""Tables of text and labels in files: csv, tsv and json lines, read into data sets.

What is wrong with a file is a `UsageError` that names the file and the line.
"""

import csv
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from support.command_line import UsageError


class Row(NamedTuple):
    line: int
    values: list[str]


class Table(NamedTuple):
    path: Path
    columns: list[str]
    rows: list[Row]


def read_delimited(path: Path, header: Sequence[str] | None = None) -> Table:
    """Read a csv file, or a tsv file without any quoting, as GLUE's are.

    Args:
        path: The file.
        header: The names of the columns; None if they are the file's first line.
    """
    if path.suffix == ".tsv":
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    else:
        dialect = {"strict": True}  # a quote that never ends is an error, not one huge field
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # MRPC starts with a BOM
            reader = csv.reader(file, **dialect)
            rows = [Row(reader.line_num, values) for values in reader if values]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: {error}") from error
    columns = list(header) if header else rows.pop(0).values if rows else []
    if not rows:
        raise UsageError(f"{path} holds no examples")
    return Table(path, columns, rows)


def _read_json_lines(path: Path) -> Table:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    columns: list[str] = []
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number}: {error}") from error
        if not isinstance(example, dict):
            raise UsageError(f"{path}, line {number}: not a JSON object")
        columns = columns or list(example)
        values = [example.get(name) for name in columns]
        rows.append(Row(number, ["" if value is None else str(value) for value in values]))
    if not rows:
        raise UsageError(f"{path} holds no examples")
    return Table(path, columns, rows)


def read_own(file: str) -> Table:
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix in (".json", ".jsonl"):
        return _read_json_lines(path)
    if path.suffix not in (".csv", ".tsv"):
        raise UsageError(f"{path}: the name must end in .csv, .tsv, .jsonl or .json")
    table = read_delimited(path)
    for row in table.rows:
        if len(row.values) != len(table.columns):
            raise UsageError(
                f"{path}, line {row.line}: {len(row.values)} values for the {len(table.columns)} "
                f"columns {', '.join(table.columns)}"
            )
    return table


def position_of(table: Table, column: str) -> int:
    if column not in table.columns:
        raise UsageError(f"{table.path} has no column {column!r}, only {', '.join(table.columns)}")
    return table.columns.index(column)


def to_dataset(
    table: Table,
    positions: Sequence[int],
    label_ids: dict[str, int] | None,
    names: Sequence[str] | None,
) -> Dataset:
    """Return the text columns and the label (the last of `positions`) of a table."""
    *text_positions, label_position = positions
    if not table.rows:
        raise UsageError(f"{table.path} holds no examples")
    columns: dict[str, list[str] | list[float]] = {
        f"sentence{i}": [row.values[position] for row in table.rows]
        for i, position in enumerate(text_positions, start=1)
    }
    columns["label"] = [
        _parse_label(table.path, row, label_position, label_ids) for row in table.rows
    ]
    features = {name: Value("string") for name in columns}
    features["label"] = ClassLabel(names=list(names)) if names else Value("float32")
    return Dataset.from_dict(columns, features=Features(features))


def _parse_label(path: Path, row: Row, position: int, label_ids: dict[str, int] | None) -> float:
    text = row.values[position]
    if label_ids is None:
        value = to_float(text)
        if value is None:
            raise UsageError(f"{path}, line {row.line}: the label {text!r} is not a number")
        return value
    if text not in label_ids:
        known = ", ".join(label_ids)
        raise UsageError(f"{path}, line {row.line}: unknown label {text!r}; the labels are {known}")
    return label_ids[text]


def to_float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def load_own_files(
    train_file: str,
    validation_file: str,
    text_columns: Sequence[str] | None = None,
    label_column: str = "label",
) -> DatasetDict:
    """Return the data in two files of the user's."""
    tables = {"train": read_own(train_file), "validation": read_own(validation_file)}
    train = tables["train"]
    if text_columns is None:
        text_columns = ["sentence1", "sentence2"] if "sentence1" in train.columns else ["sentence"]
    label_position = position_of(train, label_column)
    labels = {row.values[label_position] for row in train.rows}
    integers = all(re.fullmatch(r"[+-]?\d+", text) for text in labels)
    if not integers and all(to_float(text) is not None for text in labels):
        names = label_ids = None  # regression
    else:
        names = sorted(labels, key=int if integers else None)
        label_ids = {text: i for i, text in enumerate(names)}
        if len(names) == 1:
            raise UsageError(f"{train_file}: every label is {names[0]!r}, nothing to tell apart")
    splits = {}
    for split, table in tables.items():
        needed = [position_of(table, name) for name in (*text_columns, label_column)]
        for row in table.rows:
            for position in needed:
                if not row.values[position]:
                    raise UsageError(
                        f"{table.path}, line {row.line}: no value for {table.columns[position]!r}"
                    )
        splits[split] = to_dataset(table, needed, label_ids, names)
    return DatasetDict(splits)
