"""What an evaluation of the loss puts back, in time beside a training step.

    OMP_NUM_THREADS=1 python scripts/benchmarks/put_back.py --clock cpu

SaLSaTrainer trains MiniLM from its configuration on 16 x 64 random tokens. Every second step
searches, with one trial. In each of them the time is taken that `BatchObjective` spends outside of
forward and backward passes: on remembering and restoring what a forward pass may change, and on
copying the batch. A share is its ratio to the step without a search before it; median and quartiles
over the searches of the run.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import measuring
import workloads
from measuring import DEVICE, Clock, Ratio, Report, Row
from transformers import PrinterCallback, TrainerCallback, default_data_collator, set_seed
from workloads import MODELS, STEP_SIZE

import hf_salsa.trainer
from hf_salsa import BatchObjective, SaLSaTrainer, SaLSaTrainingArguments

LIMIT = 0.03  # of a training step, at most
WARM_UP = 4  # steps that do not count


class TimedObjective(BatchObjective):
    """Adds up what recording and evaluating take beside the training steps that they run."""

    clock = "wall"  # of all of them, like what they add up: the trainer makes its own
    seconds = 0.0

    def record_step(self, training_step: Callable[..., Any], *inputs: Any) -> Any:
        def timed(*args: Any) -> Any:
            clock = Clock(self.clock)
            clock.start()
            try:
                return training_step(*args)
            finally:
                TimedObjective.seconds -= clock.stop()

        return self._timed(super().record_step, timed, *inputs)

    def __call__(self) -> Any:
        return self._timed(super().__call__)

    def _timed(self, call: Callable[..., Any], *args: Any) -> Any:
        clock = Clock(self.clock)
        clock.start()
        returned = call(*args)
        TimedObjective.seconds += clock.stop()
        return returned


class Steps(TrainerCallback):
    """Times each step, as a whole and what is put back in it; lets every second one search."""

    def __init__(self, kind: str) -> None:
        self._clock = Clock(kind)
        self.whole: list[float] = []
        self.put_back: list[float] = []
        self.trials: list[int] = []
        self._rested: dict[bool, dict[str, Any]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trials.append(kwargs["optimizer"].optimizer.counters.trials)
        TimedObjective.seconds = 0.0
        self._clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.whole.append(self._clock.stop())
        self.put_back.append(TimedObjective.seconds)
        optimizer = kwargs["optimizer"].optimizer
        self.trials[-1] = optimizer.counters.trials - self.trials[-1]
        if not self._rested:
            self._rested = {
                due: workloads.at_rest(optimizer, STEP_SIZE, search_due=due, decrease=1e9)
                for due in (True, False)
            }
        workloads.update_groups(optimizer, self._rested[state.global_step % 2 == 1])


def train(args: argparse.Namespace, folder: str) -> Steps:
    """Train for a few steps more than there are searches to be measured."""
    shape = MODELS["minilm"]._replace(batch_size=16)
    steps = Steps(args.clock)
    number = WARM_UP + 2 * args.repeats
    set_seed(0)
    trainer = SaLSaTrainer(
        shape.build(),
        SaLSaTrainingArguments(
            folder,
            per_device_train_batch_size=shape.batch_size,
            max_steps=number,
            use_cpu=DEVICE.type == "cpu",
            dataloader_pin_memory=DEVICE.type != "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            optim="salsa_adam",
        ),
        train_dataset=shape.examples(shape.batch_size * number),
        data_collator=default_data_collator,
        callbacks=[steps],
    )
    trainer.remove_callback(PrinterCallback)
    TimedObjective.clock = args.clock
    made = hf_salsa.trainer.BatchObjective
    hf_salsa.trainer.BatchObjective = TimedObjective  # type: ignore[misc]
    try:
        trainer.train()
    finally:
        hf_salsa.trainer.BatchObjective = made  # type: ignore[misc]
    return steps


def benchmark(args: argparse.Namespace) -> list[Row]:
    """Return the table: a step, a step that searches, and what is put back in it."""
    with tempfile.TemporaryDirectory() as folder:
        steps = train(args, folder)
    pairs = range(WARM_UP, len(steps.whole), 2)
    assert all(steps.trials[i] == 0 and steps.trials[i + 1] == 1 for i in pairs)
    plain = [steps.whole[i] for i in pairs]
    found = {
        "a step without a search": plain,
        "a step with one": [steps.whole[i + 1] for i in pairs],
        "of it, what is put back": [steps.put_back[i + 1] for i in pairs],
        "the same on a step without": [steps.put_back[i] for i in pairs],
    }
    rows: list[Row] = []
    for name, seconds in found.items():
        ratio = Ratio.of(seconds, plain)
        rows.append(
            {
                "what": name,
                "ms": 1e3 * statistics.median(seconds),
                "share of a step (quartiles)": str(Ratio(*(round(x, 4) for x in ratio))),
                "target": measuring.verdict(ratio.median, LIMIT) if "of it" in name else "",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = measuring.make_parser(__doc__)
    parser.set_defaults(repeats=20)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: time on the processor"
    )
    args = measuring.parse(parser, argv)
    report = Report(args)
    report.add("What an evaluation puts back, minilm, 16 x 64 tokens", benchmark(args))


if __name__ == "__main__":
    main()
