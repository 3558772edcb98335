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


@dataclass(eq=False)
class Chunk:
    """Pieces of parameters of one dtype, and the gradients, backups and states that go with them.

    Attributes:
        group: The parameter group that they are from.
        step: k, the number of this step, of all of them (bias correction).
        owners: The parameters that the pieces are cut from.
        params: The pieces of the parameters themselves; to write them is to write the parameters.
        grads: Of their gradients.
        backups: Of the memory for w_k; empty until it is needed, where `cut` was given none.
        states: Of each tensor of the optimizer's state, by its name.
    """

    group: dict[str, Any]
    step: int
    owners: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    backups: list[Tensor] = field(default_factory=list)
    states: dict[str, list[Tensor]] = field(default_factory=dict)


# Returns -d_k of a chunk, if a first trial point is to be written, and lists of one number a piece.
Measure = Callable[[Chunk], tuple[list[Tensor] | None, list[list[Tensor]]]]
Direction = Callable[[Chunk], list[Tensor]]


def cut(
    groups: list[dict[str, Any]],
    *,
    state_of: Callable[[Tensor, dict[str, Any]], dict[str, Tensor]],
    step_numbers: Callable[[list[Tensor], dict[str, Any]], list[int]],
    backups: dict[Tensor, Tensor] | None,
) -> Iterator[Chunk]:
    """Cut what has gradients into chunks of bounded size, at w_k.

    Args:
        groups: The parameter groups.
        state_of: Returns the state of a parameter.
        step_numbers: Returns k of each parameter of a group for the coming step.
        backups: Parameter -> memory of its shape, for w_k; made here where it is missing. None:
            made when a trial point is written.
    """
    present = [(g, [p for p in g["params"] if p.grad is not None]) for g in groups]
    total = sum(p.numel() for _, params in present for p in params if p.device.type != "cpu")
    limit = max(_SMALLEST_CHUNK, total // 50)
    for group, params in present:
        chunk, size = Chunk(group, 0), 0
        for param, step in zip(params, step_numbers(params, group), strict=True):
            tensors = {n: t for n, t in state_of(param, group).items() if n != "step"}
            columns = [param, param.grad, *tensors.values()]
            if backups is not None:
                if param not in backups:
                    backups[param] = torch.empty_like(param)
                columns.append(backups[param])
            for weight, grad, *others in pieces(list(map(local, columns)), limit):
                full = size + weight.numel() > limit or step != chunk.step
                if chunk.params and (full or weight.dtype != chunk.params[0].dtype):
                    yield chunk
                    chunk, size = Chunk(group, step), 0
                chunk.step = step
                chunk.owners.append(param)
                chunk.params.append(weight)
                chunk.grads.append(grad)
                for name, piece in zip(tensors, others, strict=False):
                    chunk.states.setdefault(name, []).append(piece)
                chunk.backups += others[len(tensors) :]
                size += weight.numel()
        if chunk.params:
            yield chunk


class TrialPoints:
    """A context in which the weights may leave w_k. Afterwards they are w_k, bit for bit.

    They come back from a copy, never by subtracting, whatever is raised inside. At a trial point
    the copy is the chunks' backup. At w_{k-1} it is the memory in which the optimizer keeps that:
    the weights have changed places, so that looking back takes no memory of its own.

    Args:
        chunks: What may move.
        direction: Returns -d_k of a chunk; float32 or wider. Weights must not matter to it.
    """

    def __init__(self, chunks: list[Chunk], direction: Direction) -> None:
        self._chunks = chunks
        self._direction = direction
        self._backed_up: set[Chunk] = set()  # their backups hold w_k
        self._written: float | None = None  # the step size at which the weights are
        self._exchanged: set[Chunk] = set()  # their weights are w_{k-1}, `previous` holds w_k
        # An exchange that has begun: the weights as they were, and what is exchanged at its end.
        self._half: tuple[Chunk, list[Tensor], set[Chunk]] | None = None

    def __enter__(self) -> "TrialPoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._finish_exchange()
        if kind is not None:
            self._start()  # `previous` is w_{k-1} again, as the step is not taken
        for chunk in self._exchanged:
            torch._foreach_copy_(chunk.params, chunk.states[PREVIOUS])
        if not self._exchanged:
            self._restore()

    @property
    def kept(self) -> set[Tensor]:
        """The parameters whose `previous` holds w_k, at the end."""
        return {owner for chunk in self._exchanged for owner in chunk.owners}

    def first(self, step_size: float, measure: Measure) -> list[float]:
        """Return sums over all of what `measure` found, and if it says so write a trial point.

        One pass over memory makes the backup, the measurements and the first trial point.

        Args:
            step_size: eta of the first trial point.
            measure: Returns -d_k of a chunk, or None: then the weights stay where they are; and
                lists of one number per piece.
        """
        columns: list[list[Tensor]] = []
        owners: list[Tensor] = []
        for chunk in self._chunks:
            direction, found = measure(chunk)
            columns = columns or [[] for _ in found]
            for column, numbers in zip(columns, found, strict=True):
                column += numbers
            owners += chunk.owners
            if direction is not None:
                self._back_up(chunk)
                move(chunk, direction, step_size)
                self._written = step_size
        sums: list[float] = sum_over_shards(columns, owners).tolist()
        return sums

    def move_to(self, step_size: float) -> None:
        """Move to w_k + step_size * d_k."""
        if self._exchanged:
            self._start()
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
                if chunk in self._backed_up:
                    torch._foreach_copy_(chunk.params, chunk.backups)
                else:
                    self._back_up(chunk)
                move(chunk, self._direction(chunk), step_size)

    def undo_last_step(self) -> Tensor:
        """Move to w_{k-1}, the weights before the last step u, and return <g_k, u>."""
        self._start()
        products: list[Tensor] = []
        for chunk in self._chunks:
            steps = [
                w.to(torch.promote_types(w.dtype, torch.float32)) - p
                for w, p in zip(chunk.params, chunk.states[PREVIOUS], strict=True)
            ]
            products += dots(chunk.grads, steps)
            del steps  # before the exchange takes as much again
            self._exchange(chunk)
        owners = [owner for chunk in self._chunks for owner in chunk.owners]
        return sum_over_shards([products], owners).squeeze(0)

    def _back_up(self, chunk: Chunk) -> None:
        if not chunk.backups:
            chunk.backups = [torch.empty_like(p) for p in chunk.params]
        torch._foreach_copy_(chunk.backups, chunk.params)
        self._backed_up.add(chunk)

    def _restore(self) -> None:
        for chunk in self._backed_up:
            torch._foreach_copy_(chunk.params, chunk.backups)

    def _start(self) -> None:
        """Move to w_k, from wherever the weights are."""
        for chunk in self._chunks:
            if chunk in self._exchanged:
                self._exchange(chunk)
        if self._written is not None:
            self._restore()
        self._written = None

    def _exchange(self, chunk: Chunk) -> None:
        """Let weights and `previous` change places, in place: who holds the memory notices none."""
        weights = [torch.empty_like(w) for w in chunk.params]
        torch._foreach_copy_(weights, chunk.params)
        self._half = chunk, weights, self._exchanged ^ {chunk}
        torch._foreach_copy_(chunk.params, chunk.states[PREVIOUS])
        torch._foreach_copy_(chunk.states[PREVIOUS], weights)
        self._finished()

    def _finish_exchange(self) -> None:
        """Finish an exchange that an exception (Ctrl-C) left half done."""
        if self._half is None:
            return
        chunk, weights, _ = self._half
        previous = chunk.states[PREVIOUS]
        if not all(map(torch.equal, previous, weights)):  # else all of it was done
            torch._foreach_copy_(chunk.params, previous)
            torch._foreach_copy_(previous, weights)
        self._finished()

    def _finished(self) -> None:
        assert self._half is not None
        self._exchanged = self._half[2]
        self._half = None


def move(chunk: Chunk, direction: list[Tensor], step_size: float) -> None:
    """Move the weights of a chunk by -step_size * direction, rounding once."""
    if chunk.params[0].dtype in LOW_PRECISION:
        trial = [p.float() for p in chunk.params]
        torch._foreach_add_(trial, direction, alpha=-step_size)
        torch._foreach_copy_(chunk.params, trial)
    else:
        torch._foreach_add_(chunk.params, direction, alpha=-step_size)
