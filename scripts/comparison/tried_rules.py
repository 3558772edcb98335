"""Rules for the step size that were tried on the way to the former rule of `salsa_adam_plus`.

Prototypes, kept so that `compare.py --preset study` can repeat the comparison; to train, use the
optimizers of `hf_salsa`. Each is `SaLSaAdam` or `FormerPlusAdam` with one thing changed. They run
on CPUs, and what they remember besides is in no checkpoint.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from comparison.former_plus import FormerPlusAdam
from hf_salsa import SaLSaAdam
from hf_salsa.optimizers import Chunk, LineSearchAdam, Update
from hf_salsa.rules import (
    Line,
    RuleState,
    SaLSa,
    SaLSaState,
    SearchRecord,
    grown,
    moving_average,
)

NO_GROWTH = 1e12  # steps in which the step size may double


@dataclass(frozen=True)
class PonosState(SaLSaState):
    """What `Ponos` remembers besides: C_{k-1}, and of how many steps it is the mean."""

    reference: float = 0.0
    count: int = 0


@dataclass(frozen=True, kw_only=True)
class Ponos(SaLSa):
    """The rule of `NonMonotone`."""

    state_type: ClassVar[type[RuleState]] = PonosState
    polyak_share: ClassVar[float] = 0.1  # c_p
    largest: ClassVar[float] = 10.0  # eta_max

    def search(self, state: Any, line: Line) -> tuple[SearchRecord, Any]:
        """Backtrack from Polyak's step size until the loss is below the mean of those before."""
        mean = (state.count * state.reference + line.loss) / (state.count + 1)
        polyak = min(line.loss / (self.polyak_share * line.slope), self.largest)
        state = replace(
            state, reference=max(mean, line.loss), count=state.count + 1, step_size=polyak
        )
        return super().search(state, replace(line, loss=state.reference))


class NonMonotone(SaLSaAdam):
    """PoNoS (arXiv 2306.12747): Polyak's step size first, and the loss may rise now and then.

    From min(f_k / (c_p slope_k), eta_max) it backtracks until f_k(w_k + eta d_k) <= C_k - c eta
    slope_k. C_k is the mean of f_k(w_k) and those before it, or f_k(w_k) where that is larger.
    """

    rule_type = Ponos

    def __init__(self, params: Any) -> None:
        super().__init__(
            params,
            c=0.5,
            beta3=0.0,
            backtrack_factor=0.5,
            max_search_interval=1,
            steps_to_double=NO_GROWTH,
        )


@dataclass(frozen=True, kw_only=True)
class HowFarItMissed(SaLSa):
    """The rule of `AdaptiveBacktracking`."""

    def search(self, state: SaLSaState, line: Line) -> tuple[SearchRecord, SaLSaState]:
        """Shrink a rejected step size by how far it missed the criterion."""
        step_size, trial_loss = self.first_trial(state), math.nan
        for _ in range(self.max_trials):
            trial_loss = line.loss_at(step_size)
            if self.accepts(state, step_size, line.loss - trial_loss, line.slope):
                break
            h = moving_average(state.h, line.loss - trial_loss, self.beta3)
            s = moving_average(state.s, line.slope, self.beta3)
            missed = h / (self.c * step_size * s) if math.isfinite(h) else -math.inf
            factor = self.backtrack_factor * (1 - self.c) / (1 - self.c * missed)
            step_size *= max(0.01, factor)
        # The paper's rule accepts it at once, and moves averages and interval on.
        paper = replace(self, steps_to_double=NO_GROWTH, max_trials=1)
        known = replace(line, loss_at=lambda _: trial_loss)
        return SaLSa.search(paper, replace(state, step_size=step_size), known)


class AdaptiveBacktracking(SaLSaAdam):
    """The paper's criterion; a rejected step size shrinks by how far it missed (arXiv 2408.13150).

    With v = h_k / (c eta s_k), below 1 where it is rejected: by max(0.01, rho (1 - c) / (1 - c v)).
    """

    rule_type = HowFarItMissed


@dataclass(frozen=True, kw_only=True)
class Bounded(SaLSa):
    """The rule of `RelativeChange`, which fills `squares`: of direction and weights."""

    share: ClassVar[float] = 0.01
    squares: ClassVar[list[float]] = [0.0, 0.0]

    def first_trial(self, state: SaLSaState) -> float:
        """Return the step size that is tried first; the sums begin anew."""
        self.squares[:] = [0.0, 0.0]
        return super().first_trial(state)

    def search(self, state: SaLSaState, line: Line) -> tuple[SearchRecord, SaLSaState]:
        """Start the search at the bound, if that is smaller."""
        of_direction, of_weights = self.squares
        growth = grown(state, self.steps_to_double) / state.step_size
        bound = self.share * math.sqrt(of_weights / of_direction) / growth
        return super().search(replace(state, step_size=min(state.step_size, bound)), line)


