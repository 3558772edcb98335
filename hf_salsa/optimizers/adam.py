"""Adam's directions and steps, and the optimizers that take them.

Equation numbers are those of Kenneweg et al., "No learning rates needed: Introducing SALSA"
(IJCNN 2024).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from ..rules import Plus, SaLSa, StepSizeRule
from .base import LineSearchOptimizer
from .signature import explicit_signature
from .tensors import dots, moment_dtype
from .trial_points import Chunk
from .updates import Update


class LineSearchAdam(LineSearchOptimizer):
    r"""Adam whose step size comes from a rule: the base class for a rule of one's own.

        m_k = beta1 m_{k-1} + (1 - beta1) g_k,    mhat = m_k / (1 - beta1^k)           (Eq. 2)
        v_k = beta2 v_{k-1} + (1 - beta2) g_k^2,  vhat = v_k / (1 - beta2^k)
        tested: d_k = -g_k / (sqrt(vhat) + eps), or with direction "momentum" the direction of
                the step itself, -mhat / (sqrt(vhat) + eps)
        w_{k+1} = (1 - eta weight_decay) w_k - eta mhat / (sqrt(vhat) + eps)

    With the class attribute `nesterov` mhat is that of Nesterov's momentum, in which g_k counts
    once more (Dozat, "Incorporating Nesterov Momentum into Adam", 2016):

        n_k = beta1 m_k + (1 - beta1) g_k,        mhat = n_k / (1 - beta1^(2k))

    That is what torch's kernel divides by. The weights in n_k add up to 1 - beta1^(k+1): in the
    first twenty steps mhat is up to 28 % smaller than their mean.

    Args, beside those of `LineSearchOptimizer`:
        direction: `"gradient"` or `"momentum"`, the direction that is tested. The step is taken
            along momentum either way; `"momentum"` tests just that step.
        betas: beta1 and beta2, each in [0, 1).
        eps: Added to the denominator, above 0.
        weight_decay: Decoupled weight decay (AdamW's), at least 0. Not part of the tested step.
        head_first: Updates at the start, at least 0, that train a new head alone.
    """

    options: ClassVar[dict[str, Any]] = {
        "direction": "gradient",
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "head_first": 0,
    }
    base_name: ClassVar[str] = "Adam"
    usual_step_size: ClassVar[float] = 1e-3  # Adam's default since its paper, and torch's

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return step 0 and moments of 0, in float32 or wider."""
        dtype = moment_dtype(param)
        return {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros_like(param, dtype=dtype),
            "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
        }

    def step_numbers(self, params: list[Tensor], group: dict[str, Any]) -> list[int]:
        """Return k of each parameter for the coming step."""
        if not params:
            return []
        steps = [self._state_of(p, group)["step"].to(params[0].device) for p in params]
        return [int(step) + 1 for step in torch.stack(steps).tolist()]

    def direction(self, chunk: Chunk) -> list[Tensor]:
        """Return -d_k: g_k or mhat_k over sqrt(vhat_k) + eps."""
        return self._preconditioned(chunk, self._preconditioner(chunk))

    def direction_and_agreement(self, chunk: Chunk) -> tuple[list[Tensor], list[Tensor]]:
        """Return -d_k, and <g_k, p_k>, p_k = beta1 m_{k-1} / (1 - beta1^k) / (sqrt(vhat) + eps).

        With `nesterov` beta1^2 stands for beta1.
        """
        beta1, _ = self._kernel_betas(chunk.group)
        preconditioner = self._preconditioner(chunk)
        factor = beta1 / (1 - beta1**chunk.step)
        earlier = list(torch._foreach_mul(chunk.states["exp_avg"], factor))
        torch._foreach_mul_(earlier, preconditioner)  # p_k
        agreement = dots(chunk.grads, earlier)
        del earlier  # before the direction takes as much again
        return self._preconditioned(chunk, preconditioner), agreement

    def _preconditioned(self, chunk: Chunk, preconditioner: list[Tensor]) -> list[Tensor]:
        """Turn `preconditioner` into -d_k, in its own memory: new tensors cost more than this."""
        beta1, _ = self._kernel_betas(chunk.group)
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
    def _preconditioner(chunk: Chunk) -> list[Tensor]:
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

    def take_step(self, update: Update) -> None:
        """Take torch's AdamW step; with `nesterov` along n_k."""
        beta1, beta2 = self._kernel_betas(update.group)
        adamw(
            update.weights,
            update.grads,
            update.states["exp_avg"],
            update.states["exp_avg_sq"],
            [],
            update.states["step"],
            foreach=not update.fused,
            fused=update.fused,
            found_inf=update.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=update.step_size,
            weight_decay=update.group["weight_decay"],
            eps=update.group["eps"],
            maximize=False,
        )
        if self.nesterov and beta1:
            self._undo_nesterov(update)

    def _kernel_betas(self, group: dict[str, Any]) -> tuple[float, float]:
        """Return what torch's kernel takes: n_k = beta1^2 m_{k-1} + (1 - beta1^2) g_k."""
        beta1, beta2 = group["betas"]
        return beta1 ** (2 if self.nesterov else 1), beta2

    @staticmethod
    def _undo_nesterov(update: Update) -> None:
        """Turn n_k, which torch's kernel left in the place of m_k, into m_k."""
        beta1, _ = update.group["betas"]
        moments, grads = update.states["exp_avg"], update.grads
        if update.found_inf is None:
            torch._foreach_lerp_(moments, grads, 1 - 1 / beta1)
            return
        for moment, grad in zip(moments, grads, strict=True):  # one copy of a gradient at a time
            skipped = update.found_inf.to(moment.device, non_blocking=True) > 0
            moment.lerp_(torch.where(skipped, moment, grad), 1 - 1 / beta1)


class SaLSaAdam(LineSearchAdam):
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
        head_first: Updates at the start, at least 0, that train the new head alone: the groups
            with `"head": True` (`hf_salsa.head_groups`); at most a tenth of the run.
        total_steps: Steps of the run, at least 1, for `cool_down`; `SaLSaTrainer` knows them. None
            (default): not known, `plan()` will say.

    Raises:
        ValueError: An argument is out of range; the message has the range.

    Source:
        Kenneweg, Kenneweg, Fumagalli, Hammer: "No learning rates needed: Introducing SALSA - Stable
        Armijo Line Search Adaptation" (IJCNN 2024).

    Warning:
        The gradients must be the derivative of the loss that is evaluated: a loss with detached
        factors has no step size that can be judged by it. And d_k must descend, which `"gradient"`
        always does and `"momentum"` need not: such a search fails, the step size stays as it was.

    Example:
        >>> optimizer = SaLSaAdam(model.parameters())
        >>> objective = BatchObjective(model, optimizer)
        >>> for batch in loader:
        ...     loss = objective.record(loss_fn, batch)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
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
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        direction: str = "gradient",
        require_decrease: bool = SaLSa.require_decrease,
        max_trials: int = SaLSa.max_trials,
        cool_down: float = SaLSa.cool_down,
        head_first: int = 0,
        total_steps: int | None = None,
    ) -> None: ...


