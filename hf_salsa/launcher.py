"""python -m hf_salsa SCRIPT: run a script that uses Trainer, unchanged, with a line search.

    python -m hf_salsa [--optim NAME] SCRIPT.py ARGS...
    python -m hf_salsa [--optim NAME] -m PACKAGE.MODULE ARGS...
    accelerate launch -m hf_salsa SCRIPT.py ARGS...
    torchrun -m hf_salsa SCRIPT.py ARGS...

The script accepts the flags of `SaLSaTrainingArguments` (`--optim salsa_sgd`, `--salsa_c 0.5`)
where it accepts those of `TrainingArguments`. Which optimizer trains is one rule, the first of:

1. the launcher's `--optim`, in front of the script's name;
2. the script's own `--optim`, behind it;
3. what the code says: `optim=`, `optimizers=`, a `create_optimizer` of its own. It is left alone;
4. `salsa_adam_plus`.

A flag that names an optimizer of transformers changes `optim` and nothing else: the code may
overrule it, as it may without the launcher. One line on stderr says what trains.

A process that the script spawns (`torch.multiprocessing.spawn`) imports the script anew, without
the launcher, and trains as if there were none: start the processes with `torchrun -m hf_salsa`.

Here a script is run as Python runs it; `hf_salsa.exchange` says how the rest comes about.
"""

import argparse
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import cast

from . import exchange


def main(command_line: Sequence[str] | None = None) -> None:
    """Run what the command line names.

    Args:
        command_line: The arguments, those of the process by default.

    Raises:
        SystemExit: The command line is wrong (2), or there is no such script (2) or module (1).
    """
    parser = argparse.ArgumentParser(
        "python -m hf_salsa",
        description="Run a script that uses Trainer, unchanged, with an optimizer that needs no "
        "learning rate.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--optim",
        metavar="NAME",
        help="the optimizer, whatever the script says. Default: what the script says, else "
        "salsa_adam_plus",
    )
    parser.add_argument("-m", action="store_true", dest="module", help="SCRIPT names a module")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="the script's")
    given = parser.parse_args(command_line)
    exchange.install(exchange.Asked(given.optim, _optim_of(given.arguments)))
    run = run_module if given.module else run_script
    run(given.script, given.arguments)
    exchange.say_if_nothing_was_exchanged()


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a file as `python PATH ARGUMENTS...` does.

    Args:
        path: The file.
        arguments: What follows in `sys.argv`.
    """
    try:
        with io.open_code(os.path.abspath(path)) as file:
            source = file.read()
    except OSError as error:
        print(f"{sys.executable}: can't open file {path!r}: {error}", file=sys.stderr)
        sys.exit(2)
    script = ModuleType("__main__")  # no __spec__: a worker that is spawned looks for __file__ then
    script.__file__ = os.path.abspath(path)
    script.__loader__ = SourceFileLoader("__main__", script.__file__)
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    file_name = script.__file__
    _run(script, lambda: compile(source, file_name, "exec", dont_inherit=True), [path, *arguments])


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Run a module, or the `__main__` of a package, as `python -m NAME ARGUMENTS...` does.

    Args:
        name: The module, with dots.
        arguments: What follows in `sys.argv`.
    """
    sys.argv = ["-m", *arguments]  # to find a module imports the packages that it is in
    spec = _find(name)
    if spec is not None and spec.submodule_search_locations is not None:
        name += ".__main__"
        spec = _find(name)
    if spec is None:
        sys.exit(f"{sys.executable}: No module named {name}")
    module = importlib.util.module_from_spec(spec)
    module.__name__ = "__main__"
    loader = cast(InspectLoader, spec.loader)
    _run(module, lambda: cast(CodeType, loader.get_code(name)), [str(spec.origin), *arguments])


def _find(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name}."):
            return None
        raise  # something that a package on the way imports


def _run(module: ModuleType, code: Callable[[], CodeType], argv: list[str]) -> None:
    """Execute code as the main module; what it raises is shown as if it stood alone."""
    sys.modules["__main__"] = module
    sys.argv = argv
    try:
        exec(code(), vars(module))
    except SystemExit:
        raise
    except BaseException as error:  # Ctrl-C, too; Python goes on to set the exit status
        _show_without_launcher(error, module)
        raise


def _show_without_launcher(error: BaseException, script: ModuleType) -> None:
    """Let the hook that the script left, or Python's, print the traceback from the script on."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_globals is not vars(script):
        traceback = traceback.tb_next
    hook = sys.excepthook
    sys.excepthook = lambda kind, value, _: hook(kind, value.with_traceback(traceback), traceback)


def _optim_of(arguments: Sequence[str]) -> str | None:
    """Return the value of the script's own `--optim`, or None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--optim", nargs="?")
    optim: str | None = parser.parse_known_args(arguments)[0].optim
    return optim
