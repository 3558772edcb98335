"""LineSearchOptimizer: torch's contract for optimizers, and one step with a line search."""

import inspect
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..rules import RuleState, StepSizeRule
from ..settings import check_setting
from . import head_phase, messages, updates
from .checks import ask, check_derivative, differentiated, refuse_hopeless, unusable
from .direction import Direction
from .evaluating import Evaluating
from .evaluation import Closure, spacing
from .matrix_scale import matrix_scale
from .scale import NOT_KNOWN, Parts
from .signature import refuse_learning_rate, refuse_names
from .skips import (
    UnreadSkips,
    give_up_after_too_many,
    gradient_norm,
    largest_squares_fit,
    square_limit,
)
from .state import (
    LATER_NAMES,
    RULE,
    Counters,
    RunState,
    changed_settings,
    names_of,
    read,
    refuse_another_kind,
    refuse_own_values,
    restore_precision,
    shared_names,
    with_tensors,
    write,
)
from .tensors import LOW_PRECISION, dots, scaled
from .trial_points import PREVIOUS, Chunk, TrialPoints, cut
from .untrained import never_trained, some_new

_HOST_DEVICES = ("cpu",)  # reading a number from any other device waits for it


class LineSearchOptimizer(Direction, Evaluating):
    """A torch optimizer whose step size a rule finds on the mini-batch itself.

    A subclass brings the direction (`LineSearchAdam`, `LineSearchSGD`), and a subclass of that the
    rule: `class MyAdam(LineSearchAdam): rule_type = MyRule`. All state that outlives a step is in
    `state` (per parameter) and, as Python scalars under fixed keys, in every one of `param_groups`:
    torch keeps nothing else in checkpoints, copies and pickles.

    Args:
        params: Parameters or parameter groups. A group may have its own values of `options`, but
            not of `direction` and `head_first`. All groups share one step size; a group with
            `"step_size_factor": 0.1` (above 0; default 1) takes a tenth of it, as layer-wise decay
            and LoRA+ ask for. A group with `"head": True` is the new head of `head_first`
            (`hf_salsa.head_groups` makes it).
        total_steps: Steps of the run, at least 1. None (default): not known, `plan()` will say.
        settings: By keyword: the settings of the rule, and `options` of the direction.

    Raises:
        TypeError: A positional setting, a learning rate or an unknown setting.
        ValueError: A setting is out of range; the message has the range.
    """

    rule_type: ClassVar[type[StepSizeRule[Any]]]

    def __init__(
        self, params: ParamsT, *args: Any, total_steps: int | None = None, **settings: Any
    ) -> None:
        refuse_learning_rate(self, args, settings)
        self.set_up(params, total_steps, settings)

    def set_up(self, params: ParamsT, total_steps: int | None, settings: dict[str, Any]) -> None:
        """Finish the construction; every `__init__` ends here."""
        refuse_names(type(self), settings)
        options = {name: settings.get(name, default) for name, default in self.options.items()}
        for name, value in options.items():
            check_setting(name, value)
        if total_steps is not None:
            check_setting("total_steps", total_steps)
        of_rule = {n: settings[n] for n in names_of(self.rule_type) if n in settings}
        rule = self.rule_type(**of_rule)
        state = self.rule_type.state_type(rule.initial_step_size)
        run = RunState(run_steps=total_steps or 0)
        defaults = {"lr": state.step_size, **vars(rule), **options, **vars(state), **vars(run)}
        defaults |= {"head": False, "step_size_factor": 1.0, RULE: self.rule_type.__name__}
        self._reset_transients()
        super().__init__(params, defaults)

    def _reset_transients(self) -> None:
        self._objective = None
        self._last_search = None
        self._backups: dict[Tensor, Tensor] = {}
        self._unread_skips = UnreadSkips()
        self._warned = frozenset()
        self._asked_for_parts = False
        self._replay_checked = False
        self._derivative_checked = False  # whether its derivative is what backward found

    # --- what a user reads and says

    @classmethod
    def default_settings(cls) -> dict[str, Any]:
        """Return name -> default of every setting but `total_steps`, in the order to show them."""
        stated = inspect.signature(cls.__init__).parameters
        known = {n: getattr(cls.rule_type, n) for n in names_of(cls.rule_type)} | cls.options
        defaults = {n: parameter.default for n, parameter in stated.items() if n in known}
        return defaults | {n: value for n, value in known.items() if n not in defaults}

    @property
    def rule(self) -> StepSizeRule[Any]:
        """The step-size rule with its settings."""
        return read(self.rule_type, self.param_groups[0])

    @property
    def step_size(self) -> float:
        """The step size last applied; before the first step `initial_step_size`.

        0 as long as no search has found one, and steps only move the moments.
        """
        return self._applied(*self._read())

    @property
    def search_due(self) -> bool:
        """Whether the coming `step()` will search."""
        return self.head_alone or self._read()[0].search_due

    @property
    def counters(self) -> Counters:
        """Totals of searches, extra forward passes, failed searches and skipped steps.

        On an accelerator, reading them waits for the latest step.
        """
        state, run = self._settled()
        searches = state.searches + run.head_steps
        failed = state.failed_searches + run.head_failures
        return Counters(searches, run.trials, failed, run.skipped_steps)

    def plan(self, total_steps: int, done: int = 0) -> None:
        """Say how long the run is, by which rules with a tail know their time.

        `SaLSaTrainer` does it. In a loop of one's own the argument `total_steps` does, unless a
        second run follows the first.

        Args:
            total_steps: Calls of `step()` in the run, at least 1.
            done: How many of them came before now.

        Raises:
            ValueError: `total_steps` is out of range.
        """
        check_setting("total_steps", total_steps)
        state, run = self._read()
        self._write(state, replace(run, run_start=run.steps - done, run_steps=total_steps))

    def expect(self, micro_batches: float) -> None:
        """Search at the coming step, if only that can show the scale of its loss.

        Args:
            micro_batches: Of each update from now on, as `Parts` counts them.
        """
        state, run = self._read()
        changed = run.micro_batches not in (0, micro_batches)
        if changed and run.loss_factor == NOT_KNOWN:
            self._write(replace(state, search_interval=state.steps_since_search + 1), run)

    def go_on_with(self, state: RuleState) -> None:
        """Go on from weights and moments that somebody has put into place.

        Args:
            state: Of the rule, to go with them.
        """
        _, run = self._settled()
        if self.rule_type.looks_back:
            self._keep_weights()  # u = 0: no step has led here
        self._write(state, replace(run, consecutive_skips=0))

    def note_skipped_step(self) -> None:
        """Count a step that somebody else skipped, as a gradient scaler does on overflow.

        Raises:
            FloatingPointError: It was the 20th in a row.
        """
        self._skip(*self._settled())

    # --- torch's contract

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, for example layers that are unfrozen later.

        Args:
            param_group: As for every torch optimizer: `params`, and the options that may differ
                between groups (`weight_decay`, and `betas` and `eps`, or `momentum`).

        Raises:
            ValueError: A line-search setting or a learning rate of its own, or an option out of
                range. All groups share one step size.
        """
        current = self.param_groups[0] if self.param_groups else self.defaults
        shared = {name: current[name] for name in shared_names(type(self))}
        refuse_own_values(type(self), param_group, shared)
        group = {**param_group, **shared}
        for name in self.defaults.keys() - shared.keys():
            check_setting(name, group.setdefault(name, self.defaults[name]))
        self.check_group(group)
        super().add_param_group(group)
        for dtype in {p.dtype for p in group["params"] if p.requires_grad} & set(LOW_PRECISION):
            self._warn_once("low precision", messages.low_precision(dtype))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, counters included."""
        self._settled()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint. Moments keep the precision in which they are kept.

        A setting that the checkpoint does not know yet keeps the value that it has here. Which
        parameters are the new head is what the checkpoint says, if it has marked one or if here one
        is marked.

        Args:
            state_dict: What `state_dict()` of the same kind of optimizer returned.

        Raises:
            ValueError: The checkpoint is of another optimizer.
        """
        saved = state_dict["param_groups"][0]
        refuse_another_kind(type(self), saved, LineSearchOptimizer)
        changed = changed_settings(self.default_settings(), saved, self.param_groups[0])
        if changed:
            text = messages.OTHER_SETTINGS.format(changed=", ".join(changed))
            self._warn_once(f"settings {changed}", text)
        here = {name: self.param_groups[0][name] for name in names_of(self.rule_type)}
        # What checkpoints from before them mean.
        here |= {"step_size_factor": 1.0, RULE: self.rule_type.__name__}
        groups = [LATER_NAMES | here | group for group in state_dict["param_groups"]]
        self.param_groups = head_phase.cut_like(self.param_groups, groups)
        super().load_state_dict({**with_tensors(state_dict), "param_groups": groups})
        self._unread_skips = UnreadSkips()  # they were steps of the state that is gone
        restore_precision(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self._settled()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, a pickle or a checkpoint; what was not stored starts anew."""
        if "defaults" in state:  # a copy or a pickle; load_state_dict has no defaults
            self._reset_transients()
        super().__setstate__(state)

    # --- one step

    @torch.no_grad()
    def step(self, closure: Closure | None = None, loss: Tensor | float | None = None) -> Any:
        """Choose a step size, if a search is due, and take one step.

        Gradients must be in `.grad` already, as for every torch optimizer.

        Args:
            closure: Returns the loss of the same mini-batch (and the same dropout masks) at the
                current weights. Forward only: it is called under `torch.no_grad`, and only on steps
                that search. May be left out where a `BatchObjective` is attached.
            loss: f_k(w_k), the loss that was differentiated, if known. Saves one forward pass per
                search. At the first search it is compared with the closure's value.

        Returns:
            f_k(w_k) if it is known, else None.

        Raises:
            RuntimeError: No closure and no recorded mini-batch, or no gradients, or sparse ones.
            FloatingPointError: Loss or gradients were not finite 20 steps in a row.
        """
        objective = self._objective
        if closure is None or closure is objective:
            closure = None
            if objective is not None and objective.recorded:
                closure, loss = objective, objective.loss
        if closure is not None:
            self.leave_body_alone()
        try:
            return self._step(closure, loss)
        finally:
            if objective is not None:
                objective.clear()

    def _step(self, closure: Closure | None, loss: Tensor | float | None) -> Tensor | float | None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        fresh = self.param_groups[0]["lr"] == 0 and self.param_groups[0]["steps"] == 0
        if closure is None and (not params or fresh):
            # Checkpoint libraries make an optimizer create its state this way.
            for group in self.param_groups:
                for param in group["params"]:
                    self._state_of(param, group)
            return None
        closure = self._ready(closure, params)
        state, run = self._read()
        norm = self._objective.gradient_norm if self._objective else None
        if norm is None:
            norm = gradient_norm(params)
        # The gradients decide whether there is a step, the loss whether there is a search.
        found_inf = None
        limit = min(map(square_limit, {p.dtype for p in params}))
        on_host = not isinstance(norm, Tensor) or norm.device.type in _HOST_DEVICES
        if self.search_due or on_host:
            state, run = self._settled()
            if not float(norm) <= limit and not largest_squares_fit(params):
                self._skip(state, run)
                return loss
        else:
            assert isinstance(norm, Tensor)
            found_inf = self._unread_skips.note(norm, limit, run.consecutive_skips)
        if self.head_alone:
            return self._train_head(closure, loss, state, run)
        if state.search_due:
            loss, state, run = self._search(closure, loss, state, run)
        else:
            state, run = self._carried_over(closure, state, run)
            state = replace(state, steps_since_search=state.steps_since_search + 1)
            if self.rule_type.looks_back and state.search_due:
                self._keep_weights()
        run = replace(run, steps=run.steps + 1, head_applied=0.0)
        step_size = self._applied(state, run)
        for group in self.param_groups:
            own = step_size * group["step_size_factor"]
            updates.apply(self.take_step, group, self._state_of, own, found_inf)
        if found_inf is None:
            run = replace(run, consecutive_skips=0)
        self._write(state, run)
        return loss

    def _search(
        self, closure: Closure, loss: Tensor | float | None, state: RuleState, run: RunState
    ) -> tuple[Tensor | float | None, RuleState, RunState]:
        backups: dict[Tensor, Tensor] | None = self._backups
        known = state.step_size_known
        if self.rule_type.looks_back:
            # No step was taken yet: then w_{k-1} is w_k, and one memory serves both. Later there is
            # none for trial points until one is written.
            backups = None if known else self._keep_weights()
        chunks = list(
            cut(
                self.param_groups,
                state_of=self._state_of,
                step_numbers=self.step_numbers,
                backups=backups,
            )
        )
        first = not known and not self._derivative_checked
        evaluate = self._evaluation(closure)
        loss, run = self._known(loss, evaluate, chunks, first and not run.head_step_size, run)
        value, epsilon, before = float(loss), spacing(loss, chunks), state
        measure = partial(evaluate.measured, loss=value, epsilon=epsilon)
        state, run = self._carried_over(closure, state, run, measure)
        with TrialPoints(chunks, self._tested) as points:
            line = evaluate.line(
                points,
                self._measure,
                self.rule,
                state,
                loss=value,
                epsilon=epsilon,
                last_factor=self._last_factor(run),
                step=run.steps - run.run_start,
                total_steps=run.run_steps,
                **({} if known else self._of_weights(run)),
            )
            precise = not any(c.params[0].dtype in LOW_PRECISION for c in chunks)
            exact = not run.reevaluate_loss
            if first and exact and precise and unusable(line) is None:
                check_derivative(line)
            record, searched = ask(self.rule, state, line)
        torch.clear_autocast_cache()
        self._derivative_checked = self._derivative_checked or math.isfinite(line.loss)
        self._last_search = record
        if not record.accepted:
            self._warn_once(record.outcome, messages.failed_search(record, searched))
            refuse_hopeless(record, searched, line)
        if state is not before and self._objective and not self._objective.alone:
            # Without a search the processes would not know that the scale changes back.
            searched = replace(searched, search_interval=1)
        if searched.search_interval > 1:
            self._backups = {}  # the coming steps do not need them
        if self.rule_type.looks_back and known:
            self._keep_weights(points.kept)
        return loss, searched, replace(run, trials=run.trials + evaluate.count)

    def _of_weights(self, run: RunState) -> dict[str, float]:
        """Return what `Line` says of the weights before the first step size is found."""
        if not self.rule_type.looks_at_weights:
            return {}
        with_gradients = [
            (group, param)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        params = [param for _, param in with_gradients]
        if never_trained(params):
            return {"untrained": True, "usual_step_size": self.usual_step_size}
        if not self.usual_step_size:
            return {}
        if not run.head_steps:
            # Not for SGD, above: where its steps grow freely, one of them may break a run.
            return {"all_trained": not some_new(params)}
        body = ((p, g["step_size_factor"]) for g, p in with_gradients if not g["head"])
        return {"matrix_scale": matrix_scale(body)}

    def _train_head(
        self, closure: Closure, loss: Tensor | float | None, state: RuleState, run: RunState
    ) -> Tensor | float:
        """Take a step of the new head alone; moments and step size of its own wait."""
        loss, run = self._head_step(closure, loss, run)
        for group in self.param_groups:
            for param in group["params"]:
                self._state_of(param, group)  # checkpoints hold that of all parameters or of none
        self._write(state, run)
        return loss

    def _measure(self, chunk: Chunk) -> tuple[list[Tensor] | None, list[list[Tensor]]]:
        """Return -d_k of a chunk, and <g_k, -d_k> and, for rules that want it, the agreement.

        No -d_k for rules that look back: most of their searches end without a trial point.
        """
        agreement: list[list[Tensor]] = []
        if self.rule_type.wants_agreement:
            factor = chunk.group["step_size_factor"]
            direction, found = self.direction_and_agreement(chunk)
            direction, agreement = scaled(direction, factor), [scaled(found, factor)]
        else:
            direction = self._tested(chunk)
        slope = dots(chunk.grads, direction)
        return None if self.rule_type.looks_back else direction, [slope, *agreement]

    def _tested(self, chunk: Chunk) -> list[Tensor]:
        """Return -d_k of a chunk, by the factor of its group."""
        return scaled(self.direction(chunk), chunk.group["step_size_factor"])

    def _ready(self, closure: Closure | None, params: list[Tensor]) -> Closure:
        """Raise a `RuntimeError` if there is no loss, or no gradient, or no end to cool down to."""
        name = type(self).__name__
        closure = differentiated(closure, params, name)
        state, run = self._read()
        if self.rule.cool_down and not run.run_steps:
            raise RuntimeError(messages.NO_END.format(name=name))
        if self.param_groups[0]["lr"] != self._applied(state, run):
            lr = self.param_groups[0]["lr"]
            self._warn_once("lr", messages.LR_WAS_SET.format(lr=lr, name=name))
        return closure

    def _carried_over(
        self,
        closure: Closure,
        state: RuleState,
        run: RunState,
        measure: Callable[[Parts], Parts] | None = None,
    ) -> tuple[RuleState, RunState]:
        """Return the state at the scale that the loss of this update has, as far as it is known.

        On steps that search with what measures it.
        """
        objective = self._objective
        if objective is None or closure is not objective:
            return state, run
        before = Parts(run.micro_batches, run.loss_factor)
        # Without a search only where several processes start: their numbers may be new to all.
        agree = measure is not None or not (objective.alone or self._asked_for_parts)
        self._asked_for_parts = True
        parts = objective.parts(before, agree)
        if parts is None:
            return state, run
        if measure is not None:
            parts = measure(parts)
        growth = parts.growth_since(before)
        run = replace(run, micro_batches=parts.micro_batches, loss_factor=parts.factor)
        if growth != 1 and state.step_size_known:
            state = state.rescaled(loss=growth, step_size=growth**-self.degree)
            self.rescale(growth)
            self._write(state, run)  # all together, should the search be interrupted
        return state, run

    # --- state

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter; make it if there is none."""
        if param not in self.state:
            state = self.new_state(param, group)
            if self.rule_type.looks_back:
                state[PREVIOUS] = param.detach().clone()  # no step yet: u = 0
            if not state:  # nothing to keep
                return state
            self.state[param] = state
        return self.state[param]  # type: ignore[no-any-return]

    def _keep_weights(self, kept: Collection[Tensor] = ()) -> dict[Tensor, Tensor]:
        """Remember w_k for a search at the coming step, which looks back to it; return where.

        Args:
            kept: Parameters for which that is done.
        """
        memory = {
            param: self._state_of(param, group)[PREVIOUS]
            for group in self.param_groups
            for param in group["params"]
            if param.requires_grad
        }
        for param, previous in memory.items():
            if param not in kept:
                previous.copy_(param)
        return memory

    def _read(self) -> tuple[RuleState, RunState]:
        group = self.param_groups[0]
        return read(self.rule_type.state_type, group), read(RunState, group)

    def _write(self, state: RuleState, run: RunState) -> None:
        write(self.param_groups, state, run, lr=self._applied(state, run))

    def _settled(self) -> tuple[RuleState, RunState]:
        """Return the state, with the skipped steps that the host has not read yet."""
        state, run = self._read()
        unread = self._unread_skips.read()
        if unread is not None:
            total, in_a_row = unread
            run = replace(run, skipped_steps=run.skipped_steps + total, consecutive_skips=in_a_row)
            state = replace(state, steps_since_search=state.steps_since_search - total)
            self._write_skips(state, run, new=total)
        return state, run

    def _skip(self, state: RuleState, run: RunState) -> None:
        """Count a step that is not taken."""
        run = replace(
            run,
            steps=run.steps + 1,
            skipped_steps=run.skipped_steps + 1,
            consecutive_skips=run.consecutive_skips + 1,
        )
        self._write_skips(state, run, new=1)

    def _write_skips(self, state: RuleState, run: RunState, new: int) -> None:
        self._write(state, run)
        if new:
            self._warn_once("skip", messages.SKIPPED.format(step=run.steps))
        give_up_after_too_many(run.consecutive_skips)

    def _applied(self, state: RuleState, run: RunState) -> float:
        """Return the step size of the latest step."""
        if run.head_applied:
            return run.head_applied
        if run.steps and not state.step_size_known:
            return 0.0  # only the moments move
        return float(state.step_size * self._factor(run))

    def _factor(self, run: RunState) -> float:
        """Return the factor of the tail in the latest step."""
        return self.rule.factor(max(0, run.steps - 1 - run.run_start), run.run_steps)

    def _last_factor(self, run: RunState) -> float:
        """Return the factor of the tail in the latest step that was taken, 0 without one."""
        step = run.steps - 1 - run.consecutive_skips - run.run_start
        return self.rule.factor(step, run.run_steps) if step >= 0 else 0.0
