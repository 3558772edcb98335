"""What a training run costs with SaLSaAdam beside torch's AdamW: time and memory, through Trainer.

MiniLM and GPT-2 from their configurations, on random data. All contenders are in memory at once:
GPT-2 takes 23 GB, and on one thread an hour.
    python scripts/benchmarks/train.py

In a fraction of the time, with wider spreads: --quick. On a GPU: --bf16.

The contenders take turns within one process, in a new order every round. A ratio is the median over
the rounds of the ratio to the baseline of the same round, with the quartiles beside it. On a CPU
that other jobs share, time on the processor is steadier than time on the clock:
    OMP_NUM_THREADS=1 taskset -c 0 python scripts/benchmarks/train.py --clock cpu

The package of the paper's authors is measured where it is installed:
    pip install -c constraints.txt -e '.[compare]'

Whole short jobs, as a user runs them, on the clock and on the processor: the README's main job (0
updates: as many as the script makes by itself), and jobs of the size of MRPC and others:
    python scripts/benchmarks/train.py --jobs prose --updates 0
    python scripts/benchmarks/train.py --jobs probe --updates 40 115 230 2000
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jobs
import measuring
import torch
import workloads
from measuring import DEVICE, Clock, Ratio, Row
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, default_data_collator, set_seed
from workloads import MODELS, OURS, PYPI, STEP_SIZE, ModelShape

from hf_salsa import OPTIMIZERS, SaLSaAdam, SaLSaTrainer, SaLSaTrainingArguments

BASELINE = "adamw_torch_fused"
FORWARD = "the forward pass alone"
LIMITS = {  # the largest ratio to AdamW that is good enough
    f"{OURS}, interval 10, 1 trial": 1.04,
    f"{OURS}, interval 1, 1 trial": 1.40,
}


class Turn(NamedTuple):
    """What some steps of training took."""

    seconds: float  # per step
    searches: int
    trials: int  # forward passes beyond the one of each step


def line_search_of(optimizer: Optimizer) -> Any:
    """Return the line search inside Accelerate's wrapper, None of a stock optimizer."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if hasattr(inner, "last_search") else None


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
        line_search = line_search_of(optimizer)
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

    def put_to_rest(self, accept_all: bool) -> None:
        """Let the line search, if there is one, go on as after many steps at its step size.

        Args:
            accept_all: It then accepts every first trial; else its averages of decrease and slope
                stay what they are.
        """
        line_search = line_search_of(self._trainer.optimizer)
        if line_search is None:
            return
        decrease = 1e9 if accept_all else None
        state = workloads.at_rest(
            line_search, line_search.step_size, search_due=True, decrease=decrease
        )
        if not accept_all:
            state |= {name: line_search.param_groups[0][name] for name in ("h", "s")}
        workloads.update_groups(line_search, state)

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
        self._optimizer = workloads.pypi_optimizer(list(self._model.parameters()))
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


Arm = TrainerArm | PyPIArm


def makers(shape: ModelShape, args: argparse.Namespace) -> dict[str, Callable[[], Arm]]:
    """Return what makes each contender."""
    (optim,) = (name for name, kind in OPTIMIZERS.items() if kind is SaLSaAdam)
    ours = partial(TrainerArm, SaLSaTrainer, shape, args, optim=optim)
    constant_step = partial(ours, salsa_initial_step_size=STEP_SIZE, salsa_steps_to_double=1e9)
    found: dict[str, Callable[[], Arm]] = {
        BASELINE: partial(TrainerArm, Trainer, shape, args, optim=BASELINE),
        **{
            f"{OURS}, interval {interval}, {kind}": partial(
                make, salsa_max_search_interval=interval
            )
            for kind, make in (("1 trial", constant_step), ("defaults", ours))
            for interval in (10, 1)
        },
    }
    if measuring.version("SaLSa-Optimizer"):
        found[f"{PYPI}, defaults"] = partial(PyPIArm, shape, args)
    return found


