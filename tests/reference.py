"""The optimizers line by line: float64, one tensor and one trial at a time, no cleverness.

`Reference` is the paper, `PlusReference` the formulas of `SaLSaAdamPlus`.

The tests hold the optimizers of hf_salsa against this. It shares no code with them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Loss = Callable[[list[Tensor]], Tensor]

DEFAULTS = {
    "SaLSaAdam": {"c": 0.3, "beta3": 0.99, "max_search_interval": 10},
    "SaLSaSGD": {"c": 0.3, "beta3": 0.99, "max_search_interval": 10},
    "SLSAdam": {"c": 0.1, "beta3": 0.0, "max_search_interval": 1},
    "SLSSGD": {"c": 0.1, "beta3": 0.0, "max_search_interval": 1},
    "SaLSaAdamPlus": {"c": 0.4, "beta3": 0.9, "max_search_interval": 10},
    "SaLSaSGDPlus": {"c": 0.4, "beta3": 0.9, "max_search_interval": 10},
}


@dataclass
class Parameter:
    """One weight tensor w_k with the options of its group and its moments."""

    w: Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    g: Tensor | None = None
    k: int = 0  # gradients seen so far
    m: Tensor = field(init=False)
    v: Tensor = field(init=False)
    buf: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.w = self.w.detach().clone().to(torch.float64)
        self.m, self.v, self.buf = (torch.zeros_like(self.w) for _ in range(3))


class Reference:
    """SGD or Adam with SLS (beta3 = 0) or SaLSa; the arguments are those of the optimizers."""

    def __init__(
        self,
        name: str,
        parameters: Sequence[Parameter],
        *,
        steps_to_double: float = 500,
        backtrack_factor: float = 0.9,
        initial_step_size: float = 1.0,
        direction: str = "gradient",
        require_decrease: bool = False,
        **changed: float,
    ) -> None:
        if unknown := changed.keys() - DEFAULTS[name].keys():
            raise TypeError(f"The reference of {name} has no setting {sorted(unknown)}.")
        options = DEFAULTS[name] | changed
        self.adam = "Adam" in name
        self.parameters = list(parameters)
        self.c, self.beta3 = options["c"], options["beta3"]
        self.max_search_interval = int(options["max_search_interval"])
        self.b = steps_to_double
        self.delta = backtrack_factor
        self.direction = direction
        self.require_decrease = require_decrease

        self.eta = initial_step_size
        self.searched = False  # has any search succeeded?
        self.n = 0  # steps since the latest search
        self.L = 1
        self.h = self.s = 0.0
        self.etabar = {0.9: 0.0, 0.99: 0.0}
        self.outcome: str | None = None  # of the latest search
        self.searches = self.failed_searches = self.skipped_steps = self.trials = 0

    @property
    def weights(self) -> list[Tensor]:
        return [p.w for p in self.parameters]

    def step(self, loss: Loss, trial_loss: Loss | None = None) -> None:
        """One training step; ``trial_loss`` replaces the loss at trial points (to break them)."""
        w = [p.w.clone().requires_grad_() for p in self.parameters]
        f = loss(w)
        gradients = torch.autograd.grad(f, w)
        f0 = f.item()
        if not math.isfinite(f0) or not all(bool(g.isfinite().all()) for g in gradients):
            self.skipped_steps += 1
            return
        self.observe(gradients)
        self.n += 1
        if self.n >= self.L:
            self.search(f0, trial_loss or loss)
            self.n = 0
        if self.searched:
            self.update()

    def observe(self, gradients: Sequence[Tensor | None]) -> None:
        """Eq. 2's moments (with m_k, not the printed m_{k-1}), or heavy-ball momentum."""
        for p, g in zip(self.parameters, gradients, strict=True):
            p.g = None if g is None else g.detach().to(torch.float64)
            if p.g is None:
                continue
            p.k += 1
            beta1, beta2 = p.betas
            p.m = beta1 * p.m + (1 - beta1) * p.g
            p.v = beta2 * p.v + (1 - beta2) * p.g**2
            p.buf = p.momentum * p.buf + p.g

    def preconditioner(self, p: Parameter) -> Tensor:
        """sqrt(vhat_k) + eps."""
        return (p.v / (1 - p.betas[1] ** p.k)).sqrt() + p.eps

    def momentum_direction(self, p: Parameter) -> Tensor:
        """d_k of the final update of each step, beta1 != 0."""
        if not self.adam:
            return -p.buf
        mhat = p.m / (1 - p.betas[0] ** p.k)
        return -mhat / self.preconditioner(p)

    def tested_direction(self, p: Parameter) -> Tensor:
        """d_k of the trial points: beta1 = 0 unless direction="momentum"."""
        if p.g is None:
            return torch.zeros_like(p.w)
        if self.direction == "momentum":
            return self.momentum_direction(p)
        return -p.g / self.preconditioner(p) if self.adam else -p.g

    def slope(self) -> float:
        """||g||^2 (Eq. 1), sum g^2/(sqrt(vhat)+eps) (Eq. 3, 7), or <g, -d> for momentum."""
        return sum(
            (p.g * -self.tested_direction(p)).sum().item()
            for p in self.parameters
            if p.g is not None
        )

    def trial_point(self, eta: float) -> list[Tensor]:
        """w_k + eta d_k."""
        return [p.w + eta * self.tested_direction(p) for p in self.parameters]

    def first_trial(self) -> float:
        """eta_{k-1} 2^(n/b)."""
        return self.eta * 2 ** (self.n / self.b)

    def smoothed(self, f0: float, f: float, slope: float) -> tuple[float, float]:
        """Eq. 4 and 5 (and 7): h_k and s_k."""
        h = self.beta3 * self.h + (1 - self.beta3) * (f0 - f)
        s = self.beta3 * self.s + (1 - self.beta3) * slope
        return h, s

    def accepts(self, eta: float, f0: float, f: float, slope: float, slack: float = 0.0) -> bool:
        """Eq. 6 (Eq. 1 and 3 with beta3 = 0), and Theorem 1's decrease if it is asked for."""
        if not math.isfinite(f):
            return False
        if self.require_decrease and not f0 - f >= -slack:
            return False
        h, s = self.smoothed(f0, f, slope)
        return h >= self.c * eta * s - slack

    def accept(self, eta: float, f0: float, f: float, slope: float) -> None:
        """Move h, s, the step-size averages (Eq. 8) and the interval (Eq. 9-11), once."""
        self.h, self.s = self.smoothed(f0, f, slope)
        self.eta = eta
        self.searched = True
        self.etabar = {beta: beta * bar + (1 - beta) * eta for beta, bar in self.etabar.items()}
        r = self.etabar[0.9] / self.etabar[0.99]
        rbar = max(r, 1 / r)
        wanted = math.inf if rbar == 1 else 1 / (rbar - 1)
        wanted = min(wanted, self.max_search_interval)
        self.L = max(1, math.floor(wanted + 0.5))

    def search(self, f0: float, loss: Loss) -> None:
        """Algorithm 1: shrink by delta until the criterion accepts."""
        self.searches += 1
        slope = self.slope()
        self.outcome = "slope"
        j = 0
        while slope > 0:
            eta = self.first_trial() * self.delta**j
            if eta * slope < torch.finfo(torch.float64).eps * abs(f0):
                self.outcome = "unresolved"
                break
            f = loss(self.trial_point(eta)).item()
            self.trials += 1
            if self.accepts(eta, f0, f, slope):
                self.outcome = "accepted"
                self.accept(eta, f0, f, slope)
                return
            j += 1
        self.failed_searches += 1

    def update(self) -> None:
        """The final update: from w_k again, decoupled weight decay, then momentum."""
        for p in self.parameters:
            if p.g is not None:
                p.w = p.w * (1 - self.eta * p.weight_decay)
                p.w = p.w + self.eta * self.momentum_direction(p)


