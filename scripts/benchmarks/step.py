"""What a step of SaLSaAdam costs beside torch's AdamW and other optimizers: time and memory.

The optimizers alone, on parameters shaped like MiniLM-L6, BERT-base and GPT-2 small; and what each
takes longer than fused AdamW, as a share of a training step: forward and backward pass and AdamW.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import measuring
import torch
from contenders import (
    NO_SEARCH,
    NORM_KNOWN,
    Contender,
    parameters,
    plus_contenders,
    rival_contenders,
    salsa_contenders,
    searching,
    training_passes,
)
from measuring import DEVICE, Clock, Ratio, Row, verdict
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import set_seed
from workloads import MODELS, OURS, PYPI, STEP_SIZE

from hf_salsa import BatchObjective, SaLSaAdam

GROUP_NUMBERS = (1, 10, 100)
FUSED = "AdamW fused"
PASSES = "forward and backward pass"
TIME_LIMIT = 1.05  # the ratio to AdamW of a step that does not search, at most
MEMORY_LIMIT = 1.05  # copies of the weights that a search may add
PYPI_LIMIT = 5  # its time on a search step over ours, at least


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


# --- tables -------------------------------------------------------------------------------------


def benchmark_model(model: str, args: argparse.Namespace) -> list[Row]:
    """Return the cost of one step with each optimizer."""
    params = parameters(model)
    contenders = {
        FUSED: Contender(AdamW(params, STEP_SIZE, fused=True).step),
        "AdamW foreach": Contender(AdamW(params, STEP_SIZE, foreach=True).step),
        **salsa_contenders(SaLSaAdam(params), args.trials),
        **plus_contenders(params),
        **rival_contenders(params, args.trials),
        PASSES: training_passes(model),
    }
    measured = measure(contenders, args)
    fused, passes = measured[FUSED].seconds, measured[PASSES].seconds
    whole = [update + rest for update, rest in zip(fused, passes, strict=True)]
    rows = []
    for name, mine in measured.items():
        ratio = Ratio.of(mine.seconds, fused)
        added = [its - update for its, update in zip(mine.seconds, fused, strict=True)]
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
                "added to a training step": None if name == PASSES else Ratio.of(added, whole),
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
