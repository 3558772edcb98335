"""What a run prints: a line for each log entry, a bar, three lines at the end."""

import re

import pytest
import torch
from card_runs import end
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import DefaultFlowCallback

from hf_salsa import SaLSaAdam, SaLSaAdamPlus, SaLSaSGD, SaLSaTrainer
from hf_salsa.printing import RunPrinter, RunProgress, closing_lines, log_line, print_by
from hf_salsa.run_trace import RunTrace


def optimizer(cls=SaLSaAdam, **settings):
    return cls([torch.nn.Parameter(torch.ones(2))], **settings)


class Heard(TrainerCallback):
    """What trackers receive."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_a_run_prints_a_line_for_each_entry_and_three_at_the_end(
    arguments, bert, sentences, capsys
):
    heard = Heard()
    args = arguments(logging_steps=3, eval_strategy="steps", eval_steps=6)
    trainer = SaLSaTrainer(
        bert(), args, train_dataset=sentences, eval_dataset=sentences[:8], callbacks=[heard]
    )
    metrics = trainer.train().metrics
    lines = capsys.readouterr().out.splitlines()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert lines[:2] == [
        f"step {e['step']}/6: loss {e['loss']:.4g}, step size {e['learning_rate']:.2e}, "
        f"{e['salsa/searches']} searches"
        for e in entries
    ]
    assert lines[2].startswith("{'eval_loss': '")  # Trainer's own
    assert lines[3].startswith("{'train_runtime': '")
    assert "salsa" not in lines[3]
    searches = metrics["salsa/searches"]
    assert 1 < searches < 6
    share = 100 * metrics["salsa/search_runtime"] / metrics["train_runtime"]
    assert lines[4:] == [
        f"Step size: settled at {metrics['salsa/settled_step_size']:.2e}, and fell to 0 over the "
        "last 60 % of the run.",
        f"Search: {share:.1f} % of the time, for {searches} searches with "
        f"{metrics['salsa/trials']} extra forward passes.",
        f"AdamW: if you must, try the learning rate {metrics['salsa/median_step_size']:.1e}.",
    ]
    assert 0 < share < 100
    # What is printed is all that is tidied.
    history = [{k: v for k, v in e.items() if k != "step"} for e in trainer.state.log_history]
    assert heard.logs == history
    assert "salsa/slope" in heard.logs[0]
    assert "total_flos" not in metrics  # as with Trainer's own printer


def test_the_bar_shows_the_step_size(arguments, bert, sentences, capsys):
    shown = []

    class Look(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):  # the bar is that of before
            if state.global_step:
                shown.append((progress.training_bar.postfix, trainer.line_search.step_size))

    args = arguments(
        disable_tqdm=False,
        logging_steps=6,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )
    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences, callbacks=[Look()])
    (progress,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, RunProgress)]
    trainer.train()
    assert [text for text, _ in shown] == [f"step size {size:.2e}" for _, size in shown]
    assert len(shown) == 5
    captured = capsys.readouterr()
    assert "6/6" in captured.err
    assert "step 6/6: loss " in captured.out
    assert captured.out.rstrip().splitlines()[-1].startswith("AdamW: if you must")


def stock_lines(text):
    return re.sub(r"'train_\w+': '[^']*'", "", text)  # seconds, and what is a mean of them


def test_a_stock_optimizer_prints_as_trainer(arguments, bert, sentences, capsys):
    printed = []
    for kind in (SaLSaTrainer, Trainer):
        args = {"logging_steps": 3, "optim": "adamw_torch"}
        if kind is Trainer:
            args["cls"] = TrainingArguments
        kind(bert(), arguments(**args), train_dataset=sentences).train()
        printed.append(stock_lines(capsys.readouterr().out))
    assert printed[0] == printed[1]
    assert "learning_rate" in printed[0]


def test_who_removes_trainers_printer_hears_nothing(arguments, bert, sentences, capsys):
    trainer = SaLSaTrainer(bert(), arguments(logging_steps=1), train_dataset=sentences)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert capsys.readouterr().out == ""


def test_what_prints_takes_the_place_of_trainers_own():
    class Mine(PrinterCallback):
        """A subclass is not Trainer's own."""

    assert type(print_by(PrinterCallback())) is RunPrinter
    progress = print_by(ProgressCallback(max_str_len=7))
    assert (type(progress), progress.max_str_len) == (RunProgress, 7)
    for other in (Mine(), DefaultFlowCallback()):
        assert print_by(other) is other


