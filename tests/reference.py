"""The optimizers line by line: float64, one tensor and one trial at a time, no cleverness.

`Reference` is the paper, `PlusReference` the formulas of `SaLSaAdamPlus`.

The tests hold the optimizers of hf_salsa against this. It shares no code with them, only the
constants of the plus rule.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_salsa.rules import Plus, first, plus

Loss = Callable[[list[Tensor]], Tensor]

DEFAULTS = {
    "SaLSaAdam": {"c": 0.3, "beta3": 0.99, "max_search_interval": 10},
    "SaLSaSGD": {"c": 0.3, "beta3": 0.99, "max_search_interval": 10},
    "SLSAdam": {"c": 0.1, "beta3": 0.0, "max_search_interval": 1},
    "SLSSGD": {"c": 0.1, "beta3": 0.0, "max_search_interval": 1},
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
        self.nesterov = False

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
        beta1 = p.betas[0]
        mhat = p.m / (1 - beta1**p.k)
        if self.nesterov:
            mhat = (beta1 * p.m + (1 - beta1) * p.g) / (1 - beta1 ** (2 * p.k))
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
        direction: str = "momentum",
        total_steps: int = 0,
        initial_step_size: float = Plus.initial_step_size,
        untrained: bool = False,
        all_trained: bool = False,
        usual: float = 0.0,
        matrices: Sequence[Tensor] = (),
        **options: float,
    ) -> None:
        paper = "SaLSaAdam" if "Adam" in name else "SaLSaSGD"
        super().__init__(
            paper, parameters, direction=direction, initial_step_size=initial_step_size
        )
        self.nesterov = self.adam
        self.settings = vars(Plus(**options))
        self.total_steps = total_steps
        self.untrained = untrained
        self.all_trained = all_trained
        self.warm_up_to = usual  # step size, of weights that were never trained
        if matrices:  # of the body, after a head phase
            sizes = [
                (w.square().mean().sqrt() * (len(w) ** -0.5 + w[0].numel() ** -0.5)).item()
                for w in matrices
            ]
            self.warm_up_to = plus._OF_MATRICES * math.prod(sizes) ** (1 / len(sizes))
        self.warming_up = False
        self.k = 0  # steps so far
        self.started_at = 0
        self.before = [p.w.clone() for p in self.parameters]  # the last step
        self.first_losses: list[float] = []
        self.losses: list[float] = []
        self.changes: list[float] = []  # |D|
        self.compared: list[tuple[float, float]] = []  # losses, and means of the first then
        self.signs: list[float] = []  # of f(w - u) - f(w)
        # Searches in which each of them decided.
        names = [
            "warmed up",
            "lowered",
            "shrunk",
            "out of range",
            "waited",
            "still",
            "grown",
            "tolerated",
        ]
        self.decided = dict.fromkeys(names, 0)

    def factor(self, k: int) -> float:
        """Of the tail."""
        tail = self.settings["cool_down"] * self.total_steps
        return min(1.0, (self.total_steps - k) / tail) if tail else 1.0

    @property
    def applied(self) -> float:
        """The step size of the latest step."""
        return self.eta * self.factor(self.k - 1)

    def average(self, values: Sequence[float], beta: float = plus._BETA) -> float:
        """Weights beta^(age), normalised."""
        weights = [beta ** (len(values) - 1 - i) for i in range(len(values))]
        return sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)

    def search(self, f0: float, loss: Loss) -> None:
        self.searches += 1
        if not self.searched:
            self.start(f0, loss, self.slope())
            return
        if len(self.first_losses) < plus._FIRST:
            so_far = sum(self.first_losses) / len(self.first_losses)
            self.first_losses.append(min(f0, plus._UNKNOWN_RANGE * so_far))
        mean = sum(self.first_losses) / len(self.first_losses)
        bound = self.settings["trust"] * mean

        step = [p.w - w for p, w in zip(self.parameters, self.before, strict=True)]
        pairs = zip(self.parameters, step, strict=True)
        foreseen = sum((p.g * u).sum().item() for p, u in pairs if p.g is not None)
        tail = self.factor(self.k - 1)
        self.trials += 1
        decrease = loss(self.before).item() - f0
        change = decrease + foreseen
        change = abs(change) if self.untrained else max(change, 0.0)
        change = min(change / tail**2, plus._SAMPLE_LIMIT * bound)
        self.losses.append(f0)
        self.compared.append((f0, mean))
        self.changes.append(change)
        self.signs.append(math.copysign(decrease != 0, decrease))
        if self.warming_up:
            self.warm_up(bound)
        else:
            self.move(bound, mean)
        self.L = self.interval()

    def warm_up(self, bound: float = math.inf) -> None:
        """The line through 0 that reaches its end in the last step of the warm-up."""
        last = max(1, math.floor(self.total_steps / 20)) if self.total_steps else 50
        k = self.k - self.started_at + 1
        self.eta = self.warm_up_to * min(k, last) / last
        self.warming_up = k < last
        self.decided["warmed up"] += 1
        change = self.average(self.changes) if self.changes else 0.0
        if self.untrained and change > bound:
            shrinkage = max(0.5, (bound / change) ** (self.n / plus._STEPS_TO_RETURN))
            self.eta *= shrinkage
            self.warm_up_to *= shrinkage
            self.changes = [x * shrinkage**2 for x in self.changes]
            self.decided["lowered"] += 1

    def move(self, bound: float, mean: float) -> None:
        """Shrink or grow eta by the averages."""
        change, f = self.average(self.changes), self.average(self.losses)
        variance = sum((x - mean) ** 2 for x in self.first_losses) / len(self.first_losses)
        wide = len(self.first_losses) == plus._FIRST
        most = mean + plus._OUT_OF_RANGE * math.sqrt(variance)
        too_high = f > (most if wide else plus._UNKNOWN_RANGE * mean)
        out_of_range = too_high and change > bound / plus._HARDLY
        limit = bound if self.untrained else plus._TOLERATED * bound
        if change > limit or out_of_range:
            by_change = (limit / change) ** (self.n / plus._STEPS_TO_RETURN) if change > 0 else 1.0
            shrinkage = 0.5 if out_of_range else max(0.5, by_change)
            self.eta *= shrinkage
            self.changes = [x * shrinkage**2 for x in self.changes]
            self.decided["out of range" if out_of_range else "shrunk"] += 1
            return
        beta = plus._BETA_LONG  # an average that starts at 0: a few votes are no majority
        votes = sum((1 - beta) * beta**age * s for age, s in enumerate(reversed(self.signs)))
        disagree = votes <= 0
        high = f > mean
        if wide:
            limited = [min(x, plus._UNKNOWN_RANGE * m) for x, m in self.compared]
            longer = self.average(limited, beta)
            spread = self.average([(x - longer) ** 2 for x in limited], beta)
            high = f >= longer - plus._FALLING * math.sqrt(spread)
        self.decided["still"] += high and not disagree
        goal = bound if self.untrained else plus._GROWN_TO * bound
        self.decided["tolerated"] += change > goal
        if self.factor(self.k - 1) < 1 or high or disagree or change > goal:
            self.decided["waited"] += 1
            return
        ratio = goal / change if change > 0 else math.inf
        all_count = self.untrained or self.all_trained
        n = self.n if all_count else self.n * min(1, plus._AGREED * votes**2)
        by_change = ratio ** (n / (plus._STEPS_TO_COME_UP * self.share))
        self.eta *= min(2 ** (n / self.settings["steps_to_double"]), by_change, 2)
        self.decided["grown"] += 1

    @property
    def share(self) -> float:
        """Of what is counted in steps."""
        return self.total_steps / plus._RUN if 0 < self.total_steps < plus._RUN else 1.0

    def interval(self) -> int:
        """Steps to the next search."""
        wanted = 1 + math.floor((self.k - self.started_at) / (plus._DENSE * self.share))
        return min(wanted, self.settings["max_search_interval"])

    def start(self, f0: float, loss: Loss, slope: float) -> None:
        """Up or down by a factor each, until one is accepted and its neighbour is not; bisect."""
        if self.warm_up_to:
            self.first_losses.append(f0)
            self.started_at, self.searched, self.L = self.k, True, 1
            self.warm_up()
            return

        def accepts(eta: float) -> bool:
            self.trials += 1
            return f0 - loss(self.trial_point(eta)).item() >= plus._C * eta * slope

        low = high = self.eta
        if accepts(self.eta):
            while accepts(high := high * first._STRIDE):
                low = high
        else:
            while not accepts(low := low / first._STRIDE):
                high = low
        for _ in range(first._BISECTIONS):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if accepts(middle) else (low, middle)
        self.eta, self.searched = self.settings["first_share"] * low, True
        self.first_losses.append(f0)
        self.started_at = self.k
        self.L = 1

    def update(self) -> None:
        """The step, at the step size of the tail; what was before it is kept."""
        self.before = [p.w.clone() for p in self.parameters]
        whole, self.eta = self.eta, self.eta * self.factor(self.k)
        super().update()
        self.eta = whole
        self.k += 1
