"""The loss of the mini-batch as a search sees it: evaluated, checked, and along one line."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ..rules import Line, RuleState, StepSizeRule
from . import messages
from .scale import NOT_A_SUM, NOT_KNOWN, SUM, Parts
from .tensors import gradients_aside, numbers
from .trial_points import Chunk, Measure, TrialPoints

Closure: TypeAlias = Callable[[], Tensor | float]


class Objective(Protocol):
    """The loss of the mini-batch whose gradients are in `.grad`, re-evaluable at other weights.

    `hf_salsa.BatchObjective` is the implementation; it attaches itself to its optimizer, whose
    `step()` then needs no closure.
    """

    @property
    def recorded(self) -> bool:
        """Whether a mini-batch is recorded."""

    @property
    def loss(self) -> Tensor | None:
        """f_k(w_k) as training computed it, or None where it is not known."""

    @property
    def clip_factor(self) -> Tensor | float:
        """What gradient clipping multiplied the gradients by, 1 without clipping."""

    @property
    def gradient_norm(self) -> Tensor | float | None:
        """The norm of all gradients, or None if nobody computed it."""

    @property
    def alone(self) -> bool:
        """Whether no other process is to be asked for `parts`."""

    def parts(self, before: Parts, agree: bool) -> Parts | None:
        """Return what the loss of this update is a sum of; None where that need not be known.

        Args:
            before: The same of the update before. A factor that is measured is taken from it.
            agree: Whether all processes ask now. If not, the answer is None where this process is
                not alone, and where the number of micro-batches is that of before or none is known.
        """

    def doubled(self) -> AbstractContextManager[None]:
        """Return a context in which evaluations divide by twice what they divide by else."""

    with_gradients: bool  # whether evaluations need gradients of their own

    def try_with_gradients(self) -> bool:
        """Evaluate with gradients from now on; False if all processes do already."""

    def __call__(self) -> Tensor:
        """Return the loss at the current weights."""

    def clear(self) -> None:
        """Forget the mini-batch."""


class Evaluation:
    """The loss of the mini-batch at the current weights, and how often it was asked for.

    Args:
        closure: Returns it: the objective, or a function of the user's.
        objective: The objective that is attached, if any.
        params: All parameters of the optimizer. A closure of the user's must leave their gradients
            alone.
    """

    def __init__(self, closure: Closure, objective: Objective | None, params: list[Tensor]) -> None:
        self.count = 0
        self._closure = closure
        self._objective = objective
        self._params = params

    def __call__(self) -> Tensor | float:
        """Evaluate it."""
        self.count += 1
        # Autocast caches the low-precision copy of every weight that it has seen.
        torch.clear_autocast_cache()
        if self._closure is self._objective:
            return self._closure()
        return self._of_user()

    def _of_user(self) -> Tensor | float:
        try:
            with gradients_aside(self._params):  # out of reach of a zero_grad() in the closure
                loss = self._closure()
                if any(p.grad is not None for p in self._params):
                    raise RuntimeError(messages.BACKWARD_IN_CLOSURE)
        except RuntimeError as error:
            if "does not require grad" in str(error):
                raise RuntimeError(messages.BACKWARD_IN_CLOSURE) from error
            raise
        if not isinstance(loss, (int, float)) and not (
            isinstance(loss, Tensor) and loss.numel() == 1
        ):
            raise TypeError(messages.NO_NUMBER.format(kind=type(loss).__name__))
        return loss

    def fault(self, loss: Tensor | float, epsilon: float) -> str | None:
        """Return what to say if it is not the loss that was differentiated, or None if it is.

        Args:
            loss: f_k(w_k), as it was differentiated. The weights must be w_k.
            epsilon: Relative spacing of its numbers. A few roundings are no fault.
        """
        trained, objective = float(loss), self._objective
        tolerance = 32 * epsilon * abs(trained)
        replayed = float(self())
        if abs(trained - replayed) <= tolerance:
            return None
        if objective is not None and objective.try_with_gradients():  # what is computed may differ
            again = math.nan
            try:
                again = float(self())
            finally:
                objective.with_gradients = abs(trained - again) <= tolerance
            if objective.with_gradients:
                return None
        return messages.REPLAY.format(trained=trained, replayed=replayed)

    def measured(self, parts: Parts, loss: float, epsilon: float) -> Parts:
        """Return `parts` with the factor that was not known; not where the loss shows none.

        Args:
            parts: Of the objective's loss.
            loss: f_k(w_k). The weights must be w_k.
            epsilon: Relative spacing of its numbers.
        """
        shows = math.isfinite(loss) and loss != 0 and parts.micro_batches > 1
        if self._objective is None or parts.factor != NOT_KNOWN or not shows:
            return parts
        with self._objective.doubled():
            same = abs(float(self()) - loss) <= 32 * epsilon * abs(loss)
        return replace(parts, factor=SUM if same else NOT_A_SUM)

    def line(
        self,
        points: TrialPoints,
        measure: Measure,
        rule: StepSizeRule[Any],
        state: RuleState,
        *,
        loss: float,
        epsilon: float,
        **of_run: Any,
    ) -> Line:
        """Return what the rule may know, with the first trial point written if `measure` says so.

        Where the rule does not want the slope, nothing is measured or written.

        Args:
            points: The way to the trial points.
            measure: As for `TrialPoints.first`: the slope, and the agreement if it is wanted.
            rule: Who will search.
            state: Its state.
            loss: f_k(w_k).
            epsilon: Relative spacing of its numbers.
            of_run: What `Line` says of the run, by name.
        """
        clip_factor = float(self._objective.clip_factor) if self._objective else 1.0

        def unclipped(slope: float) -> float:
            return slope / clip_factor if clip_factor else math.nan

        def loss_at(step_size: float) -> float:
            points.move_to(step_size)
            return float(self())

        def look_back() -> tuple[float, float]:
            slope = points.undo_last_step()
            before, slope_before = numbers(self(), slope)
            return before, unclipped(slope_before)

        measured = [0.0]
        if rule.wants_slope(state):
            measured = points.first(rule.first_trial(state), measure)
        slope, *agreement = measured
        line = Line(
            loss_at,
            loss=loss,
            slope=unclipped(slope),
            resolution=epsilon * abs(loss),
            agreement=unclipped(agreement[0]) if agreement else 0.0,
            **of_run,
        )
        return replace(line, look_back=look_back) if rule.looks_back else line


def spacing(loss: Tensor | float | None, chunks: list[Chunk]) -> float:
    """Return the relative spacing of the numbers in which the loss was computed."""
    known = isinstance(loss, Tensor) and loss.is_floating_point()
    dtype = loss.dtype if known and isinstance(loss, Tensor) else chunks[0].params[0].dtype
    return torch.finfo(dtype).eps
