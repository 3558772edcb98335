"""Whether weights were ever trained, all of them or some."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .tensors import local, numbers, sum_over_shards, whole, widest


def never_trained(params: Sequence[Tensor]) -> bool:
    """Return whether weights still have the values that they were made with.

    It shows in those of one dimension, biases and normalisations: they are made as 0 or 1, and
    training moves nearly every number. Where there are none, or they are made in another way
    (torch's own linear layers have random biases), the answer is no.

    Args:
        params: The trainable parameters, sharded or not. All processes must ask.

    Returns:
        Whether more than half of the numbers in one-dimensional parameters are exactly 0 or 1;
        single numbers do not count.
    """
    flat = [p for p in params if p.dim() == 1 and p.numel() > 1]
    if not flat:
        return False
    with torch.no_grad():
        mine = [local(p) for p in flat]
        as_made = [((p == 0) | (p == 1)).sum(dtype=widest(p.device)) for p in mine]
        all_numbers = [
            torch.tensor(p.numel(), dtype=widest(p.device), device=p.device) for p in mine
        ]
        made, total = sum_over_shards([as_made, all_numbers], flat).tolist()
    return bool(2 * made > total)


def some_new(params: Sequence[Tensor]) -> bool:
    """Return whether some weights beside trained ones still have the values they were made with.

    It shows where a parameter is 0 throughout: the second matrix of LoRA's adapters, the bias of a
    head, a gate. Training moves nearly every number. What starts with other values does not show,
    as a head without bias.

    Args:
        params: The trainable parameters, sharded or not. All processes must ask.

    Returns:
        Whether a parameter is exactly 0 throughout; empty ones do not count.
    """
    # Sums of magnitudes: unlike squares they do not vanish, and need no wider copy.
    norms = [whole(torch.linalg.vector_norm(p.detach(), 1)) for p in params if p.numel()]
    return 0.0 in (numbers(*norms) if norms else [])
