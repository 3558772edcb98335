"""How large the matrices of a model are, as step sizes see it."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .tensors import numbers, whole, widest


def matrix_scale(weights: Iterable[tuple[Tensor, float]]) -> float:
    """Return the step size at which one step may be as large as the matrices themselves.

        s = exp(mean of ln(rms(W) (1 / sqrt(rows) + 1 / sqrt(columns)) / factor)) over matrices W

    Large in the spectral norm, which bounds what a layer makes of its input (Yang, Simon, Bernstein
    2023, arXiv:2310.17813). That of a matrix of independent numbers is about rms(W) (sqrt(rows) +
    sqrt(columns)), and that of a step that moves every number by eta at most eta sqrt(rows
    columns). So s is in units of a step size whose steps move each number by about that, as Adam's.

    Args:
        weights: Each with the factor by which its steps are multiplied; sharded or not. More
            dimensions than two count as the matrix of theirs that is closest to a square: of a
            convolution output channels times the rest, of stacked experts nearly that of one. Of
            shape (n, 1, ...) they are a depthwise convolution, n matrices of one row: its channels
            do not mix. Vectors, also those of shape (1, 1, n) or (n, 1, 1), are no matrices. All
            processes must ask.

    Returns:
        s. 0 where the weights do not say: if there is no matrix, if one is 0 as the second one of
        new LoRA adapters, or if a number is not finite.
    """
    matrices = [
        (weight.detach(), shape, factor)
        for weight, factor in weights
        if (shape := _shape(weight)) is not None
    ]
    norms = [whole(torch.linalg.vector_norm(m, dtype=_precise(m))) for m, _, _ in matrices]
    logarithms = []
    for (matrix, (rows, columns), factor), norm in zip(
        matrices, numbers(*norms) if norms else [], strict=True
    ):
        if not 0 < norm < math.inf:
            return 0.0
        rms = norm / math.sqrt(matrix.numel())
        logarithms.append(math.log(rms * (rows**-0.5 + columns**-0.5) / factor))
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else 0.0


def _shape(weight: Tensor) -> tuple[int, int] | None:
    """Return rows and columns of the matrix, or of each matrix, that a weight is; None if none."""
    shape = weight.shape
    kernel = shape[2:].numel()  # 1 of two dimensions
    if kernel > 1 and shape[0] > 1 and shape[1] == 1:  # depthwise
        return 1, kernel
    cuts = ((shape[:cut].numel(), shape[cut:].numel()) for cut in range(1, weight.dim()))
    closest = max(cuts, key=min, default=(1, 1))
    return closest if min(closest) > 1 else None


def _precise(tensor: Tensor) -> torch.dtype:
    dtype = widest(tensor.device)
    return dtype.to_complex() if tensor.is_complex() else dtype
