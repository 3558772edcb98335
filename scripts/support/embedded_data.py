"""English text that every CPython carries: the prose of Python's own documentation topics.

`pydoc_data.topics` holds the texts behind `help("with")`: plain text rendered from the language
reference. This module keeps its prose and drops titles, code, doctests, tables and grammar, so
that language modelling and sentence classification have real English at hand without any download.

The wording changes a little from one Python version to the next, and a measured loss or accuracy
with it: 256,000 characters and 1,850 distinct sentences on Python 3.11, a few per cent more on
3.13.
"""

import random
import re
from functools import cache
from pydoc_data.topics import topics
from typing import Literal

# Straight double quotes, back-ticks and asterisks are markup in these texts (literals and
# emphasis; quotations have curly quotes), and ASCII makes one character one byte.
_MARKUP = str.maketrans(
    {
        '"': None,
        "`": None,
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u2192": "->",
        "\u00a0": " ",
    }
)
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})(?=[^\s*])([^*]*[^\s*])\1(?![\w*])")
_FOOTNOTE_MARK = re.compile(r"\s*\[\d+\]")
_LIST_MARK = re.compile(r"^(?:[*-]|\d+\.|\[\d+\])\s+")
_ADMONITION = re.compile(
    r"^(?:(?:Changed|New|Added) in version [^:]*:|Note:|CPython implementation detail:)\s+"
)
_WRAPPED_HYPHEN = re.compile(r"(?<=\w)-\n\s*(?=\w)")
_CODE = re.compile(r">>>|::=|\+[-=]{3}|[-=~*^#]{4}|\|\s|\w = |^\s*(?:@|#)", re.MULTILINE)
_PLAIN_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_SENTENCE_END = re.compile(r"(?<=[.?!])(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)(?<!etc\.)\s+(?=[A-Z])")
# Code read as prose lacks these; no English sentence of some length does.
# fmt: off
_FUNCTION_WORDS = {
    "a", "an", "and", "are", "as", "at", "be", "by", "can", "for", "from", "has", "if", "in",
    "is", "it", "may", "no", "not", "of", "on", "or", "that", "the", "then", "this", "to", "was",
    "when", "which", "will", "with",
}
# fmt: on


def _is_prose(text: str) -> bool:
    """Whether `text` reads as English: enough words, mostly plain ones, some function words."""
    words = text.split()
    plain = [word for word in words if _PLAIN_WORD.fullmatch(word.strip("(),.:;!?\"'"))]
    function_words = sum(word.lower() in _FUNCTION_WORDS for word in plain)
    return len(words) >= 5 and len(plain) >= 0.75 * len(words) and function_words >= 2


def _paragraphs(topic: str) -> list[str]:
    """The prose paragraphs of one topic, each on one line, without markup."""
    result = []
    for block in re.split(r"\n\s*\n", topic):
        if _CODE.search(block):
            continue
        # Items of a list stand on successive lines without a blank one between them.
        for item in re.split(r"\n(?=\s*(?:\*|\d+\.)\s)", block):
            # "left-" at the end of a line, "hand" on the next
            text = _WRAPPED_HYPHEN.sub("-", item)
            text = _LIST_MARK.sub("", " ".join(text.split()))
            text = _EMPHASIS.sub(r"\2", text)
            text = _FOOTNOTE_MARK.sub("", text).translate(_MARKUP)
            text = _ADMONITION.sub("", text)
            if text.endswith((".", ":", "?", "!", ")")) and _is_prose(text):
                result.append(" ".join(text.split()))  # markup may leave two blanks behind
    return result


@cache
def python_documentation() -> str:
    """Return the prose of Python's documentation topics, one paragraph a line.

    Topics come in alphabetical order; a paragraph that several topics share (many are chapters
    of one another) is kept once, so that held-out text was not seen in training.
    """
    paragraphs = [text for name in sorted(topics) for text in _paragraphs(topics[name])]
    return "\n".join(dict.fromkeys(paragraphs)) + "\n"


def sentences(min_words: int = 6, max_words: int = 40) -> list[str]:
    """Return the distinct sentences of `python_documentation()`, in the order of the text.

    A sentence starts with a capital letter, ends with a full stop, a question or an exclamation
    mark, and has `min_words` to `max_words` words separated by blanks.
    """
    found: dict[str, str] = {}
    for paragraph in python_documentation().splitlines():
        for sentence in _SENTENCE_END.split(paragraph):
            if (
                sentence[0].isupper()
                and sentence[-1] in ".?!"
                and min_words <= len(sentence.split()) <= max_words
                and _is_prose(sentence)
            ):
                found.setdefault(sentence.lower(), sentence)
    return list(found.values())


def _swap_positions(words: list[str]) -> list[int]:
    """Positions i where words i and i+1 can be swapped without an outward sign of the swap.

    Only plain words inside the sentence qualify: a capital letter away from the start or a comma
    that moved along would tell the label without any knowledge of word order.
    """
    return [
        i
        for i in range(1, len(words) - 2)
        if all(_PLAIN_WORD.fullmatch(word) and word[0].islower() for word in words[i : i + 2])
        and words[i] != words[i + 1]
    ]


def bigram_shift_pairs(
    seed: int = 0,
    split: Literal["train", "validation"] | None = None,
    validation_fraction: float = 0.1,
) -> list[dict[str, str | int]]:
    """Return the bigram-shift probe: is the word order of a sentence original or shifted?

    Each sentence gives two rows, {"sentence": as it is, "label": 0 (original)} and {"sentence":
    with two neighbouring words swapped, "label": 1 (shifted)}, so that both labels are equally
    frequent and the words of a row tell nothing about its label.

    Args:
        seed: chooses the words to swap, the split and the order of the rows; the same seed gives
            the same rows.
        split: "train", "validation", or None for both; the two rows of a sentence are always in
            the same split.
        validation_fraction: the share of the sentences in the validation split, in (0, 1).
    """
    if split not in ("train", "validation", None):
        raise ValueError(f"split must be 'train', 'validation' or None, got {split!r}")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in (0, 1), got {validation_fraction}")
    rng = random.Random(seed)
    originals = sentences()
    known = {sentence.lower() for sentence in originals}
    pairs = []
    for original in originals:
        words = original.split()
        candidates = []
        for i in _swap_positions(words):
            shifted = " ".join(words[:i] + [words[i + 1], words[i]] + words[i + 2 :])
            if shifted.lower() not in known:
                candidates.append(shifted)
        if candidates:
            pairs.append((original, rng.choice(candidates)))
    rng.shuffle(pairs)
    first_training_pair = round(validation_fraction * len(pairs))
    if split == "validation":
        pairs = pairs[:first_training_pair]
    elif split == "train":
        pairs = pairs[first_training_pair:]
    rows: list[dict[str, str | int]] = [
        {"sentence": sentence, "label": label}
        for pair in pairs
        for label, sentence in enumerate(pair)
    ]
    rng.shuffle(rows)
    return rows
