"""BatchObjective: the loss of one recorded (accumulated) mini-batch, at any weights."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.optimizer import Optimizer

from .accelerated import scaler_of, synchronises_gradients, unwrap_evaluating
from .micro_batch import MicroBatch, checked_loss, copied_inputs, write_counts
from .optimizers.evaluating import Evaluating
from .optimizers.scale import NOT_A_SUM, NOT_KNOWN, Parts
from .optimizers.tensors import gradients_aside, whole
from .processes import all_have, mean_over_processes, several_processes
from .scene import Scene
from .traces import Snapshot, reshard, without_trace

_SMALLEST_UNKNOWN_SCALE = 4096  # a power of two from here on that multiplies a loss is a GradScaler


class BatchObjective:
    """f_k: the loss of the mini-batch that is being trained on, re-evaluable at other weights.

    Record the forward passes of one update; `optimizer.step()` then evaluates the objective at the
    trial points of its search, with the same data and the same dropout masks, and forgets the
    mini-batch. The objective is what was differentiated: the sum over the backward passes of the
    update, each with the factor that backward saw (`loss / n` in an accumulation), and nothing of a
    micro-batch whose backward was left out. With several processes it is the mean over them, so
    that all take the same decisions; every process must then take part in every evaluation.

    Evaluating leaves no trace: the random streams of torch (CPU and accelerators), NumPy and
    Python, generators, buffers, flags and attributes of the modules, gradients and the batch itself
    are afterwards what they would be without (see `hf_salsa.traces`).

    Args:
        model: The model, as it is trained (after `accelerator.prepare`). Its parameters are not
            touched here.
        optimizer: The line-search optimizer, or a stock one that trains a new head first (or
            Accelerate's wrapper of it). `step()` without a closure uses this objective from now on.
        modules: Further modules that the loss uses, whose state is put back too.
        scaler: The `torch.amp.GradScaler` of a loop of one's own. That of Accelerate is known.

    Raises:
        TypeError: `optimizer` is not a line-search optimizer.
        ValueError: `optimizer` trains no parameter of `model`.

    Example:
        >>> objective = BatchObjective(model, optimizer)
        >>> for batch in loader:
        ...     loss = objective.record(lambda batch: model(**batch).loss, batch)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        modules: tuple[nn.Module, ...] = (),
        scaler: GradScaler | None = None,
    ) -> None:
        evaluating = unwrap_evaluating(optimizer)
        if evaluating is None:
            raise TypeError(
                f"BatchObjective needs a line-search optimizer (SaLSaAdam, ...), not "
                f"{type(optimizer).__name__}: no other one evaluates the loss again."
            )
        trained = {id(p) for group in evaluating.param_groups for p in group["params"]}
        if trained.isdisjoint(id(p) for p in model.parameters()):
            raise ValueError(
                f"The optimizer trains no parameter of this {type(model).__name__}. Make the "
                "objective of the model that the optimizer was made for, after "
                "accelerator.prepare(model, optimizer) where there is one."
            )
        self._optimizer: Evaluating = evaluating
        self._scaler = scaler or scaler_of(optimizer)
        self.scene = Scene(model, modules, self)
        self.with_gradients = False  # whether an evaluation needs gradients of its own
        self.evaluating = False  # True while an evaluation runs
        self.doubling = False  # True in `doubled`, which is for the training step to see
        # Of trainers, in whose loss a factor is hidden: how many processes it is multiplied by.
        self.processes_in_loss: int | None = None
        self._micro_batches: list[MicroBatch] = []
        self._earlier: list[MicroBatch] = []  # differentiated before the last one was recorded
        self._clip_factor: Tensor | float = 1.0
        self._gradient_norm: Tensor | float | None = None
        self._sums: tuple[float, ...] = ()  # of micro-batches and factors, mean over processes
        self._update_complete = True
        self._writes_into_inputs: bool | None = None  # None: not seen yet
        self._updates = 0
        evaluating.attach(self)

    @property
    def line_search(self) -> Evaluating:
        """The optimizer that evaluates the loss again, without Accelerate's wrapper."""
        return self._optimizer

    @property
    def recorded(self) -> bool:
        """Whether a mini-batch is recorded and was differentiated.

        With several processes one that was not is the part of a process in an objective of all.
        """
        return self._differentiated() or (several_processes() and bool(self._micro_batches))

    @property
    def loss(self) -> Tensor | None:
        """f_k(w_k) as training computed it, known on steps that search, else None."""
        if not self._repeatable():
            return None
        taken = [m for m in self._micro_batches if m.factors]
        return self._mean([m.differentiated(m.loss) for m in taken if m.loss is not None])

    @property
    def clip_factor(self) -> Tensor | float:
        """What gradient clipping multiplied the gradients by, 1 without clipping."""
        return self._clip_factor

    @property
    def gradient_norm(self) -> Tensor | float | None:
        """The norm of all gradients, or None if nobody computed it."""
        return self._gradient_norm

    @property
    def alone(self) -> bool:
        """Whether no other process is to be asked for `parts`."""
        return not several_processes()

    def parts(self, before: Parts, agree: bool) -> Parts | None:
        """Return what the loss of this update is a sum of; None where that need not be known.

        Args:
            before: The same of the update before. A factor that is measured is taken from it.
            agree: Whether all processes ask now.
        """
        number = self._number()
        # To read the factors waits for an accelerator: only where there is something to compare.
        if not agree and (not self.alone or before.micro_batches in (0, self._share(number))):
            return None
        factors = math.nan
        if self.alone:
            factors = self._sum_of_factors()
        else:
            if not self._repeatable():  # else the loss brought them along
                self._mean([])
            number, factors = self._sums
        if not number:
            return None
        if self.processes_in_loss is not None:
            return Parts(self._share(number), min(before.factor, NOT_KNOWN))
        shown = math.isfinite(factors) and factors != 0
        return Parts(number, abs(factors) / number if shown else NOT_A_SUM)

    def _number(self) -> float:
        return float(sum(bool(m.factors) for m in self._micro_batches))

    def _share(self, number: float) -> float:
        return number * (self.processes_in_loss or 1)

    def _sum_of_factors(self) -> float:
        """Return the sum over the micro-batches of what backward multiplied each by."""
        scale = 1.0
        if self._scaler is not None and not self._repeatable():
            scale = self._scaler.get_scale()  # not divided out yet
        return math.fsum(float(m.factor) for m in self._micro_batches if m.factors) / scale

    @contextmanager
    def doubled(self) -> Iterator[None]:
        """Let the training step divide by twice what it divides by else."""
        try:
            self.doubling = True
            yield
        finally:
            self.doubling = False

    def record(self, loss_fn: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Run one micro-batch's forward pass and remember it.

        Several calls before one `optimizer.step()` are the micro-batches of one accumulated update.
        What an abandoned update left behind (a gradient scaler skipped the step on overflow) is
        dropped, and counted as a skipped step, when no parameter has a gradient any more. With
        FSDP2, accumulate through Accelerate or Trainer.

        Args:
            loss_fn: Returns the scalar loss of `inputs`. It is called again with the same `inputs`:
                pass what it reads as arguments, since a variable of the loop has moved on by then.
            inputs: Arguments of `loss_fn`. It may pop keys and write into tensors of them.

        Returns:
            The loss, ready for `backward()`.

        Raises:
            TypeError: `loss_fn` is no function, or returned something else than a scalar tensor.
        """
        if not callable(loss_fn):
            raise TypeError(
                f"record() got a {type(loss_fn).__name__} as loss_fn, which must be a function: "
                "the search calls it again. Write objective.record(loss_fn, batch), where "
                "loss_fn(batch) returns the loss."
            )

        def run(*args: Any) -> tuple[Tensor, Tensor]:
            loss = checked_loss(loss_fn(*args))
            return loss, loss

        micro_batch, loss = self._record(run, inputs)
        if loss.requires_grad:
            loss.register_hook(  # type: ignore[no-untyped-call]
                lambda factor: self._note_backward(micro_batch, factor)
            )
        return loss

    def record_step(
        self, training_step: Callable[..., tuple[Tensor, Tensor | None]], *inputs: Any
    ) -> Tensor:
        """Run one micro-batch's forward and backward pass and remember it: for trainers.

        Args:
            training_step: Runs both on `inputs` and returns what it returns, and the sum of the
                losses that it differentiated, None if there was none. It is called again to
                evaluate: then it must not differentiate, but return the same.
            inputs: Arguments of `training_step`.

        Returns:
            What `training_step` returned.
        """
        differentiated = False

        def run(*args: Any) -> tuple[Tensor, Tensor]:
            nonlocal differentiated
            returned, loss = training_step(*args)
            differentiated = loss is not None
            return returned, returned.new_full((), math.nan) if loss is None else loss

        micro_batch, returned = self._record(run, inputs)
        if differentiated:
            micro_batch.factors.append(1.0)
        return returned

    def _record(
        self, run: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Any, ...]
    ) -> tuple[MicroBatch, Tensor]:
        """Run `run`, which returns what it returns and the loss to search on; remember it."""
        if self._differentiated() and self._update_complete and not self._has_gradients():
            self.clear()
            self._optimizer.note_skipped_step()
        self._earlier = [m for m in self._micro_batches if m.factors and self._update_complete]
        # FSDP2 holds the gradients of an unfinished update where `.grad` does not show them;
        # Accelerate knows. Without Accelerate this is always True.
        self._update_complete = synchronises_gradients()
        micro_batch = MicroBatch()
        self._micro_batches.append(micro_batch)
        if not self._optimizer.search_due:
            return micro_batch, run(*inputs)[0]
        kept = copied_inputs(inputs, self._writes_into_inputs is not False)
        counts = write_counts(inputs)
        before = Snapshot(self.scene)
        returned, loss = run(*inputs)
        micro_batch.loss = loss.detach().reshape(())
        if self._lost(counts, write_counts(inputs)):
            micro_batch.loss = micro_batch.loss * math.nan  # no search on this one

        def repeat() -> Tensor:
            before.restore()
            reshard(self.scene.model)
            _, again = run(*copied_inputs(kept, self._writes_into_inputs is not False))
            reshard(self.scene.model)
            return again.detach().reshape(())

        micro_batch.repeat = repeat
        return micro_batch, returned

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

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of the optimizer's parameters at a norm, and tell the search.

        `torch.nn.utils.clip_grad_norm_` for a loop of one's own: call it after the last backward
        pass of an update. Gradients of a gradient scaler are unscaled first.

        Args:
            max_norm: The largest norm, above 0.

        Returns:
            The norm of all gradients before clipping.

        Raises:
            ValueError: `max_norm` is not above 0.
        """
        if not max_norm > 0:
            raise ValueError(f"max_norm={max_norm!r} is not allowed: it must be a number above 0.")
        self._optimizer.leave_body_alone()
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm = whole(torch.nn.utils.clip_grad_norm_(params, max_norm))
        self.note_clipping(norm, max_norm)
        return norm

    def __call__(self) -> Tensor:
        """Return the recorded mini-batch's loss at the current weights.

        Without gradients; a loss that takes a derivative of its own (forces, gradient penalties)
        with them, one micro-batch at a time.

        Raises:
            RuntimeError: No mini-batch is recorded for a search; or, with several processes,
                another one failed.
        """
        if not self._repeatable():
            raise RuntimeError(
                "BatchObjective has no mini-batch to evaluate: call record() before backward(), "
                "on a step with optimizer.search_due."
            )
        losses: list[Tensor] = []
        failure: Exception | None = None
        with without_trace(self.scene), _one_path():
            try:
                self.evaluating = True
                losses = self._evaluate()
            except Exception as error:
                if not several_processes():
                    raise
                failure = error  # the others wait for this process's part of the mean
            finally:
                self.evaluating = False
        return self._mean(losses, failure)

    def _evaluate(self) -> list[Tensor]:
        if not self.with_gradients:
            try:
                with torch.no_grad():
                    return self._repeat_all()
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                self.with_gradients = True
        of_modules = [p for _, m in self.scene.named_modules() for p in m.parameters(False)]
        trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        with torch.enable_grad(), gradients_aside([*of_modules, *trained]):
            return self._repeat_all()

    def _repeat_all(self) -> list[Tensor]:
        return [m.differentiated(m.repeat()) for m in self._micro_batches if m.factors and m.repeat]

    def clear(self) -> None:
        """Forget the recorded mini-batch."""
        self._updates += bool(self._micro_batches)
        self._micro_batches, self._earlier = [], []
        self._clip_factor = 1.0
        self._gradient_norm = None

    def try_with_gradients(self) -> bool:
        """Evaluate with gradients from now on; False if all processes do already."""
        known = all_have(self.with_gradients, self._device)
        self.with_gradients = True
        return not known

    @property
    def _device(self) -> torch.device:
        return next(self.scene.model.parameters()).device

    def _differentiated(self) -> bool:
        return any(m.factors for m in self._micro_batches)

    def _repeatable(self) -> bool:
        return any(m.repeat is not None for m in self._micro_batches)

    def _has_gradients(self) -> bool:
        return any(
            param.grad is not None
            for group in self._optimizer.param_groups
            for param in group["params"]
        )

    def _note_backward(self, micro_batch: MicroBatch, factor: Tensor) -> None:
        """Note that backward came, and by what it multiplies the loss."""
        factor = factor.detach()
        earlier, self._earlier = self._earlier, []
        if earlier and micro_batch not in earlier and not self._has_gradients():
            # zero_grad() came between record() and backward(): a scaler skipped their step.
            self._micro_batches = [m for m in self._micro_batches if m not in earlier]
            self._optimizer.note_skipped_step()
        if micro_batch.repeat is not None:
            if self._scaler is not None:
                factor = factor / self._scaler.get_scale()
            elif _is_scale(float(factor)):
                raise RuntimeError(
                    f"backward multiplies the loss by {float(factor):g}: a gradient scaler that "
                    "the objective does not know, so the search would see another loss than the "
                    "one whose gradient is used. Write BatchObjective(..., scaler=scaler)."
                )
        if micro_batch.repeat is not None and self._updates == 1 and not self._differentiated():
            self._check_zero_grad()
        micro_batch.factors.append(factor)

    def _check_zero_grad(self) -> None:
        grads = [p.grad for g in self._optimizer.param_groups for p in g["params"]]
        if any(grad is not None and bool(whole(grad).any()) for grad in grads):
            warnings.warn(
                "The gradients of the step before are still in .grad and backward adds to them, so "
                "the search sees another loss than the one whose gradient is used. Call "
                "optimizer.zero_grad() after optimizer.step().",
                stacklevel=2,
            )

    def _lost(self, before: list[int | None], after: list[int | None]) -> bool:
        """Return whether `loss_fn` wrote into a batch that was not copied; copy from then on."""
        if before == after:
            self._writes_into_inputs = self._writes_into_inputs or False
            return False
        uncopied = self._writes_into_inputs is False
        if not self._writes_into_inputs:
            self._writes_into_inputs = True
            warnings.warn(
                "loss_fn writes into tensors of its batch, which is therefore copied at every "
                "search. An operation that is not in place (x - 1 for x.sub_(1)) needs no copy.",
                stacklevel=2,
            )
        return uncopied

    def _mean(self, losses: list[Tensor], failure: Exception | None = None) -> Tensor:
        """Return the sum over micro-batches, the mean over processes, in the losses' precision."""
        total = losses[0] if losses else torch.zeros(())
        for loss in losses[1:]:
            total = total + loss
        if self.alone:
            return total
        further = (self._number(), self._sum_of_factors())
        mean, self._sums = mean_over_processes(total, further, self._device, failure)
        return mean


def _is_scale(factor: float) -> bool:
    return factor >= _SMALLEST_UNKNOWN_SCALE and math.frexp(factor)[0] == 0.5


@contextmanager
def _one_path() -> Iterator[None]:
    """Keep nn.TransformerEncoder from another path where nothing is differentiated."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