class RelativeChange(SaLSaAdam):
    """The paper's rule, with a tested step of at most a hundredth of the weights' norm."""

    rule_type = Bounded

    def direction(self, chunk: Chunk) -> list[Tensor]:
        """Return -d_k, and add up the squares of it and of the weights."""
        direction = super().direction(chunk)
        for total, column in enumerate((direction, chunk.params)):  # which are at w_k
            Bounded.squares[total] += sum(float(t.square().sum()) for t in column)
        return direction


class _OtherJudge(LineSearchAdam):
    """The mini-batch of the search before judges the step of this one."""

    _judge: Callable[[], Tensor] | None = None

    def _search(self, closure: Any, loss: Any, state: Any, run: Any) -> Any:
        # A copy of the objective keeps its mini-batch: clearing makes new lists.
        judge, self._judge = self._judge, copy.copy(closure)
        if judge is None:
            return super()._search(closure, loss, state, run)
        return super()._search(judge, None, state, run)


class OtherBatch(_OtherJudge, SaLSaAdam):
    """The paper's rule, but the mini-batch of the search before judges the step of this one."""


class PlusOtherBatch(_OtherJudge, FormerPlusAdam):
    """`FormerPlusAdam`, likewise."""


class _Averaging(LineSearchAdam):
    """Evaluates an exponential average of the weights (decay 0.98), when `Trainer` asks for it."""

    decay = 0.98

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self._weights = [param for group in self.param_groups for param in group["params"]]
        self._averages = [torch.zeros_like(weight) for weight in self._weights]
        self._count = 0
        self._training: list[Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None, loss: Any = None) -> Any:
        """Take a step and move the averages."""
        found = super().step(closure, loss)
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)
        self._count += 1
        return found

    @torch.no_grad()
    def eval(self) -> None:
        """Put the averages in the place of the weights."""
        if self._training is None and self._count:
            self._training = [weight.clone() for weight in self._weights]
            unbiased = torch._foreach_div(self._averages, 1 - self.decay**self._count)
            torch._foreach_copy_(self._weights, unbiased)

    @torch.no_grad()
    def train(self) -> None:
        """Put the weights back."""
        if self._training is not None:
            torch._foreach_copy_(self._weights, self._training)
            self._training = None


class Averaged(_Averaging, SaLSaAdam):
    """`SaLSaAdam` with averaged weights."""


class PlusAveraged(_Averaging, FormerPlusAdam):
    """`FormerPlusAdam`, likewise."""


class ScheduleFree(SaLSaAdam):
    """Schedule-Free AdamW (arXiv 2405.15682) with a learning rate gamma by the paper's rule.

    It trains y = (1 - beta1) z + beta1 x, where x is the mean of all z. A step of z by gamma moves
    y by gamma (1 - beta1 (1 - 1/k)) along its gradient, and that is the eta that the search tests.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self._at_y = True

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return step 0, a second moment of 0, and z."""
        return {
            "step": torch.zeros(()),
            "exp_avg_sq": torch.zeros_like(param),
            "z": param.detach().clone(),
        }

    def take_step(self, update: Update) -> None:
        """Move z and y."""
        beta1, beta2 = update.group["betas"]
        states, weights, grads = update.states, update.weights, update.grads
        torch._foreach_add_(states["step"], 1)
        step = float(states["step"][0])
        torch._foreach_lerp_(states["exp_avg_sq"], torch._foreach_mul(grads, grads), 1 - beta2)
        correction = 1 - beta2**step
        denominators = torch._foreach_div(states["exp_avg_sq"], correction)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, update.group["eps"])
        normalized = torch._foreach_div(grads, denominators)
        torch._foreach_lerp_(weights, states["z"], 1 / step)
        torch._foreach_add_(weights, normalized, alpha=-update.step_size)
        rate = update.step_size / (1 - beta1 * (1 - 1 / step))
        torch._foreach_add_(states["z"], normalized, alpha=-rate)

    def _move_weights(self, share: float) -> None:
        for param, state in self.state.items():
            param.data.lerp_(state["z"], share)

    def eval(self) -> None:
        """Put x, the average, in the place of y."""
        if self._at_y:
            self._move_weights(1 - 1 / self.defaults["betas"][0])
            self._at_y = False

    def train(self) -> None:
        """Put y back."""
        if not self._at_y:
            self._move_weights(1 - self.defaults["betas"][0])
            self._at_y = True