class SLSAdam(SaLSaAdam):
    r"""Adam whose step size is chosen by SLS, the Armijo line search of every single mini-batch.

    `SaLSaAdam` with beta3 = 0 (Eq. 3: f_k(w_k + eta d_k) <= f_k(w_k) - c eta slope_k), c = 0.1 and
    a search at every step. Arguments, ranges and errors are those of `SaLSaAdam`.
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
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        direction: str = "gradient",
        require_decrease: bool = SaLSa.require_decrease,
        max_trials: int = SaLSa.max_trials,
        cool_down: float = SaLSa.cool_down,
        head_first: int = 0,
        total_steps: int | None = None,
    ) -> None: ...


class SaLSaAdamPlus(LineSearchAdam):
    r"""NAdam without a learning rate: a new head first, a trust region in function space, a tail.

    Not the paper's method, but what came out of it when one setting had to serve fine-tuning and
    training from scratch. With the symbols of `SaLSaAdam`, u the last step, f and g loss and
    gradient of the next mini-batch, which this step has not seen:

        head:    the first `head_first` updates train a new head alone, by a line search of its own
        start:   eta = `first_share` of the largest step size with f(w) - f(w + eta d) >=
                 0.4 eta slope on the first mini-batch (Eq. 1), d = -mhat / (sqrt(vhat) + eps),
                 mhat that of Nesterov's momentum (`LineSearchAdam`);
                 where the weights were never trained eta rises instead, over 5 % of the run, to
                 1e-3, Adam's default since its paper, which shrinks as eta does below; after a head
                 to 0.02 s, s the geometric mean of rms (1/sqrt(rows) + 1/sqrt(columns)) over the
                 body's matrices: steps whose signs agree are 2 % of the spectral norm that random
                 matrices of their size have
        search:  D = f(w - u) - f(w) + <g, u>, one forward pass; averaged
        shrink:  where D > 3 B, B = `trust` * (mean loss of the first ten searches), by
                 (3 B / D)^(steps since the last search / 10), at most by half (weights that were
                 never trained: where |D| > B, without the 3)
        grow:    where D <= 2 B, by (2 B / D)^(n / 60), at most twofold in `steps_to_double` steps,
                 while the loss falls and p > 0. n are the steps since the last search; on trained
                 weights with a new head or adapters (a parameter is 0 throughout), and with SGD,
                 min(1, 2 p^2) of them. p, 0 at first, is the average of 1 where the last step
                 lowered the loss of the next mini-batch and of -1 where it did not. Weights that
                 were never trained: B for 2 B. Runs of less than 500 steps have their share of the
                 60
        step:    w - eta mhat / (sqrt(vhat) + eps), eta falling linearly to 0 over the last
                 `cool_down` of the run, where it no longer grows

    A run whose loss leaves the range in which it started halves its step size until it is back, or
    until its steps hardly show in the loss. Searches are at every step in the beginning and ever
    fewer later. It keeps one more copy of the trainable weights, those before the last step.

    Clip the gradients: without it training from scratch may fail. `SaLSaTrainer` clips them at a
    norm of 1; a loop of one's own does it as below. The loss must not be negative.

    Args:
        params: As in `SaLSaAdam`.
        first_share: Share of the first step size found at which training starts, in (0, 1].
            Without effect where training starts with a warm-up: after a head whose body has
            matrices, none of them 0, and where the weights were never trained, that is, most biases
            and normalisations are 0 or 1.
        trust: B as a share of the loss at the start, above 0.
        steps_to_double: Steps in which the step size may double, at least 1; with a new head or
            adapters on trained weights, and with SGD, more, the fewer of them make progress.
        initial_step_size: Where the first search starts, above 0. It goes up and down from there.
        max_search_interval: Most steps between two searches, at least 1.
        direction: Along which the first step size is found: `"momentum"`, d as above, or
            `"gradient"`, that of `SaLSaAdam`.
        betas: beta1 and beta2, each in [0, 1).
        eps: Added to the denominator, above 0.
        weight_decay: Decoupled weight decay (AdamW's), at least 0. Part of u.
        cool_down: Share of the run, in [0, 1], over which at its end the step size falls to 0.
        head_first: Updates at the start, at least 0, that train the new head alone: the groups
            with `"head": True` (`hf_salsa.head_groups`); at most a tenth of the run.
        total_steps: Steps of the run, at least 1; `SaLSaTrainer` knows them. None (default): not
            known, `plan()` will say, or `cool_down=0` needs none.

    Raises:
        ValueError: An argument is out of range; the message has the range.
        RuntimeError: In a step: the loss is negative.

    Example:
        >>> optimizer = SaLSaAdamPlus(model.parameters(), total_steps=len(loader))
        >>> objective = BatchObjective(model, optimizer)
        >>> for batch in loader:
        ...     loss = objective.record(loss_fn, batch)
        ...     loss.backward()
        ...     objective.clip_grad_norm_(1.0)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    rule_type: ClassVar[type[StepSizeRule[Any]]] = Plus
    nesterov: ClassVar[bool] = True

    @explicit_signature
    def __init__(
        self,
        params: ParamsT,
        *,
        first_share: float = Plus.first_share,
        trust: float = Plus.trust,
        steps_to_double: float = Plus.steps_to_double,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        initial_step_size: float = Plus.initial_step_size,
        max_search_interval: int = Plus.max_search_interval,
        direction: str = "momentum",
        weight_decay: float = 0.0,
        cool_down: float = Plus.cool_down,
        head_first: int = 10,
        total_steps: int | None = None,
    ) -> None: ...
