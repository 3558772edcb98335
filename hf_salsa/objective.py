"""BatchObjective: the loss of one recorded (accumulated) mini-batch, at any weights."""

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.optimizer import Optimizer

from .optimizers import LineSearchOptimizer
from .optimizers.tensors import whole
from .traces import Snapshot, reshard, without_trace


@dataclass(frozen=True)
class _MicroBatch:
    loss_fn: Callable[..., Tensor]
    inputs: tuple[Any, ...]
    before: Snapshot  # the forward pass


class BatchObjective:
    """f_k: the loss of the mini-batch that is being trained on, re-evaluable at other weights.

    Record the forward passes of one update; `optimizer.step()` then evaluates the objective at the
    trial points of its search, with the same data, the same dropout masks and the same buffers, and
    forgets the mini-batch. With several processes the objective is the mean over them, so that all
    take the same decisions; every process must then take part in every evaluation.

    Evaluating leaves no trace: the random streams of torch (CPU and accelerators), NumPy and
    Python and the buffers of the model (BatchNorm) are afterwards what they were before.

    Args:
        model: The model whose buffers and devices the loss depends on. Its parameters are not
            touched here.
        optimizer: The line-search optimizer (or Accelerate's wrapper of it). `step()` without a
            closure uses this objective from now on.
        gradient_accumulation_steps: What backward divides each recorded loss by. 1 (default) if
            `loss_fn` returns just what is differentiated; Accelerate's
            `gradient_accumulation_steps` where `accelerator.backward(loss)` divides.

    Raises:
        TypeError: `optimizer` is not a line-search optimizer.

    Example:
        >>> objective = BatchObjective(model, optimizer)
        >>> for batch in loader:
        ...     loss = objective.record(lambda batch: model(**batch).loss, batch)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, gradient_accumulation_steps: int = 1
    ) -> None:
        line_search = unwrap_optimizer(optimizer)
        if line_search is None:
            raise TypeError(
                f"BatchObjective needs a line-search optimizer (SaLSaAdam, ...), not "
                f"{type(optimizer).__name__}: no other one evaluates the loss again."
            )
        self._model = model
        self._optimizer: LineSearchOptimizer = line_search
        self._divisor = gradient_accumulation_steps
        self._losses: list[Tensor] = []
        self._micro_batches: list[_MicroBatch] = []
        self._clip_factor: Tensor | float = 1.0
        self._gradient_norm: Tensor | float | None = None
        self._update_complete = True
        self._scaler = _scaler_of(optimizer)
        line_search.attach(self)

    @property
    def line_search(self) -> LineSearchOptimizer:
        """The line-search optimizer, without Accelerate's wrapper."""
        return self._optimizer

    @property
    def recorded(self) -> bool:
        """Whether a mini-batch is recorded."""
        return bool(self._losses)

    @property
    def loss(self) -> Tensor | None:
        """f_k(w_k) as training computed it, or None where it is not known.

        With several processes it is known on steps that search only: the others stay free of
        communication, and a loss that is not finite shows in the averaged gradients.
        """
        if not self._losses or (_several_processes() and not self._micro_batches):
            return None
        return _total(self._losses)

    @property
    def clip_factor(self) -> Tensor | float:
        """What gradient clipping multiplied the gradients by, 1 without clipping."""
        return self._clip_factor

    @property
    def gradient_norm(self) -> Tensor | float | None:
        """The norm of all gradients, or None if nobody computed it."""
        return self._gradient_norm

    def record(self, loss_fn: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Run one micro-batch's forward pass and remember it.

        Several calls before one `optimizer.step()` are the micro-batches of one accumulated update:
        the objective is the sum of their losses. What an abandoned update left behind (a gradient
        scaler skipped the step on overflow) is dropped, and counted as a skipped step, when no
        parameter has a gradient any more. With FSDP2, accumulate through Accelerate or Trainer.

        Args:
            loss_fn: Returns the scalar loss of `inputs`, as it is differentiated. It is called
                again, under `torch.no_grad`, with the very same `inputs`: pass what it reads as
                arguments, since a variable of the loop has moved on by then.
            inputs: Arguments of `loss_fn`. Mappings are copied shallowly for each call, so that
                `loss_fn` may pop keys.

        Returns:
            The loss, ready for `backward()`.
        """
        if self._losses and self._update_complete and not self._has_gradients():
            self.clear()
            self._optimizer.note_skipped_step()
        # FSDP2 holds the gradients of an unfinished update where `.grad` does not show them;
        # Accelerate knows. Without Accelerate this is always True.
        self._update_complete = _synchronises_gradients()
        micro_batch = None
        if self._optimizer.search_due:
            micro_batch = _MicroBatch(loss_fn, _shallow_copy(inputs), Snapshot(self._model))
        loss = loss_fn(*inputs)
        self._losses.append(self._scaled(loss))
        if micro_batch is not None:
            self._micro_batches.append(micro_batch)
        return loss

    def note_gradient_norm(self, total_norm: Tensor | float) -> None:
        """Tell the step the norm of all gradients, which shows whether they are finite.

        Args:
            total_norm: The norm, what `clip_grad_norm_` returns; with several processes that of the
                whole model.
        """
        self._gradient_norm = total_norm

    def note_clipping(self, total_norm: Tensor | float, max_norm: float) -> None:
        """Tell the search that the gradients were clipped, so that its slope stays the true one.

        Args:
            total_norm: The norm before clipping, what `clip_grad_norm_` returns.
            max_norm: The norm to which `clip_grad_norm_` was told to clip, above 0.
        """
        self.note_gradient_norm(total_norm)
        # The formula of torch.nn.utils.clip_grad_norm_.
        clip_factor = max_norm / (total_norm + 1e-6)
        self._clip_factor = (
            clip_factor.clamp(max=1.0) if isinstance(clip_factor, Tensor) else min(clip_factor, 1.0)
        )

    def clip_grad_norm_(self, max_norm: float, scaler: GradScaler | None = None) -> Tensor:
        """Clip the gradients of the optimizer's parameters at a norm, and tell the search.

        `torch.nn.utils.clip_grad_norm_` for a loop of one's own: call it after the last backward
        pass of an update.

        Args:
            max_norm: The largest norm, above 0.
            scaler: The `torch.amp.GradScaler` of the loop, whose scaled gradients must be unscaled
                first. That of Accelerate is known.

        Returns:
            The norm of all gradients before clipping.

        Raises:
            ValueError: `max_norm` is not above 0.
        """
        if not max_norm > 0:
            raise ValueError(f"max_norm={max_norm!r} is not allowed: it must be a number above 0.")
        scaler = scaler or self._scaler
        if scaler is not None:
            scaler.unscale_(self._optimizer)
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm = whole(torch.nn.utils.clip_grad_norm_(params, max_norm))
        self.note_clipping(norm, max_norm)
        return norm

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the recorded mini-batch's loss at the current weights.

        Raises:
            RuntimeError: No mini-batch is recorded for a search.
        """
        if not self._micro_batches:
            raise RuntimeError(
                "BatchObjective has no mini-batch to evaluate: call record() before backward(), "
                "on a step with optimizer.search_due."
            )
        losses = []
        with without_trace(self._model):
            for micro_batch in self._micro_batches:
                micro_batch.before.restore()
                reshard(self._model)
                losses.append(self._scaled(micro_batch.loss_fn(*_shallow_copy(micro_batch.inputs))))
                reshard(self._model)
            return _total(losses)

    def clear(self) -> None:
        """Forget the recorded mini-batch."""
        self._losses = []
        self._micro_batches = []
        self._clip_factor = 1.0
        self._gradient_norm = None

    def _has_gradients(self) -> bool:
        return any(
            param.grad is not None
            for group in self._optimizer.param_groups
            for param in group["params"]
        )

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss.detach() / self._divisor if self._divisor > 1 else loss.detach()


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _shallow_copy(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(copy.copy(value) if isinstance(value, Mapping) else value for value in inputs)


def unwrap_optimizer(optimizer: Optimizer | None) -> LineSearchOptimizer | None:
    """Return the line-search optimizer inside Accelerate's wrapper, or None if it is another."""
    while _is_accelerated(optimizer):
        optimizer = optimizer.optimizer  # type: ignore[union-attr]
    return optimizer if isinstance(optimizer, LineSearchOptimizer) else None


def _is_accelerated(optimizer: Optimizer | None) -> bool:
    # Where Accelerate is not loaded, nothing is wrapped; to import it costs a second.
    accelerate = sys.modules.get("accelerate.optimizer")
    return accelerate is not None and isinstance(optimizer, accelerate.AcceleratedOptimizer)


def _scaler_of(optimizer: Optimizer) -> GradScaler | None:
    """Return the gradient scaler that Accelerate uses with an optimizer."""
    return optimizer.scaler if _is_accelerated(optimizer) else None  # type: ignore[attr-defined]


def _synchronises_gradients() -> bool:
    """Return whether this micro-batch ends an update, as far as Accelerate knows."""
    accelerate = sys.modules.get("accelerate.state")
    return accelerate is None or bool(accelerate.GradientState().sync_gradients)


def _total(losses: list[Tensor]) -> Tensor:
    """Sum over micro-batches, mean over processes, in the precision of the losses."""
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    if _several_processes():
        total = total.clone()
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    return total
