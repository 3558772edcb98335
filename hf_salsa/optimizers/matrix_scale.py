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
            convolution output channels times the rest, of stacked experts nearly that of one.
            Vectors, also those of shape (1, 1, n) or (n, 1, 1), are no matrices. All processes must
            ask.

    Returns:
        s. 0 where the weights do not say: if there is no matrix, if one is 0 as the second one of
        new LoRA adapters, or if a number is not finite.
    """
    matrices = [
        (weight.detach(), factor)
        for weight, factor in weights
        if weight.dim() > 1 and min(_shape(weight)) > 1
    ]
    norms = [whole(torch.linalg.vector_norm(m, dtype=_precise(m))) for m, _ in matrices]
    logarithms = []
    for (matrix, factor), norm in zip(matrices, numbers(*norms) if norms else [], strict=True):
        if not 0 < norm < math.inf:
            return 0.0
        rows, columns = _shape(matrix)
        rms = norm / math.sqrt(rows * columns)
        logarithms.append(math.log(rms * (rows**-0.5 + columns**-0.5) / factor))
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else 0.0


def _shape(weight: Tensor) -> tuple[int, int]:
    cuts = range(1, weight.dim())
    shapes = ((weight.shape[:cut].numel(), weight.shape[cut:].numel()) for cut in cuts)
    return max(shapes, key=min)


def _precise(tensor: Tensor) -> torch.dtype:
    dtype = widest(tensor.device)
    return dtype.to_complex() if tensor.is_complex() else dtype
