"""What a step of SaLSaAdam costs beside torch's AdamW and other optimizers: time and memory.

The optimizers alone, on parameters shaped like MiniLM-L6, BERT-base and GPT-2 small:
    python scripts/benchmark.py step

Whole training runs (MiniLM and GPT-2 from their configurations, random data). All contenders are in
memory at once: GPT-2 takes 23 GB, and on one thread an hour.
    python scripts/benchmark.py train

In a fraction of the time, with wider spreads: --quick. On a GPU: train --bf16.

The contenders take turns within one process, in a new order every round. A ratio is the median over
the rounds of the ratio to the baseline of the same round, with the quartiles beside it. On a CPU
that other jobs share, time on the processor is steadier than time on the clock:
    OMP_NUM_THREADS=1 taskset -c 0 python scripts/benchmark.py step --clock cpu

Rivals are measured where they are installed:
    pip install hf_salsa[compare]
"""

import argparse
import gc
import importlib.metadata
import io
import json
import os
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

from hf_salsa import BatchObjective, SaLSaAdam, SaLSaTrainer, SaLSaTrainingArguments
from hf_salsa.line_search import SearchState
from hf_salsa.objective import unwrap_optimizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEP_SIZE = 1e-6  # so small that the weights stay what they were
SHORTEST_TURN = 0.1  # seconds; one step of a small model is shorter than a time slice
GROUP_NUMBERS = (1, 10, 100)
RIVALS = ("SaLSa-Optimizer", "schedulefree", "prodigyopt")
FUSED = "AdamW fused"
OURS = "SaLSaAdam"
PYPI = "PyPI SaLSA"  # the authors' own release, SaLSa-Optimizer
LIMITS = {  # the largest ratio to AdamW that is good enough
    f"{OURS}, no search": 1.05,
    f"{OURS}, no search, norm known": 1.05,
    f"{OURS}, interval 10, 1 trial": 1.04,
    f"{OURS}, interval 1, 1 trial": 1.40,
}
MEMORY_LIMIT = 1.05  # copies of the weights that a search may add
PYPI_LIMIT = 5  # its time on a search step over ours, at least

Row = dict[str, Any]  # column -> value: what a table shows and the JSON file keeps


class ModelShape(NamedTuple):
    """A model's configuration, and the batch of its training run."""

    model: type[PreTrainedModel]
    config: BertConfig | GPT2Config
    batch_size: int
    sequence_length: int

    def build(self) -> PreTrainedModel:
        return self.model(self.config)

    def examples(self, number: int) -> list[dict[str, Tensor]]:
        """Return random tokens; what can be learned of them is in the labels."""
        generator = torch.Generator().manual_seed(0)
        shape = (number, self.sequence_length)
        tokens = torch.randint(0, self.config.vocab_size, shape, generator=generator)
        if self.model is GPT2LMHeadModel:
            return [{"input_ids": row, "labels": row} for row in tokens]
        labels = (tokens[:, 0] < self.config.vocab_size // 2).long()
        return [
            {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
            for row, label in zip(tokens, labels, strict=True)
        ]


MODELS = {
    "minilm": ModelShape(
        BertForSequenceClassification,
        BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        ),
        batch_size=32,
        sequence_length=64,
    ),
    "bert": ModelShape(BertForSequenceClassification, BertConfig(), 32, 64),
    "gpt2": ModelShape(GPT2LMHeadModel, GPT2Config(), 12, 64),
}


# --- measuring --------------------------------------------------------------------------------


class Clock:
    """Seconds from start to stop, the accelerator's work included."""

    def __init__(self, kind: str) -> None:
        self._now = time.process_time if kind == "cpu" else time.perf_counter
        self._started = 0.0

    def start(self) -> None:
        _synchronise()
        self._started = self._now()

    def stop(self) -> float:
        _synchronise()
        return self._now() - self._started


def _synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], Any]) -> int:
    """Return how many bytes of tensors `run` needs at its peak, beyond those there before."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    present = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            present += event.nbytes()
            peak = max(peak, present)
    return peak


def host_waits(run: Callable[[], Any]) -> int | None:
    """Return how often the host waits for the GPU in `run`, or None without a GPU."""
    if DEVICE.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def in_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each contender in each round."""
    order = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    shuffler = random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            seconds[name].append(contenders[name]())
    return seconds


