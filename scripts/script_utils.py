"""What the training scripts share: command line, user errors, checkpoints, the closing report.

A mistake of the user is one line `script.py: error: ...` and exit status 2, never a traceback.
"""

import dataclasses
import difflib
import json
import os
import re
import shutil
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

PLOT_NAME = "step_size_and_loss.png"  # beside the card that `create_model_card` writes
COMMON_DEFAULTS = {  # where the scripts differ from SaLSaTrainingArguments
    "eval_on_start": True,
    "report_to": "none",
    "save_total_limit": 1,
    "dataloader_pin_memory": torch.accelerator.is_available(),  # a CPU run would warn of it
}
_INTERRUPTED = 130  # 128 + SIGINT, the exit status that shells give to Ctrl-C


class UsageError(ValueError):
    """A mistake of the user, to be shown without a traceback."""


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the defaults, and the commands of a script's docstring as they were written."""


class ScriptArgumentParser(HfArgumentParser):
    """`HfArgumentParser` that also reads a settings file and reports an error in one line.

    Args:
        argument_classes: The dataclasses to fill.
        script: The path of the script.
        doc: The script's docstring, which `--help` shows.
        defaults: Name -> default, where the script's default is not the dataclass's.
    """

    def __init__(
        self, argument_classes: Sequence[Any], script: str, doc: str | None, **defaults: Any
    ) -> None:
        super().__init__(
            argument_classes,
            prog=Path(script).name,
            description=doc,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,  # a misspelt flag must not pass for another one
        )
        self.set_defaults(**defaults)

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Return the filled dataclasses.

        Args:
            argv: The flags; by default those of the command line. The first may instead be a
                .yaml, .yml or .json file with names and values; flags after it win.
        """
        arguments = list(sys.argv[1:] if argv is None else argv)
        with self.user_errors(ValueError, OSError):
            if arguments and arguments[0].endswith((".yaml", ".yml", ".json")):
                arguments = _flags_of_file(Path(arguments[0])) + arguments[1:]
            *filled, unknown = self.parse_args_into_dataclasses(
                arguments, return_remaining_strings=True, look_for_args_file=False
            )
            if unknown:
                name = unknown[0].split("=")[0]
                known = [
                    f"--{e.name}" for cls in self.dataclass_types for e in dataclasses.fields(cls)
                ]
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise UsageError(f"unknown argument {name}.{hint}")
        return tuple(filled)

    @contextmanager
    def user_errors(self, *others: type[Exception]) -> Iterator[None]:
        """Report a `UsageError` of the block, or one of `others`, and exit with status 2."""
        try:
            yield
        except (UsageError, *others) as error:
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line; the usage of all training arguments fills pages."""
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


def _flags_of_file(path: Path) -> list[str]:
    """Return the settings in a file as flags, so that both ways check and convert alike."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        settings = json.loads(text)
    else:
        import yaml  # comes with transformers

        try:
            settings = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"{path}: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{path} holds no names with values")
    flags = []
    for name, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            flags.append(f"--{name}={json.dumps(value)}")
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def check_processes(world_size: int) -> None:
    """Refuse a launch whose processes would each train alone, into the same folder.

    Args:
        world_size: The number of processes that train together.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != world_size:
        raise UsageError(f"{launched} processes on a machine without a GPU need --use_cpu true")


def check_sample_limits(args: Any) -> None:
    """Refuse a `max_train_samples` or `max_eval_samples` below 1.

    Args:
        args: Data arguments that have both.
    """
    for name in ("max_train_samples", "max_eval_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint in `output_dir`."""
    # Trainer writes trainer_state.json last: a folder without it was interrupted half-way.
    complete = [path.parent for path in _checkpoints(output_dir, "trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def _checkpoints(output_dir: str | Path, content: str = "") -> list[Path]:
    """Return the paths checkpoint-<number>/`content` that exist in `output_dir`."""
    return [
        path
        for path in Path(output_dir).glob(f"checkpoint-*/{content}")
        if re.fullmatch(r"checkpoint-\d+", path.relative_to(output_dir).parts[0])
    ]


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
        checkpoint = last_checkpoint(output_dir) if wanted.lower() == "true" else Path(wanted)
        if checkpoint is None:
            raise UsageError(f"no checkpoint to resume from in {output_dir}")
        if not (checkpoint / "trainer_state.json").is_file():
            raise UsageError(
                f"{checkpoint} is no complete checkpoint: it has no trainer_state.json"
            )
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
        for folder in _checkpoints(output_dir):
            shutil.rmtree(folder)
        for pattern in ("*_results.json", "trainer_state.json", PLOT_NAME):
            for file in output_dir.glob(pattern):
                file.unlink()
    return None


def train_and_evaluate(
    trainer: Trainer, checkpoint: str | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Train, save the model and evaluate; print, save and return the metrics of both.

    On Ctrl-C: say in one line how to resume, and exit with status 130.

    Args:
        trainer: The trainer.
        checkpoint: The checkpoint to resume from.
    """
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
    return train_metrics, metrics


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
    train_metrics: Mapping[str, float],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> None:
    """Print what came out of a run and where it lies.

    Args:
        trainer: The trainer, after training, saving and `create_model_card`.
        train_metrics: The metrics of training.
        before: What to show of the evaluation before training, name -> value; may be empty.
        after: The same after training.
    """
    if not trainer.is_world_process_zero():
        return
    output_dir = Path(trainer.args.output_dir)

    def show(metrics: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())

    lines = [("Before training", show(before))] if before else []
    lines.append(("After training", show(after)))
    if "salsa/final_step_size" in train_metrics:
        lines += [
            (
                "Step size",
                f"{train_metrics['salsa/final_step_size']:.3g} at the end, median "
                f"{train_metrics['salsa/median_step_size']:.3g} (the rate to try in a plain run)",
            ),
            (
                "Line search",
                f"{train_metrics['salsa/searches']:.0f} searches, "
                f"{train_metrics['salsa/trials']:.0f} extra forward passes "
                f"({train_metrics['salsa/extra_forward_share']:.1%} of all)",
            ),
        ]
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
