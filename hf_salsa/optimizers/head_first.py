"""Stock optimizers that train a new head first: the one line search that they are given.

The phase is that of the line-search optimizers (`head_phase`). Then the stock optimizer begins, as
if its run began there: it has no moments, of head or body, before. A learning-rate schedule runs
from the first update as ever.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..settings import check_setting
from . import messages
from .checks import differentiated
from .evaluating import Evaluating
from .head_phase import differ_in_head_only
from .skips import give_up_after_too_many, largest_squares_fit
from .state import LATER_NAMES, Counters, RunState, names_of, read, write

_SHARED = ("head_first", *names_of(RunState))


class HeadFirst(Evaluating):
    """What `head_first_class` puts before a stock optimizer.

    What outlives a step is in `param_groups`, beside the options of the stock optimizer. Weight
    decay, too, begins after the phase.

    Args:
        params: Parameter groups, split by `hf_salsa.head_groups`.
        args: Of the stock optimizer, like `kwargs`.
        head_first: Updates at the start, at least 0, that train the head alone; at most a tenth of
            the run.
        kwargs: The same by keyword.

    Raises:
        ValueError: `head_first` is out of range.
    """

    _starts_empty = False  # whether the stock optimizer makes its state at its first step
    _unscales = False  # whether its kernels do what a gradient scaler does else

    def __init__(self, params: ParamsT, *args: Any, head_first: int, **kwargs: Any) -> None:
        check_setting("head_first", head_first)
        self._initial = {"head_first": head_first, **vars(RunState())}
        super().__init__(params, *args, **kwargs)  # the stock optimizer's
        self._starts_empty = not self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as every torch optimizer does.

        Args:
            param_group: `params`, and options of the stock optimizer.
        """
        current = self.param_groups[0] if self.param_groups else self._initial
        shared = {name: current[name] for name in _SHARED}
        super().add_param_group({"head": False, **param_group, **shared})

    @property
    def step_size(self) -> float:
        """The step size of the latest step, if it was one of the head alone, else 0."""
        return self._run.head_applied

    @property
    def counters(self) -> Counters:
        """Totals of the phase: searches, extra forward passes, failed searches, skipped steps."""
        run = self._run
        return Counters(run.head_steps, run.trials, run.head_failures, run.skipped_steps)

    @property
    def in_phase(self) -> bool:
        """Whether the latest step was one of the head alone, and the stock optimizer has none."""
        run = self._run
        return run.head_steps > 0 and run.steps == run.head_steps + run.skipped_steps

    def plan(self, total_steps: int, done: int = 0) -> None:
        """Say how long the run is, of which the phase is at most a tenth.

        Args:
            total_steps: Calls of `step()` in the run, at least 1.
            done: How many of them came before now.
        """
        check_setting("total_steps", total_steps)
        run = self._run
        write(self.param_groups, replace(run, run_start=run.steps - done, run_steps=total_steps))

    def note_skipped_step(self) -> None:
        """Count a step of the phase that a gradient scaler skipped.

        Raises:
            FloatingPointError: It was the 20th in a row.
        """
        if self.head_alone:
            self._skip()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Train the head alone, or take a step of the stock optimizer.

        Args:
            closure: As for the stock optimizer. The phase takes the loss from `BatchObjective`.

        Returns:
            f_k(w_k) in the phase, then what the stock optimizer returns.

        Raises:
            RuntimeError: In the phase: no recorded mini-batch, or no gradients, or sparse ones.
            FloatingPointError: In the phase: gradients were not finite 20 steps in a row.
        """
        objective = self._objective
        recorded = objective is not None and objective.recorded
        # Checkpoint libraries make an optimizer create its state this way.
        only_state = not recorded and all(group.get("lr") == 0 for group in self.param_groups)
        try:
            if only_state:
                return self._own_step(closure)
            if self.head_alone:
                return self._train_head()
            return self._begin_or_go_on(closure)
        finally:
            if objective is not None:
                objective.clear()

    def _train_head(self) -> Tensor | float | None:
        self.leave_body_alone()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        objective = self._objective
        if objective is None or not objective.recorded:
            raise RuntimeError(messages.NO_LOSS_OF_HEAD.format(name=type(self).__name__))
        closure = differentiated(objective, params, type(self).__name__)
        loss = objective.loss
        if not largest_squares_fit(params):
            self._skip()
            return loss
        known, run = self._head_step(closure, loss, self._run)
        write(self.param_groups, run)
        return known

    def _begin_or_go_on(self, closure: Any) -> Any:
        run = self._run
        if self.in_phase and self._starts_empty:
            self.state.clear()  # what checkpoint libraries made it create
        returned = self._own_step(closure)
        write(self.param_groups, replace(run, steps=run.steps + 1, head_applied=0.0))
        return returned

    def _own_step(self, closure: Any) -> Any:
        step = super().step
        # torch lets every step run the hooks; those of this optimizer's run around the outer one.
        if vars(step.__func__).get("hooked"):  # type: ignore[attr-defined]
            return step.__func__.__wrapped__(self, closure)  # type: ignore[attr-defined]
        return step(closure)

    def _skip(self) -> None:
        run = self._run
        run = replace(
            run,
            steps=run.steps + 1,
            skipped_steps=run.skipped_steps + 1,
            consecutive_skips=run.consecutive_skips + 1,
        )
        write(self.param_groups, run)
        self._warn_once("skip", messages.SKIPPED.format(step=run.steps))
        give_up_after_too_many(run.consecutive_skips)

    @property
    def _run(self) -> RunState:
        return read(RunState, self.param_groups[0])

    # A scaler leaves scaled gradients to torch's fused steps, and never to the phase.

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self._unscales and not self.head_alone

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._unscales = value

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, also one of the stock optimizer.

        Args:
            state_dict: What `state_dict()` returned.

        Raises:
            ValueError: The checkpoint has another new head, or none where here is one.
        """
        groups = [LATER_NAMES | vars(RunState()) | g for g in state_dict["param_groups"]]
        if differ_in_head_only(self.param_groups, groups):
            raise ValueError(messages.ANOTHER_HEAD)
        super().load_state_dict({**state_dict, "param_groups": groups})

    def __reduce__(self) -> tuple[Any, ...]:
        return _bare, (type(self).__bases__[1],), self.__getstate__()


@cache
def head_first_class(stock: Any) -> type[HeadFirst]:
    """Return a class of optimizers that train a new head first, and then are a stock optimizer.

    Args:
        stock: A class of torch optimizers. Its step is its own; nothing of it is known here.

    Example:
        >>> cls = head_first_class(torch.optim.AdamW)
        >>> optimizer = cls(head_groups(model), lr=5e-5, head_first=10)
        >>> objective = BatchObjective(model, optimizer)
    """
    # Of the module of the stock class: transformers asks whether it is one of bitsandbytes.
    return type(f"HeadFirst{stock.__name__}", (HeadFirst, stock), {"__module__": stock.__module__})


def _bare(stock: Any) -> HeadFirst:
    """Return an optimizer for a copy or a pickle to fill: its class has no name to be found by."""
    cls = head_first_class(stock)
    return cls.__new__(cls)
