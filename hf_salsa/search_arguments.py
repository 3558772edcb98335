"""What makes `TrainingArguments` know the line-search optimizers by name.

Imports no subclass of `TrainingArguments`: the launcher loads it before there is one.
"""

import ast
import difflib
import re
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any

from transformers.training_args import OptimizerNames, TrainingArguments

from .optimizers import OPTIMIZERS, LineSearchOptimizer
from .rules.plus import Plus
from .settings import SETTINGS, SettingFields, check_setting

DEFAULT_OPTIMIZER = "salsa_adam_plus"
_PREFIX = "salsa_"
_HEAD_FIRST = "salsa_head_first"  # which the optimizers of transformers have too
# Settings that transformers has fields for.
_STOCK_FIELDS = {
    "weight_decay": "weight_decay",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
}


def _help(name: str) -> str:
    """Return the words for a setting: meaning, range and the default of every optimizer."""
    defaults: dict[str, list[str]] = {}
    for optimizer, cls in OPTIMIZERS.items():
        if name in cls.default_settings():
            defaults.setdefault(f"{cls.default_settings()[name]}", []).append(optimizer)
    listed = ", ".join(f"{value} ({', '.join(names)})" for value, names in defaults.items())
    return f"{SETTINGS[name].meaning}: {SETTINGS[name].allowed}. Default: {listed}."


# The words need the defaults of the optimizers, which settings.py does not know.
for _entry in fields(SettingFields):
    _entry.metadata = MappingProxyType({"help": _help(_entry.name.removeprefix(_PREFIX))})


@dataclass
class SearchArguments(SettingFields):
    """Fields and checks of the line-search optimizers, for in front of `TrainingArguments`."""

    optim: str = field(
        default=DEFAULT_OPTIMIZER,
        metadata={
            "help": "The optimizer. Line searches, which need no learning rate: "
            f"{', '.join(OPTIMIZERS)}; or any optimizer of transformers (adamw_torch, ...)."
        },
    )
    salsa_head: list[str] | None = field(
        default=None,
        metadata={
            "help": "The new head that salsa_head_first trains: names of parameters, or how they "
            "begin. Default: what is new at the end of a trained model, by its weights. For every "
            "optimizer, those of transformers too."
        },
    )
    salsa_go_back: bool = field(
        default=False,
        metadata={
            "help": "Go back to the weights of the lowest loss when a run has broken down. Keeps a "
            "copy of weights and moments, in checkpoints too. For the plus optimizers."
        },
    )
    max_grad_norm: float | None = field(
        default=None,
        metadata={
            "help": "Largest norm of the gradient; 0 does not clip. Default: 0 with the paper's "
            "line searches, transformers' own default with the plus ones and all other optimizers."
        },
    )

    def __post_init__(self) -> None:
        name = str(getattr(self.optim, "value", self.optim))
        stock = [optimizer.value for optimizer in OptimizerNames]
        if name not in OPTIMIZERS and name not in stock:
            close = difflib.get_close_matches(name, [*OPTIMIZERS, *stock], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"optim={name!r} is not an optimizer.{hint} Line searches: "
                f"{', '.join(OPTIMIZERS)}. Of transformers: {', '.join(stock)}."
            )
        self.max_grad_norm = resolved_max_grad_norm(self.max_grad_norm, OPTIMIZERS.get(name))
        if name not in OPTIMIZERS:
            self._refuse_settings_of_a_search(name)
        else:
            self._check_line_search_arguments(name)
        self._check_head(name)
        self._check_go_back(name)
        if name in OPTIMIZERS:
            # transformers knows its own names only; none of what it derives depends on this one.
            self.optim = OptimizerNames.ADAMW_TORCH
        super().__post_init__()  # type: ignore[misc]  # of TrainingArguments, which comes next
        if name in OPTIMIZERS:
            self.optim = name

    def set_optimizer(self, name: str = DEFAULT_OPTIMIZER, *args: Any, **kwargs: Any) -> Any:
        """Set the optimizer, a line search's too, and its options as `TrainingArguments` does.

        Args:
            name: The optimizer, as for `optim`.
            args: As in `TrainingArguments.set_optimizer`, like `kwargs`. A learning rate has no
                meaning for a line search.
            kwargs: The same by keyword.
        """
        arguments: Any = self
        stock = OptimizerNames.ADAMW_TORCH if name in OPTIMIZERS else name
        super().set_optimizer(stock, *args, **kwargs)  # type: ignore[misc]
        if name in OPTIMIZERS:
            arguments.optim = name
            arguments.learning_rate = _stock_default("learning_rate")
            self._check_line_search_arguments(name)
        self.max_grad_norm = resolved_max_grad_norm(self.max_grad_norm, OPTIMIZERS.get(name))
        return self

    def _refuse_settings_of_a_search(self, name: str) -> None:
        if self.salsa_head_first is not None:
            check_setting("head_first", self.salsa_head_first, _HEAD_FIRST)
        set_fields = [e.name for e in fields(SettingFields) if getattr(self, e.name) is not None]
        given = [field_name for field_name in set_fields if field_name != _HEAD_FIRST]
        if given:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])!r} is not allowed with optim={name!r}, which "
                f"does not search. Leave it out, or choose one of {', '.join(OPTIMIZERS)}."
            )

    def _check_head(self, name: str) -> None:
        arguments: Any = self  # also of TrainingArguments
        if self.salsa_head is not None and not head_first_of(arguments):
            raise ValueError(
                f"salsa_head={self.salsa_head!r} is not allowed where no head is trained first: "
                f"set salsa_head_first (10 works well with optim={name!r}), or leave it out."
            )

    def _check_go_back(self, name: str) -> None:
        able = [n for n, cls in OPTIMIZERS.items() if issubclass(cls.rule_type, Plus)]
        if self.salsa_go_back and name not in able:
            raise ValueError(
                f"salsa_go_back={self.salsa_go_back!r} is not allowed with optim={name!r}, which "
                f"knows no range of the loss. Leave it out, or choose one of {', '.join(able)}."
            )

    def _check_line_search_arguments(self, name: str) -> None:
        arguments: Any = self  # also of TrainingArguments
        _given_settings(arguments, name)
        if arguments.deepspeed:
            raise ValueError(
                f"deepspeed={arguments.deepspeed!r} is not allowed with optim={name!r}: "
                "DeepSpeed's engine steps inside backward, where the loss cannot be re-evaluated. "
                "Use FSDP2 (fsdp=True) or DDP (torchrun) instead, or a stock optimizer."
            )


