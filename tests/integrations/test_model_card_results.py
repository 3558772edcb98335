"""The model card's results, table, costs and plot, from log histories by hand and of a real run."""

import builtins
import math
import sys
import warnings

import card_runs
import numpy as np
import pytest
from card_runs import HISTORY, CardWriter, end, evaluation, section, table, train
from huggingface_hub import ModelCard

from hf_salsa import SaLSaTrainer, SaLSaTrainingArguments
from hf_salsa.accelerated import unwrap_optimizer
from hf_salsa.model_card import write_model_card


@pytest.fixture
def write(tmp_path, bert):
    return CardWriter(tmp_path / "tiny-bert", bert)


def test_run_without_evaluation(write):
    card = write([entry for entry in HISTORY if "eval_loss" not in entry])
    assert "Results on" not in card
    assert "### Training results" not in card
    assert "(step_size_and_loss.png)" in card
    data = ModelCard(card).data
    assert (data.eval_results, data.metrics, data.model_name) == (None, None, None)


def test_evaluation_after_training_only(write):
    """`trainer.train(); trainer.evaluate()`."""
    history = [entry for entry in HISTORY if "eval_loss" not in entry]
    card = write([*history, evaluation(100, loss=0.5)])
    assert "Results on the evaluation set after step 100 of 100:\n\n- Loss: 0.5000\n\n" in card
    row = {"Epoch": "2", "Step": "100", "Training Loss": "0.000432", "Step Size": "2.5e-05"}
    assert table(card) == [row | {"Validation Loss": "0.5000"}]


def test_without_logs_no_plot(write):
    write()
    assert (write.folder / "step_size_and_loss.png").exists()
    card = write([evaluation(100, loss=0.5), end(100)])  # logging_strategy="no"
    assert not (write.folder / "step_size_and_loss.png").exists()
    assert "![" not in card
    assert "png" not in card
    row = {"Epoch": "2", "Step": "100", "Training Loss": "No log", "Step Size": "No log"}
    assert table(card) == [row | {"Validation Loss": "0.5000"}]
    # What the trainer kept of the searches is known without a log.
    costs = section(card, "### What the search cost")
    assert costs[0] == "- 60 searches in 100 steps"
    assert "- step size: median 3.14e-05, final 2.5e-05" in costs


def test_a_short_run_shows_its_searches(write):
    """A run of 40 updates has logged too little to draw, but has searched."""
    searches = [(step, 1e-3 / step, 1.0 / step) for step in range(1, 41)]
    card = write([evaluation(40, loss=0.5), end(40)], searches=searches)
    assert (write.folder / "step_size_and_loss.png").exists()
    (row,) = table(card)
    assert (row["Training Loss"], row["Step Size"]) == ("0.0250", "2.5e-05")


def test_interrupted_run(write):
    """Ctrl-C: totals as far as they were logged."""
    history = [train(1, 0.7, 0.5, trials=15), train(40, 0.6, 1e-4, trials=55)]
    card = write(history, state={"max_steps": 100})
    assert section(card, "### What the search cost") == [
        "- 40 searches in 40 steps",
        "- 55 extra forward passes",
    ]
    # Of the steps after the last line of the log nothing is known.
    later = write(history, state={"max_steps": 100, "global_step": 45})
    assert "- 40 searches in 40 steps\n" in later
    assert "- training steps: 40 of 100 planned (0.8 epochs)" in card
    card = write([])
    assert section(card, "### What the search cost") == [
        "The run ended before its totals were logged."
    ]
    assert "- training steps: 0 (0 epochs)" in card


def test_one_of_everything(write):
    history = [train(1, 0.7, 0.5), evaluation(1, loss=0.7)]
    report = {"searches": 1, "trials": 1, "failed_searches": 1, "extra_forward_share": 0.5}
    card = write([*history, end(1, **report)], state={"epoch": 1.0, "max_steps": 2})
    assert section(card, "### What the search cost")[:4] == [
        "- 1 search in 1 step",
        "- 1 extra forward pass, 50.0 % of all forward passes of training",
        "- 1 failed search, which kept the step size of before",
        "- 1 skipped step, at which the loss or a gradient was not finite",
    ]
    assert "after step 1 of 1:" in card
    assert "- training steps: 1 of 2 planned (1 epoch)\n" in card


def test_only_what_was_measured(write):
    report = {"salsa/searches": 3, "salsa/trials": 4, "salsa/failed_searches": 0}
    card = write([{**report, "step": 5}], state={"epoch": None})
    assert section(card, "### What the search cost") == [
        "- 3 searches in 5 steps",
        "- 4 extra forward passes",
        "- 0 failed searches, which kept the step size of before",
    ]
    assert "- training steps: 5\n" in card
    assert "None" not in card


