"""Rules for the step size that were tried on the way to `salsa_adam_plus`.

Prototypes, kept so that `compare.py --preset study` can repeat the comparison; to train, use the
optimizers of `hf_salsa`. Each is `SaLSaAdam` or `SaLSaAdamPlus` with one thing changed. They run on
CPUs, and what they remember besides is in no checkpoint.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_salsa import SaLSaAdam, SaLSaAdamPlus
from hf_salsa.line_search import (
    SearchRecord,
    SearchSettings,
    SearchState,
    first_step_size,
    is_accepted,
    moving_average,
    search,
)

NO_GROWTH = 1e12  # steps in which the step size may double
Evaluate = Callable[[float], float]
Found = tuple[SearchRecord, SearchState]


class NonMonotone(SaLSaAdam):
    """PoNoS (arXiv 2306.12747): Polyak's step size first, and the loss may rise now and then.

    From min(f_k / (c_p slope_k), eta_max) it backtracks until f_k(w_k + eta d_k) <= C_k - c eta
    slope_k. C_k is the mean of f_k(w_k) and those before it, or f_k(w_k) where that is larger.
    """

    polyak_share = 0.1  # c_p
    largest = 10.0  # eta_max

    def __init__(self, params: Any) -> None:
        super().__init__(
            params,
            c=0.5,
            beta3=0.0,
            backtrack_factor=0.5,
            max_search_interval=1,
            steps_to_double=NO_GROWTH,
        )
        self._reference, self._count = 0.0, 0

    def _choose(
        self,
        settings: SearchSettings,
        state: SearchState,
        evaluate: Evaluate,
        *,
        loss: float,
        slopes: list[float],
        resolution: float,
    ) -> Found:
        (slope,) = slopes
        mean = (self._count * self._reference + loss) / (self._count + 1)
        self._reference, self._count = max(mean, loss), self._count + 1
        polyak = min(loss / (self.polyak_share * slope), self.largest)
        return search(
            settings,
            replace(state, step_size=polyak),
            evaluate,
            loss=self._reference,
            slope=slope,
            resolution=resolution,
        )


class AdaptiveBacktracking(SaLSaAdam):
    """The paper's criterion; a rejected step size shrinks by how far it missed (arXiv 2408.13150).

    With v = h_k / (c eta s_k), below 1 where it is rejected: by max(0.01, rho (1 - c) / (1 - c v)).
    """

    def _choose(
        self,
        settings: SearchSettings,
        state: SearchState,
        evaluate: Evaluate,
        *,
        loss: float,
        slopes: list[float],
        resolution: float,
    ) -> Found:
        (slope,) = slopes
        step_size, trial_loss = first_step_size(settings, state), math.nan
        for _ in range(settings.max_trials):
            trial_loss = evaluate(step_size)
            if is_accepted(settings, state, step_size, loss - trial_loss, slope):
                break
            h = moving_average(state.h, loss - trial_loss, settings.beta3)
            s = moving_average(state.s, slope, settings.beta3)
            missed = h / (settings.c * step_size * s) if math.isfinite(h) else -math.inf
            factor = settings.backtrack_factor * (1 - settings.c) / (1 - settings.c * missed)
            step_size *= max(0.01, factor)
        # `search` accepts it at once, and moves averages and interval on.
        return search(
            replace(settings, steps_to_double=NO_GROWTH, max_trials=1),
            replace(state, step_size=step_size),
            lambda _: trial_loss,
            loss=loss,
            slope=slope,
            resolution=resolution,
        )


class RelativeChange(SaLSaAdam):
    """The paper's rule, with a tested step of at most a hundredth of the weights' norm."""

    largest = 0.01

    def _measure(self, chunk: Any) -> tuple[list[Tensor], list[list[Tensor]]]:
        direction, products = super()._measure(chunk)
        squares = [[t.square().sum() for t in column] for column in (direction, chunk.backups)]
        return direction, [*products, *squares]

    def _choose(
        self,
        settings: SearchSettings,
        state: SearchState,
        evaluate: Evaluate,
        *,
        loss: float,
        slopes: list[float],
        resolution: float,
    ) -> Found:
        slope, of_direction, of_weights = slopes
        growth = first_step_size(settings, state) / state.step_size
        bound = self.largest * math.sqrt(of_weights / of_direction) / growth
        return search(
            settings,
            replace(state, step_size=min(state.step_size, bound)),
            evaluate,
            loss=loss,
            slope=slope,
            resolution=resolution,
        )


class OtherBatch(SaLSaAdam):
    """The paper's rule, but the mini-batch of the search before judges the step of this one."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self._judge: Callable[[], Tensor] | None = None

    def _search(self, closure: Any, loss: Any, clip_factor: Any, state: SearchState) -> Any:
        # A copy of the objective keeps its mini-batch: clearing makes new lists.
        judge, self._judge = self._judge, copy.copy(closure)
        if judge is None:
            return super()._search(closure, loss, clip_factor, state)
        return super()._search(judge, None, clip_factor, state)


class PlusOtherBatch(OtherBatch, SaLSaAdamPlus):
    """`SaLSaAdamPlus`, likewise."""


class Averaged(SaLSaAdam):
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


class PlusAveraged(Averaged, SaLSaAdamPlus):
    """`SaLSaAdamPlus`, likewise."""


class ScheduleFree(SaLSaAdam):
    """Schedule-Free AdamW (arXiv 2405.15682) with a learning rate gamma by the paper's rule.

    It trains y = (1 - beta1) z + beta1 x, where x is the mean of all z. A step of z by gamma moves
    y by gamma (1 - beta1 (1 - 1/k)) along its gradient, and that is the eta that the search tests.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self._at_y = True

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg_sq"] = torch.zeros_like(param)
            state["z"] = param.detach().clone()
        return state

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
        torch._foreach_add_(states["step"], 1)
        step = float(states["step"][0])
        torch._foreach_lerp_(states["exp_avg_sq"], torch._foreach_mul(grads, grads), 1 - beta2)
        correction = 1 - beta2**step
        denominators = torch._foreach_div(states["exp_avg_sq"], correction)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        normalized = torch._foreach_div(grads, denominators)
        torch._foreach_lerp_(weights, states["z"], 1 / step)
        torch._foreach_add_(weights, normalized, alpha=-step_size)
        rate = step_size / (1 - beta1 * (1 - 1 / step))
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
