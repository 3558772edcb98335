"""Scalars in `param_groups`, where every way to make a checkpoint finds them.

Each parameter group holds the same scalars under fixed keys, present from the start: name, settings
and state of the rule, `RunState`, and `lr`, the step size last applied.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .scale import NOT_KNOWN
from .tensors import moment_dtype
from .trial_points import PREVIOUS

Record = TypeVar("Record")


@dataclass(frozen=True)
class RunState:
    """What the optimizer itself remembers from step to step, whatever the rule.

    Attributes:
        reevaluate_loss: The replay does not reproduce the training loss, so f(w_k) is evaluated
            with the trials.
        trials: Evaluations of the objective so far, each an extra forward pass.
        skipped_steps: Steps not taken because a gradient was not finite.
        consecutive_skips: How many of them came last in a row.
        steps: Steps so far, skipped ones too.
        run_start: `steps` at the start of the run.
        run_steps: Steps of the run; 0 where they are not known.
        micro_batches: Of the update whose scale the state of the rule has: `Parts.micro_batches`.
        loss_factor: The same of `Parts.factor`.
        head_steps: Steps that trained the new head alone.
        head_failures: How many of them found no step size.
        head_step_size: The step size of the latest of them that found one.
        head_losses: Sum of the losses f_k(w_k) at which they began, of those that are finite.
        head_losses_seen: How many these are.
        head_applied: The step size of the latest step, if it was one of them, else 0.
    """

    reevaluate_loss: bool = False
    trials: int = 0
    skipped_steps: int = 0
    consecutive_skips: int = 0
    steps: int = 0
    run_start: int = 0
    run_steps: int = 0
    micro_batches: float = 0.0
    loss_factor: float = NOT_KNOWN
    head_steps: int = 0
    head_failures: int = 0
    head_step_size: float = 0.0
    head_losses: float = 0.0
    head_losses_seen: int = 0
    head_applied: float = 0.0


RULE = "rule"  # the key of the name of the rule

# What checkpoints of earlier versions lack, and stands for "not known", or for no head.
LATER_NAMES = {
    "micro_batches": RunState.micro_batches,
    "loss_factor": RunState.loss_factor,
    "head": False,
    "head_first": 0,
    "head_steps": RunState.head_steps,
    "head_failures": RunState.head_failures,
    "head_step_size": RunState.head_step_size,
    "head_losses": RunState.head_losses,
    "head_losses_seen": RunState.head_losses_seen,
    "head_applied": RunState.head_applied,
}


@dataclass(frozen=True)
class Counters:
    """Totals since the optimizer was made, checkpoints included.

    Attributes:
        searches: Searches.
        trials: Evaluations of the closure or objective: extra forward passes.
        failed_searches: Searches that found no step size and kept the one of before.
        skipped_steps: Steps not taken because a gradient was not finite.
    """

    searches: int
    trials: int
    failed_searches: int
    skipped_steps: int


@cache  # asked for many times in each step
def names_of(record: type[Any]) -> tuple[str, ...]:
    """Return the names of a dataclass's fields."""
    return tuple(entry.name for entry in fields(record))


def read(record: type[Record], group: dict[str, Any]) -> Record:
    """Return the dataclass `record` filled from a parameter group."""
    names = names_of(record)  # type: ignore[arg-type]  # classes are hashable
    return record(**{name: group[name] for name in names})


def write(groups: list[dict[str, Any]], *records: Any, **others: Any) -> None:
    """Write dataclasses, and what is given by name, into all parameter groups."""
    for group in groups:
        for record in records:
            group.update(vars(record))
        group.update(others)


def shared_names(optimizer: type[Any]) -> list[str]:
    """Return what all parameter groups share: one search, one step size."""
    records = (optimizer.rule_type, optimizer.rule_type.state_type, RunState)
    names = [name for record in records for name in names_of(record)]
    return [*names, *({"direction", "head_first"} & optimizer.options.keys()), RULE, "lr"]


