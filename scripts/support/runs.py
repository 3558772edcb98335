"""A run's folder from start to end: resuming, overwriting, training, the closing report."""

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import Trainer, TrainingArguments

from support.checkpoints import Rotation, checkpoints_in, fault_of, numbered_checkpoints
from support.command_line import UsageError

PLOT_NAME = "step_size_and_loss.png"  # beside the card that `create_model_card` writes
# What a run leaves beside model, card and checkpoints: the names that Trainer gives.
RESULT_NAMES = (
    *("train_results.json", "eval_results.json", "all_results.json"),
    *("trainer_state.json", PLOT_NAME),
)
_PACKAGE = logging.getLogger("hf_salsa")
_INTERRUPTED = 130  # 128 + SIGINT, the exit status that shells give to Ctrl-C


class _Print(logging.Handler):
    """Prints what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage())


_PRINT = _Print()


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint in `output_dir`."""
    newest_first = reversed(numbered_checkpoints(output_dir))
    return next((path for path in newest_first if fault_of(path) is None), None)


def prepare_output_dir(args: TrainingArguments, overwrite: bool) -> str | None:
    """Return the checkpoint to resume from, or make sure that a new run may use `output_dir`.

    Args:
        args: The training arguments; `resume_from_checkpoint` is a folder, or "true" for the newest
            complete checkpoint in `output_dir`.
        overwrite: A new run deletes an earlier one's checkpoints and results instead of refusing.
            Without effect when a run is resumed.
    """
    output_dir = Path(args.output_dir)
    wanted = args.resume_from_checkpoint
    if wanted and wanted.lower() != "false":
        if wanted.lower() == "true":
            checkpoint = _newest_complete(output_dir, say=args.process_index == 0)
        else:
            checkpoint = _complete(Path(wanted), output_dir)
        args.eval_on_start = False  # the checkpoint's log has that evaluation
        return str(checkpoint)
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError(f"output_dir {output_dir} is a file")
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return None
    if not overwrite:
        raise UsageError(
            f"output_dir {output_dir} is not empty. Resume its run with --resume_from_checkpoint "
            "true, start anew with --overwrite_output_dir, or choose another"
        )
    if args.process_index == 0:
        # Left where they are, old checkpoints would count as this run's (resuming, rotation), and
        # old figures would stay in all_results.json.
        for folder in checkpoints_in(output_dir):
            shutil.rmtree(folder)
        for name in RESULT_NAMES:
            (output_dir / name).unlink(missing_ok=True)
    return None


def _newest_complete(output_dir: Path, say: bool) -> Path:
    checkpoint = last_checkpoint(output_dir)
    passed_over = []
    for path in reversed(numbered_checkpoints(output_dir)):
        if path == checkpoint:
            break
        passed_over.append(f"{path.name} ({fault_of(path)})")
    if checkpoint is None:
        incomplete = f"; incomplete: {', '.join(passed_over)}" if passed_over else ""
        raise UsageError(f"no checkpoint to resume from in {output_dir}{incomplete}")
    if passed_over and say:
        print(f"Resuming from {checkpoint}; passed over as incomplete: {', '.join(passed_over)}")
    return checkpoint


def _complete(checkpoint: Path, output_dir: Path) -> Path:
    fault = fault_of(checkpoint)
    if fault is not None:
        other = last_checkpoint(output_dir) or last_checkpoint(checkpoint.parent)
        hint = f"; {other} is one" if other else ""
        raise UsageError(f"{checkpoint} is no complete checkpoint: {fault}{hint}")
    return checkpoint


def train_and_evaluate(trainer: Trainer, checkpoint: str | None) -> dict[str, float]:
    """Train, save the model and evaluate; print and save the metrics of both, return the latter's.

    On Ctrl-C: say in one line how to resume, and exit with status 130.

    Args:
        trainer: The trainer.
        checkpoint: The checkpoint to resume from.
    """
    _PACKAGE.addHandler(_PRINT)  # once, however often
    _PACKAGE.setLevel(logging.INFO)  # which head is trained first
    trainer.add_callback(Rotation(trainer.args))
    try:
        train_metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        trainer.log_metrics("train", train_metrics)
        trainer.save_metrics("train", train_metrics)
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        trainer.save_state()
    except KeyboardInterrupt:
        last = last_checkpoint(trainer.args.output_dir)
        if last is None:
            advice = (
                "No checkpoint was saved yet (--save_strategy steps --save_steps N saves more "
                "often); start again with --overwrite_output_dir."
            )
        else:
            advice = (
                f"The last checkpoint is {last}; to resume, give the same command with "
                "--resume_from_checkpoint true."
            )
        print(f"\nInterrupted at step {trainer.state.global_step}. {advice}", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None
    return metrics


def evaluation_at_start(trainer: Trainer) -> dict[str, float]:
    """Return the metrics of the evaluation before training (`eval_on_start`), if there was one.

    A resumed run has them from its checkpoint.
    """
    return {
        name: value
        for entry in trainer.state.log_history
        if entry["step"] == 0
        for name, value in entry.items()
        if name.startswith("eval_")
    }


def print_closing_report(
    trainer: Trainer,
    metrics: Mapping[str, float],
    shown: Sequence[str],
) -> None:
    """Print what came out of a run and where it lies; the trainer has said what the search found.

    Args:
        trainer: The trainer, after training, saving and `create_model_card`.
        metrics: The metrics of the evaluation after training.
        shown: Which metrics of both evaluations to print, without "eval_".
    """
    if not trainer.is_world_process_zero():
        return
    output_dir = Path(trainer.args.output_dir)

    def show(metrics: Mapping[str, float]) -> str:
        return ", ".join(
            f"{name} {metrics[f'eval_{name}']:.4f}" for name in shown if f"eval_{name}" in metrics
        )

    before = evaluation_at_start(trainer)
    lines = [("Before training", show(before))] if before else []
    lines.append(("After training", show(metrics)))
    lines.append(("Model card", str(output_dir / "README.md")))
    plot = output_dir / PLOT_NAME
    if plot.exists():
        lines.append(("Plot", str(plot)))
    checkpoint = last_checkpoint(output_dir)
    resumable = f"; to resume: {checkpoint}" if checkpoint else ""
    lines.append(("Checkpoint", f"{output_dir} (the trained model){resumable}"))
    print()
    for name, text in lines:
        print(f"{name + ':':<17}{text}")
