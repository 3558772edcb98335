"""SaLSa and SLS on tensors: four torch optimizers over one private base.

A subclass knows its tested direction and its update; the base gathers gradients, asks
`line_search.search` for the step size, and writes trial points. Equation numbers are those of
Kenneweg et al., "No learning rates needed: Introducing SALSA" (IJCNN 2024).
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.sgd import sgd

from .line_search import (
    AgreementSettings,
    AgreementState,
    SearchRecord,
    SearchSettings,
    SearchState,
    check_setting,
    cooling,
    first_step_size,
    search,
    search_once,
)

Closure: TypeAlias = Callable[[], Tensor | float]

_MAX_CONSECUTIVE_SKIPS = 20
# A trial point is computed in pieces of so many elements: temporaries stay in the cache of a CPU.
# Elsewhere of up to a fiftieth of the model, so that kernels are few and temporaries small.
_SMALLEST_CHUNK = 2**18
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_HOST_DEVICES = ("cpu",)  # reading a number from any other device waits for it
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")

_FAILURES = {
    "slope": "the tested direction does not descend (slope {slope:.3g})",
    "unresolved": "no step size that lowers the loss {loss:.6g} by more than its precision can show"
    " was accepted (slope {slope:.3g})",
    "trials": "max_trials={trials} forward passes found no step size that is accepted",
}


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

    def __call__(self) -> Tensor:
        """Return the loss at the current weights."""

    def clear(self) -> None:
        """Forget the mini-batch."""


@dataclass(frozen=True)
class Counters:
    """Totals since the optimizer was made, checkpoints included.

    Attributes:
        searches: Searches.
        trials: Evaluations of the closure or objective: extra forward passes.
        failed_searches: Searches that found no step size and kept the one of before.
        skipped_steps: Steps not taken because the loss or a gradient was not finite.
    """

    searches: int
    trials: int
    failed_searches: int
    skipped_steps: int


@dataclass
class _Chunk:
    """Pieces of parameters of one dtype, and the gradients, backups and states that go with them.

    `step` is k, the number of this step, of all of them (bias correction).
    """

    group: dict[str, Any]
    step: int
    owners: list[Tensor] = field(default_factory=list)  # the parameters the pieces are cut from
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    backups: list[Tensor] = field(default_factory=list)
    states: dict[str, list[Tensor]] = field(default_factory=dict)


class LineSearchOptimizer(Optimizer):
    """What SaLSa and SLS share, whatever the direction.

    All state that outlives a step is in `state` (per parameter) and, as Python scalars under fixed
    keys, in every one of `param_groups`: torch keeps nothing else in checkpoints, copies and
    pickles.
    """

    _settings_type: ClassVar[type[SearchSettings]] = SearchSettings
    _state_type: ClassVar[type[SearchState]] = SearchState

    def __init__(self, params: ParamsT, total_steps: int | None, **options: Any) -> None:
        for name, value in options.items():
            check_setting(name, value)
        if total_steps is not None:
            check_setting("total_steps", total_steps)
        state = self._state_type(options["initial_step_size"], run_steps=total_steps or 0)
        defaults = {"lr": state.step_size, **options, **vars(state)}
        self._reset_transients()
        super().__init__(params, defaults)

    def _reset_transients(self) -> None:
        self._objective: Objective | None = None
        self._last_search: SearchRecord | None = None
        self._backup: dict[Tensor, Tensor] = {}
        self._unread_skips: tuple[Tensor, Tensor] | None = None
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        self._settled_state()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, a pickle or a checkpoint; what was not stored starts anew."""
        if "defaults" in state:  # a copy or a pickle; load_state_dict has no defaults
            self._reset_transients()
        super().__setstate__(state)

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
        shared = {name: current[name] for name in self._shared_names()}
        for name in shared:
            if name in param_group and param_group[name] != current[name]:
                raise ValueError(
                    f"{name}={param_group[name]!r} in a parameter group is not allowed: one line "
                    f"search sets one step size for all groups. Remove it there; pass line-search "
                    f"settings to {type(self).__name__} itself."
                )
        group = {**param_group, **shared}
        for name in self.defaults.keys() - shared.keys():
            check_setting(name, group.setdefault(name, self.defaults[name]))
        self._check_group(group)
        super().add_param_group(group)
        self._warn_of_low_precision(group["params"])

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise a `ValueError` if options of a group do not go together."""

    def _warn_of_low_precision(self, params: list[Tensor]) -> None:
        low = {p.dtype for p in params if p.requires_grad and p.is_floating_point()} & {
            torch.bfloat16,
            torch.float16,
        }
        if low:
            dtype = str(low.pop()).removeprefix("torch.")
            self._warn_once(
                "low precision",
                f"Trainable parameters are {dtype}: a change of a weight by less than about "
                f"{torch.finfo(getattr(torch, dtype)).eps / 2:.1g} of its size rounds away, and "
                "with it what the line search measures. At a step size of 1e-5 only 40 % of the "
                "predicted decrease remains, at 1e-6 10 % (bfloat16). Load the model in float32 "
                "and train under autocast instead: dtype=torch.float32 in from_pretrained, and "
                "bf16=True in the training arguments.",
            )

    @property
    def step_size(self) -> float:
        """The step size last applied; `initial_step_size` before the first search."""
        return self._applied(self._search_state())

    @property
    def search_due(self) -> bool:
        """Whether the coming `step()` will search."""
        return self._search_state().search_due

    @property
    def last_search(self) -> SearchRecord | None:
        """The record of the latest search of this process, or None before the first."""
        return self._last_search

    @property
    def counters(self) -> Counters:
        """Totals of searches, extra forward passes, failed searches and skipped steps.

        On an accelerator, reading them waits for the latest step.
        """
        state = self._settled_state()
        return Counters(**{total.name: getattr(state, total.name) for total in fields(Counters)})

    def plan(self, total_steps: int, done: int = 0) -> None:
        """Say how long the run is, by which `cool_down` knows its time.

        `SaLSaTrainer` does it. In a loop of one's own the argument `total_steps` does, unless a
        second run follows the first.

        Args:
            total_steps: Calls of `step()` in the run, at least 1.
            done: How many of them came before now.

        Raises:
            ValueError: `total_steps` is out of range.
        """
        check_setting("total_steps", total_steps)
        state = self._search_state()
        self._write_search_state(
            replace(state, run_start=state.steps - done, run_steps=total_steps)
        )

    def attach(self, objective: Objective | None) -> None:
        """Let `step()` without a closure take loss and re-evaluation from `objective`."""
        self._objective = objective

    def note_skipped_step(self) -> None:
        """Count a step that somebody else skipped, as a gradient scaler does on overflow.

        Raises:
            FloatingPointError: It was the 20th in a row.
        """
        self._write_search_state(self._skip(self._settled_state()))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, counters included."""
        self._settled_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint. Moments keep the precision in which they were saved.

        Args:
            state_dict: What `state_dict()` of the same kind of optimizer returned.

        Raises:
            ValueError: The checkpoint is not of a line-search optimizer.
        """
        missing = set(self._shared_names()) - state_dict["param_groups"][0].keys()
        if missing:
            raise ValueError(
                f"This checkpoint was not written by {type(self).__name__}: its parameter groups "
                f"lack {sorted(missing)}. Resume with the optimizer that wrote it."
            )
        super().load_state_dict(state_dict)
        self._unread_skips = None  # they were steps of the state that is gone
        # torch casts all state to the dtype of the parameter (pytorch #43706).
        params = [p for group in self.param_groups for p in group["params"]]
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for param, saved_id in zip(params, saved_ids, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                self.state[param][name] = value.detach().to(param.device, copy=True)

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
        try:
            return self._step(closure, loss, objective)
        finally:
            if objective is not None:
                objective.clear()

    def _step(
        self, closure: Closure | None, loss: Tensor | float | None, objective: Objective | None
    ) -> Tensor | float | None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if closure is None and (not params or self.param_groups[0]["lr"] == 0):
            # Checkpoint libraries make an optimizer create its state this way.
            for group in self.param_groups:
                for param in group["params"]:
                    self._state_of(param, group)
            return None
        if closure is None:
            raise RuntimeError(
                f"{type(self).__name__}.step() found gradients but no loss to re-evaluate. Pass "
                "step(closure, loss=loss), where closure() returns the loss of the same "
                "mini-batch, or record the mini-batch: "
                "objective = BatchObjective(model, optimizer) once, then "
                "loss = objective.record(loss_fn, batch) in place of loss = loss_fn(batch)."
            )
        if not params:
            raise RuntimeError(
                f"{type(self).__name__}.step() found no gradients. Call loss.backward() before "
                "step(closure): the closure only returns the loss."
            )
        if any(p.grad.is_sparse for p in params if p.grad is not None):
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients. Make the embedding "
                "with sparse=False."
            )
        state = self._search_state()
        if self.param_groups[0]["cool_down"] and not state.run_steps:
            raise RuntimeError(
                f"{type(self).__name__} cools down over the last part of a run, but the length of "
                "this one is not known: pass total_steps=..., the number of calls of step() in "
                "the run, or cool_down=0."
            )
        if self.param_groups[0]["lr"] != self._applied(state):
            self._warn_once(
                "lr",
                f"Something set lr={self.param_groups[0]['lr']} in the parameter groups of "
                f"{type(self).__name__} (a learning-rate scheduler?). It is ignored: the line "
                "search sets the step size. Remove the scheduler.",
            )
        norm = objective.gradient_norm if objective else None
        # Finite if and only if the loss and all gradients are.
        witness = (self._norm(params) if norm is None else norm) + (0.0 if loss is None else loss)
        found_inf = None
        if (
            state.search_due
            or not isinstance(witness, Tensor)
            or witness.device.type in _HOST_DEVICES
        ):
            state = self._settled_state()
            if not math.isfinite(witness):
                self._write_search_state(self._skip(state))
                return loss
        else:
            found_inf = self._note_finiteness(witness, state)
        if state.search_due:
            before = state
            clip_factor = objective.clip_factor if objective else 1.0
            loss, state = self._search(closure, loss, clip_factor, before)
            if state.skipped_steps > before.skipped_steps:
                self._write_search_state(state)
                return loss
        else:
            state = replace(state, steps_since_search=state.steps_since_search + 1)
        state = replace(state, steps=state.steps + 1)
        # Before any search was accepted no step size is known: only the moments move.
        self._update(self._applied(state) if state.step_size_known else 0.0, found_inf)
        if found_inf is None:
            state = replace(state, consecutive_skips=0)
        self._write_search_state(state)
        return loss

    def _search(
        self,
        closure: Closure,
        loss: Tensor | float | None,
        clip_factor: Tensor | float,
        state: SearchState,
    ) -> tuple[Tensor | float | None, SearchState]:
        calls = 0

        def evaluate() -> Tensor | float:
            nonlocal calls
            calls += 1
            # Autocast caches the low-precision copy of every weight that it has seen.
            torch.clear_autocast_cache()
            return closure()

        chunks = list(self._chunks())
        if loss is not None and state.searches == 0:
            replayed = float(evaluate())
            if not self._reproduces(float(loss), replayed, _epsilon(loss, chunks)):
                state = replace(state, reevaluate_loss=True)
                self._warn_once(
                    "replay",
                    f"Evaluating the objective again at the same weights gave {replayed:.9g}, "
                    f"training had {float(loss):.9g}: the step size is chosen on another loss than "
                    "the one whose gradient is used. Look for random numbers that do not come from "
                    "torch, NumPy or random (or a closure that draws new dropout masks: use "
                    "BatchObjective), for state that the forward pass changes, for torch.compile. "
                    "From now on f(w_k) is re-evaluated at every search, one more forward pass.",
                )
        if loss is None or state.reevaluate_loss:
            loss = evaluate()
        start = float(loss)
        if not math.isfinite(start):
            return loss, replace(self._skip(state), trials=state.trials + calls)
        settings = self._search_settings()
        first = written = first_step_size(settings, state)
        backed_up: list[_Chunk] = []

        def loss_at(step_size: float) -> float:
            nonlocal written
            if step_size != written:
                self._write_trial(chunks, step_size, written)
                written = step_size
            return float(evaluate())

        try:
            slopes = self._write_first_trial(chunks, first, backed_up)
            record, searched = self._choose(
                settings,
                state,
                loss_at,
                loss=start,
                slopes=[slope / float(clip_factor) for slope in slopes],
                resolution=_epsilon(loss, chunks) * abs(start),
            )
        finally:
            self._restore(backed_up)
            torch.clear_autocast_cache()
        self._last_search = record
        if not record.accepted:
            reason = _FAILURES[record.outcome].format(**asdict(record))
            kept = (
                f"the step size {record.step_size:.3g} of before is kept"
                if searched.step_size_known
                else "no step is taken, since no step size is known yet"
            )
            self._warn_once(
                record.outcome,
                f"A line search failed: {reason}; {kept}. Said once; counters.failed_searches has "
                "the total.",
            )
        if searched.search_interval > 1:
            self._backup = {}  # the coming steps do not need it
        return loss, replace(searched, trials=state.trials + calls)

    def _note_finiteness(self, witness: Tensor, state: SearchState) -> Tensor:
        """Return 1 if the step must be skipped, else 0, and count it, without waiting for it.

        torch's fused kernels skip the step when this says so, as they do for a gradient scaler.
        """
        if isinstance(witness, DTensor):
            witness = witness.full_tensor()
        found_inf = 1.0 - torch.isfinite(witness).float()
        if self._unread_skips is None:
            self._unread_skips = (
                torch.zeros_like(found_inf),
                torch.full_like(found_inf, state.consecutive_skips),
            )
        total, in_a_row = self._unread_skips
        self._unread_skips = (total + found_inf, (in_a_row + 1) * found_inf)
        return found_inf

    def _settled_state(self) -> SearchState:
        """Return the search state, with the skipped steps that the host has not read yet."""
        state = self._search_state()
        if self._unread_skips is not None:
            total, in_a_row = (int(count) for count in torch.stack(self._unread_skips).tolist())
            self._unread_skips = None
            state = replace(
                state,
                skipped_steps=state.skipped_steps + total,
                consecutive_skips=in_a_row,
                steps_since_search=state.steps_since_search - total,
            )
            self._write_search_state(state)
            self._check_skips(state)
        return state

    def _skip(self, state: SearchState) -> SearchState:
        skipped = replace(
            state,
            steps=state.steps + 1,
            skipped_steps=state.skipped_steps + 1,
            consecutive_skips=state.consecutive_skips + 1,
        )
        self._check_skips(skipped)
        return skipped

    def _check_skips(self, skipped: SearchState) -> None:
        if skipped.consecutive_skips >= _MAX_CONSECUTIVE_SKIPS:
            self._write_search_state(skipped)
            raise FloatingPointError(
                f"Loss or gradients were not finite {skipped.consecutive_skips} steps in a row; "
                "the weights are those of the last good step. Look for bad input data and for "
                "overflow: try bf16 instead of fp16, gradient clipping, or detect it with "
                "torch.autograd.detect_anomaly()."
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=2)

    def _shared_names(self) -> list[str]:
        """Return what all parameter groups share: one search, one step size."""
        names = (*_names(self._settings_type), *_names(self._state_type))
        return [*names, "direction", "cool_down", "lr"]

    def _search_settings(self) -> SearchSettings:
        group = self.param_groups[0]
        return self._settings_type(**{name: group[name] for name in _names(self._settings_type)})

    def _search_state(self) -> SearchState:
        group = self.param_groups[0]
        return self._state_type(**{name: group[name] for name in _names(self._state_type)})

    def _write_search_state(self, state: SearchState) -> None:
        for group in self.param_groups:
            group.update(vars(state), lr=self._applied(state))

    def _applied(self, state: SearchState) -> float:
        """Return the step size of the latest step of `state`."""
        latest = max(0, state.steps - 1 - state.run_start)
        cool_down = self.param_groups[0]["cool_down"]
        return float(state.step_size * cooling(cool_down, latest, state.run_steps))

    @staticmethod
    def _reproduces(loss: float, replayed: float, epsilon: float) -> bool:
        """Whether two evaluations agree up to a few roundings of the loss's precision."""
        return abs(loss - replayed) <= 32 * epsilon * abs(loss)

    @staticmethod
    def _norm(params: list[Tensor]) -> Tensor:
        """Return the norm of all gradients: not finite if one is not, or if it overflows."""
        (grads,) = _locals([[p.grad for p in params]], params)
        return _sum_over_shards([list(torch._foreach_norm(grads))], params).squeeze(0)

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter; make it if there is none."""
        raise NotImplementedError

    def _direction(self, chunk: _Chunk) -> list[Tensor]:
        """Return -d_k, the tested direction with its sign turned; float32 or wider."""
        raise NotImplementedError

    def _measure(self, chunk: _Chunk) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Return what `_direction` does, and lists of one number per piece: <g_k, -d_k> first.

        Further lists are what else the search must know.
        """
        direction = self._direction(chunk)
        return direction, [_dots(chunk.grads, direction)]

    def _choose(
        self,
        settings: SearchSettings,
        state: SearchState,
        evaluate: Callable[[float], float],
        *,
        loss: float,
        slopes: list[float],
        resolution: float,
    ) -> tuple[SearchRecord, SearchState]:
        """Search the step size; `slopes` are the sums of the lists that `_measure` returned."""
        (slope,) = slopes
        return search(settings, state, evaluate, loss=loss, slope=slope, resolution=resolution)

    def _update_group(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        states: dict[str, list[Tensor]],
        step_size: float,
        fused: bool,
        found_inf: Tensor | None,
    ) -> None:
        """Move the moments by one step and the weights by `step_size` along the final direction.

        Where `found_inf`, with fused kernels only, is 1, nothing moves.
        """
        raise NotImplementedError

    def _update(self, step_size: float, found_inf: Tensor | None) -> None:
        """Take the step of all groups from w_k with torch's kernels, unless `found_inf` is 1."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            rows = [self._state_of(p, group) for p in params]
            columns = [[row[name] for row in rows] for name in rows[0]]
            reals, grads, *columns = _locals([params, [p.grad for p in params], *columns], params)
            weights, states = reals, dict(zip(rows[0], columns, strict=True))
            low_precision = any(p.dtype in _LOW_PRECISION for p in reals)
            if low_precision:  # take their step in float32, where their moments are
                weights = [p.float() if p.dtype in _LOW_PRECISION else p for p in reals]
                grads = [g.to(w.dtype) for g, w in zip(grads, weights, strict=True)]
            # The fused kernels walk through memory: they need dense tensors of equal layout.
            fused = all(t.is_contiguous() for t in (*weights, *grads)) and all(
                w.device.type in _FUSED_DEVICES for w in weights
            )
            if not fused and found_inf is not None and found_inf:
                continue
            found_inf_here = found_inf if fused else None
            self._update_group(group, weights, grads, states, step_size, fused, found_inf_here)
            if low_precision:
                torch._foreach_copy_(reals, weights)

    def _chunks(self) -> Iterator[_Chunk]:
        """Cut what has gradients into pieces of bounded size, at w_k."""
        groups = [(g, [p for p in g["params"] if p.grad is not None]) for g in self.param_groups]
        total = sum(p.numel() for _, params in groups for p in params if p.device.type != "cpu")
        limit = max(_SMALLEST_CHUNK, total // 50)
        for group, params in groups:
            chunk, size = _Chunk(group, 0), 0
            for param, step in zip(params, self._step_numbers(params, group), strict=True):
                if param not in self._backup:
                    self._backup[param] = torch.empty_like(param)
                moments = {n: t for n, t in self._state_of(param, group).items() if n != "step"}
                columns = [param, param.grad, self._backup[param], *moments.values()]
                for weight, grad, backup, *states in _pieces(list(map(_local, columns)), limit):
                    full = size + weight.numel() > limit or step != chunk.step
                    if chunk.params and (full or weight.dtype != chunk.params[0].dtype):
                        yield chunk
                        chunk, size = _Chunk(group, step), 0
                    chunk.step = step
                    chunk.owners.append(param)
                    chunk.params.append(weight)
                    chunk.grads.append(grad)
                    chunk.backups.append(backup)
                    for name, piece in zip(moments, states, strict=True):
                        chunk.states.setdefault(name, []).append(piece)
                    size += weight.numel()
            if chunk.params:
                yield chunk

    def _step_numbers(self, params: list[Tensor], group: dict[str, Any]) -> list[int]:
        """Return k of each parameter for the coming step."""
        return [0] * len(params)

    def _write_first_trial(
        self, chunks: list[_Chunk], step_size: float, backed_up: list[_Chunk]
    ) -> list[float]:
        """Write w_k + step_size * d_k into the parameters, and return the sums of `_measure`.

        One pass over memory makes the backup, the slope and the first trial point. What is safe in
        the backup is added to `backed_up`.
        """
        products: list[list[Tensor]] = []
        owners: list[Tensor] = []
        for chunk in chunks:
            torch._foreach_copy_(chunk.backups, chunk.params)
            backed_up.append(chunk)
            direction, found = self._measure(chunk)
            products = products or [[] for _ in found]
            for column, pieces in zip(products, found, strict=True):
                column += pieces
            owners += chunk.owners
            self._move(chunk, direction, step_size)
        sums: list[float] = _sum_over_shards(products, owners).tolist()
        return sums

    def _write_trial(self, chunks: list[_Chunk], step_size: float, written: float) -> None:
        """Write w_k + step_size * d_k into the parameters, which hold w_k + written * d_k."""
        for chunk in chunks:
            near = written / 2 <= step_size < written
            if near and chunk.params[0].dtype not in _LOW_PRECISION:
                # Part of the way back to w_k, which costs one more rounding but no direction. Not
                # most of it, where the part that is left has few digits, and not away from it,
                # where what the smaller step lost in rounding would grow.
                torch._foreach_lerp_(chunk.params, chunk.backups, 1 - step_size / written)
            else:
                torch._foreach_copy_(chunk.params, chunk.backups)
                self._move(chunk, self._direction(chunk), step_size)

    @staticmethod
    def _move(chunk: _Chunk, direction: list[Tensor], step_size: float) -> None:
        if chunk.params[0].dtype in _LOW_PRECISION:
            trial = [p.float() for p in chunk.params]
            torch._foreach_add_(trial, direction, alpha=-step_size)
            torch._foreach_copy_(chunk.params, trial)
        else:
            torch._foreach_add_(chunk.params, direction, alpha=-step_size)

    @staticmethod
    def _restore(chunks: list[_Chunk]) -> None:
        for chunk in chunks:
            torch._foreach_copy_(chunk.params, chunk.backups)


def _names(kind: type[SearchSettings | SearchState]) -> tuple[str, ...]:
    return tuple(entry.name for entry in fields(kind))


def _local(tensor: Tensor) -> Tensor:
    """View what this process holds of a tensor, complex numbers as pairs of reals.

    The view shares memory with the tensor. Complex parameters are treated as torch.optim.AdamW
    does.
    """
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _locals(columns: list[list[Any]], params: list[Tensor]) -> list[list[Tensor]]:
    """Return `_local` of what belongs to parameters: most often the very same tensors."""
    if any(isinstance(p, DTensor) or p.is_complex() for p in params):
        return [[_local(tensor) for tensor in column] for column in columns]
    return columns


def _sum_over_shards(columns: list[list[Tensor]], params: list[Tensor]) -> Tensor:
    """Add up columns of one scalar per parameter, over the processes too where they are sharded.

    One small all-reduce per device mesh; none without sharded parameters.
    """
    rows: dict[tuple[Any, ...], list[int]] = {}
    for row, param in enumerate(params):
        layout = (param.device_mesh, param.placements) if isinstance(param, DTensor) else None
        rows.setdefault((layout, columns[0][row].device), []).append(row)
    total = torch.zeros(len(columns), dtype=torch.float64, device=columns[0][0].device)
    for (layout, _), of_layout in rows.items():
        part = torch.stack(
            [
                torch.stack([column[row] for row in of_layout]).sum(dtype=torch.float64)
                for column in columns
            ]
        )
        if layout is not None:
            mesh, placements = layout
            partial = [Partial() if isinstance(p, Shard) else Replicate() for p in placements]
            part = DTensor.from_local(part, mesh, partial, run_check=False).full_tensor()
        total = total + part.to(total.device)
    return total


def _dots(gradients: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
    return [
        torch.dot(g.to(d.dtype).reshape(-1), d.reshape(-1))
        for g, d in zip(gradients, directions, strict=True)
    ]


def _pieces(columns: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Cut tensors of one shape into aligned pieces of at most `limit` elements."""
    if columns[0].numel() <= limit or not all(column.is_contiguous() for column in columns):
        yield columns
    else:
        flat = [torch.split(column.view(-1), limit) for column in columns]
        yield from map(list, zip(*flat, strict=True))


