"""How large the matrices of a model are, as step sizes see it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .tensors import numbers, whole, widest


def matrix_scale(params: Sequence[Tensor]) -> float:
    """Return the step size at which one step may be as large as the matrices themselves.

        s = exp(mean of ln(rms(W) (1 / sqrt(rows) + 1 / sqrt(columns)))) over all matrices W

    Large in the spectral norm, which bounds what a layer makes of its input (Yang, Simon, Bernstein
    2023, arXiv:2310.17813). That of a matrix of independent numbers is about rms(W) (sqrt(rows) +
    sqrt(columns)), and that of a step that moves every number by eta at most eta sqrt(rows
    columns). So s is in units of a step size whose steps move each number by about that, as Adam's.

    Args:
        params: Weights, sharded or not; a convolution counts as a matrix with one row for each
            output channel. All processes must ask.

    Returns:
        s; 0 if no matrix has a number other than 0.
    """
    matrices = [p.detach() for p in params if p.dim() > 1]
    norms = [whole(torch.linalg.vector_norm(matrix, dtype=_precise(matrix))) for matrix in matrices]
    logarithms = []
    for matrix, norm in zip(matrices, numbers(*norms) if norms else [], strict=True):
        rows, columns = matrix.shape[0], matrix.shape[1:].numel()
        if norm > 0:
            rms = norm / math.sqrt(rows * columns)
            logarithms.append(math.log(rms * (rows**-0.5 + columns**-0.5)))
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else 0.0


def _precise(tensor: Tensor) -> torch.dtype:
    dtype = widest(tensor.device)
    return dtype.to_complex() if tensor.is_complex() else dtype