class PlusReference(Reference):
    """`SaLSaAdamPlus` and `SaLSaSGDPlus`, every average computed anew from all that was seen."""

    def __init__(
        self,
        name: str,
        parameters: Sequence[Parameter],
        *,
        steps_to_double_fast: float = 12,
        confidence: float = 2.0,
        first_share: float = 0.1,
        backtrack_factor: float = 0.5,
        direction: str = "momentum",
        **options: float,
    ) -> None:
        super().__init__(
            name, parameters, backtrack_factor=backtrack_factor, direction=direction, **options
        )
        self.fast_b = steps_to_double_fast
        self.confidence = confidence
        self.first_share = first_share
        self.slopes: list[float] = []
        self.curvatures: list[float] = []
        self.agreements: list[float] = []
        self.etas: list[float] = []
        self.warm_up_over = False
        self.fast_growth = self.bounded = 0  # searches in which they decided

    def earlier(self, p: Parameter) -> Tensor:
        """p_k, what earlier gradients put into the direction: all of it but the newest gradient."""
        if not self.adam:
            return p.buf - p.g
        beta1 = p.betas[0]
        newest = (1 - beta1) * p.g / (1 - beta1**p.k) / self.preconditioner(p)
        return -self.momentum_direction(p) - newest

    def average(self, values: Sequence[float]) -> float:
        """Weights beta3^(age), normalised."""
        weights = [self.beta3 ** (len(values) - 1 - i) for i in range(len(values))]
        return sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)

    def grows_fast(self) -> bool:
        n = len(self.agreements)
        if n < 3:
            return False
        mean = self.average(self.agreements)
        variance = max(self.average([a**2 for a in self.agreements]) - mean**2, 0)
        count = min(n, (1 + self.beta3) / (1 - self.beta3))
        agree = mean > self.confidence * math.sqrt(variance / count)
        if n >= 10 and not agree:
            self.warm_up_over = True
        return agree and not self.warm_up_over

    def search(self, f0: float, loss: Loss) -> None:
        slope = self.slope()
        if not self.searched:
            self.start(f0, loss, slope)
            return
        self.searches += 1
        present = [p for p in self.parameters if p.g is not None]
        self.slopes.append(slope)
        self.agreements.append(sum((p.g * self.earlier(p)).sum().item() for p in present))
        fast = self.grows_fast()
        eta = self.eta * 2 ** (self.n / (self.fast_b if fast else self.b))
        steepest = max(abs(slope), self.average(self.slopes))
        f = loss(self.trial_point(eta)).item()
        self.trials += 1
        while not math.isfinite(f):
            eta *= self.delta
            f = loss(self.trial_point(eta)).item()
            self.trials += 1
        curvature = 2 * (slope - (f0 - f) / eta) / eta
        self.curvatures.append(min(curvature, 4 * steepest / eta))
        s, kappa = self.average(self.slopes), self.average(self.curvatures)
        if s <= 0:
            bound = 0.0
        elif kappa <= 0:
            bound = math.inf
        else:
            bound = 2 * (1 - self.c) * s / kappa
        self.fast_growth += fast
        self.bounded += bound < eta
        self.eta = min(eta, max(bound, self.delta * self.eta))
        self.etas.append(self.eta)
        self.L = min(self.max_search_interval, 1 + len(self.etas) // 8) if self.warm_up_over else 1

    def start(self, f0: float, loss: Loss, slope: float) -> None:
        self.searches += 1
        eta = self.first_trial()
        while True:
            self.trials += 1
            if f0 - loss(self.trial_point(eta)).item() >= self.c * eta * slope:
                break
            eta *= self.delta
        self.eta, self.searched = self.first_share * eta, True