# --- The words


def test_a_line_of_the_log():
    state = TrainerState(global_step=1, max_steps=200)
    entry = {"loss": 0.69314, "grad_norm": 1.5, "learning_rate": 3.14159e-5, "epoch": 0.1}
    entry |= {"salsa/searches": 1, "salsa/trials": 15, "salsa/slope": 0.5}
    line = "step   1/200: loss 0.6931, step size 3.14e-05, 1 search"
    assert log_line(entry, state, optimizer()) == line
    state.global_step = 120
    entry |= {"salsa/searches": 45, "entropy": 0.123456, "num_tokens": 2048}  # as TRL's
    assert log_line(entry, state, optimizer()) == (
        "step 120/200: loss 0.6931, step size 3.14e-05, 45 searches, entropy 0.1235, num_tokens "
        "2048"
    )
    del entry["learning_rate"]  # a subclass's own entry
    assert "loss 0.6931, 45 searches" in log_line(entry, state, optimizer())


def test_a_line_tells_whose_the_step_size_of_the_head_is():
    trained = optimizer(head_first=3)
    trained.param_groups[0]["head_steps"] = 3
    entry = {"loss": 0.5, "learning_rate": 0.25, "salsa/searches": 3}
    state = TrainerState(global_step=3, max_steps=40)
    assert "step size of the head alone 2.50e-01, 3" in log_line(entry, state, trained)
    state.global_step = 4
    assert "step size 2.50e-01, 3" in log_line(entry, state, trained)


REPORT = {
    "search_runtime": 1.25,
    "settled_step_size": 4e-5,
    "median_step_size": 3.14159e-5,
}


def test_the_three_lines():
    assert closing_lines(end(100, **REPORT), optimizer()) == [
        "Step size: settled at 4.00e-05.",
        "Search: 10.0 % of the time, for 60 searches with 90 extra forward passes.",
        "AdamW: if you must, try the learning rate 3.1e-05.",
    ]
    one = {"searches": 1, "trials": 1}
    lines = closing_lines(end(100, **REPORT | one), optimizer(SaLSaAdamPlus, cool_down=0.25))
    assert (
        lines[0] == "Step size: settled at 4.00e-05, and fell to 0 over the last 25 % of the run."
    )
    assert lines[1].endswith("for 1 search with 1 extra forward pass.")
    assert closing_lines(end(100, **REPORT), optimizer(SaLSaSGD))[2].startswith("SGD: if you must")


def test_nothing_found_is_no_rate_to_try():
    lines = closing_lines(end(5, **REPORT | {"settled_step_size": 0.0}), optimizer())
    assert lines[0] == "Step size: none was found."
    assert len(lines) == 2


# --- The clock of the searches


def test_the_searches_are_timed(monkeypatch):
    """A step takes 1 s; one that searches 5 s, so that its search takes 4 s."""
    clock = [0.0]
    monkeypatch.setattr("hf_salsa.run_trace.time.perf_counter", lambda: clock[0])
    weight = torch.nn.Parameter(torch.ones(2))
    sgd = SaLSaSGD([weight])
    trace = RunTrace()
    arguments = TrainingArguments("unused", use_cpu=True)
    heard = (arguments, TrainerState(), None)
    trace.on_train_begin(*heard, optimizer=sgd)
    searches = 0
    for step in range(12):
        sgd.param_groups[0]["search_interval"] = 1 if step < 2 else 4
        weight.grad = 2 * weight.detach()
        searching = sgd.search_due
        trace.on_pre_optimizer_step(*heard, optimizer=sgd)
        sgd.step(lambda: weight.square().sum())
        clock[0] += 5 if searching else 1
        trace.on_optimizer_step(*heard, optimizer=sgd)
        searches += searching
        clock[0] += 100  # the rest of training
        if step == 1:
            assert trace.search_seconds == pytest.approx(10)  # no other step is known yet
    assert searches == 4
    assert trace.search_seconds == pytest.approx(4 * searches)
    trace.on_train_begin(*heard, optimizer=sgd)
    assert trace.search_seconds == 0
