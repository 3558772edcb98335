"""SaLSaTrainingArguments: TrainingArguments that know the line-search optimizers by name."""

import difflib
import inspect
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.training_args import OptimizerNames

from .line_search import check_setting
from .optimizers import OPTIMIZERS, SaLSaAdam

_DEFAULT_OPTIMIZER = "salsa_adam"
_PREFIX = "salsa_"
_UNCLIPPED = ("salsa_adam", "salsa_sgd", "sls_adam", "sls_sgd")  # the paper's methods


@dataclass
class SaLSaArgumentsMixin:
    """Adds the line-search optimizers to any subclass of `TrainingArguments`.

    Put it first: `class MyConfig(SaLSaArgumentsMixin, SFTConfig)`, decorated with `@dataclass`.
    `SaLSaTrainingArguments` documents the fields.
    """

    optim: str = field(
        default=_DEFAULT_OPTIMIZER,
        metadata={
            "help": "The optimizer. Line searches, which need no learning rate: "
            f"{', '.join(OPTIMIZERS)}; or any optimizer of transformers (adamw_torch, ...)."
        },
    )
    max_grad_norm: float | None = field(
        default=None,
        metadata={
            "help": "Largest norm of the gradient; 0 does not clip. Default: 0 with the paper's "
            "line searches, transformers' own default with the plus ones and all other optimizers."
        },
    )
    logging_steps: float = field(
        default=10,
        metadata={"help": "Log every so many updates; below 1: a ratio of all updates."},
    )
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first update too."})
    salsa_c: float | None = field(
        default=None,
        metadata={
            "help": "c of the Armijo criterion, between 0 and 1. Default: 0.3 (SaLSa), 0.1 (SLS), "
            "0.4 (plus)."
        },
    )
    salsa_beta3: float | None = field(
        default=None,
        metadata={
            "help": "Smoothing of the criterion, in [0, 1). Default: 0.99 (SaLSa), 0 (SLS), "
            "0.9 (plus)."
        },
    )
    salsa_steps_to_double: float | None = field(
        default=None,
        metadata={"help": "Updates in which the step size may double, at least 1. Default: 500."},
    )
    salsa_backtrack_factor: float | None = field(
        default=None,
        metadata={
            "help": "By what a rejected step size shrinks, between 0 and 1. Default: 0.9, "
            "0.5 (plus)."
        },
    )
    salsa_initial_step_size: float | None = field(
        default=None,
        metadata={"help": "Step size at which the first search starts, above 0. Default: 1."},
    )
    salsa_max_search_interval: int | None = field(
        default=None,
        metadata={
            "help": "Most updates from one search to the next. Default: 10 (SaLSa, plus), 1 (SLS)."
        },
    )
    salsa_direction: str | None = field(
        default=None,
        metadata={
            "help": "Direction that is tested: gradient, the paper's, or momentum. Default: "
            "gradient, momentum (plus)."
        },
    )
    salsa_require_decrease: bool | None = field(
        default=None,
        metadata={
            "help": "Accept no step on which the loss of the mini-batch rises. Default: False."
        },
    )
    salsa_cool_down: float | None = field(
        default=None,
        metadata={
            "help": "Share of the run, from 0 to 1, over which at its end the step size falls "
            "linearly to 0. Default: 0, 0.6 (plus)."
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
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0 if name in _UNCLIPPED else _stock_default("max_grad_norm")
        if name in OPTIMIZERS:
            self._check_line_search_arguments(name)
            # transformers knows its own names only; none of what it derives depends on this one.
            self.optim = OptimizerNames.ADAMW_TORCH
        super().__post_init__()  # type: ignore[misc]  # of TrainingArguments, which comes next
        if name in OPTIMIZERS:
            self.optim = name

    def _check_line_search_arguments(self, name: str) -> None:
        settings = inspect.signature(OPTIMIZERS[name]).parameters
        for argument, value in _line_search_fields(self).items():
            check_setting(argument.removeprefix(_PREFIX), value, argument)
            if argument.removeprefix(_PREFIX) not in settings:
                raise ValueError(
                    f"{argument}={value!r} is not allowed with optim={name!r}, which has no such "
                    "setting. Leave it out, or choose another optimizer."
                )
        arguments: Any = self  # the fields below are those of TrainingArguments
        if arguments.deepspeed:
            raise ValueError(
                f"deepspeed={arguments.deepspeed!r} is not allowed with optim={name!r}: "
                "DeepSpeed's engine steps inside backward, where the loss cannot be re-evaluated. "
                "Use FSDP2 (fsdp=True) or DDP (torchrun) instead, or a stock optimizer."
            )
        if arguments.optim_args:
            raise ValueError(
                f"optim_args={arguments.optim_args!r} is not allowed with optim={name!r}: use the "
                f"{_PREFIX}* arguments."
            )


@dataclass
class SaLSaTrainingArguments(SaLSaArgumentsMixin, TrainingArguments):  # type: ignore[misc]
    """`TrainingArguments` whose default optimizer needs no learning rate.

    `adam_beta1`, `adam_beta2`, `adam_epsilon` and `weight_decay` keep their meaning. With a line
    search `learning_rate`, `lr_scheduler_type` and `warmup_steps` have none; setting them warns.
    A field left at `None` takes the optimizer's own default (`SaLSaAdam` and its siblings document
    them).

    Args:
        optim: `"salsa_adam"` (default), `"salsa_sgd"`, `"sls_adam"`, `"sls_sgd"`,
            `"salsa_adam_plus"`, `"salsa_sgd_plus"`; or any name that transformers knows, with which
            training is `Trainer`'s own.
        salsa_c: c of the Armijo criterion, in (0, 1).
        salsa_beta3: Smoothing of both sides of the criterion, in [0, 1).
        salsa_steps_to_double: Updates in which the step size may double, at least 1.
        salsa_backtrack_factor: By what a rejected step size shrinks, in (0, 1).
        salsa_initial_step_size: Step size at which the first search starts, above 0.
        salsa_max_search_interval: Most updates from one search to the next, at least 1.
        salsa_direction: `"gradient"` or `"momentum"`.
        salsa_require_decrease: Accept no step on which the mini-batch's loss rises.
        salsa_cool_down: Share of the run at its end in which the step size falls linearly to 0.

    Raises:
        ValueError: An unknown optimizer, a value out of range, or one that the optimizer does not
            have.

    Defaults that differ from `TrainingArguments`:
        - `optim`: `"salsa_adam"` instead of `"adamw_torch_fused"`.
        - `max_grad_norm`: 0 (no clipping) instead of 1 with the paper's line searches. The plus
          ones keep the 1, without which training from scratch may fail.
        - `logging_steps`: 10 instead of 500, and `logging_first_step`: True instead of False, so
          that the step size can be seen finding itself.
    """


@dataclass
class SaLSaSeq2SeqTrainingArguments(  # type: ignore[misc]
    SaLSaArgumentsMixin, Seq2SeqTrainingArguments
):
    """`SaLSaTrainingArguments` with the fields of `Seq2SeqTrainingArguments`."""


def line_search_name(args: TrainingArguments) -> str | None:
    """Return the line search that `args` ask for, or None for an optimizer of transformers.

    Plain `TrainingArguments` cannot name one and get `"salsa_adam"`.
    """
    if isinstance(args, SaLSaArgumentsMixin):
        return args.optim if args.optim in OPTIMIZERS else None
    return _DEFAULT_OPTIMIZER


def optimizer_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the keyword arguments of the line search that `args` ask for.

    Raises:
        ValueError: A value is out of range (it may have been set after construction).
    """
    options: dict[str, Any] = {"weight_decay": args.weight_decay}
    if issubclass(OPTIMIZERS[str(line_search_name(args))], SaLSaAdam):
        options |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if isinstance(args, SaLSaArgumentsMixin):
        for argument, value in _line_search_fields(args).items():
            check_setting(argument.removeprefix(_PREFIX), value, argument)
            options[argument.removeprefix(_PREFIX)] = value
    return options


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


def _line_search_fields(args: SaLSaArgumentsMixin) -> dict[str, Any]:
    """Return the `salsa_*` fields that were set."""
    names = [entry.name for entry in fields(SaLSaArgumentsMixin) if entry.name.startswith(_PREFIX)]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _stock_default(name: str) -> Any:
    default = {entry.name: entry.default for entry in fields(TrainingArguments)}[name]
    if default is MISSING:
        raise KeyError(name)
    return default
