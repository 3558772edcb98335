"""Whether weights were ever trained."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .tensors import local, sum_over_shards, widest


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
