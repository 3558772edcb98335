"""Scalars in `param_groups`, where every way to make a checkpoint finds them.

Each parameter group holds the same scalars under fixed keys, present from the start: settings and
state of the rule, `RunState`, and `lr`, the step size last applied.
"""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor
from torch.optim.optimizer import Optimizer

Record = TypeVar("Record")


@dataclass(frozen=True)
class RunState:
    """What the optimizer itself remembers from step to step, whatever the rule.

    Attributes:
        reevaluate_loss: The replay does not reproduce the training loss, so f(w_k) is evaluated
            with the trials.
        trials: Evaluations of the objective so far, each an extra forward pass.
        skipped_steps: Steps not taken because the loss or the gradient was not finite.
        consecutive_skips: How many of them came last in a row.
        steps: Steps so far, skipped ones too.
        run_start: `steps` at the start of the run.
        run_steps: Steps of the run; 0 where they are not known.
    """

    reevaluate_loss: bool = False
    trials: int = 0
    skipped_steps: int = 0
    consecutive_skips: int = 0
    steps: int = 0
    run_start: int = 0
    run_steps: int = 0


@dataclass(frozen=True)
class Counters:
    """Totals since the optimizer was made, checkpoints included.

    Attributes:
        searches: Searches.
        trials: Evaluations of the closure or objective: extra forward passes.
        failed_searches: Searches that found no step size and kept the one of before.
        skipped_steps: Steps not taken because the loss or a gradient was not finite.
    """

    searches: int
    trials: int
    failed_searches: int
    skipped_steps: int


def names_of(record: type[Any]) -> list[str]:
    """Return the names of a dataclass's fields."""
    return [entry.name for entry in fields(record)]


def read(record: type[Record], group: dict[str, Any]) -> Record:
    """Return the dataclass `record` filled from a parameter group."""
    return record(**{name: group[name] for name in names_of(record)})


def write(groups: list[dict[str, Any]], *records: Any, lr: float) -> None:
    """Write dataclasses and the step size last applied into all parameter groups."""
    for group in groups:
        for record in records:
            group.update(vars(record))
        group["lr"] = lr


def check_loadable(
    optimizer: Optimizer, shared_names: list[str], state_dict: dict[str, Any]
) -> None:
    """Raise a `ValueError` if a checkpoint is not of this kind of optimizer."""
    missing = set(shared_names) - state_dict["param_groups"][0].keys()
    if missing:
        raise ValueError(
            f"This checkpoint was not written by {type(optimizer).__name__}: its parameter groups "
            f"lack {sorted(missing)}. Resume with the optimizer that wrote it."
        )


def keep_precision(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Give loaded tensors the precision in which they were saved.

    `Optimizer.load_state_dict` casts all state to the dtype of the parameter (pytorch #43706).
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    for param, saved_id in zip(params, saved_ids, strict=True):
        for name, value in state_dict["state"].get(saved_id, {}).items():
            assert isinstance(value, Tensor)
            optimizer.state[param][name] = value.detach().to(param.device, copy=True)
