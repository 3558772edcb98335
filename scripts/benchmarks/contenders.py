"""Who takes a step in step.py, and how it is brought to where it takes that step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measuring import DEVICE, Clock, version
from torch import Tensor, nn
from transformers import default_data_collator
from workloads import (
    LONG_RUN,
    MODELS,
    OURS,
    PLUS,
    PYPI,
    STEP_SIZE,
    at_rest,
    plus_before_a_search,
    pypi_optimizer,
    update_groups,
)

from hf_salsa import BatchObjective, SaLSaAdam, SaLSaAdamPlus

SHORTEST_TURN = 0.1  # seconds; one step of a small model is shorter than a time slice
NO_SEARCH = f"{OURS}, no search"
NORM_KNOWN = f"{NO_SEARCH}, norm known"


@dataclass
class Contender:
    """One way to take a step.

    Attributes:
        step: Takes the step; this is timed.
        prepare: Brings the optimizer into the state from which it takes that step.
        release: Gives back what earlier steps left in memory, before memory is measured.
    """

    step: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    release: Callable[[], Any] = lambda: None

    def run(self) -> None:
        self.prepare()
        self.step()

    def turn(self, clock: Clock) -> float:
        """Return the seconds of a step, averaged over as many as a turn needs."""
        total, steps = 0.0, 0
        while total < SHORTEST_TURN:
            self.prepare()
            clock.start()
            self.step()
            total += clock.stop()
            steps += 1
        return total / steps


class PrescribedLoss:
    """The loss of the trial points, at no cost: rejects all but the last of the wanted trials."""

    def __init__(self, trials: int) -> None:
        self._trials = trials
        self._calls = 0
        self.at_start = torch.tensor(1.0, device=DEVICE)
        self._rejected = torch.tensor(2.0, device=DEVICE)
        self._accepted = torch.tensor(-1e30, device=DEVICE)

    def restart(self) -> None:
        self._calls = 0

    def __call__(self) -> Tensor:
        self._calls += 1
        return self._rejected if self._calls < self._trials else self._accepted


def parameters(model: str) -> list[nn.Parameter]:
    """Return random parameters and gradients of the shapes that a model's parameters have."""
    with torch.device("meta"):
        shapes = [param.shape for param in MODELS[model].build().parameters()]
    params = [nn.Parameter(0.02 * torch.randn(shape, device=DEVICE)) for shape in shapes]
    for param in params:
        param.grad = 0.01 * torch.randn_like(param)
    return params


def searching(trials: int) -> str:
    return f"search, {trials} trial{'s' if trials > 1 else ''}"


class RestingSearch:
    """A line search after many steps at one step size, put back there before every step."""

    def __init__(self, optimizer: SaLSaAdam) -> None:
        self._optimizer = optimizer
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._objective = BatchObjective(nn.ParameterList(params), optimizer)
        self._norm = torch.tensor(1.0, device=DEVICE)
        # Where the interval is above 1 after a search, that search drops its backup.
        self._interval = optimizer.param_groups[0]["max_search_interval"]
        self._states = {due: at_rest(optimizer, STEP_SIZE, search_due=due) for due in (True, False)}

    def _reset(self, search_due: bool, max_search_interval: int) -> None:
        values = {**self._states[search_due], "max_search_interval": max_search_interval}
        update_groups(self._optimizer, values)

    def search(self, trials: int, max_search_interval: int | None = None) -> Contender:
        """Return the step with a search of so many trials."""
        loss = PrescribedLoss(trials)
        step = partial(self._optimizer.step, loss, loss=loss.at_start)

        def prepare(max_search_interval: int = max_search_interval or self._interval) -> None:
            loss.restart()
            self._reset(True, max_search_interval)

        def release() -> None:
            prepare(self._interval)
            step()

        return Contender(step, prepare, release)

    def no_search(self) -> Contender:
        """Return the step without a search, as a plain loop takes it."""
        loss = PrescribedLoss(1)
        step = partial(self._optimizer.step, loss, loss=loss.at_start)
        return Contender(step, partial(self._reset, False, self._interval))

    def norm_known(self) -> Contender:
        """Return the same with the norm of the gradients, which `Trainer` computes to log it."""

        def prepare() -> None:
            self._reset(False, self._interval)
            self._objective.record_step(lambda: (self._norm, self._norm))
            self._objective.note_gradient_norm(self._norm)

        return Contender(self._optimizer.step, prepare)