def benchmark_training(model: str, args: argparse.Namespace) -> list[Row]:
    """Return the cost of a training step with each optimizer."""
    arms: dict[str, Arm] = {}
    turns: dict[str, Callable[[], Turn]] = {}
    memory: dict[str, int] = {}
    waits: dict[str, int | None] = {}

    def make_and_run(name: str, make: Callable[[], Arm]) -> None:
        arms[name] = make()
        arms[name].turn()

    for name, make in makers(MODELS[model], args).items():
        memory[name] = measuring.peak_memory(partial(make_and_run, name, make))
        arm = arms[name]
        turns[name] = arm.turn
        if isinstance(arm, TrainerArm):
            arm.put_to_rest(accept_all=name.endswith("1 trial"))
        waits[name] = measuring.host_waits(arm.turn)
    turns[FORWARD] = partial(arms[BASELINE].forward_passes, Clock(args.clock))

    taken: dict[str, list[Turn]] = {name: [] for name in turns}

    def take(name: str) -> float:
        taken[name].append(turns[name]())
        return taken[name][-1].seconds

    measuring.in_turns({name: partial(take, name) for name in turns}, args.repeats)
    return rows_of(taken, memory, waits, args.steps)


def rows_of(
    taken: Mapping[str, Sequence[Turn]],
    memory: Mapping[str, int],
    waits: Mapping[str, int | None],
    steps: int,
) -> list[Row]:
    """Return the table of some turns of `steps` steps each."""
    seconds = {name: [turn.seconds for turn in turns] for name, turns in taken.items()}
    forward_ratio = Ratio.of(seconds[FORWARD], seconds[BASELINE]).median
    rows = []
    for name, turns in taken.items():
        ratio = Ratio.of(seconds[name], seconds[BASELINE])
        counted = steps * len(turns)
        trials = sum(turn.trials for turn in turns) / counted
        rows.append(
            {
                "run": name,
                "s per step": statistics.median(seconds[name]),
                "ratio (quartiles)": ratio,
                "target": measuring.verdict(ratio.median, LIMITS[name]) if name in LIMITS else "",
                "searches per step": sum(turn.searches for turn in turns) / counted,
                "extra forwards per step": trials,
                "their share": trials * forward_ratio,
                "all else": None if name == FORWARD else ratio.median - 1 - trials * forward_ratio,
                "peak MB": memory[name] / 1e6 if name in memory else None,
                "host waits per step": waits.get(name) and waits[name] / (steps + 1),
            }
        )
    return rows


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = measuring.make_parser(__doc__)
    measuring.add_model_flags(parser, tuple(MODELS), ("minilm", "gpt2"))
    parser.add_argument("--steps", type=int, default=10, help="of a turn, a multiple of 10")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    whole = parser.add_argument_group("whole jobs, instead of steps")
    whole.add_argument("--jobs", nargs="+", choices=jobs.SCRIPTS, default=[])
    whole.add_argument("--updates", type=int, nargs="+", default=[40], help="of a job; 0: its own")
    whole.add_argument(
        "--optims", nargs="+", choices=OPTIMIZERS, default=[SaLSaTrainingArguments.optim]
    )
    args = measuring.parse(parser, argv)
    if args.steps < 10 or args.steps % 10:
        parser.error(f"--steps {args.steps} is not a multiple of 10, the search interval")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.jobs:
        args.clock = "both"
    report = measuring.Report(args)
    for job in args.jobs:
        for updates in args.updates:
            title = f"The whole job {job}, {updates or 'all'} updates"
            report.add(title, jobs.benchmark(job, args.optims, updates, args.repeats))
    if args.jobs:
        return
    with tempfile.TemporaryDirectory() as args.output_dir:
        for model in args.models:
            report.add(f"Training runs, {model}", benchmark_training(model, args))


if __name__ == "__main__":
    main()
