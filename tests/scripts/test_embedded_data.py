"""The text that the scripts carry, and the probe that is made of it."""

import re

import pytest
from support.embedded_data import bigram_shift_pairs, python_documentation, sentences


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
