"""What all processes of a run have to agree on."""

import torch
import torch.distributed as dist
from torch import Tensor


def several_processes() -> bool:
    """Return whether the run has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_have(flag: bool, device: torch.device) -> bool:
    """Return whether a flag is set in every process."""
    if not several_processes():
        return flag
    known = torch.tensor(float(flag), device=device)
    dist.all_reduce(known, dist.ReduceOp.MIN)
    return bool(known)


def mean_over_processes(
    loss: Tensor, device: torch.device, failure: Exception | None = None
) -> Tensor:
    """Return the mean of a loss, in its precision; every process must take part.

    Args:
        loss: The part of this process, a scalar.
        device: Where processes exchange tensors.
        failure: Why this process has no part. It is raised here, and said to the others.

    Raises:
        RuntimeError: Another process failed.
    """
    if not several_processes():
        return loss
    both = torch.stack([loss.to(device), loss.new_full((), failure is not None).to(device)])
    dist.all_reduce(both)
    if failure is not None:
        raise failure
    if both[1]:
        raise RuntimeError(
            "Another process failed while it evaluated the loss; its error says why. This one "
            "stops too, with the weights of before the search."
        )
    return both[0] / dist.get_world_size()