def _epsilon(loss: Tensor | float | None, chunks: list[_Chunk]) -> float:
    """Return the relative spacing of the numbers in which the loss was computed."""
    dtype = loss.dtype if isinstance(loss, Tensor) else chunks[0].params[0].dtype
    return torch.finfo(dtype).eps


class SaLSaAdam(LineSearchOptimizer):
    r"""Adam whose step size is chosen by SaLSa, the smoothed Armijo line search.

    At step k with loss f_k, gradient g_k and weights w_k (all operations elementwise):

        m_k = beta1 m_{k-1} + (1 - beta1) g_k,    mhat = m_k / (1 - beta1^k)           (Eq. 2)
        v_k = beta2 v_{k-1} + (1 - beta2) g_k^2,  vhat = v_k / (1 - beta2^k)
        tested:  d_k = -g_k / (sqrt(vhat) + eps),  slope_k = sum g_k^2 / (sqrt(vhat) + eps)
        h_k = beta3 h_{k-1} + (1 - beta3) (f_k(w_k) - f_k(w_k + eta d_k))              (Eq. 5)
        s_k = beta3 s_{k-1} + (1 - beta3) slope_k                                      (Eq. 7)
        accept the first eta of eta_{k-1} 2^(n/b) delta^j, j = 0, 1, ..., with h_k >= c eta s_k
        w_{k+1} = (1 - eta weight_decay) w_k - eta mhat / (sqrt(vhat) + eps)

    A search happens every L_k steps, between 1 and `max_search_interval`, the rarer the less the
    step size moves (Eq. 8-11); in between the last step size is kept. n is the number of steps
    since the last search. The step size is in `step_size` and in every `param_groups[i]["lr"]`.

    Args:
        params: Parameters or parameter groups. A group may have its own `betas`, `eps` and
            `weight_decay`; all groups share one step size.
        c: Share of the first-order decrease that must be reached, in (0, 1); 0.3 to 0.5 is good.
        beta3: Smoothing of both sides of the criterion, in [0, 1); 0.9 to 0.999 is good, 0 is SLS.
        steps_to_double: b, training steps in which the step size may double, at least 1.
        backtrack_factor: delta, by which a rejected step size shrinks, in (0, 1).
        initial_step_size: eta_0, above 0. Too large costs a few forward passes, once.
        max_search_interval: Most steps between two searches, at least 1.
        direction: `"gradient"` tests d_k as above, the paper's method; `"momentum"` tests Adam's
            own direction -mhat / (sqrt(vhat) + eps) with slope <g_k, -d_k> (ALSALS,
            arXiv 2403.18519).
        require_decrease: Accept no step on which the loss of the mini-batch rises, Theorem 1's
            extra condition.
        betas: beta1 and beta2, each in [0, 1).
        eps: Added to the denominator, above 0.
        weight_decay: Decoupled weight decay (AdamW's), at least 0. Not part of the tested step.
        max_trials: Most forward passes of one search, at least 1.
        cool_down: Share of the run, in [0, 1], over which at its end the step size is applied by a
            factor that falls linearly from 1 to 0. Searches go on at the full step size. 0, the
            paper's method, applies it as it is.
        total_steps: Steps of the run, at least 1, for `cool_down`; `SaLSaTrainer` knows them. None
            (default): not known, `plan()` will say.

    Raises:
        ValueError: An argument is out of range; the message has the range.

    Source:
        Kenneweg, Kenneweg, Fumagalli, Hammer: "No learning rates needed: Introducing SALSA - Stable
        Armijo Line Search Adaptation" (IJCNN 2024).

    Example:
        >>> optimizer = SaLSaAdam(model.parameters())
        >>> objective = BatchObjective(model, optimizer)
        >>> for batch in loader:
        ...     loss = objective.record(loss_fn, batch)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        params: ParamsT,
        c: float = 0.3,
        beta3: float = 0.99,
        steps_to_double: float = 500,
        backtrack_factor: float = 0.9,
        initial_step_size: float = 1.0,
        max_search_interval: int = 10,
        direction: str = "gradient",
        require_decrease: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_trials: int = 30,
        cool_down: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(
            params,
            total_steps=total_steps,
            c=c,
            beta3=beta3,
            steps_to_double=steps_to_double,
            backtrack_factor=backtrack_factor,
            initial_step_size=initial_step_size,
            max_search_interval=max_search_interval,
            direction=direction,
            require_decrease=require_decrease,
            max_trials=max_trials,
            cool_down=cool_down,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            moments = torch.float32 if param.dtype in _LOW_PRECISION else param.dtype
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, dtype=moments)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=moments)
        return state

    def _step_numbers(self, params: list[Tensor], group: dict[str, Any]) -> list[int]:
        if not params:
            return []
        steps = [self._state_of(p, group)["step"].to(params[0].device) for p in params]
        return [int(step) + 1 for step in torch.stack(steps).tolist()]

    def _direction(self, chunk: _Chunk) -> list[Tensor]:
        return self._preconditioned(chunk, self._preconditioner(chunk))

    def _preconditioned(self, chunk: _Chunk, preconditioner: list[Tensor]) -> list[Tensor]:
        """Turn `preconditioner` into -d_k, in its own memory: new tensors cost more than this."""
        beta1, _ = chunk.group["betas"]
        if chunk.group["direction"] == "gradient":  # beta1 = 0 in the test, Eq. 3 and 7
            numerators = chunk.grads
        else:
            correction = 1 - beta1**chunk.step
            numerators = list(torch._foreach_mul(chunk.states["exp_avg"], beta1 / correction))
            grads = [g.to(m.dtype) for g, m in zip(chunk.grads, numerators, strict=True)]
            torch._foreach_add_(numerators, grads, alpha=(1 - beta1) / correction)  # mhat_k, Eq. 2
        torch._foreach_mul_(
            preconditioner,
            [n.to(p.dtype) for n, p in zip(numerators, preconditioner, strict=True)],
        )
        return preconditioner

    @staticmethod
    def _preconditioner(chunk: _Chunk) -> list[Tensor]:
        """Return 1 / (sqrt(vhat_k) + eps)."""
        _, beta2 = chunk.group["betas"]
        second = chunk.states["exp_avg_sq"]
        grads = [g.to(v.dtype) for g, v in zip(chunk.grads, second, strict=True)]
        correction = 1 - beta2**chunk.step
        result = list(torch._foreach_mul(second, beta2 / correction))  # vhat_k, Eq. 2
        torch._foreach_addcmul_(result, grads, grads, value=(1 - beta2) / correction)
        if result[0].device.type == "cpu":
            # The square root of 0 takes MKL thirty times as long as that of another number, and
            # words that have not occurred yet have 0. Beside eps nothing is seen of this.
            torch._foreach_clamp_min_(result, torch.finfo(result[0].dtype).tiny)
        torch._foreach_sqrt_(result)
        torch._foreach_add_(result, chunk.group["eps"])
        torch._foreach_reciprocal_(result)
        return result

    def _update_group(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        states: dict[str, list[Tensor]],
        step_size: float,
        fused: bool,
        found_inf: Tensor | None,
    ) -> None:
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            grads,
            states["exp_avg"],
            states["exp_avg_sq"],
            [],
            states["step"],
            foreach=not fused,
            fused=fused,
            found_inf=found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=step_size,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class SaLSaSGD(LineSearchOptimizer):
    r"""SGD whose step size is chosen by SaLSa, the smoothed Armijo line search.

    At step k with loss f_k, gradient g_k and weights w_k:

        tested:  d_k = -g_k,  slope_k = ||g_k||^2
        h_k = beta3 h_{k-1} + (1 - beta3) (f_k(w_k) - f_k(w_k + eta d_k))              (Eq. 5)
        s_k = beta3 s_{k-1} + (1 - beta3) slope_k                                      (Eq. 5)
        accept the first eta of eta_{k-1} 2^(n/b) delta^j, j = 0, 1, ..., with h_k >= c eta s_k
        u_k = momentum u_{k-1} + g_k
        w_{k+1} = (1 - eta weight_decay) w_k - eta u_k                                 (Eq. 6)

    See `SaLSaAdam` for when a search happens and where the step size is.

    Args:
        params: Parameters or parameter groups. A group may have its own `momentum` and
            `weight_decay`; all groups share one step size.
        c: Share of the first-order decrease that must be reached, in (0, 1); 0.3 to 0.5 is good.
        beta3: Smoothing of both sides of the criterion, in [0, 1); 0.9 to 0.999 is good, 0 is SLS.
        steps_to_double: b, training steps in which the step size may double, at least 1.
        backtrack_factor: delta, by which a rejected step size shrinks, in (0, 1).
        initial_step_size: eta_0, above 0. Too large costs a few forward passes, once.
        max_search_interval: Most steps between two searches, at least 1.
        direction: `"gradient"` tests -g_k, the paper's method; `"momentum"` tests -u_k with slope
            <g_k, u_k>.
        require_decrease: Accept no step on which the loss of the mini-batch rises, Theorem 1's
            extra condition.
        momentum: Heavy-ball momentum of the final update, in [0, 1).
        weight_decay: Decoupled weight decay (AdamW's, not the L2 term of torch.optim.SGD), at
            least 0. Not part of the tested step.
        max_trials: Most forward passes of one search, at least 1.
        cool_down: Share of the run, in [0, 1], over which at its end the step size is applied by a
            factor that falls linearly from 1 to 0. Searches go on at the full step size. 0, the
            paper's method, applies it as it is.
        total_steps: Steps of the run, at least 1, for `cool_down`; `SaLSaTrainer` knows them. None
            (default): not known, `plan()` will say.

    Raises:
        ValueError: An argument is out of range; the message has the range.

    Source:
        Kenneweg, Kenneweg, Fumagalli, Hammer: "No learning rates needed: Introducing SALSA - Stable
        Armijo Line Search Adaptation" (IJCNN 2024).
    """

    def __init__(
        self,
        params: ParamsT,
        c: float = 0.3,
        beta3: float = 0.99,
        steps_to_double: float = 500,
        backtrack_factor: float = 0.9,
        initial_step_size: float = 1.0,
        max_search_interval: int = 10,
        direction: str = "gradient",
        require_decrease: bool = False,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_trials: int = 30,
        cool_down: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(
            params,
            total_steps=total_steps,
            c=c,
            beta3=beta3,
            steps_to_double=steps_to_double,
            backtrack_factor=backtrack_factor,
            initial_step_size=initial_step_size,
            max_search_interval=max_search_interval,
            direction=direction,
            require_decrease=require_decrease,
            max_trials=max_trials,
            cool_down=cool_down,
            momentum=momentum,
            weight_decay=weight_decay,
        )

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if group["momentum"] and not state:
            dtype = torch.float32 if param.dtype in _LOW_PRECISION else param.dtype
            state["momentum_buffer"] = torch.zeros_like(param, dtype=dtype)
        return state

    def _direction(self, chunk: _Chunk) -> list[Tensor]:
        wide = [g.float() if g.dtype in _LOW_PRECISION else g for g in chunk.grads]
        if chunk.group["direction"] == "gradient" or not chunk.group["momentum"]:
            return wide
        buffers = torch._foreach_mul(chunk.states["momentum_buffer"], chunk.group["momentum"])
        torch._foreach_add_(buffers, wide)
        return list(buffers)

    def _update_group(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        states: dict[str, list[Tensor]],
        step_size: float,
        fused: bool,
        found_inf: Tensor | None,
    ) -> None:
        if group["weight_decay"]:
            decay: Tensor | float = step_size * group["weight_decay"]
            if found_inf is not None:
                decay = decay * (1 - found_inf.double())
            torch._foreach_mul_(weights, 1 - decay)
        sgd(
            weights,
            grads,
            list(states["momentum_buffer"]) if group["momentum"] else [None] * len(weights),
            foreach=not fused,
            fused=fused,
            found_inf=found_inf,
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=step_size,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


class SLSAdam(SaLSaAdam):
    r"""Adam whose step size is chosen by SLS, the Armijo line search of every single mini-batch.

    `SaLSaAdam` with beta3 = 0 (Eq. 3: f_k(w_k + eta d_k) <= f_k(w_k) - c eta slope_k), c = 0.1 and
    a search at every step. Arguments, ranges and errors are those of `SaLSaAdam`.
    """

    def __init__(
        self,
        params: ParamsT,
        c: float = 0.1,
        beta3: float = 0.0,
        steps_to_double: float = 500,
        backtrack_factor: float = 0.9,
        initial_step_size: float = 1.0,
        max_search_interval: int = 1,
        direction: str = "gradient",
        require_decrease: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_trials: int = 30,
        cool_down: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(
            params,
            total_steps=total_steps,
            c=c,
            beta3=beta3,
            steps_to_double=steps_to_double,
            backtrack_factor=backtrack_factor,
            initial_step_size=initial_step_size,
            max_search_interval=max_search_interval,
            direction=direction,
            require_decrease=require_decrease,
            max_trials=max_trials,
            cool_down=cool_down,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )


class SLSSGD(SaLSaSGD):
    r"""SGD whose step size is chosen by SLS, the Armijo line search of every single mini-batch.

    `SaLSaSGD` with beta3 = 0 (Eq. 1: f_k(w_k - eta g_k) <= f_k(w_k) - c eta ||g_k||^2), c = 0.1 and
    a search at every step. Arguments, ranges and errors are those of `SaLSaSGD`.
    """

    def __init__(
        self,
        params: ParamsT,
        c: float = 0.1,
        beta3: float = 0.0,
        steps_to_double: float = 500,
        backtrack_factor: float = 0.9,
        initial_step_size: float = 1.0,
        max_search_interval: int = 1,
        direction: str = "gradient",
        require_decrease: bool = False,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_trials: int = 30,
        cool_down: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(
            params,
            total_steps=total_steps,
            c=c,
            beta3=beta3,
            steps_to_double=steps_to_double,
            backtrack_factor=backtrack_factor,
            initial_step_size=initial_step_size,
            max_search_interval=max_search_interval,
            direction=direction,
            require_decrease=require_decrease,
            max_trials=max_trials,
            cool_down=cool_down,
            momentum=momentum,
            weight_decay=weight_decay,
        )


class _OneTrialOptimizer(LineSearchOptimizer):
    """What the two `...Plus` optimizers share: `search_once`. `_measure` adds <g_k, p_k>."""

    _settings_type = AgreementSettings
    _state_type = AgreementState

    def _choose(
        self,
        settings: SearchSettings,
        state: SearchState,
        evaluate: Callable[[float], float],
        *,
        loss: float,
        slopes: list[float],
        resolution: float,
    ) -> tuple[SearchRecord, SearchState]:
        assert isinstance(settings, AgreementSettings)
        assert isinstance(state, AgreementState)
        slope, agreement = slopes
        return search_once(
            settings,
            state,
            evaluate,
            loss=loss,
            slope=slope,
            agreement=agreement,
            resolution=resolution,
        )


class SaLSaAdamPlus(_OneTrialOptimizer, SaLSaAdam):
    r"""Adam without a learning rate: a fast, guarded start, one trial per search, a cool-down.

    Not the paper's method, but what came out of it when one setting had to serve fine-tuning and
    training from scratch (README, "salsa_adam_plus"). With the symbols of `SaLSaAdam`:

        tested:     d_k = -mhat_k / (sqrt(vhat_k) + eps),  slope_k = <g_k, -d_k>
        agreement:  a_k = <g_k, p_k>,  p_k = beta1 m_{k-1} / (1 - beta1^k) / (sqrt(vhat_k) + eps)
        start:      eta = `first_share` of the largest 2^-j with f_k(w_k) - f_k(w_k + eta d_k) >=
                    c eta slope_k on the first mini-batch
        growth:     eta_{k-1} 2^(n/b): b = `steps_to_double_fast` as long as the average of a_k is
                    above 0 by more than `confidence` standard errors: new mini-batches still want
                    more of the steps that were taken. Else, and for good once that warm-up is over
                    (no such agreement after 10 searches or more), b = `steps_to_double`, as in the
                    paper.
        bound:      one trial at that step size measures slope and curvature, s and kappa are their
                    averages (beta3), eta <= 2 (1 - c) s / kappa: Armijo's criterion, Eq. 6, on the
                    parabola
        step:       as `SaLSaAdam`, eta falling linearly to 0 over the last `cool_down` of the run

    The warm-up searches at every step. After it searches are 1 + (searches so far) / 8 steps apart,
    at most `max_search_interval`.

    Clip the gradients: without it training from scratch may fail. `SaLSaTrainer` clips them at a
    norm of 1; a loop of one's own does it as below.

    Args:
        params: As in `SaLSaAdam`. beta1 must be above 0.
        c: Share of the first-order decrease that must be reached, in (0, 1).
        beta3: Smoothing of slope, curvature and agreement, in [0, 1).
        steps_to_double: b, training steps in which the step size may double, at least 1.
        steps_to_double_fast: The same while mini-batches agree, at least 1.
        confidence: Standard errors, by which the agreement must be above 0 for fast growth.
        first_share: Share of the first step size found at which training starts, in (0, 1].
        backtrack_factor: By which the step size shrinks in the first search, and at most in each
            later one, in (0, 1).
        initial_step_size: Where the first search starts, above 0.
        max_search_interval: Most steps between two searches, at least 1.
        direction: `"momentum"` tests d_k as above, `"gradient"` the direction of `SaLSaAdam`.
        betas: beta1 in (0, 1) and beta2 in [0, 1).
        eps: Added to the denominator, above 0.
        weight_decay: Decoupled weight decay (AdamW's), at least 0. Not part of the tested step.
        max_trials: Most forward passes of one search, at least 1.
        cool_down: Share of the run, in [0, 1], over which at its end the step size falls to 0.
        total_steps: Steps of the run, at least 1; `SaLSaTrainer` knows them. None (default): not
            known, `plan()` will say, or `cool_down=0` needs none.

    Raises:
        ValueError: An argument is out of range; the message has the range.

    Example:
        >>> optimizer = SaLSaAdamPlus(model.parameters(), total_steps=len(loader))
        >>> objective = BatchObjective(model, optimizer)
        >>> for batch in loader:
        ...     loss = objective.record(loss_fn, batch)
        ...     loss.backward()
        ...     norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ...     objective.note_clipping(norm, 1.0)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        params: ParamsT,
        c: float = 0.4,
        beta3: float = 0.9,
        steps_to_double: float = 500,
        steps_to_double_fast: float = 12,
        confidence: float = 2.0,
        first_share: float = 0.1,
        backtrack_factor: float = 0.5,
        initial_step_size: float = 1.0,
        max_search_interval: int = 10,
        direction: str = "momentum",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_trials: int = 30,
        cool_down: float = 0.6,
        total_steps: int | None = None,
    ) -> None:
        LineSearchOptimizer.__init__(
            self,
            params,
            total_steps=total_steps,
            c=c,
            beta3=beta3,
            steps_to_double=steps_to_double,
            steps_to_double_fast=steps_to_double_fast,
            confidence=confidence,
            first_share=first_share,
            backtrack_factor=backtrack_factor,
            initial_step_size=initial_step_size,
            max_search_interval=max_search_interval,
            direction=direction,
            require_decrease=False,
            max_trials=max_trials,
            cool_down=cool_down,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["betas"][0] == 0:
            raise ValueError(
                f"betas={group['betas']!r} is not allowed: {type(self).__name__} compares each "
                "gradient with those before it, so beta1 must be above 0 (0.9 works well)."
            )

    def _measure(self, chunk: _Chunk) -> tuple[list[Tensor], list[list[Tensor]]]:
        beta1, _ = chunk.group["betas"]
        preconditioner = self._preconditioner(chunk)
        factor = beta1 / (1 - beta1**chunk.step)
        earlier = list(torch._foreach_mul(chunk.states["exp_avg"], factor))
        torch._foreach_mul_(earlier, preconditioner)  # p_k
        agreement = _dots(chunk.grads, earlier)
        del earlier  # before the direction takes as much again
        direction = self._preconditioned(chunk, preconditioner)
        return direction, [_dots(chunk.grads, direction), agreement]


class SaLSaSGDPlus(_OneTrialOptimizer, SaLSaSGD):
    r"""SGD without a learning rate: a fast, guarded start, one trial per search, a cool-down.

    `SaLSaAdamPlus` on SGD with momentum, u_k = momentum u_{k-1} + g_k: tested is d_k = -u_k, the
    agreement is <g_k, momentum u_{k-1}>.

    Args:
        params: As in `SaLSaSGD`.
        momentum: Heavy-ball momentum, in (0, 1).
        weight_decay: Decoupled weight decay (AdamW's, not the L2 term of torch.optim.SGD), at
            least 0. Not part of the tested step.
        c, beta3, steps_to_double, steps_to_double_fast, confidence, first_share, backtrack_factor,
            initial_step_size, max_search_interval, direction, max_trials, cool_down, total_steps:
            as in `SaLSaAdamPlus`.

    Raises:
        ValueError: An argument is out of range; the message has the range.
    """

    def __init__(
        self,
        params: ParamsT,
        c: float = 0.4,
        beta3: float = 0.9,
        steps_to_double: float = 500,
        steps_to_double_fast: float = 12,
        confidence: float = 2.0,
        first_share: float = 0.1,
        backtrack_factor: float = 0.5,
        initial_step_size: float = 1.0,
        max_search_interval: int = 10,
        direction: str = "momentum",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        max_trials: int = 30,
        cool_down: float = 0.6,
        total_steps: int | None = None,
    ) -> None:
        LineSearchOptimizer.__init__(
            self,
            params,
            total_steps=total_steps,
            c=c,
            beta3=beta3,
            steps_to_double=steps_to_double,
            steps_to_double_fast=steps_to_double_fast,
            confidence=confidence,
            first_share=first_share,
            backtrack_factor=backtrack_factor,
            initial_step_size=initial_step_size,
            max_search_interval=max_search_interval,
            direction=direction,
            require_decrease=False,
            max_trials=max_trials,
            cool_down=cool_down,
            momentum=momentum,
            weight_decay=weight_decay,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["momentum"] == 0:
            raise ValueError(
                f"momentum={group['momentum']!r} is not allowed: {type(self).__name__} compares "
                "each gradient with those before it, so momentum must be above 0 (0.9 works well)."
            )

    def _measure(self, chunk: _Chunk) -> tuple[list[Tensor], list[list[Tensor]]]:
        direction, products = super()._measure(chunk)
        buffers = chunk.states["momentum_buffer"]
        earlier = list(torch._foreach_mul(buffers, chunk.group["momentum"]))  # p_k
        return direction, [*products, _dots(chunk.grads, earlier)]


OPTIMIZERS: dict[str, type[SaLSaAdam] | type[SaLSaSGD]] = {
    "salsa_adam": SaLSaAdam,
    "salsa_sgd": SaLSaSGD,
    "sls_adam": SLSAdam,
    "sls_sgd": SLSSGD,
    "salsa_adam_plus": SaLSaAdamPlus,
    "salsa_sgd_plus": SaLSaSGDPlus,
}
