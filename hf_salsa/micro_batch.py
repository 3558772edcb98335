"""One micro-batch: its forward pass, to be run again, and its inputs as they were."""

import copy
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class MicroBatch:
    """One micro-batch of the update.

    Attributes:
        repeat: Runs the forward pass again; None on steps that do not search.
        loss: What the forward pass returned, detached; None on steps that do not search.
        factors: What each backward pass multiplied it by; none where it was not differentiated.
    """

    repeat: Callable[[], Tensor] | None = None
    loss: Tensor | None = None
    factors: list[Tensor | float] = field(default_factory=list)

    @property
    def factor(self) -> Tensor | float:
        """What all backward passes together multiplied the loss by."""
        factor = self.factors[0]
        for other in self.factors[1:]:
            factor = factor + other
        return factor

    def differentiated(self, loss: Tensor) -> Tensor:
        """Return `loss` as backward took it."""
        factor = self.factor
        return loss if isinstance(factor, float) and factor == 1 else loss * factor


def checked_loss(loss: Any) -> Tensor:
    """Return the loss, if it is one."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss_fn returned a {type(loss).__name__}; it must return the loss, a tensor with one "
            "element: model(**batch).loss, not model(**batch), and no .item()."
        )
    if loss.numel() != 1:
        raise TypeError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}; it must return one number: "
            "write loss.mean()."
        )
    return loss


def copied_inputs(value: Any, tensors: bool) -> Any:
    """Copy containers, of any depth, and with `tensors` what they hold."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad) if tensors else value
    if type(value) in (tuple, list):
        return type(value)(copied_inputs(entry, tensors) for entry in value)
    if isinstance(value, MutableMapping):
        result = copy.copy(value)
        for key, entry in value.items():
            result[key] = copied_inputs(entry, tensors)
        return result
    return value


def write_counts(value: Any) -> list[int | None]:
    """Return how often each tensor of a nested container was written into."""
    if isinstance(value, Tensor):
        return [None if value.is_inference() else value._version]
    if isinstance(value, MutableMapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [version for entry in value for version in write_counts(entry)]
    return []