def test_resumed_run(write):
    """The history goes on; the totals are those of the last leg, which count all."""
    history = [
        train(10, 0.7, 1e-3),
        evaluation(10, loss=0.7),
        end(10, searches=10, trials=30),
        evaluation(10, loss=0.7),
        train(20, 0.6, 1e-4),
        evaluation(20, loss=0.6),
        end(20, searches=12, trials=33),
    ]
    card = write(history)
    assert "- 12 searches in 20 steps" in card
    assert [(row["Step"], row["Training Loss"], row["Step Size"]) for row in table(card)] == [
        ("10", "0.7000", "0.001"),
        ("20", "0.6000", "0.0001"),
    ]
    assert "Results on the evaluation set after step 20 of 20:\n\n- Loss: 0.6000\n" in card


def test_best_checkpoint_is_what_the_results_are_of(write):
    options = {
        "arguments": {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 50,
            "save_steps": 50,
        },
        "state": {"best_global_step": 50, "best_model_checkpoint": "out/checkpoint-50"},
    }
    sentence = (
        "Results on the evaluation set after step 50 of 100 (the best checkpoint, which was loaded "
        "at the end):\n\n- Loss: 0.6600\n- Accuracy: 0.7500\n"
    )
    assert sentence in write(**options)
    # An evaluation after training sees the weights of step 50, whatever step its log line has.
    after = [*HISTORY, evaluation(100, loss=0.66, accuracy=0.75)]
    card = write(after, **options)
    assert sentence in card
    assert [row["Accuracy"] for row in table(card)] == ["0.5000", "0.7500", "0.8750"]
    assert [row["Epoch"] for row in table(card)] == ["0", "1", "2"]
    # Interrupted, the run kept the last weights.
    assert "after step 100 of 100:\n\n- Loss: 0.6123" in write(HISTORY[:-1], **options)
    options["state"] = {"best_global_step": 50}
    assert "after step 100 of 100:\n\n- Loss: 0.6123" in write(**options)


def test_several_evaluation_sets(write):
    history = [
        train(1, 0.7, 1e-3),
        train(50, 0.6, 1e-4),
        evaluation(50, "eval_matched", loss=0.5, accuracy=0.7),
        evaluation(50, "eval_mis_matched", loss=0.6, accuracy=0.6),
        train(100, 0.5, 1e-4),
        evaluation(100, "eval_matched", loss=0.4, accuracy=0.8),
        end(100),
        evaluation(100, "test", loss=0.3),
    ]
    card = write(history, dataset_tags="org/nli")
    for sentence in (
        "the evaluation set matched after step 100 of 100:\n\n- Loss: 0.4000\n- Accuracy: 0.8000\n",
        "the evaluation set mis_matched after step 50 of 100:\n\n- Loss: 0.6000\n- Accuracy: 0.60",
        "the evaluation set test after step 100 of 100:\n\n- Loss: 0.3000\n\n",
    ):
        assert sentence in card
    rows = table(card)
    assert [row["Loss (mis_matched)"] for row in rows] == ["0.6000", ""]
    assert [row["Accuracy (matched)"] for row in rows] == ["0.7000", "0.8000"]
    assert [row["Loss (test)"] for row in rows] == ["", "0.3000"]
    assert [
        (r.dataset_type, r.dataset_split, r.metric_type, r.metric_value)
        for r in ModelCard(card).data.eval_results
    ] == [
        ("org/nli", "matched", "loss", 0.4),
        ("org/nli", "matched", "accuracy", 0.8),
        ("org/nli", "mis_matched", "loss", 0.6),
        ("org/nli", "mis_matched", "accuracy", 0.6),
        ("org/nli", "test", "loss", 0.3),
    ]


def test_values_that_are_not_finite(write):
    history = [
        train(1, math.nan, 0.5),
        train(2, 0.7, math.nan),
        train(3, math.inf, 1e-4),
        train(4, 0.6, 1e-4),
        evaluation(4, loss=math.nan, f1=math.inf, accuracy=0.5),
        end(4, median_step_size=math.nan),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        card = write(history)
    assert "- Loss: nan\n- F1: inf\n- Accuracy: 0.5000\n" in card
    assert "median nan, final 2.5e-05" in card
    assert "the rate to try" not in card
    assert "(step_size_and_loss.png)" in card
    (result,) = ModelCard(card).data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.5)