class Ratio(NamedTuple):
    """Median and quartiles of the ratios of two contenders within each round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float], baseline: Sequence[float]) -> "Ratio":
        ratios = [mine / its for mine, its in zip(seconds, baseline, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def verdict(name: str, ratio: Ratio) -> str:
    limit = LIMITS.get(name)
    return "" if limit is None else f"{'met' if ratio.median <= limit else 'MISSED'}: {limit}"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- the optimizers alone -----------------------------------------------------------------------


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
        memory[name] = peak_memory(contender.step)
        contender.prepare()
        waits[name] = host_waits(contender.step)
    clock = Clock(args.clock)
    turns = {name: partial(contender.turn, clock) for name, contender in contenders.items()}
    seconds = in_turns(turns, args.repeats)
    return {name: Measurement(seconds[name], memory[name], waits[name]) for name in contenders}


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


class KnownNorm:
    """An objective on a step that does not search, with the norm that Trainer computes to log."""

    recorded = True
    clip_factor = 1.0

    def __init__(self) -> None:
        self.loss = torch.tensor(1.0, device=DEVICE)
        self.gradient_norm = torch.tensor(1.0, device=DEVICE)

    def __call__(self) -> Tensor:
        raise AssertionError("a step that does not search evaluates nothing")

    def clear(self) -> None:
        """Forget nothing: every step of the benchmark has the same mini-batch."""


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


def put_to_rest(optimizer: Optimizer, search_interval: int, max_search_interval: int) -> None:
    """Bring a line search into the state after many steps at one step size.

    The next search is `search_interval` steps away. If that accepts its first trial, the one after
    it is `max_search_interval` steps away.
    """
    state = SearchState(
        step_size=STEP_SIZE,
        step_size_average_fast=STEP_SIZE,
        step_size_average_slow=STEP_SIZE,
        search_interval=search_interval,
        searches=1,  # only the first one of a run checks the replay
    )
    for group in optimizer.param_groups:
        group.update(vars(state), lr=STEP_SIZE, max_search_interval=max_search_interval)


def salsa_contenders(optimizer: SaLSaAdam, trials: Sequence[int]) -> dict[str, Contender]:
    known_norm = KnownNorm()

    def no_search(objective: KnownNorm | None) -> None:
        optimizer.attach(objective)
        put_to_rest(optimizer, search_interval=2, max_search_interval=10)

    def before_search(loss: PrescribedLoss, max_search_interval: int) -> None:
        loss.restart()
        optimizer.attach(None)
        put_to_rest(optimizer, search_interval=1, max_search_interval=max_search_interval)

    def search(trials: int, max_search_interval: int) -> Contender:
        loss = PrescribedLoss(trials)
        return Contender(
            step=partial(optimizer.step, loss, loss=loss.at_start),
            prepare=partial(before_search, loss, max_search_interval),
            release=release,
        )

    def release() -> None:
        """Search once more; an interval above 1 after it drops the backup."""
        before_search(loss, max_search_interval=10)
        optimizer.step(loss, loss=loss.at_start)

    loss = PrescribedLoss(1)
    contenders = {
        f"{OURS}, no search": Contender(
            step=partial(optimizer.step, loss, loss=loss.at_start),
            prepare=partial(no_search, None),
        ),
        f"{OURS}, no search, norm known": Contender(
            step=optimizer.step, prepare=partial(no_search, known_norm)
        ),
        **{f"{OURS}, {searching(n)}": search(n, max_search_interval=10) for n in trials},
    }
    # Where every step searches, the backup stays for the next search.
    contenders[f"{OURS}, {searching(1)}, every step"] = search(1, max_search_interval=1)
    return contenders


def pypi_optimizer(params: list[nn.Parameter]) -> Any:
    from salsa.SaLSA import SaLSA

    return SaLSA(params)


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
        target = verdict(name, ratio)
        if name.startswith(f"{OURS}, search"):
            target = f"{'met' if copies <= MEMORY_LIMIT else 'MISSED'}: {MEMORY_LIMIT} copies"
        if name.startswith(f"{PYPI}, search"):
            ours = measured[name.replace(PYPI, OURS)]
            times = Ratio.of(mine.seconds, ours.seconds).median
            target = f"{'met' if times >= PYPI_LIMIT else 'MISSED'}: {times:.1f} x ours"
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
        for name in (f"{OURS}, no search, norm known", f"{OURS}, {searching(1)}"):
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


# --- whole training runs ------------------------------------------------------------------------


class Turn(NamedTuple):
    """What some steps of training took."""

    seconds: float  # per step
    searches: int
    trials: int  # forward passes beyond the one of each step


class Stopwatch(TrainerCallback):
    """Measures a training run from the end of its first step to the end of its last."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._before = (0, 0)
        self.turn: Turn | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self._before = self._counts(kwargs["optimizer"])
            self._clock.start()
        elif state.global_step == state.max_steps:
            seconds = self._clock.stop() / (state.max_steps - 1)
            searches, trials = self._counts(kwargs["optimizer"])
            self.turn = Turn(seconds, searches - self._before[0], trials - self._before[1])

    @staticmethod
    def _counts(optimizer: Optimizer) -> tuple[int, int]:
        line_search = unwrap_optimizer(optimizer)
        if line_search is None:
            return 0, 0
        return line_search.counters.searches, line_search.counters.trials