def line_search_name(args: TrainingArguments) -> str | None:
    """Return the line search that `args` ask for, or None for an optimizer of transformers.

    Plain `TrainingArguments` cannot name one and get `DEFAULT_OPTIMIZER`.
    """
    if isinstance(args, SearchArguments):
        return args.optim if args.optim in OPTIMIZERS else None
    return DEFAULT_OPTIMIZER


def head_first_of(args: TrainingArguments) -> int:
    """Return how many updates `args` ask to train a new head alone."""
    name = line_search_name(args)
    if name is None:
        return vars(args)[_HEAD_FIRST] or 0
    settings = OPTIMIZERS[name].default_settings() | _given_settings(args, name)
    return int(settings.get("head_first", 0))


def optimizer_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the keyword arguments of the line search that `args` ask for.

    Raises:
        ValueError: A value is out of range (it may have been set after construction).
    """
    name = str(line_search_name(args))
    stock = {
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    known = OPTIMIZERS[name].default_settings()
    return {n: v for n, v in stock.items() if n in known} | _given_settings(args, name)


class _Default(float):
    """A value that nobody asked for: another optimizer may want another one."""


def resolved_max_grad_norm(
    value: float | None, optimizer: type[LineSearchOptimizer] | None
) -> float:
    """Return the norm at which gradients are clipped: what was asked for, or the optimizer's own.

    Args:
        value: The argument as it stands: None or an earlier default where nobody asked.
        optimizer: The class of the line search; None is an optimizer of transformers.
    """
    if value is not None and not isinstance(value, _Default):
        return value
    clips = optimizer is None or optimizer.rule_type.clips_gradients
    return _Default(_stock_default("max_grad_norm") if clips else 0.0)


def ignored_settings(args: TrainingArguments) -> list[str]:
    """Return `name=value` of what was set though a line search has no use for it."""
    defaults = {entry.name: entry.default for entry in fields(args)}  # TRL's are not transformers'
    names = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
    values = {name: getattr(args, name) for name in names}
    return [
        f"{name}={getattr(value, 'value', value)}"
        for name, value in values.items()
        if value != defaults[name]
    ]


def _given_settings(args: TrainingArguments, name: str) -> dict[str, Any]:
    """Return the settings that were given, as `salsa_*` fields and in `optim_args`.

    Raises:
        ValueError: The optimizer has no such setting, or the value is out of range.
    """
    given: list[tuple[str, Any, str]] = []  # name of the setting, its value, what the user wrote
    if isinstance(args, SearchArguments):
        set_fields = [e.name for e in fields(SettingFields) if getattr(args, e.name) is not None]
        given += [(n.removeprefix(_PREFIX), getattr(args, n), n) for n in set_fields]
        given += [(n, value, f"optim_args: {n}") for n, value in _parse_optim_args(args)]
    known = OPTIMIZERS[name].default_settings()
    for setting, value, argument in given:
        if setting in _STOCK_FIELDS:
            raise ValueError(
                f"{argument}={value!r} is not allowed: it has a field of its own. Use "
                f"{_STOCK_FIELDS[setting]} of the training arguments."
            )
        if setting not in known:
            able = [n for n, cls in OPTIMIZERS.items() if setting in cls.default_settings()]
            choice = f", or set optim to one of {', '.join(able)}" if able else ""
            raise ValueError(
                f"{argument}={value!r} is not allowed with optim={name!r}, which has no such "
                f"setting. Leave it out{choice}."
            )
        check_setting(setting, value, argument)
    return {setting: value for setting, value, _ in given}


def _parse_optim_args(args: Any) -> list[tuple[str, Any]]:
    """Return (name, value) of each NAME=VALUE of `optim_args`, which commas separate."""
    parsed = []
    # Commas inside of brackets belong to a value.
    for item in re.split(r",(?![^(\[]*[)\]])", (args.optim_args or "").replace(" ", "")):
        name, equals, text = item.partition("=")
        if not item:
            continue
        if not name or not equals or not text:
            raise ValueError(
                f"optim_args={args.optim_args!r} is not allowed: it must be NAME=VALUE, with "
                "commas between several."
            )
        parsed.append((name, _value_of(text)))
    return parsed


def _value_of(text: str) -> Any:
    """Return a number, a truth value or a tuple if `text` is one, else the word itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    try:
        return float(text)  # inf
    except ValueError:
        return text


def _stock_default(name: str) -> Any:
    default = {entry.name: entry.default for entry in fields(TrainingArguments)}[name]
    if default is MISSING:
        raise KeyError(name)
    return default
