"""Any text may stand in a model card: valid YAML, Markdown and Python show it as it is."""

import ast
import re
import unicodedata

import pytest
import yaml
from card_runs import CardWriter, end, evaluation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

NASTY = [
    'a "quoted" name',
    "it's",
    "\"both\" 'kinds'",
    '"""',
    "back\\slash",
    "end\\",
    "\\|",
    "{braces}",
    "{{ title }}",
    "{% raw %}{# note #}",
    "`code`",
    "```",
    "a\n```\nb",
    "~~~",
    "~~struck~~",
    "a | b",
    "| a |\n|---|",
    "<b>bold</b>",
    "<!-- hidden",
    "<https://example.org>",
    "[x](https://example.org)",
    "![x](https://example.org)",
    "[x]: https://example.org",
    "[x]",
    "# heading",
    "heading #",
    "a\n# b",
    "a\n===",
    "- item",
    "-1",
    "---",
    "a\n---\nb",
    "a: b",
    ": b",
    "a #b",
    "1. item",
    "2)",
    "> quoted",
    "+ item",
    "*a* **b** _c_ __d__ e_f",
    "&amp; &#35;",
    "日本語 ü 🙂 e\u0301 a\u200db",
    "a\u2028b\x85c\u00a0d",
    "\x00\x07\x1b[31m",
    "\udcff of a file name",
    "a\r\nb\rc",
    "\ta",
    "no",
    "1e3",
    "0o17",
    "null",
    "2024-01-01",
    "@me %",
    "$x$",
]

CHARACTERS = "aZ1 _-*+#.)(`~|\\\"'<>[]!&;:{}%$=@/\n\r\t\x00\x85\u2028\u00e9\U0001f642\ud800"

SECTIONS = [
    "How to load the model",
    "Training procedure",
    "Training hyperparameters",
    "What the search cost",
    "Training results",
    "Framework versions",
    "Citation",
]


@pytest.fixture
def write(tmp_path, bert):
    """Write a card in which everything that a user may choose is `text`."""
    model = bert()
    card = CardWriter(tmp_path / "card", lambda: model)

    def make(text):
        (card.folder / "README.md").unlink(missing_ok=True)
        model.config._name_or_path = f"/nowhere/{folder_name(text)}"
        metrics = {text: 0.5, "report": text}
        return card(
            [evaluation(100, f"eval_{text}", **metrics), end(100)],
            model_name=text,
            language=text,
            license=text,
            tags=text,
            tasks=text,
            dataset_tags=text,
            dataset=text,
            dataset_args=text,
            processing_class=object(),
            arguments={"hub_model_id": text},
        )

    return make


def folder_name(text):
    name = text.replace("/", ":")
    return f"{name}x" if name in ("", ".", "..") else name


def shown(text):
    """What a reader sees of a text: one line, without control characters."""
    line = " ".join(text.split())
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in line)


def label(text):
    return shown(" ".join(part.capitalize() for part in text.split("_")))


def front_matter(card):
    start, metadata, _ = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    assert not start
    return yaml.safe_load(metadata)


def blocks(card):
    """The Markdown below the front matter as (kind, text): headings, items, cells and the like."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    found = []
    tokens = parser.parse(card.split("\n---\n", 1)[1])
    for i, token in enumerate(tokens):
        if token.type in ("fence", "html_block", "code_block"):
            found.append((token.type, token.content))
        elif token.type == "inline":
            kinds = {"text", "code_inline", "link_open", "link_close"}
            assert {child.type for child in token.children} <= kinds
            links = [child.attrs["href"] for child in token.children if child.type == "link_open"]
            assert links in ([], ["https://arxiv.org/abs/2407.20650"])
            # Items of a list without blank lines are hidden paragraphs.
            parent = tokens[i - 1]
            kind = "item" if parent.hidden else parent.type.removesuffix("_open")
            found.append((kind, "".join(child.content for child in token.children)))
    return found


def check(card, text):
    data = front_matter(card)
    assert data["license"] == text
    assert data["language"] == data["datasets"] == [text]
    assert data["tags"] == [text, "generated_from_trainer", "hf_salsa"]
    (index,) = data["model-index"]
    assert index["name"] == text
    (result,) = index["results"]
    split = {"split": text} if text else {}
    assert result["dataset"] == {"name": text, "type": text, "args": text} | split
    assert result["task"]["type"] == text
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [(text.lower(), 0.5)]

    body = blocks(card)
    of = {kind: [content for k, content in body if k == kind] for kind, _ in body}
    assert of["heading"] == [shown(text), *SECTIONS]
    assert len(of["html_block"]) == 1
    assert set(of) == {"heading", "html_block", "paragraph", "item", "fence", "th", "td"}
    assert of["paragraph"][0] == (
        f"This model is a fine-tuned version of a local model, {shown(folder_name(text))}, on the "
        f"{shown(text)} dataset, without a learning rate."
    )
    assert f"set {shown(text)} after step 100 of 100:" in of["paragraph"][1]
    assert of["item"][:2] == [f"{label(text)}: 0.5000", f"Report: {shown(text)}"]
    assert of["th"][4:] == [shown(f"{label(text)} ({text})"), shown(f"Report ({text})")]
    assert of["td"][4:] == ["0.5000", shown(text)]

    program, citation = of["fence"]
    compile(program, "card", "exec")
    strings = [
        node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)
    ]
    assert strings == [text, text]
    assert citation.startswith("@inproceedings")


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_any_text_is_shown_as_it_is(write, text):
    check(write(text), text)


@pytest.mark.slow
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.text(st.sampled_from(CHARACTERS), min_size=1, max_size=12).filter(lambda text: text.split())
)
def test_random_text_is_shown_as_it_is(write, text):
    check(write(text), text)