class TrainerArm:
    """A model with its own Trainer, which takes some steps at each turn."""

    def __init__(
        self,
        trainer_class: type[Trainer],
        shape: ModelShape,
        args: argparse.Namespace,
        **options: Any,
    ) -> None:
        set_seed(0)
        self._stopwatch = Stopwatch(Clock(args.clock))
        self._trainer = trainer_class(
            shape.build(),
            SaLSaTrainingArguments(
                args.output_dir,
                per_device_train_batch_size=shape.batch_size,
                max_steps=args.steps + 1,
                bf16=args.bf16,
                use_cpu=DEVICE.type == "cpu",
                dataloader_pin_memory=DEVICE.type != "cpu",
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **options,
            ),
            train_dataset=shape.examples(shape.batch_size * (args.steps + 1)),
            data_collator=default_data_collator,
            callbacks=[self._stopwatch],
        )
        self._trainer.remove_callback(PrinterCallback)

    def turn(self) -> Turn:
        self._trainer.train()
        assert self._stopwatch.turn is not None
        return self._stopwatch.turn

    def put_to_rest(self, **state: float) -> None:
        """Let the line search go on as after many steps at the step size that it has now."""
        assert self._trainer.optimizer is not None
        for group in self._trainer.optimizer.param_groups:
            group.update(
                step_size_average_fast=group["step_size"],
                step_size_average_slow=group["step_size"],
                search_interval=group["max_search_interval"],
                **state,
            )

    def forward_passes(self, clock: Clock) -> Turn:
        """Measure the forward pass alone, as a trial takes it."""
        trainer, batches = self._trainer, list(self._trainer.get_train_dataloader())
        trainer.model.train()
        clock.start()
        with torch.no_grad():
            for batch in batches[1:]:
                with trainer.compute_loss_context_manager():
                    trainer.compute_loss(trainer.model, batch)
        return Turn(clock.stop() / len(batches[1:]), searches=0, trials=0)


class PyPIArm:
    """The authors' own release, in the loop that its documentation shows."""

    def __init__(self, shape: ModelShape, args: argparse.Namespace) -> None:
        set_seed(0)
        self._model = shape.build().to(DEVICE).train()
        self._optimizer = pypi_optimizer(list(self._model.parameters()))
        self._loader: DataLoader[Any] = DataLoader(
            shape.examples(shape.batch_size * (args.steps + 1)),  # type: ignore[arg-type]
            batch_size=shape.batch_size,
            shuffle=True,
            collate_fn=default_data_collator,
            pin_memory=DEVICE.type != "cpu",
        )
        self._clock = Clock(args.clock)
        self._bf16 = args.bf16

    def turn(self) -> Turn:
        searches = passes = steps = 0
        for batch in self._loader:
            inputs = {name: value.to(DEVICE) for name, value in batch.items()}
            self._optimizer.zero_grad()
            self._optimizer.step(partial(self._loss, inputs))
            if not passes:
                passes = self._optimizer.state["n_forwards"]
                self._clock.start()
            else:
                steps += 1
                searches += self._optimizer.tslls == 0
        seconds = self._clock.stop() / steps
        return Turn(seconds, searches, self._optimizer.state["n_forwards"] - passes - steps)

    def _loss(self, inputs: dict[str, Tensor], backwards: bool = False) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self._bf16):
            loss: Tensor = self._model(**inputs).loss
        if backwards:
            loss.backward()
        return loss


