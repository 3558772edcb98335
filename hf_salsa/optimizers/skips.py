"""Gradients that are not finite: a step is skipped and counted; after 20 in a row it is over.

One whose square is not finite, above 1.8e19 in float32, counts as one of them: Adam averages
squares and would keep an infinite one for good, the slope of SGD is a sum of them. The norm of the
gradients, which every step knows, shows it.
"""

import math

import torch
from torch import Tensor

from .tensors import LOW_PRECISION, locals_of, moment_dtype, sum_over_shards, whole

MAX_CONSECUTIVE_SKIPS = 20


def square_limit(dtype: torch.dtype) -> float:
    """Return the largest number whose square the moments of parameters of this type can hold."""
    return math.sqrt(torch.finfo(torch.promote_types(dtype, torch.float32)).max)


def largest_squares_fit(params: list[Tensor]) -> bool:
    """Return whether no gradient is too large, for where their norm is: it may have overflowed.

    The largest element of each parameter counts as a share of its limit, and together they must not
    be above 1: a sum takes one collective, where the gradients are sharded.
    """
    (grads,) = locals_of([[p.grad for p in params]], params)
    shares = [
        largest.to(moment_dtype(grad)) / square_limit(grad.dtype)
        for largest, grad in zip(torch._foreach_norm(grads, math.inf), grads, strict=True)
    ]
    return bool(sum_over_shards([shares], params) <= 1)


def gradient_norm(params: list[Tensor]) -> Tensor:
    """Return a number not below the norm of all gradients; not finite if it overflows."""
    (grads,) = locals_of([[p.grad for p in params]], params)
    if all(_is_dense_on_host(grad) for grad in grads):
        # Torch's norm takes a quarter longer. That a square overflows shows in both.
        flat = [grad.view(-1) for grad in grads]
        norms = torch._foreach_sqrt([torch.dot(grad, grad) for grad in flat])
    else:
        norms = torch._foreach_norm(grads, 2)
    return sum_over_shards([list(norms)], params).squeeze(0)


def _is_dense_on_host(grad: Tensor) -> bool:
    wide = grad.dtype not in LOW_PRECISION  # whose own squares are too large for float16
    return wide and grad.device.type == "cpu" and grad.is_contiguous()


class UnreadSkips:
    """Counts of skipped steps that the host has not read from an accelerator yet.

    To read a number from an accelerator is to wait for it, so on steps that do not search the
    accelerator itself decides and counts.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._in_a_row: Tensor | None = None

    def note(self, norm: Tensor, limit: float, consecutive_skips: int) -> Tensor:
        """Return 1 if the step must be skipped, else 0, and count it, without waiting for it.

        torch's fused kernels skip the step when this says so, as they do for a gradient scaler.

        Args:
            norm: Of all gradients.
            limit: Up to which norm a step is taken.
            consecutive_skips: Skips in a row before those that are not read yet.
        """
        found_inf = 1.0 - (whole(norm) <= limit).float()
        if self._total is None or self._in_a_row is None:
            self._total = torch.zeros_like(found_inf)
            self._in_a_row = torch.full_like(found_inf, consecutive_skips)
        self._total = self._total + found_inf
        self._in_a_row = (self._in_a_row + 1) * found_inf
        return found_inf

    def read(self) -> tuple[int, int] | None:
        """Return skips since the last reading and how many came last in a row, or None."""
        if self._total is None or self._in_a_row is None:
            return None
        total, in_a_row = (int(n) for n in torch.stack([self._total, self._in_a_row]).tolist())
        self._total = self._in_a_row = None
        return total, in_a_row


def give_up_after_too_many(consecutive_skips: int) -> None:
    """Raise a `FloatingPointError` after 20 skipped steps in a row."""
    if consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
        raise FloatingPointError(
            f"Loss or gradients were not finite {consecutive_skips} steps in a row; "
            "the weights are those of the last good step. Look for bad input data and for "
            "overflow: try bf16 instead of fp16, gradient clipping, or detect it with "
            "torch.autograd.detect_anomaly()."
        )
