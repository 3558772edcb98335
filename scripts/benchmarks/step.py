"""What a step of SaLSaAdam costs beside torch's AdamW and other optimizers: time and memory.

The optimizers alone, on parameters shaped like MiniLM-L6, BERT-base and GPT-2 small:
    python scripts/benchmarks/step.py

In a fraction of the time, with wider spreads: --quick.

The contenders take turns within one process, in a new order every round. A ratio is the median over
the rounds of the ratio to the baseline of the same round, with the quartiles beside it. On a CPU
that other jobs share, time on the processor is steadier than time on the clock:
    OMP_NUM_THREADS=1 taskset -c 0 python scripts/benchmarks/step.py --clock cpu

Rivals are measured where they are installed:
    pip install -c constraints.txt -e '.[compare]'
"""

import argparse
import gc
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import measuring
import torch
from measuring import DEVICE, Clock, Ratio, Row, verdict, version
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import set_seed
from workloads import MODELS, OURS, PYPI, STEP_SIZE, at_rest, pypi_optimizer, update_groups

from hf_salsa import BatchObjective, SaLSaAdam

SHORTEST_TURN = 0.1  # seconds; one step of a small model is shorter than a time slice
GROUP_NUMBERS = (1, 10, 100)
FUSED = "AdamW fused"
NO_SEARCH = f"{OURS}, no search"
NORM_KNOWN = f"{NO_SEARCH}, norm known"
TIME_LIMIT = 1.05  # the ratio to AdamW of a step that does not search, at most
MEMORY_LIMIT = 1.05  # copies of the weights that a search may add
PYPI_LIMIT = 5  # its time on a search step over ours, at least


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


@dataclass(frozen=True)
class Measurement:
    """A contender's seconds in each round, bytes at its peak, and waits for the GPU."""

    seconds: list[float]
    memory: int
    waits: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(
    contenders: Mapping[str, Contender], args: argparse.Namespace
) -> dict[str, Measurement]:
    for contender in contenders.values():
        contender.run()  # creates the state
    memory, waits = {}, {}
    for name, contender in contenders.items():
        contender.release()
        contender.prepare()
        memory[name] = measuring.peak_memory(contender.step)
        contender.prepare()
        waits[name] = measuring.host_waits(contender.step)
    clock = Clock(args.clock)
    turns = {name: partial(contender.turn, clock) for name, contender in contenders.items()}
    seconds = measuring.in_turns(turns, args.repeats)
    return {name: Measurement(seconds[name], memory[name], waits[name]) for name in contenders}


# --- contenders ---------------------------------------------------------------------------------


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


# --- tables -------------------------------------------------------------------------------------


def benchmark_model(model: str, args: argparse.Namespace) -> list[Row]:
    """Return the cost of one step with each optimizer."""
    params = parameters(model)
    contenders = {
        FUSED: Contender(AdamW(params, STEP_SIZE, fused=True).step),
        "AdamW foreach": Contender(AdamW(params, STEP_SIZE, foreach=True).step),
        **salsa_contenders(SaLSaAdam(params), args.trials),
        **rival_contenders(params, args.trials),
    }
    measured = measure(contenders, args)
    rows = []
    for name, mine in measured.items():
        ratio = Ratio.of(mine.seconds, measured[FUSED].seconds)
        copies = mine.memory / sum(p.nbytes for p in params)
        target = verdict(ratio.median, TIME_LIMIT) if name in (NO_SEARCH, NORM_KNOWN) else ""
        if name.startswith(f"{OURS}, search"):
            target = verdict(copies, MEMORY_LIMIT, f"{MEMORY_LIMIT} copies")
        if name.startswith(f"{PYPI}, search"):
            ours = measured[name.replace(PYPI, OURS)]
            times = Ratio.of(mine.seconds, ours.seconds).median
            target = verdict(times, PYPI_LIMIT, f"{times:.1f} x ours", at_least=True)
        rows.append(
            {
                "optimizer": name,
                "ms": 1e3 * mine.median,
                "ratio (quartiles)": ratio,
                "target": target,
                "ns per weight": 1e9 * mine.median / sum(p.numel() for p in params),
                "extra MB": mine.memory / 1e6,
                "copies of the weights": copies,
                "host waits": mine.waits,
            }
        )
    return rows