def salsa_contenders(optimizer: SaLSaAdam, trials: Sequence[int]) -> dict[str, Contender]:
    search = RestingSearch(optimizer)
    return {
        NO_SEARCH: search.no_search(),
        NORM_KNOWN: search.norm_known(),
        **{f"{OURS}, {searching(n)}": search.search(n) for n in trials},
        # Where every step searches, the backup stays for the next search.
        f"{OURS}, {searching(1)}, every step": search.search(1, max_search_interval=1),
    }


class PlusSearch:
    """SaLSaAdamPlus where searches are rare, put back to one step before one every time.

    It is meant for clipped gradients, so their norm is known.
    """

    def __init__(self, optimizer: SaLSaAdamPlus) -> None:
        self._optimizer = optimizer
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._objective = BatchObjective(nn.ParameterList(params), optimizer)
        self._norm = torch.tensor(1.0, device=DEVICE)
        self._state = plus_before_a_search(STEP_SIZE)
        loss = torch.tensor(1.0, device=DEVICE)  # at no cost
        self._step = partial(optimizer.step, lambda: loss, loss=loss)

    def _prepare_no_search(self) -> None:
        self._prepare_step_before()
        update_groups(self._optimizer, {"steps_since_search": 0})

    def _prepare_step_before(self) -> None:
        update_groups(self._optimizer, self._state)
        self._objective.note_gradient_norm(self._norm)

    def _prepare_search(self) -> None:
        self.step_before().run()
        self._objective.note_gradient_norm(self._norm)

    def no_search(self) -> Contender:
        """Return a step far from any search."""
        return Contender(self._step, self._prepare_no_search)

    def step_before(self) -> Contender:
        """Return the step before a search, which copies the weights."""
        return Contender(self._step, self._prepare_step_before)

    def search(self) -> Contender:
        """Return the step with a search, which looks back at the step before."""
        return Contender(self._step, self._prepare_search)


def plus_contenders(params: list[nn.Parameter]) -> dict[str, Contender]:
    search = PlusSearch(SaLSaAdamPlus(params, total_steps=LONG_RUN))
    return {
        f"{PLUS}, no search": search.no_search(),
        f"{PLUS}, step before a search": search.step_before(),
        f"{PLUS}, search": search.search(),
    }


def training_passes(model: str) -> Contender:
    """Return the forward and the backward pass of a training step, without its update."""
    shape = MODELS[model]
    network = shape.build().to(DEVICE).train()
    examples = default_data_collator(shape.examples(shape.batch_size))
    batch = {name: value.to(DEVICE) for name, value in examples.items()}
    return Contender(lambda: network(**batch).loss.backward(), network.zero_grad)


def pypi_contenders(params: list[nn.Parameter], trials: Sequence[int]) -> dict[str, Contender]:
    optimizer = pypi_optimizer(params)
    optimizer.state["step"] = 10  # it searches at the first 10 steps

    def before(loss: PrescribedLoss, steps_since_search: int) -> None:
        loss.restart()
        optimizer.step_size = STEP_SIZE
        optimizer.avg_step_size_fast = optimizer.avg_step_size_slow = STEP_SIZE
        optimizer.avg_decrease.zero_()
        optimizer.tslls = steps_since_search

    def contender(trials: int, steps_since_search: int) -> Contender:
        loss = PrescribedLoss(trials)

        def closure(backwards: bool = False) -> Tensor:
            return loss.at_start if backwards else loss()  # the training pass, or a trial

        return Contender(
            step=partial(optimizer.step, closure),
            prepare=partial(before, loss, steps_since_search),
        )

    return {
        f"{PYPI}, no search": contender(1, steps_since_search=0),
        **{f"{PYPI}, {searching(n)}": contender(n, steps_since_search=100) for n in trials},
    }


def rival_contenders(params: list[nn.Parameter], trials: Sequence[int]) -> dict[str, Contender]:
    contenders: dict[str, Contender] = {}
    if version("SaLSa-Optimizer"):
        contenders |= pypi_contenders(params, trials)
    if version("schedulefree"):
        from schedulefree import AdamWScheduleFree

        schedule_free = AdamWScheduleFree(params, lr=STEP_SIZE)
        schedule_free.train()
        contenders["schedulefree AdamW"] = Contender(schedule_free.step)
    if version("prodigyopt"):
        from prodigyopt import Prodigy

        contenders["Prodigy"] = Contender(Prodigy(params, lr=STEP_SIZE).step)
    return contenders
