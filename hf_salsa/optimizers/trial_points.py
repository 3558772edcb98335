"""Trial points: the weights moved along a direction, and the exact way back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .tensors import LOW_PRECISION, dots, local, pieces, sum_over_shards

# A trial point is computed in pieces of so many elements: temporaries stay in the cache of a CPU.
# Elsewhere of up to a fiftieth of the model, so that kernels are few and temporaries small.
_SMALLEST_CHUNK = 2**18

# The state that `LineSearchOptimizer` keeps for rules that look back: w_{k-1}.
PREVIOUS = "previous"


@dataclass
class Chunk:
    """Pieces of parameters of one dtype, and the gradients, backups and states that go with them.

    Attributes:
        group: The parameter group that they are from.
        step: k, the number of this step, of all of them (bias correction).
        owners: The parameters that the pieces are cut from.
        params: The pieces of the parameters themselves; to write them is to write the parameters.
        grads: Of their gradients.
        backups: Of the memory for w_k.
        states: Of each tensor of the optimizer's state, by its name.
    """

    group: dict[str, Any]
    step: int
    owners: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    backups: list[Tensor] = field(default_factory=list)
    states: dict[str, list[Tensor]] = field(default_factory=dict)


Measure = Callable[[Chunk], tuple[list[Tensor], list[list[Tensor]]]]
Direction = Callable[[Chunk], list[Tensor]]


def cut(
    groups: list[dict[str, Any]],
    *,
    state_of: Callable[[Tensor, dict[str, Any]], dict[str, Tensor]],
    step_numbers: Callable[[list[Tensor], dict[str, Any]], list[int]],
    backups: dict[Tensor, Tensor],
) -> Iterator[Chunk]:
    """Cut what has gradients into chunks of bounded size, at w_k.

    Args:
        groups: The parameter groups.
        state_of: Returns the state of a parameter.
        step_numbers: Returns k of each parameter of a group for the coming step.
        backups: Parameter -> memory of its shape, for w_k; made here where it is missing.
    """
    present = [(g, [p for p in g["params"] if p.grad is not None]) for g in groups]
    total = sum(p.numel() for _, params in present for p in params if p.device.type != "cpu")
    limit = max(_SMALLEST_CHUNK, total // 50)
    for group, params in present:
        chunk, size = Chunk(group, 0), 0
        for param, step in zip(params, step_numbers(params, group), strict=True):
            if param not in backups:
                backups[param] = torch.empty_like(param)
            tensors = {n: t for n, t in state_of(param, group).items() if n != "step"}
            columns = [param, param.grad, backups[param], *tensors.values()]
            for weight, grad, backup, *states in pieces(list(map(local, columns)), limit):
                full = size + weight.numel() > limit or step != chunk.step
                if chunk.params and (full or weight.dtype != chunk.params[0].dtype):
                    yield chunk
                    chunk, size = Chunk(group, step), 0
                chunk.step = step
                chunk.owners.append(param)
                chunk.params.append(weight)
                chunk.grads.append(grad)
                chunk.backups.append(backup)
                for name, piece in zip(tensors, states, strict=True):
                    chunk.states.setdefault(name, []).append(piece)
                size += weight.numel()
        if chunk.params:
            yield chunk


class TrialPoints:
    """A context in which the weights may leave w_k. Afterwards they are w_k, bit for bit.

    They come back from a copy, never by subtracting, whatever is raised inside.

    Args:
        chunks: What may move.
        direction: Returns -d_k of a chunk; float32 or wider. Weights must not matter to it.
    """

    def __init__(self, chunks: list[Chunk], direction: Direction) -> None:
        self._chunks = chunks
        self._direction = direction
        self._backed_up: list[Chunk] = []
        self._written: float | None = None  # the step size at which the weights are

    def __enter__(self) -> "TrialPoints":
        return self

    def __exit__(self, *exception: object) -> None:
        for chunk in self._backed_up:
            torch._foreach_copy_(chunk.params, chunk.backups)

    def first(self, step_size: float, measure: Measure) -> list[float]:
        """Move to w_k + step_size * d_k and return sums over all of what `measure` found.

        One pass over memory makes the backup, the measurements and the first trial point.

        Args:
            step_size: eta of the first trial point.
            measure: Returns -d_k of a chunk, and lists of one number per piece.
        """
        columns: list[list[Tensor]] = []
        owners: list[Tensor] = []
        for chunk in self._chunks:
            torch._foreach_copy_(chunk.backups, chunk.params)
            self._backed_up.append(chunk)
            direction, found = measure(chunk)
            columns = columns or [[] for _ in found]
            for column, numbers in zip(columns, found, strict=True):
                column += numbers
            owners += chunk.owners
            move(chunk, direction, step_size)
        self._written = step_size
        sums: list[float] = sum_over_shards(columns, owners).tolist()
        return sums

    def move_to(self, step_size: float) -> None:
        """Move to w_k + step_size * d_k."""
        written, self._written = self._written, step_size
        if step_size == written:
            return
        for chunk in self._chunks:
            near = written is not None and written / 2 <= step_size < written
            if near and written and chunk.params[0].dtype not in LOW_PRECISION:
                # Part of the way back to w_k, which costs one more rounding but no direction. Not
                # most of it, where the part that is left has few digits, and not away from it,
                # where what the smaller step lost in rounding would grow.
                torch._foreach_lerp_(chunk.params, chunk.backups, 1 - step_size / written)
            else:
                torch._foreach_copy_(chunk.params, chunk.backups)
                move(chunk, self._direction(chunk), step_size)

    def undo_last_step(self) -> float:
        """Move to w_{k-1}, the weights before the last step u, and return <g_k, u>."""
        self._written = None
        products: list[Tensor] = []
        for chunk in self._chunks:
            previous = chunk.states[PREVIOUS]
            steps = [
                b.to(torch.promote_types(b.dtype, torch.float32)) - p
                for b, p in zip(chunk.backups, previous, strict=True)
            ]
            products += dots(chunk.grads, steps)
            torch._foreach_copy_(chunk.params, previous)
        owners = [owner for chunk in self._chunks for owner in chunk.owners]
        return float(sum_over_shards([products], owners))


def move(chunk: Chunk, direction: list[Tensor], step_size: float) -> None:
    """Move the weights of a chunk by -step_size * direction, rounding once."""
    if chunk.params[0].dtype in LOW_PRECISION:
        trial = [p.float() for p in chunk.params]
        torch._foreach_add_(trial, direction, alpha=-step_size)
        torch._foreach_copy_(chunk.params, trial)
    else:
        torch._foreach_add_(chunk.params, direction, alpha=-step_size)