def test_metrics_that_are_no_numbers(write):
    metrics = {
        "confusion": [[1, 2], [3, 4]],
        "report": "a | b\nc",
        "long": "x" * 200,
        "ok": True,
        "count": 12,
        "perplexity": np.float32(123.5),
        "hits": np.int64(7),
        "huge": 1.5e7,
        "zero": 0.0,
        "rouge1": 0.25,
        "my_runtime": 3.0,
    }
    card = write([evaluation(10, **metrics), end(10)])
    lines = card[card.index("Results on") : card.index("## How to load")].splitlines()[2:-1]
    assert lines == [
        r"- Confusion: \[\[1, 2\], \[3, 4\]\]",
        "- Report: a | b c",
        f"- Long: {'x' * 77}...",
        "- Ok: True",
        "- Count: 12",
        "- Perplexity: 123.5000",
        "- Hits: 7",
        "- Huge: 1.5e+07",
        "- Zero: 0.0000",
        "- Rouge1: 0.2500",
    ]
    assert r"a \| b c" in section(card, "### Training results")[2]
    data = ModelCard(card).data
    assert data.metrics == ["rouge"]
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {
        "count": 12,
        "perplexity": 123.5,
        "hits": 7,
        "huge": 1.5e7,
        "zero": 0.0,
        "rouge": 0.25,
    }


def test_losses_that_a_subclass_logged_are_no_steps(write):
    """Only Trainer's own line of an update has loss and step size."""
    card = write([{"loss": 0.1, "epoch": 2.0, "step": 100}, *HISTORY[:-1], HISTORY[-1]])
    assert table(card) == table(write())


# --- The plot


def test_plot_shows_the_curves(write, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: [figures.append(self), save(self, *args, **kw)]
    )
    before = sys.modules.get("matplotlib.pyplot")
    write()
    assert sys.modules.get("matplotlib.pyplot") is before  # no global state
    top, bottom = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in top.lines}
    assert lines == {
        "training": [[1, 0.71], [50, 0.65], [100, 0.0004321]],
        "evaluation": [[0, 0.7], [50, 0.66], [100, 0.61234]],
    }
    assert bottom.lines[0].get_xydata().tolist() == [[1, 0.5], [50, 4e-05], [100, 2.5e-05]]
    assert bottom.get_yscale() == "log"
    assert bottom.get_shared_x_axes().joined(top, bottom)
    assert (top.get_ylabel(), bottom.get_ylabel()) == ("loss", "step size (log scale)")
    assert bottom.get_xlabel() == "training step (updates of the weights)"
    png = (write.folder / "step_size_and_loss.png").read_bytes()
    assert png.startswith(b"\x89PNG")


def test_without_matplotlib(write, monkeypatch):
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.warns(UserWarning, match="pip install matplotlib") as caught:
        card = write()
    assert len(caught) == 1
    assert caught[0].filename == card_runs.__file__  # who asked for the card
    assert "![" not in card
    assert not list(write.folder.glob("*.png"))
    assert "### Training results" in card
    # Where there is nothing to plot nothing is missing.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write([end(10)])


# --- A real run


def test_card_of_a_real_resumed_run(tmp_path, bert, sentences):
    """Three steps, then three more from the checkpoint."""

    def run(steps, resume):
        args = SaLSaTrainingArguments(
            str(tmp_path / "run"),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=8,
            max_steps=steps,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=3,
            save_steps=3,
            weight_decay=0.1,
        )
        trainer = SaLSaTrainer(
            bert(),
            args,
            train_dataset=sentences,
            eval_dataset={"a": sentences[:8], "b": sentences[8:16]},
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    run(3, False)
    trainer = run(6, True)
    optimizer = unwrap_optimizer(trainer.optimizer)
    write_model_card(
        tmp_path / "run",
        state=trainer.state,
        arguments=trainer.args,
        optimizer=optimizer,
        model=trainer.model,
    )
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"- {optimizer.counters.searches} searches in 6 steps" in card
    assert f"- {optimizer.counters.trials} extra forward passes, " in card
    assert f"final {optimizer.step_size:.3g}\n" in card
    rows = table(card)
    assert [row["Step"] for row in rows] == ["3", "6"]
    assert all(0 < float(row["Step Size"]) < 1 for row in rows)
    assert float(rows[1]["Loss (b)"]) > 0
    assert "weight_decay=0.1 (0.0 in other parameter groups)" in card
    assert {r.dataset_split for r in ModelCard(card).data.eval_results} == {"a", "b"}
    assert (tmp_path / "run" / "step_size_and_loss.png").exists()


@pytest.mark.parametrize("name", ["$\\frac$", "a $ b", "\udcff", "a\nb"], ids=ascii)
def test_plot_names_any_evaluation_set(write, name):
    history = [train(1, 0.7, 1e-3), train(2, 0.6, 1e-3), evaluation(2, f"eval_{name}", loss=0.5)]
    assert "(step_size_and_loss.png)" in write(history)


def test_metrics_with_the_names_of_other_columns(write):
    metrics = {"step_size": 8.5, "training_loss": 9.5, "Step": 6.5}
    lines = section(write([evaluation(10, **metrics), end(10)]), "### Training results")
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "0.2",
        "10",
        "No log",
        "No log",
        "8.5000",
        "9.5000",
        "6.5000",
    ]
