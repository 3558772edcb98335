"""The model card's plot: what is marked, and that a phone shows it."""

from itertools import combinations

import numpy as np
import pytest
from card_runs import CardWriter, end, evaluation, train
from matplotlib.figure import Figure
from PIL import Image

from hf_salsa import SaLSaAdam, SaLSaAdamPlus

PHONE = 360  # pixels


def with_head(updates, cls=SaLSaAdam, **settings):
    def make(params):
        optimizer = cls(params, head_first=updates, **settings)
        optimizer.param_groups[0] |= {"head_steps": updates}
        return optimizer

    return make


@pytest.fixture
def draw(tmp_path, bert, monkeypatch):
    """Writes a card, and returns the figure of its plot."""
    write = CardWriter(tmp_path / "tiny-bert", bert)
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: [figures.append(self), save(self, *args, **kw)]
    )

    def run(*args, **options):
        write(*args, **options)
        return figures[-1]

    run.image = write.folder / "step_size_and_loss.png"
    return run


def sizes(step):
    """Step sizes as of a run with a head and a tail."""
    if step <= 10:
        return 0.03 * step
    return 2e-5 if step <= 1000 else 2e-5 * (2001 - step) / 1000


STEPS = [*range(1, 20), *range(20, 2001, 20)]
HISTORY = [train(step, 0.7 - step / 4000, sizes(step)) for step in STEPS]
SEARCHES = [(step, sizes(step), 0.5) for step in STEPS[::2]]
PLUS = with_head(10, SaLSaAdamPlus, cool_down=0.5)
WHOLE = [*HISTORY, evaluation(2000, loss=0.3), end(2000)]


def spans(panel):
    return [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in panel.patches]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_phases_and_searches_are_marked(draw):
    figure = draw(WHOLE, optimizer=PLUS, searches=SEARCHES)
    top, bottom = figure.axes
    assert spans(top) == spans(bottom) == [(0.5, 10.5), (1001.5, 2000.5)]
    assert legend(figure) == [
        "a search",
        "head first, at step sizes of 0.03 to 0.3 (not drawn)",
        "tail: the step size falls to 0",
    ]
    curve, marks = bottom.lines
    after = [(step, size) for step, size, _ in SEARCHES if step > 10]
    assert [tuple(point) for point in marks.get_xydata()] == after
    assert min(curve.get_xdata()) == 11
    assert max(bottom.get_ylim()) == pytest.approx(4e-5)
    # The end of the tail would squeeze the rest of the plot, too.
    assert min(bottom.get_ylim()) == pytest.approx(2e-5 / 30)
    assert min(top.lines[0].get_xdata()) == 1  # the loss is that of the model all along


def test_a_run_of_one_phase(draw):
    figure = draw(WHOLE, searches=SEARCHES)
    assert spans(figure.axes[1]) == []
    assert legend(figure) == ["a search"]
    assert min(figure.axes[1].lines[0].get_xdata()) == 1
    assert legend(draw(WHOLE)) == []  # whose searches nobody gave


def test_interrupted_in_the_phase_of_the_head(draw):
    figure = draw(HISTORY[:5], optimizer=PLUS, state={"max_steps": 2000})
    assert list(figure.axes[1].lines[0].get_xdata()) == [1, 2, 3, 4, 5]
    assert legend(figure) == ["head first"]


NARROW = [train(step, 0.5, 2e-3 + 1e-3 * (step % 2)) for step in range(1, 40)]


@pytest.mark.parametrize(
    ("history", "name", "first"),
    [
        (NARROW, "tiny-bert", "tiny-bert"),
        (
            WHOLE,
            "bert-base-uncased on $MRPC$, with a tail, seed 12",
            "bert-base-uncased on \\$MRPC\\$, with a t...",
        ),
        (WHOLE[:60], "a" * 100, f"{'a' * 37}..."),
    ],
    ids=["a narrow range", "two phases", "a long name"],
)
def test_a_phone_shows_it(draw, history, name, first):
    figure = draw(history, optimizer=PLUS, searches=SEARCHES, model_name=name)
    title = figure.get_suptitle()
    assert title == f"{first}\nloss and step size"
    with Image.open(draw.image) as image:
        width, height = image.size
        pixels = np.asarray(image.convert("L"))
    assert 1 <= height / width <= 1.5
    for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
        assert (edge == 255).all()  # nothing is cut off
    figure.dpi = width / figure.get_figwidth()
    figure.draw_without_rendering()
    texts = shown(figure)
    assert len(texts) > 15
    labels = figure.axes[1].get_yticklabels()
    assert sum(label in texts for label in labels) >= 2  # a scale is read
    for text in texts:
        assert text.get_fontsize() / 72 * figure.dpi * PHONE / width >= 10, text
    boxes = [text.get_window_extent() for text in texts]
    for i, j in combinations(range(len(texts)), 2):
        assert not boxes[i].overlaps(boxes[j]), (texts[i], texts[j])


def shown(figure):
    """All texts but the labels of ticks beyond the ends of an axis."""
    texts = [figure._suptitle, *figure.legends[0].get_texts()]
    for panel in figure.axes:
        texts += [panel.xaxis.label, panel.yaxis.label]
        texts += panel.get_legend().get_texts() if panel.get_legend() else []
        for axis, i in ((panel.xaxis, 0), (panel.yaxis, 1)):
            low, high = sorted(axis.get_view_interval())
            labels = axis.get_ticklabels(which="both")
            texts += [label for label in labels if low <= label.get_position()[i] <= high]
    return [text for text in texts if text.get_visible() and text.get_text()]
