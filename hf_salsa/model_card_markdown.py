"""Markdown that shows any text as it is: `render` escapes all that is not `Markdown` already."""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import jinja2

# What means something within a line: emphasis, code, links, HTML, struck and math text, the end of
# a heading, character references, and what GitHub's dialect takes for an address.
_INLINE = re.compile(
    r"[\\`*\[\]<~$#]"
    r"|(?<![^\W_])_|_(?![^\W_])"
    r"|&(?=#?\w+;)"
    r"|:(?=//)|(?<=\bwww)\.|(?<=\w)@(?=\w)",
    re.IGNORECASE,
)
# What means something at the start of a line: lists, quotes, rules and underlined headings.
_START = re.compile(r"^(\d{1,9}(?=[.)](?: |$))|(?=[+=>]|-(?!\d)))")


class Markdown(str):
    """Text that is Markdown already."""


def escape(text: object) -> Markdown:
    """Return Markdown that shows `text`, on one line."""
    if isinstance(text, Markdown):
        return text
    return Markdown(_START.sub(r"\1\\", _INLINE.sub(r"\\\g<0>", one_line(text))))


def code_span(text: object) -> Markdown:
    """Return Markdown that shows `text` as code within a line."""
    line = one_line(text) or " "  # nothing is no code
    fence = "`" * (_longest_run(line) + 1)
    # A backtick at an end would belong to the fence; the reader drops the space.
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return Markdown(f"{fence}{space}{line}{space}{fence}")


def code_block(code: str, language: str) -> Markdown:
    """Return a block of code, fenced by more backticks than it holds in a row."""
    fence = "`" * max(3, _longest_run(code) + 1)
    return Markdown(f"{fence}{language}\n{code}\n{fence}")


def table(rows: Sequence[Sequence[object]]) -> Markdown:
    """Return a table whose first row is its head."""
    cells = [[escape(cell).replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        " | ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]
    lines = [f"| {line} |" for line in lines]
    lines.insert(1, "|".join(["", *(f"{'-' * (width + 1)}:" for width in widths), ""]))
    return Markdown("\n".join(lines))


def render(template: Path, **values: object) -> str:
    """Fill in a template: what is not `Markdown` is escaped, what is missing is an error."""
    environment = jinja2.Environment(
        finalize=escape, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)


def one_line(text: object) -> str:
    """Return `text` on one line; what neither a reader nor UTF-8 can show becomes U+FFFD."""
    line = " ".join(str(text).split())
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in line)


def _longest_run(text: str) -> int:
    """Return how many backticks follow one another in `text`."""
    return max(map(len, re.findall("`+", text)), default=0)
