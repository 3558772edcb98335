"""What a run prints: one line for each log entry, a bar with the step size, three lines at the end.

Only what is printed: trackers and the log history get every number.
"""

from typing import TYPE_CHECKING, Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .accelerated import unwrap_optimizer
from .optimizers import LineSearchOptimizer
from .phases import phases_of

_OURS = "salsa/"
# Trainer's own of an entry that are left to the trackers, and what a line begins with.
_LEFT_OUT = {"grad_norm", "epoch", "total_flos", "num_input_tokens_seen"}
_FIRST = {"loss", "learning_rate"}

if TYPE_CHECKING:
    _Base = TrainerCallback
else:
    _Base = object


class _Tidy(_Base):
    """Put before one of Trainer's callbacks that print; with a stock optimizer it is that one."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print a log entry."""
        line_search = unwrap_optimizer(kwargs.get("optimizer"))
        if logs is not None and line_search is not None and f"{_OURS}searches" in logs:
            if "loss" in logs:
                self.say(log_line(logs, state, line_search), state)
                return
            stock = {name: value for name, value in logs.items() if not name.startswith(_OURS)}
            super().on_log(args, state, control, logs=stock, **kwargs)
            if "total_flos" not in stock:  # the printer takes it out of what train() returns
                logs.pop("total_flos", None)
            return
        super().on_log(args, state, control, logs=logs, **kwargs)

    def say(self, line: str, state: TrainerState) -> None:
        """Print a line."""
        if state.is_local_process_zero:
            print(line)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print what the run found and cost."""
        super().on_train_end(args, state, control, **kwargs)
        line_search = unwrap_optimizer(kwargs.get("optimizer"))
        report = state.log_history[-1] if state.log_history else {}
        if line_search is None or "train_runtime" not in report:  # a sweep may end a run early
            return
        for line in closing_lines(report, line_search):
            if state.is_local_process_zero:
                print(line)


class RunPrinter(_Tidy, PrinterCallback):
    """`PrinterCallback`, with a line search's entries on a line each."""


class RunProgress(_Tidy, ProgressCallback):
    """`ProgressCallback`, the same, and the step size beside the bar."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar on."""
        line_search = unwrap_optimizer(kwargs.get("optimizer"))
        if line_search is not None and self.training_bar is not None:
            text = f"step size {line_search.step_size:.2e}"
            self.training_bar.set_postfix_str(text, refresh=False)
        super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def say(self, line: str, state: TrainerState) -> None:
        """Print a line above the bar."""
        if self.training_bar is not None:
            self.training_bar.write(line)


def print_by(callback: TrainerCallback) -> TrainerCallback:
    """Return what prints a run in place of one of Trainer's callbacks; any other as it is."""
    if type(callback) is PrinterCallback:
        return RunPrinter()
    if type(callback) is ProgressCallback:
        return RunProgress(callback.max_str_len)
    return callback


def log_line(logs: dict[str, Any], state: TrainerState, optimizer: LineSearchOptimizer) -> str:
    """Return a log entry of training on one line.

    Loss, step size and searches so far, and then what a subclass of Trainer adds.

    Args:
        logs: The entry, with `salsa/searches`.
        state: Trainer's, at that step.
        optimizer: The line search.
    """
    step, steps = state.global_step, state.max_steps
    parts = [f"step {step:>{len(str(steps))}}/{steps}: loss {_text(logs['loss'])}"]
    if "learning_rate" in logs:
        of_head = "of the head alone " if step <= phases_of(optimizer, steps).head else ""
        parts.append(f"step size {of_head}{logs['learning_rate']:.2e}")
    parts.append(count(logs[f"{_OURS}searches"], "search", "searches"))
    others = [name for name in logs if not name.startswith(_OURS)]
    parts += [f"{n} {_text(logs[n])}" for n in others if n not in _LEFT_OUT | _FIRST]
    return ", ".join(parts)


def closing_lines(report: dict[str, Any], optimizer: LineSearchOptimizer) -> list[str]:
    """Return what a run found and cost, in three lines.

    Args:
        report: The log entry at the end of training.
        optimizer: The line search.
    """
    of_run = {name.removeprefix(_OURS): value for name, value in report.items()}
    share = 100 * of_run["search_runtime"] / max(report["train_runtime"], 1e-4)
    cost = f"{share:.1f} % of the time"
    searches = count(of_run["searches"], "search", "searches")
    passes = count(of_run["trials"], "extra forward pass", "extra forward passes")
    lines = [f"Search: {cost}, for {searches} with {passes}."]
    if not of_run["settled_step_size"]:
        return ["Step size: none was found.", *lines]
    tail = optimizer.rule.cool_down
    fell = f", and fell to 0 over the last {100 * tail:.3g} % of the run" if tail else ""
    plain = stock_name(optimizer)
    return [
        f"Step size: settled at {of_run['settled_step_size']:.2e}{fell}.",
        *lines,
        f"{plain}: if you must, try the learning rate {of_run['median_step_size']:.1e}.",
    ]


def stock_name(optimizer: LineSearchOptimizer) -> str:
    """Return the name of the optimizer that takes such steps with a learning rate."""
    return "AdamW" if optimizer.base_name == "Adam" else optimizer.base_name


def count(number: float | str, one: str, many: str | None = None) -> str:
    """Return a number of things, in the singular or the plural."""
    return f"{number} {one if str(number) == '1' else many or f'{one}s'}"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
