"""What one process holds of a tensor, and sums of numbers over all processes that hold a part.

Sharded tensors (`DTensor`, FSDP2) are known by their module being loaded: to import it costs every
user who has none a second.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


def moment_dtype(param: Tensor) -> torch.dtype:
    """Return the type of a parameter's moments: its own, float32 for 16-bit ones."""
    return torch.float32 if param.dtype in LOW_PRECISION else param.dtype


def widest(device: torch.device) -> torch.dtype:
    """Return the type in which sums are taken: float64, which MPS does not know."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_sharded(tensor: Any) -> "TypeGuard[DTensor]":
    """Return whether a tensor is a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is not sharded, by a collective if it was."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """View what this process holds of a tensor, complex numbers as pairs of reals.

    The view shares memory with the tensor. Complex parameters are treated as torch.optim.AdamW
    does.
    """
    if is_sharded(tensor):
        tensor = tensor.to_local()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@contextmanager
def gradients_aside(params: Iterable[Tensor]) -> Iterator[None]:
    """Keep `.grad` of parameters out of reach of what runs inside; afterwards it is as before."""
    distinct = {id(p): p for p in params}.values()
    grads = [p.grad for p in distinct]
    try:
        for param in distinct:
            param.grad = None
        yield
    finally:
        for param, grad in zip(distinct, grads, strict=True):
            param.grad = grad


def locals_of(columns: list[list[Any]], params: list[Tensor]) -> list[list[Tensor]]:
    """Return `local` of what belongs to parameters: most often the very same tensors."""
    if any(is_sharded(p) or p.is_complex() for p in params):
        return [[local(tensor) for tensor in column] for column in columns]
    return columns


def sum_over_shards(columns: list[list[Tensor]], params: list[Tensor]) -> Tensor:
    """Add up columns of one scalar per parameter, over the processes too where they are sharded.

    One small all-reduce per device mesh; none without sharded parameters.
    """
    rows: dict[tuple[Any, ...], list[int]] = {}
    for row, param in enumerate(params):
        layout = (param.device_mesh, param.placements) if is_sharded(param) else None
        rows.setdefault((layout, columns[0][row].device), []).append(row)
    device = columns[0][0].device
    dtype = widest(device)
    total = torch.zeros(len(columns), dtype=dtype, device=device)
    for (layout, _), of_layout in rows.items():
        part = torch.stack(
            [torch.stack([column[row] for row in of_layout]).sum(dtype=dtype) for column in columns]
        )
        if layout is not None:
            part = _sum_over_mesh(part, *layout)
        total = total + part.to(total.device)
    return total


def _sum_over_mesh(part: Tensor, mesh: Any, placements: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    partial = [Partial() if isinstance(p, Shard) else Replicate() for p in placements]
    return DTensor.from_local(part, mesh, partial, run_check=False).full_tensor()


def numbers(*values: Tensor | float) -> list[float]:
    """Return plain numbers; those on one device are read at once, since reading may wait for it."""
    tensors = [value.reshape(()) for value in values if isinstance(value, Tensor)]
    if len(tensors) < len(values) or len({t.device for t in tensors}) > 1:
        return list(map(float, values))
    dtype = widest(tensors[0].device)
    read: list[float] = torch.stack([t.to(dtype) for t in tensors]).tolist()
    return read


def dots(gradients: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
    """Return the inner product of each gradient with its direction, in the direction's type."""
    return [
        torch.dot(g.to(d.dtype).reshape(-1), d.reshape(-1))
        for g, d in zip(gradients, directions, strict=True)
    ]


def pieces(columns: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Cut tensors of one shape into aligned pieces of at most `limit` elements."""
    if columns[0].numel() <= limit or not all(column.is_contiguous() for column in columns):
        yield columns
    else:
        flat = [torch.split(column.view(-1), limit) for column in columns]
        yield from map(list, zip(*flat, strict=True))


def scaled(tensors: list[Tensor], factor: float) -> list[Tensor]:
    """Return tensors times a factor; themselves where that is 1."""
    return tensors if factor == 1 else list(torch._foreach_mul(tensors, factor))
