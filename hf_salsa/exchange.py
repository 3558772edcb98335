"""How a script that knows nothing of line searches gets a trainer and arguments that do.

Nothing happens before the script imports transformers, so that what it sets before (`HF_HOME`,
`CUDA_VISIBLE_DEVICES`) counts. Then two things happen, each where all that follows goes through:

- As soon as `transformers.training_args` is loaded, its `TrainingArguments` is replaced by a
  subclass of the same name with our fields and defaults. Nobody has seen the stock class by then:
  what transformers, TRL or the script derive from it have the fields too, their own defaults win
  over ours as over the stock ones, and `isinstance` means what it did.
- As soon as `transformers.trainer` is loaded, `Trainer` gets a `__new__`. The classes stay what
  they are, under whatever name they are imported. A trainer is made of a subclass of the class that
  was called, with `SaLSaTrainerMixin` in front: so a `training_step` of the script's own, or TRL's,
  lies inside of what is evaluated again, and `super()` and `isinstance` work as ever.

What is pickled names the script's own classes and this module: `training_args.bin` can be loaded
wherever hf_salsa is installed, and a process that was spawned without the launcher, as a worker of
a DataLoader, gets the same objects.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Asked:
    """Which optimizers the command line names.

    Attributes:
        launcher: The launcher's `--optim`.
        script: The script's own.
    """

    launcher: str | None = None
    script: str | None = None


asked = Asked()  # of this process


def install(flags: Asked) -> None:
    """Exchange `TrainingArguments` and make trainers search, once transformers is imported.

    Args:
        flags: What the command line asks for.
    """
    global asked
    asked = flags
    functions = {
        "transformers.training_args": exchange_arguments,
        "transformers.trainer": exchange_trainer,
    }
    sys.meta_path.insert(0, AfterImport(functions))


class AfterImport(MetaPathFinder):
    """Hands a module to a function as soon as it is loaded, before whoever imports it sees it."""

    def __init__(self, functions: Mapping[str, Callable[[Any], None]]) -> None:
        self._functions = functions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how to load a module, for those that are waited for.

        Args:
            fullname: Name of the module.
            path: Where to look.
            target: As in `importlib`.
        """
        if fullname not in self._functions:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _LoaderThen(self._functions[fullname], fullname, spec.loader.path)
        return spec


class _LoaderThen(SourceFileLoader):
    def __init__(self, function: Callable[[Any], None], fullname: str, path: str) -> None:
        super().__init__(fullname, path)
        self._function = function

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self._function(module)


def exchange_arguments(module: Any) -> None:
    """Put our arguments in the place of `TrainingArguments`.

    Args:
        module: `transformers.training_args`, just loaded.
    """
    exchanged = searching_arguments(module.TrainingArguments)
    exchanged.stands_for = None  # here it is what its name leads to
    module.TrainingArguments = exchanged


def exchange_trainer(module: Any) -> None:
    """Let every trainer be made of a subclass that searches.

    Args:
        module: `transformers.trainer`, just loaded.
    """
    trainer = module.Trainer

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        searching = searching_trainer(cls)
        return super(trainer, searching).__new__(searching)

    # Who inspects a class with a `__new__` shall still see what the constructor takes.
    new.__signature__ = inspect.signature(trainer.__init__)  # type: ignore[attr-defined]
    trainer.__new__ = staticmethod(new)


@functools.cache
def searching_arguments(cls: Any) -> Any:
    """Return a subclass of `TrainingArguments` with our fields, `cls` itself if it has them.

    Args:
        cls: `TrainingArguments`, or a subclass that was made without the launcher.
    """
    from .search_arguments import SearchArguments

    if issubclass(cls, SearchArguments):
        return cls

    @dataclass
    class Searching(SearchArguments, cls):  # type: ignore[misc]
        stands_for = cls

        def __post_init__(self) -> None:
            if asked.launcher is not None:
                self.optim = asked.launcher
            super().__post_init__()

        def __reduce__(self) -> tuple[Any, ...]:
            return restore, (searching_arguments, self.stands_for or type(self)), vars(self)

    return _in_place_of(cls, Searching)


@functools.cache
def searching_trainer(cls: Any) -> Any:
    """Return a subclass of a trainer that searches, `cls` itself if it does.

    Args:
        cls: `Trainer` or a subclass.
    """
    from .script_trainer import ScriptTrainerMixin
    from .trainer import SaLSaTrainerMixin

    if issubclass(cls, SaLSaTrainerMixin):
        return cls

    class Searching(SaLSaTrainerMixin, ScriptTrainerMixin, cls):  # type: ignore[misc]
        def __reduce__(self) -> tuple[Any, ...]:
            return restore, (searching_trainer, cls), vars(self)

    return _in_place_of(cls, Searching)


def restore(searching: Callable[[Any], Any], cls: Any) -> Any:
    """Return an empty object for `pickle` to fill.

    Args:
        searching: `searching_arguments` or `searching_trainer`.
        cls: Of which class it is without us.
    """
    made = searching(cls)
    return made.__new__(made)


def say_if_nothing_was_exchanged() -> None:
    """Say on stderr that the script has come to its end and made no trainer in this process."""
    if not searching_trainer.cache_info().currsize:
        print("hf_salsa: nothing was exchanged, for this process made no Trainer.", file=sys.stderr)


def _in_place_of(cls: Any, searching: Any) -> Any:
    """Let a class go by the name of the one whose place it takes."""
    for name in ("__module__", "__qualname__", "__name__", "__doc__"):
        setattr(searching, name, getattr(cls, name))
    return searching
