"""The final update: one group's step by torch's own kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tensors import LOW_PRECISION, locals_of

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass
class Update:
    """One group's step, as torch's functional optimizers take it.

    Attributes:
        group: The parameter group, with its options.
        weights: w_k, to be moved; float32 or wider.
        grads: g_k of each weight.
        states: Name -> the optimizer's state of each weight, to be moved too.
        step_size: eta, by which the weights move.
        fused: Whether the fused kernels can do it.
        found_inf: With fused kernels only: where it is 1, nothing moves.
    """

    group: dict[str, Any]
    weights: list[Tensor]
    grads: list[Tensor]
    states: dict[str, list[Tensor]]
    step_size: float
    fused: bool
    found_inf: Tensor | None


def apply(
    take: Callable[[Update], None],
    group: dict[str, Any],
    state_of: Callable[[Tensor, dict[str, Any]], dict[str, Tensor]],
    step_size: float,
    found_inf: Tensor | None,
) -> None:
    """Let `take` move what has a gradient in a group, unless `found_inf` is 1.

    Weights in a 16-bit type take their step in float32, where their moments are.
    """
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    rows = [state_of(p, group) for p in params]
    columns = [[row[name] for row in rows] for name in rows[0]]
    reals, grads, *columns = locals_of([params, [p.grad for p in params], *columns], params)
    weights, states = reals, dict(zip(rows[0], columns, strict=True))
    low_precision = any(p.dtype in LOW_PRECISION for p in reals)
    if low_precision:
        weights = [p.float() if p.dtype in LOW_PRECISION else p for p in reals]
        grads = [g.to(w.dtype) for g, w in zip(grads, weights, strict=True)]
    # The fused kernels walk through memory: they need dense tensors of equal layout.
    fused = all(t.is_contiguous() for t in (*weights, *grads)) and all(
        w.device.type in _FUSED_DEVICES for w in weights
    )
    if not fused and found_inf is not None and found_inf:
        return
    take(Update(group, weights, grads, states, step_size, fused, found_inf if fused else None))
    if low_precision:
        torch._foreach_copy_(reals, weights)