def benchmark_training(model: str, args: argparse.Namespace) -> list[Row]:
    """Return the cost of a training step with each optimizer."""
    shape = MODELS[model]
    baseline, forward = "adamw_torch_fused", "the forward pass alone"
    ours = partial(TrainerArm, SaLSaTrainer, shape, args)
    constant_step = partial(ours, salsa_initial_step_size=STEP_SIZE, salsa_steps_to_double=1e9)
    makers: dict[str, Callable[[], TrainerArm | PyPIArm]] = {
        baseline: partial(TrainerArm, Trainer, shape, args, optim="adamw_torch_fused"),
        **{
            f"{OURS}, interval {interval}, {kind}": partial(
                make, salsa_max_search_interval=interval
            )
            for kind, make in (("1 trial", constant_step), ("defaults", ours))
            for interval in (10, 1)
        },
    }
    if version("SaLSa-Optimizer"):
        makers[f"{PYPI}, defaults"] = partial(PyPIArm, shape, args)

    arms: dict[str, TrainerArm | PyPIArm] = {}
    turns: dict[str, Callable[[], Turn]] = {}
    memory: dict[str, int] = {}
    waits: dict[str, int | None] = {}

    def make_and_run(name: str) -> None:
        arms[name] = makers[name]()
        arms[name].turn()

    for name in makers:
        memory[name] = peak_memory(partial(make_and_run, name))
        arm = arms[name]
        turns[name] = arm.turn
        if isinstance(arm, TrainerArm) and name.startswith(OURS):
            # With h far above what the criterion asks for, every first trial is accepted.
            arm.put_to_rest(**({"h": 1e9} if name.endswith("1 trial") else {}))
        waits[name] = host_waits(arm.turn)
    turns[forward] = partial(arms[baseline].forward_passes, Clock(args.clock))

    taken: dict[str, list[Turn]] = {name: [] for name in turns}

    def take(name: str) -> float:
        taken[name].append(turns[name]())
        return taken[name][-1].seconds

    seconds = in_turns({name: partial(take, name) for name in turns}, args.repeats)
    forward_ratio = Ratio.of(seconds[forward], seconds[baseline]).median
    steps = args.steps * args.repeats
    rows = []
    for name in turns:
        ratio = Ratio.of(seconds[name], seconds[baseline])
        trials = sum(turn.trials for turn in taken[name]) / steps
        rows.append(
            {
                "run": name,
                "s per step": statistics.median(seconds[name]),
                "ratio (quartiles)": ratio,
                "target": verdict(name, ratio),
                "searches per step": sum(turn.searches for turn in taken[name]) / steps,
                "extra forwards per step": trials,
                "their share": trials * forward_ratio,
                "all else": None if name == forward else ratio.median - 1 - trials * forward_ratio,
                "peak MB": memory[name] / 1e6 if name in memory else None,
                "host waits per step": waits.get(name) and waits[name] / (args.steps + 1),
            }
        )
    return rows


# --- command line and output --------------------------------------------------------------------


def environment(args: argparse.Namespace) -> Row:
    """Return what the figures depend on."""
    cpu = f"CPU ({platform.machine()})"
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "repeats": args.repeats,
        "load average": os.getloadavg()[0],
        **{name: version(name) for name in ("hf_salsa", "torch", "transformers", *RIVALS)},
    }


def print_table(title: str, rows: Sequence[Row]) -> None:
    table = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    print(f"\n{title}\n")
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(f"| {' | '.join(cells)} |", flush=True)


def _shown(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def main() -> None:
    args = parse_arguments()
    about = environment(args)
    print(
        ", ".join(f"{name} {value or 'not installed: left out'}" for name, value in about.items())
    )
    tables: dict[str, list[Row]] = {}

    def report(title: str, rows: list[Row]) -> None:
        tables[title] = rows
        print_table(title, rows)

    if args.command == "step":
        for model in args.models:
            report(f"A step without its forward passes, {model}", benchmark_model(model, args))
        report("The same parameters in several groups, minilm", benchmark_groups(args))
        report("A long run of a small model", benchmark_steps(args))
    else:
        with tempfile.TemporaryDirectory() as args.output_dir:
            for model in args.models:
                report(f"Training runs, {model}", benchmark_training(model, args))
    if args.output:
        args.output.write_text(json.dumps({"environment": about, **tables}, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="the optimizers alone")
    train = commands.add_parser("train", help="whole training runs")
    for command, models in ((step, list(MODELS)), (train, ["minilm", "gpt2"])):
        command.add_argument("--models", nargs="+", choices=MODELS, default=models)
        command.add_argument("--repeats", type=int, default=5, help="rounds")
        command.add_argument("--quick", action="store_true", help="MiniLM and 3 rounds only")
        command.add_argument(
            "--clock", choices=("wall", "cpu"), default="wall", help="cpu: time on the processor"
        )
        command.add_argument("--output", type=Path, help="a JSON file for the figures")
    # The fourth rejection would be followed by a bisection, which makes more trials.
    trials = [1, 2, 3]
    step.add_argument("--trials", type=int, nargs="+", choices=trials, default=trials)
    step.add_argument("--steps", type=int, default=10_000, help="length of the long run")
    train.add_argument("--steps", type=int, default=10, help="of a turn, a multiple of 10")
    train.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args()
    if args.quick:
        args.models, args.repeats = ["minilm"], 3
    if args.repeats < 2:
        parser.error(f"--repeats {args.repeats} is too few: quartiles need at least 2")
    if args.clock == "cpu" and DEVICE.type != "cpu":
        parser.error("--clock cpu does not see the work of a GPU")
    if args.command == "step" and args.steps < 4:
        parser.error(f"--steps {args.steps} is too few: the long run is shown in quarters")
    if args.command == "train" and (args.steps < 10 or args.steps % 10):
        parser.error(f"--steps {args.steps} is not a multiple of 10, the search interval")
    return args


if __name__ == "__main__":
    main()