def refuse_own_values(optimizer: type[Any], group: dict[str, Any], shared: dict[str, Any]) -> None:
    """Raise a `ValueError` if a parameter group has a value of its own of what all share."""
    for name, value in shared.items():
        if name in group and group[name] != value:
            raise ValueError(
                f"{name}={group[name]!r} in a parameter group is not allowed: one line search sets "
                "one step size for all groups. Remove it there; pass line-search settings to "
                f"{optimizer.__name__} itself. For shorter or longer steps of one group set its "
                "step_size_factor."
            )


def fit(optimizer: type[Any], group: dict[str, Any]) -> int:
    """Return how much of an optimizer class's state a saved parameter group holds: all, or 0.

    Of several classes that fit, the one with the most wrote it: a rule's state may have held
    another's names too.
    """
    records = (RunState, optimizer.rule_type.state_type)
    names = {*optimizer.options, *(name for record in records for name in names_of(record))}
    return len(names) if names <= group.keys() | LATER_NAMES.keys() else 0


def written_by(group: dict[str, Any], base: type[Any]) -> type[Any] | None:
    """Return the subclass of `base` that fits a saved parameter group best, or None."""
    classes = list(base.__subclasses__())
    for cls in classes:
        classes += cls.__subclasses__()
    with_rule = [cls for cls in classes if getattr(cls, "rule_type", None) is not None]
    best = max(with_rule, key=lambda cls: fit(cls, group), default=None)
    return best if best is not None and fit(best, group) else None


def refuse_another_kind(optimizer: type[Any], group: dict[str, Any], base: type[Any]) -> None:
    """Raise a `ValueError` if another subclass of `base`, or another rule, wrote this."""
    if optimizer.rule_type.state_type.is_former(group):
        raise ValueError(
            f"This checkpoint was written by a former version of the rule of {optimizer.__name__}, "
            "which knew other things. Start the run anew, or resume it with the version of "
            "hf_salsa that wrote it."
        )
    writer = written_by(group, base)
    if writer is None or fit(optimizer, group) < fit(writer, group):
        name = writer.__name__ if writer else "another kind of optimizer"
        raise ValueError(
            f"This checkpoint was not written by {optimizer.__name__} but by {name}. Resume with "
            "the optimizer that wrote it."
        )
    # Rules whose states have the same names mean different things by them.
    rule = optimizer.rule_type.__name__
    if group.get(RULE, rule) != rule:
        raise ValueError(
            f"This checkpoint was written with the rule {group[RULE]}, but the rule of "
            f"{optimizer.__name__} is {rule}. Resume with an optimizer of the rule that wrote it."
        )


def changed_settings(
    names: Iterable[str], saved: dict[str, Any], here: dict[str, Any]
) -> list[str]:
    """Return what differs between two parameter groups, `name=saved (here ...)`."""
    return [
        f"{name}={saved[name]!r} (here {here[name]!r})"
        for name in names
        if name in saved and _plain(saved[name]) != _plain(here[name])
    ]


def _plain(value: Any) -> Any:
    """Return a setting as it compares: JSON and some checkpoints make lists of tuples."""
    return tuple(value) if isinstance(value, list) else value


def with_tensors(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint in which what torch's optimizers keep as tensors is tensors.

    Some libraries save numbers there, as `step`.
    """
    state = {
        key: {n: v if isinstance(v, Tensor) else torch.tensor(float(v)) for n, v in entry.items()}
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def restore_precision(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Give loaded tensors the precision in which they are kept, whatever they were saved in.

    `Optimizer.load_state_dict` casts all state to the dtype of the parameter (pytorch #43706).
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    saved = with_tensors(state_dict)["state"]
    for param, saved_id in zip(params, saved_ids, strict=True):
        for name, value in saved.get(saved_id, {}).items():
            dtype = {"step": torch.float32, PREVIOUS: param.dtype}.get(name, moment_dtype(param))
            optimizer.state[param][name] = value.detach().to(param.device, dtype, copy=True)
