"""Optimizers that evaluate the loss of their mini-batch again, and what a `BatchObjective` asks."""

import math
import warnings
from dataclasses import replace

from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..rules import SearchRecord
from . import head_phase, messages
from .evaluation import Closure, Evaluation, Objective, spacing
from .state import Counters, RunState
from .trial_points import Chunk


class Evaluating(Optimizer):
    """An optimizer that may evaluate the loss at other weights: at every search, or at first.

    Its parameter groups hold `head_first`, `head` and the fields of `RunState`.
    """

    _objective: Objective | None = None
    _last_search: SearchRecord | None = None
    _warned: frozenset[str] = frozenset()
    _replay_checked = False  # whether the objective is the loss of training

    @property
    def step_size(self) -> float:
        """The step size last applied by a search."""
        raise NotImplementedError

    @property
    def counters(self) -> Counters:
        """Totals of searches, extra forward passes, failed searches and skipped steps."""
        raise NotImplementedError

    @property
    def search_due(self) -> bool:
        """Whether the coming `step()` will search."""
        return self.head_alone

    @property
    def head_alone(self) -> bool:
        """Whether the coming `step()` trains the new head alone (`head_first`)."""
        return head_phase.is_head_alone(self.param_groups)

    @property
    def last_search(self) -> SearchRecord | None:
        """The record of the latest search of this process, or None before the first."""
        return self._last_search

    def leave_body_alone(self) -> None:
        """Drop the gradients of the body, if the coming step trains the head alone.

        `step()` does it. Before that it keeps them out of what is unscaled, clipped or measured:
        `BatchObjective.clip_grad_norm_` and the trainer call it. A loop of one's own with a
        gradient scaler and no clipping may, after the last backward pass of an update.
        """
        if self.head_alone:
            head_phase.drop_body_gradients(self.param_groups)

    def plan(self, total_steps: int, done: int = 0) -> None:
        """Say how long the run is.

        Args:
            total_steps: Calls of `step()` in the run, at least 1.
            done: How many of them came before now.
        """
        raise NotImplementedError

    def attach(self, objective: Objective | None) -> None:
        """Let `step()` without a closure take loss and re-evaluation from `objective`."""
        self._objective = objective

    def note_skipped_step(self) -> None:
        """Count a step that somebody else skipped, as a gradient scaler does on overflow."""
        raise NotImplementedError

    def _head_step(
        self, closure: Closure, loss: Tensor | float | None, run: RunState
    ) -> tuple[Tensor | float, RunState]:
        """Take a step of the new head alone; return f_k(w_k), and where the run stands now."""
        chunks = head_phase.chunks_of_gradients(self.param_groups)
        evaluate = self._evaluation(closure)
        loss, run = self._known(loss, evaluate, chunks, not run.head_step_size, run)
        record, run = head_phase.train_head(chunks, evaluate, loss, run)
        self._last_search = record
        if not record.accepted:
            self._warn_once(f"head: {record.outcome}", messages.failed_head_search(record))
        trials = run.trials + evaluate.count
        return loss, replace(run, steps=run.steps + 1, consecutive_skips=0, trials=trials)

    def _evaluation(self, closure: Closure) -> Evaluation:
        params = [p for group in self.param_groups for p in group["params"]]
        return Evaluation(closure, self._objective, params)

    def _known(
        self,
        loss: Tensor | float | None,
        evaluate: Evaluation,
        chunks: list[Chunk],
        first: bool,
        run: RunState,
    ) -> tuple[Tensor | float, RunState]:
        """Return f_k(w_k), evaluated where it is not known; the first search checks the replay."""
        check = first and not self._replay_checked
        if check and loss is None:
            loss = evaluate()
        if check and loss is not None and math.isfinite(loss):
            fault = evaluate.fault(loss, spacing(loss, chunks))
            if fault is not None:
                self._warn_once("replay", fault)
            run = replace(run, reevaluate_loss=fault is not None)
            self._replay_checked = True
        if loss is None or run.reevaluate_loss:
            loss = evaluate()
        return loss, run

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned = self._warned | {key}
            warnings.warn(message, stacklevel=2)