def benchmark_groups(args: argparse.Namespace) -> list[Row]:
    """Return the cost of the same parameters in few and in many parameter groups."""
    params = parameters("minilm")
    contenders = {}
    for number in GROUP_NUMBERS:
        groups = [{"params": params[i::number]} for i in range(number)]
        salsa = salsa_contenders(SaLSaAdam(groups), [1])
        contenders[f"{FUSED}, {number}"] = Contender(AdamW(groups, STEP_SIZE, fused=True).step)
        for name in (NORM_KNOWN, f"{OURS}, {searching(1)}"):
            contenders[f"{name}, {number}"] = salsa[name]
    measured = measure(contenders, args)
    rows = []
    for name, mine in measured.items():
        optimizer, number = name.rsplit(", ", 1)
        fused = measured[f"{FUSED}, {number}"]
        one_group = measured[f"{optimizer}, 1"]
        rows.append(
            {
                "optimizer": optimizer,
                "groups": int(number),
                "ms": 1e3 * mine.median,
                "ratio to itself with 1 group": Ratio.of(mine.seconds, one_group.seconds),
                "ratio to AdamW fused with as many": Ratio.of(mine.seconds, fused.seconds),
            }
        )
    return rows


def benchmark_steps(args: argparse.Namespace) -> list[Row]:
    """Return what the optimizer of a small model costs in each quarter of a long run."""
    set_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1)).to(DEVICE)
    inputs = torch.randn(4096, 32, device=DEVICE)
    targets = inputs[:, :1] + torch.randn(4096, 1, device=DEVICE)
    optimizer = SaLSaAdam(model.parameters())
    objective = BatchObjective(model, optimizer)

    def loss_fn(batch: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(inputs[batch]), targets[batch])

    clock = Clock(args.clock)
    rows: list[Row] = []
    with_search: list[float] = []
    without: list[float] = []
    for step in range(1, args.steps + 1):
        objective.record(loss_fn, torch.randint(0, 4096, (32,), device=DEVICE)).backward()
        seconds = with_search if optimizer.search_due else without
        clock.start()
        optimizer.step()
        seconds.append(clock.stop())
        optimizer.zero_grad()
        if step % (args.steps // 4) == 0:
            with io.BytesIO() as file:
                torch.save(optimizer.state_dict(), file)
                saved = file.getbuffer().nbytes
            rows.append(
                {
                    "steps": step,
                    "searches": optimizer.counters.searches,
                    "trials": optimizer.counters.trials,
                    "us without a search": 1e6 * statistics.median(without) if without else None,
                    "us with one": 1e6 * statistics.median(with_search) if with_search else None,
                    "bytes saved": saved,
                    "bytes of live tensors": _live_tensor_bytes(),
                }
            )
            with_search, without = [], []
    return rows


def _live_tensor_bytes() -> int:
    gc.collect()
    # isinstance would ask every object for its __class__, and some of torch's then warn.
    tensors = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = measuring.make_parser(__doc__)
    measuring.add_model_flags(parser, tuple(MODELS), tuple(MODELS))
    # The fourth rejection would be followed by a bisection, which makes more trials.
    trials = [1, 2, 3]
    parser.add_argument("--trials", type=int, nargs="+", choices=trials, default=trials)
    parser.add_argument("--steps", type=int, default=10_000, help="length of the long run")
    args = measuring.parse(parser, argv)
    if args.steps < 4:
        parser.error(f"--steps {args.steps} is too few: the long run is shown in quarters")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    report = measuring.Report(args)
    for model in args.models:
        report.add(f"A step without its forward passes, {model}", benchmark_model(model, args))
    report.add("The same parameters in several groups, minilm", benchmark_groups(args))
    report.add("A long run of a small model", benchmark_steps(args))


if __name__ == "__main__":
    main()
