"""What the model card keeps of the README.md that is in its folder already."""

import warnings

import card_runs
import pytest
from card_runs import CardWriter, end
from huggingface_hub import ModelCard

GENERATED = ["generated_from_trainer", "hf_salsa"]


@pytest.fixture
def write(tmp_path, bert):
    card = CardWriter(tmp_path / "card", bert)
    card.folder.mkdir()
    return card


def tags(card):
    return ModelCard(card).data.tags


@pytest.mark.parametrize(
    ("front_matter", "kept"),
    [
        ("tags: mine", ["mine"]),
        ("tags: [mine, b, hf_salsa]", ["mine", "b", "hf_salsa", "generated_from_trainer"]),
        ("tags:\n- 'a: b'\n- \"#1\"", ["a: b", "#1"]),
        ("license: mit", []),
        ("model-index: 5", []),
        ("tags: []", []),
        ("tags:", []),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tags_are_kept(write, front_matter, kept, encoding):
    text = f"---\n{front_matter}\n---\n\n# Mine\n"
    (write.folder / "README.md").write_text(text, encoding=encoding)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(tags(write([end(10)]))) == {*kept, *GENERATED}
    assert [path.name for path in write.folder.iterdir()] == ["README.md"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        b"---\ntags: [a\n---\n# Mine\n",
        b"---\n\tx: : y\n---\n",
        b"---\ntags: [a]\n# Mine: no end\n",
        b"---\n- a\n- b\n---\n",
        b"---\ntext\n---\n",
        b"---\ntags: {a: b}\n---\n",
        b"---\ntags: 5\n---\n",
        b"---\nmade: 2024-13-45\n---\n",
        b"---\n? [a]\n: b\n? {c: d}\n: e\n---\n",
        b"---\nx: !!python/object/apply:os.getcwd []\n---\n",
        b"---\nx: " + b"[" * 5000 + b"\n---\n",
        "---\ntags: [größe]\n---\n".encode("latin-1"),
        "---\ntags: [a]\n---\n".encode("utf-16"),
        b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe",
        b"---\nx: \x00\n---\n",
        b"# My own notes\n",
    ],
)
def test_card_that_cannot_be_read_is_kept_beside(write, content):
    readme, kept = write.folder / "README.md", write.folder / "README.md.bak"
    readme.write_bytes(content)
    with pytest.warns(UserWarning, match="no front matter that can be read") as caught:
        card = write([end(10)])
    (warning,) = caught
    assert str(readme) in str(warning.message)
    assert str(kept) in str(warning.message)
    assert warning.filename == card_runs.__file__  # who asked for the card
    assert kept.read_bytes() == content
    assert tags(card) == GENERATED
    assert {path.name for path in write.folder.iterdir()} == {"README.md", "README.md.bak"}


def test_nothing_that_was_kept_is_overwritten(write):
    for i in range(3):
        (write.folder / "README.md").write_text(f"---\n{i}: [\n---\n")
        with pytest.warns(UserWarning, match="README"):
            write([end(10)])
    for i, name in enumerate(["README.md.bak", "README-2.md.bak", "README-3.md.bak"]):
        assert (write.folder / name).read_text() == f"---\n{i}: [\n---\n"


def test_empty_file_holds_nothing_to_keep(write):
    (write.folder / "README.md").write_text(" \n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write([end(10)])
    assert [path.name for path in write.folder.iterdir()] == ["README.md"]
