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
    loss: Tensor,
    further: tuple[float, ...],
    device: torch.device,
    failure: Exception | None = None,
) -> tuple[Tensor, tuple[float, ...]]:
    """Return the means of a loss, in its precision, and of numbers; all processes must take part.

    Args:
        loss: The part of this process, a scalar.
        further: Numbers that go the same way.
        device: Where processes exchange tensors.
        failure: Why this process has no part. It is raised here, and said to the others.

    Raises:
        RuntimeError: Another process failed.
    """
    numbers = loss.new_tensor([failure is not None, *further])
    both = torch.cat([loss.reshape(1), numbers]).to(device)
    dist.all_reduce(both)
    if failure is not None:
        raise failure
    if both[1]:
        raise RuntimeError(
            "Another process failed while it evaluated the loss; its error says why. This one "
            "stops too, with the weights of before the search."
        )
    both = both / dist.get_world_size()
    return both[0], tuple(both[2:].tolist())
