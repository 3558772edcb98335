"""What the documents say of the results is what the results say."""

import re

import pytest
import write_docs
from comparison.candidates import CALIBRATED, NAMES
from comparison.documents import (
    KINDS,
    MARKED,
    TABLES,
    Evidence,
    drawn,
    listed,
    of_plus,
    written,
)
from comparison.plots import draw_beside_each_other, fingerprint
from comparison.tasks import PRESETS
from PIL import Image
from support.command_line import UsageError

from hf_salsa import SaLSaAdam

ROOT = write_docs.ROOT
DOCUMENTS = [path.relative_to(ROOT).as_posix() for path in write_docs.documents()]
# Equations and settings, no measurements.
WITHOUT_FIGURES = {"docs/paper-to-code.md"}
FIGURE = re.compile(r"\d+\.\d+|\d ?%|\d+e-\d|\bper cent of\b")
NO_FIGURE = re.compile(r"arXiv \d+\.\d+|\d+\.\d+\.\d+|Python \d+\.\d+|\d+-\d+-\d+")


@pytest.fixture(scope="module")
def evidence():
    return Evidence(ROOT / "model_cards")


def test_documents_have_tables_and_each_table_has_a_place():
    assert {"README.md", "docs/evidence.md", "docs/cost.md"} <= set(DOCUMENTS)
    placed = [name for path in DOCUMENTS for name in MARKED.findall((ROOT / path).read_text())]
    assert set(placed) == set(TABLES)


@pytest.mark.parametrize("path", DOCUMENTS)
def test_a_document_says_what_the_results_say(path, evidence):
    text = (ROOT / path).read_text()
    assert text == written(text, evidence), "run python scripts/write_docs.py"


def test_every_marker_has_an_end():
    for path in DOCUMENTS:
        text = (ROOT / path).read_text()
        assert text.count("<!-- table:") == text.count("<!-- end -->") == len(MARKED.findall(text))


def test_the_picture_is_of_the_results(evidence):
    with Image.open(write_docs.PICTURE) as picture:
        shown = picture.text["Description"]
    assert shown == fingerprint(drawn(evidence)), "run python scripts/write_docs.py"


def by_hand(text):
    """A document without what is generated, code and names with numbers in them; of a block of
    commands only its first fence is left.
    """
    text = MARKED.sub("", text)
    # Every block is matched, lest the end of one is taken for the start of another.
    text = re.sub(
        r"^```(\w*)\n.*?^```$",
        lambda block: "```bash" if block[1] == "bash" else "",
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    return NO_FIGURE.sub("", re.sub(r"`[^`\n]+`|\]\([^)]*\)", "", text))


def test_no_figure_of_the_readme_is_typed_by_hand():
    assert not FIGURE.findall(by_hand((ROOT / "README.md").read_text()))


@pytest.mark.parametrize(
    "path", sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))
)
def test_a_figure_typed_by_hand_stands_beside_its_command(path):
    if path in WITHOUT_FIGURES:
        pytest.skip("equations and settings")
    for section in re.split(r"^#+ ", by_hand((ROOT / path).read_text()), flags=re.MULTILINE):
        assert not FIGURE.findall(section) or "```bash" in section, section


def test_figures_are_recognised():
    for figure in ("a loss of 1.81", "4 % of it", "15% more", "a rate of 1e-4"):
        assert FIGURE.search(by_hand(figure))
    for other in ("10 steps", "`0.5`", "Python 3.11", "version 0.1.0", "arXiv 2408.13150"):
        assert not FIGURE.search(by_hand(other))


def test_a_table_is_replaced_and_an_unknown_one_refused(evidence):
    text = "before\n<!-- table: cost-sentence -->\nold\n<!-- end -->\nafter\n"
    new = written(text, evidence)
    assert "old" not in new
    assert " forward passes per update" in new
    assert new.startswith("before\n<!-- table: cost-sentence -->\n\n")
    assert new.endswith("\n\n<!-- end -->\nafter\n")
    assert written(new, evidence) == new
    with pytest.raises(UsageError, match="no table 'costs', only caption"):
        written(text.replace("cost-sentence", "costs"), evidence)


def test_results_without_the_method_are_refused(tmp_path):
    for preset in ("cpu", "study"):
        (tmp_path / preset).symlink_to(ROOT / "model_cards" / "study")
    with pytest.raises(UsageError, match="holds results of another preset"):
        Evidence(tmp_path)


def test_figures_of_the_summary_by_hand(evidence):
    """From the results.json, not through the tables: one cell with its verdict."""
    (row,) = (
        line
        for line in TABLES["summary"](evidence).splitlines()
        if line.startswith("| Shakespeare, held-out loss |")
    )
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    mean = {}
    for name in (evidence.plus, NAMES[SaLSaAdam], CALIBRATED):
        runs = evidence.cpu.of("shakespeare", name)
        mean[name] = [
            sum(run[key] for run in runs) / len(runs)
            for key in ("final_training_loss", "peak_metric")
        ]
    loss, metric = mean[NAMES[SaLSaAdam]]
    assert f"{loss:.3f} / {metric:.3f}" in cells[2]
    assert cells[2].startswith("**") is (loss <= 1.05 * mean[CALIBRATED][0])
    loss, metric = mean[evidence.plus]
    assert f"{loss:.3f} / {metric:.3f}" in cells[1]


def test_every_task_is_of_one_kind(evidence):
    of_kinds = [task for tasks in KINDS.values() for task in tasks]
    assert len(set(of_kinds)) == len(of_kinds)
    assert set(of_kinds) == set(PRESETS["cpu"])
    assert set(of_plus(evidence)) <= set(of_kinds)


def test_methods_are_compared_on_the_tasks_that_all_have_run_on(evidence):
    for row in TABLES["kinds"](evidence).splitlines()[2:]:
        kind, count, *cells, everywhere = (cell.strip() for cell in row.split("|")[1:-1])
        assert all(cells) is (int(count) > 0), kind
        assert any(cells) is any(cell.startswith("**") for cell in cells), kind
        assert int(re.search(r"\((\d+)\)$", everywhere)[1]) == len(KINDS[kind])


def test_words_are_listed_so_that_each_can_be_told_from_the_next():
    assert listed(["a"]) == "a"
    assert listed(["a", "b"]) == "a and b"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(["a", "b, c", "d"]) == "a; b, c and d"


def test_the_picture_holds_its_fingerprint(tmp_path):
    run = {"updates": 4, "losses": [4.0, 3.0, 2.0, 1.0], "step_sizes": [0.1, 0.1, 0.2, 0.0]}
    stock = run | {"losses": [4.0, 3.0, 2.0, 0.5]}
    runs = {"plus": run | {"searched_at": [1, 3]}, "AdamW": stock, "AdamW at 5e-5": run}
    columns = [("one, from scratch", runs), ("other, fine-tuned", runs | {"AdamW": run})]
    draw_beside_each_other(columns, tmp_path / "two.png")
    with Image.open(tmp_path / "two.png") as picture:
        assert picture.text["Description"] == fingerprint(columns)
        assert picture.width >= 720  # sharp at the width of a phone
    assert fingerprint(columns) != fingerprint(columns[::-1])
