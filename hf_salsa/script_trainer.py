"""What a trainer of somebody else's script needs besides a search: who names the optimizer."""

import sys
from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import Optimizer
from transformers import Trainer, TrainerCallback

from . import exchange
from .accelerated import innermost, unwrap_optimizer
from .optimizers import OPTIMIZERS, LineSearchOptimizer
from .search_arguments import DEFAULT_OPTIMIZER

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ScriptTrainerMixin(_Base):
    """Applies the rule of `hf_salsa.launcher`; stands between `SaLSaTrainerMixin` and the script's.

    A flag that names a line search wins over `optim=`, `optimizers=` and `create_optimizer`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        asked = exchange.asked
        named = asked.launcher or (asked.script if asked.script in OPTIMIZERS else None)
        if named is not None:
            self.args.optim = named  # the code may have set another one
        if self._flag_names_line_search:
            if unwrap_optimizer(self.optimizer) is None:
                self.optimizer = self.lr_scheduler = None
            self.optimizer_cls_and_kwargs = None
        self.add_callback(_Announcement(self))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Set up the optimizer: the script's way, unless a flag asks for another one.

        Args:
            args: As in `Trainer.create_optimizer`, like `kwargs`.
            kwargs: The same by keyword.
        """
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._flag_names_line_search and unwrap_optimizer(optimizer) is None:
            self.optimizer = None
            optimizer = Trainer.create_optimizer(self, *args, **kwargs)
        return optimizer

    @property
    def schedules_itself(self) -> bool:
        """Whether the script's trainer has a `create_scheduler` of its own."""
        # What has no function behind it, as a static method, is not Trainer's either.
        own = getattr(super().create_scheduler, "__func__", None)
        return own is not Trainer.create_scheduler

    @property
    def _flag_names_line_search(self) -> bool:
        return self.args.optim in OPTIMIZERS and _flag(self.args.optim) is not None


_said: set[str] = set()  # one line for all trainers of a script, if they do the same


class _Announcement(TrainerCallback):
    """Says what trains, as soon as that is certain."""

    def __init__(self, trainer: ScriptTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        text = _what_trains(self._trainer)
        if state.is_world_process_zero and text not in _said:
            _said.add(text)
            print(f"hf_salsa: {text}", file=sys.stderr, flush=True)


def _what_trains(trainer: ScriptTrainerMixin) -> str:
    kind, optimizer = type(trainer).__name__, innermost(trainer.optimizer)
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))  # of an enum, or a word
    flag = _flag(name)
    if isinstance(optimizer, LineSearchOptimizer):
        who = flag or ("the default" if name == DEFAULT_OPTIMIZER else "the script's optim=")
        text = f"{kind}'s optimizer was exchanged for {type(optimizer).__name__} ({who})."
        if trainer.schedules_itself:
            text += " Its create_scheduler is not called: there is no learning rate to schedule."
        return text
    text = f"{kind} trains with {type(optimizer).__name__}, nothing was exchanged:"
    if flag is not None:
        return f"{text} {flag} names {name}."
    return f"{text} its script names it. --optim NAME in front of the script's name exchanges it."


def _flag(name: str) -> str | None:
    """Return whose flag names an optimizer, in words."""
    if name == exchange.asked.launcher:
        return "the launcher's --optim"
    return "the script's --optim" if name == exchange.asked.script else None
