"""SGD's directions and steps, and the optimizers that take them.

Equation numbers are those of Kenneweg et al., "No learning rates needed: Introducing SALSA"
(IJCNN 2024).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from ..rules import Plus, SaLSa, StepSizeRule
from .base import LineSearchOptimizer
from .signature import explicit_signature
from .tensors import LOW_PRECISION, dots, moment_dtype
from .trial_points import Chunk
from .updates import Update


class LineSearchSGD(LineSearchOptimizer):
    r"""SGD whose step size comes from a rule: the base class for a rule of one's own.

        u_k = momentum u_{k-1} + g_k
        tested: d_k = -g_k, or with direction "momentum" the direction of the step itself, -u_k
        w_{k+1} = (1 - eta weight_decay) w_k - eta u_k

    Args, beside those of `LineSearchOptimizer`:
        direction: `"gradient"` or `"momentum"`, the direction that is tested.
        momentum: Heavy-ball momentum of the final update, in [0, 1).
        weight_decay: Decoupled weight decay (AdamW's, not the L2 term of torch.optim.SGD), at
            least 0. Not part of the tested step.
    """

    options: ClassVar[dict[str, Any]] = {
        "direction": "gradient",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "head_first": 0,
    }
    base_name: ClassVar[str] = "SGD"
    degree: ClassVar[int] = 1

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return a momentum buffer of 0, in float32 or wider; nothing without momentum."""
        if not group["momentum"]:
            return {}
        dtype = moment_dtype(param)
        return {"momentum_buffer": torch.zeros_like(param, dtype=dtype)}

    def direction_and_agreement(self, chunk: Chunk) -> tuple[list[Tensor], list[Tensor]]:
        """Return -d_k, and <g_k, p_k>, p_k = momentum u_{k-1}: 0 without momentum."""
        if not chunk.group["momentum"]:
            return self.direction(chunk), [g.new_zeros(()) for g in chunk.grads]
        buffers = chunk.states["momentum_buffer"]
        earlier = list(torch._foreach_mul(buffers, chunk.group["momentum"]))  # p_k
        return self.direction(chunk), dots(chunk.grads, earlier)

    def direction(self, chunk: Chunk) -> list[Tensor]:
        """Return -d_k: g_k or u_k."""
        wide = [g.float() if g.dtype in LOW_PRECISION else g for g in chunk.grads]
        if chunk.group["direction"] == "gradient" or not chunk.group["momentum"]:
            return wide
        buffers = torch._foreach_mul(chunk.states["momentum_buffer"], chunk.group["momentum"])
        torch._foreach_add_(buffers, wide)
        return list(buffers)

    def rescale(self, growth: float) -> None:
        """Rescale u_{k-1}: else a step along it would have another length."""
        for state in self.state.values():
            if "momentum_buffer" in state:
                state["momentum_buffer"].mul_(growth)

    def take_step(self, update: Update) -> None:
        """Take torch's SGD step after decoupled decay."""
        momentum, weight_decay = update.group["momentum"], update.group["weight_decay"]
        if weight_decay:
            decay: Tensor | float = update.step_size * weight_decay
            if update.found_inf is not None:
                decay = decay * (1 - update.found_inf.double())
            torch._foreach_mul_(update.weights, 1 - decay)
        sgd(
            update.weights,
            update.grads,
            list(update.states["momentum_buffer"]) if momentum else [None] * len(update.weights),
            foreach=not update.fused,
            fused=update.fused,
            found_inf=update.found_inf,
            weight_decay=0.0,
            momentum=momentum,
            lr=update.step_size,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


class SaLSaSGD(LineSearchSGD):
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
        head_first: Updates at the start, at least 0, that train the new head alone: the groups
            with `"head": True` (`hf_salsa.head_groups`); at most a tenth of the run.
        total_steps: Steps of the run, at least 1, for `cool_down`; `SaLSaTrainer` knows them. None
            (default): not known, `plan()` will say.

    Raises:
        ValueError: An argument is out of range; the message has the range.

    Source:
        Kenneweg, Kenneweg, Fumagalli, Hammer: "No learning rates needed: Introducing SALSA - Stable
        Armijo Line Search Adaptation" (IJCNN 2024).
    """

    rule_type: ClassVar[type[StepSizeRule[Any]]] = SaLSa

    @explicit_signature
    def __init__(
        self,
        params: ParamsT,
        *,
        c: float = SaLSa.c,
        beta3: float = SaLSa.beta3,
        steps_to_double: float = SaLSa.steps_to_double,
        backtrack_factor: float = SaLSa.backtrack_factor,
        initial_step_size: float = SaLSa.initial_step_size,
        max_search_interval: int = SaLSa.max_search_interval,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        direction: str = "gradient",
        require_decrease: bool = SaLSa.require_decrease,
        max_trials: int = SaLSa.max_trials,
        cool_down: float = SaLSa.cool_down,
        head_first: int = 0,
        total_steps: int | None = None,
    ) -> None: ...


class SLSSGD(SaLSaSGD):
    r"""SGD whose step size is chosen by SLS, the Armijo line search of every single mini-batch.

    `SaLSaSGD` with beta3 = 0 (Eq. 1: f_k(w_k - eta g_k) <= f_k(w_k) - c eta ||g_k||^2), c = 0.1 and
    a search at every step. Arguments, ranges and errors are those of `SaLSaSGD`.
    """

    @explicit_signature
    def __init__(
        self,
        params: ParamsT,
        *,
        c: float = 0.1,
        beta3: float = 0.0,
        steps_to_double: float = SaLSa.steps_to_double,
        backtrack_factor: float = SaLSa.backtrack_factor,
        initial_step_size: float = SaLSa.initial_step_size,
        max_search_interval: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        direction: str = "gradient",
        require_decrease: bool = SaLSa.require_decrease,
        max_trials: int = SaLSa.max_trials,
        cool_down: float = SaLSa.cool_down,
        head_first: int = 0,
        total_steps: int | None = None,
    ) -> None: ...


class SaLSaSGDPlus(LineSearchSGD):
    r"""SGD without a learning rate: a new head first, a trust region in function space, a tail.

    `SaLSaAdamPlus` on SGD with the usual momentum, not Nesterov's: u_k = momentum u_{k-1} + g_k,
    d_k = -u_k.

    Args:
        params: As in `SaLSaSGD`.
        momentum: Heavy-ball momentum, in [0, 1).
        weight_decay: Decoupled weight decay (AdamW's, not the L2 term of torch.optim.SGD), at
            least 0. Part of the last step.
        first_share: As in `SaLSaAdamPlus`; training always starts so: no step size is usual.
        trust, steps_to_double, initial_step_size, max_search_interval, direction, cool_down,
            head_first, total_steps: as in `SaLSaAdamPlus`.

    Raises:
        ValueError: An argument is out of range; the message has the range.
        RuntimeError: In a step: the loss is negative.
    """

    rule_type: ClassVar[type[StepSizeRule[Any]]] = Plus

    @explicit_signature
    def __init__(
        self,
        params: ParamsT,
        *,
        first_share: float = Plus.first_share,
        trust: float = Plus.trust,
        steps_to_double: float = Plus.steps_to_double,
        momentum: float = 0.9,
        initial_step_size: float = Plus.initial_step_size,
        max_search_interval: int = Plus.max_search_interval,
        direction: str = "momentum",
        weight_decay: float = 0.0,
        cool_down: float = Plus.cool_down,
        head_first: int = 10,
        total_steps: int | None = None,
    ) -> None: ...
