"""The command line of the training scripts: flags, settings files, user errors.

A mistake of the user is one line `script.py: error: ...` and exit status 2, never a traceback.
"""

import difflib
import json
import os
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

COMMON_DEFAULTS = {  # where the scripts differ from SaLSaTrainingArguments
    "eval_on_start": True,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_steps": 10,  # the step size can be seen finding itself
    "logging_first_step": True,
    "report_to": "none",
    "save_total_limit": 1,
    "dataloader_pin_memory": torch.accelerator.is_available(),  # a CPU run would warn of it
}


class UsageError(ValueError):
    """A mistake of the user, to be shown without a traceback."""


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the defaults, and the commands of a script's docstring as they were written."""

    def _get_help_string(self, action: Action) -> str | None:
        # No default, or one that the words for it tell.
        return action.help if action.default is None else super()._get_help_string(action)


class ScriptArgumentParser(HfArgumentParser):
    """`HfArgumentParser` that also reads a settings file and reports an error in one line.

    `--help` shows the settings of the search first, in a group of their own.

    Args:
        argument_classes: The dataclasses to fill.
        script: The path of the script.
        doc: The script's docstring, which `--help` shows.
        defaults: Name -> default, where the script's default is not the dataclass's.
    """

    _groups: list[Any] | None = None

    def __init__(
        self, argument_classes: Sequence[Any], script: str, doc: str | None, **defaults: Any
    ) -> None:
        super().__init__(
            argument_classes,
            prog=Path(script).name,
            usage="%(prog)s [SETTINGS.yaml] --output_dir FOLDER [--NAME VALUE ...]",
            description=doc,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,  # a misspelt flag must not pass for another one
        )
        self.set_defaults(**defaults)

    def add_argument(self, *names: Any, **options: Any) -> Action:
        """Add an argument, to the group that it belongs to."""
        name = names[0].lstrip("-")
        if name == "h":
            return super().add_argument(*names, **options)
        if self._groups is None:
            self._groups = [
                self.add_argument_group("the optimizer, and the settings of its line search"),
                self.add_argument_group("model, data and training"),
            ]
        of_search = name in ("optim", "optim_args") or name.startswith("salsa_")
        return self._groups[0 if of_search else 1].add_argument(*names, **options)

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
                known = [f"--{e.name}" for cls in self.dataclass_types for e in fields(cls)]
                raise UsageError(f"unknown argument {name}.{did_you_mean(name, known)}")
            for arguments in filled:
                if isinstance(arguments, TrainingArguments):
                    check_processes(arguments.world_size)
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


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return a question for the name that is closest to a misspelt one; empty if none is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def overwrite_flag() -> Any:
    """Return the field `overwrite_output_dir` of a dataclass of arguments."""
    return field(
        default=False,
        metadata={
            "help": "Delete the checkpoints and results of an earlier run in output_dir. Without "
            "effect when it is resumed."
        },
    )


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
