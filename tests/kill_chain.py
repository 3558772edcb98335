"""Kills a training run again and again, resumes it, and compares its end with a straight run's.

    python tests/kill_chain.py CHAINS KILLS [--optim NAME] [--seed SEED] [--folder DIR]

Each kill is SIGKILL or SIGINT, at a random moment after the start, in a save or after one, drawn
from the seed; those that wait for a save lie ever later in the run. The run goes on from the
newest complete checkpoint, as the scripts do. Weights, step sizes, counters, the optimizer's
groups, the trace and the log are compared bit for bit. `--optim adamw_torch` does the same to stock
`Trainer`. The exit status is 1 if a chain ended elsewhere.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import torch
from support.checkpoints import numbered_checkpoints
from support.runs import last_checkpoint
from transformers import BertConfig, BertForSequenceClassification, Trainer, set_seed

from hf_salsa import OPTIMIZERS, SaLSaTrainer, SaLSaTrainingArguments

UPDATES, SAVE_EVERY = 60, 5
_RESULT = "result.pt"
# Seconds from the first file of a checkpoint on in which a kill comes.
_AFTER = {"in a save": (0.0, 0.04), "after a save": (0.04, 0.15)}
_LONGEST = 120  # seconds that a process may take
# What `Trainer` counts from the latest resuming on.
_OF_ITS_PROCESS = (
    *("train_runtime", "train_samples_per_second", "train_steps_per_second"),
    *("train_loss", "salsa/search_runtime"),
)


@dataclass
class Kill:
    """One kill: what was sent when, and where the run was taken up after it."""

    sent: str
    aim: str
    resumed_from: int = 0
    passed_over: int = 0

    def __str__(self) -> str:
        passed = f" past {self.passed_over}" if self.passed_over else ""
        return f"{self.sent[3:]} {self.aim} -> {self.resumed_from}{passed}"


def make_trainer(folder: Path, optim: str, updates: int = UPDATES) -> Trainer:
    """A tiny BERT with dropout; 60 updates are seven and a half epochs."""
    set_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )
    tokens = torch.randint(0, 64, (64, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": int(row[0] < 32)} for row in tokens]
    args = SaLSaTrainingArguments(
        str(folder),
        optim=optim,
        max_steps=updates,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="steps",
        save_steps=SAVE_EVERY,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    kind = SaLSaTrainer if optim in OPTIMIZERS else Trainer
    return kind(model, args, train_dataset=data)


def outcome(trainer: Trainer) -> dict[str, Any]:
    """What a run ended with, in numbers that can be compared for equality."""
    log = [
        {name: value for name, value in entry.items() if name not in _OF_ITS_PROCESS}
        for entry in trainer.state.log_history
    ]
    result = {
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        "step sizes": [entry["learning_rate"] for entry in log if "learning_rate" in entry],
        "log": log,
    }
    if isinstance(trainer, SaLSaTrainer):
        optimizer = trainer.line_search
        result["counters"] = asdict(optimizer.counters)
        result["groups"] = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        result["trace"] = [tuple(point) for point in trainer.run_trace.points]
    return result


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The distance of the final weights of two outcomes."""
    pairs = zip(a["weights"].values(), b["weights"].values(), strict=True)
    return sum(float((x - y).double().square().sum()) for x, y in pairs) ** 0.5


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The parts of two outcomes that are not the same bit for bit."""
    assert a.keys() == b.keys()
    assert a["weights"].keys() == b["weights"].keys()
    equal = {name: a[name] == b[name] for name in a if name != "weights"}
    equal["weights"] = all(torch.equal(x, b["weights"][name]) for name, x in a["weights"].items())
    return [name for name, same in equal.items() if not same]


def _train(folder: Path, optim: str) -> None:
    checkpoint = last_checkpoint(folder)
    trainer = make_trainer(folder, optim)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    torch.save(outcome(trainer), folder / _RESULT)


def start(folder: Path, optim: str) -> int:
    """Start a process that trains in `folder` to the end; return its number.

    It is a copy of this one, which has imported everything.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open(folder / "output.txt", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        _train(folder, optim)
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid: int, seconds: float) -> int | None:
    """Wait for a process, at most so long; return its exit status, or None if it still runs."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.0005)


def finish(pid: int, folder: Path) -> int:
    """Wait until a process ends; return its exit status."""
    status = ended(pid, _LONGEST)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise RuntimeError(f"a process in {folder} did not end within {_LONGEST} s")
    if status not in (0, 130, -signal.SIGKILL, -signal.SIGINT):
        output = (folder / "output.txt").read_text()
        raise RuntimeError(f"a process in {folder} ended with {status}:\n{output[-3000:]}")
    return status


def _kill_once(
    folder: Path, optim: str, draws: random.Random, last_save: int, longest: float
) -> Kill | None:
    """Run, and kill, by the save of step `last_save`; None if the run ended before."""
    at = last_checkpoint(folder)
    step = int(at.name.split("-")[1]) if at else 0
    aim = draws.choice(["at", *_AFTER])
    kill = Kill(draws.choice(["SIGKILL", "SIGINT"]), aim)
    began = time.time_ns()
    pid = start(folder, optim)
    if aim in _AFTER:
        saves = range(step + SAVE_EVERY, max(last_save, step + SAVE_EVERY) + 1, SAVE_EVERY)
        at_step = draws.choice(saves)
        first = folder / f"checkpoint-{at_step}"
        kill.aim += f" {at_step}"
        until = time.monotonic() + _LONGEST
        while time.monotonic() < until:
            if any(path.stat().st_mtime_ns > began for path in first.glob("*")):
                break
            if (status := ended(pid, 0.0005)) is not None:
                raise RuntimeError(f"{folder} ended with {status} before it saved {first.name}")
        delay = draws.uniform(*_AFTER[aim])
    else:
        delay = draws.uniform(0, longest)
        kill.aim += f" {delay:.2f} s"
    if ended(pid, delay) is not None:
        return None
    os.kill(pid, signal.Signals[kill.sent])
    if finish(pid, folder) == 0:
        return None
    newest = last_checkpoint(folder)
    kill.resumed_from = int(newest.name.split("-")[1]) if newest else 0
    steps = [int(path.name.split("-")[1]) for path in numbered_checkpoints(folder)]
    kill.passed_over = sum(step > kill.resumed_from for step in steps)
    return kill


def chain(
    folder: Path, optim: str, kills: int, seed: int, seconds: float
) -> tuple[list[Kill], dict[str, Any]]:
    """Train in `folder` with `kills` kills in between; return them and the outcome.

    Args:
        folder: An empty or new folder.
        optim: The optimizer.
        kills: At most 5: so often a run is killed before its end.
        seed: Of the moments.
        seconds: How long the straight run took.
    """
    draws = random.Random(seed)
    happened = []
    for number in range(kills):
        last_save = UPDATES * (number + 1) // (kills + 1)
        kill = _kill_once(folder, optim, draws, last_save, 0.8 * seconds / kills)
        if kill is None:
            break
        happened.append(kill)
    if not (folder / _RESULT).exists() and finish(start(folder, optim), folder) != 0:
        raise RuntimeError(f"the last process in {folder} was killed by somebody else")
    return happened, torch.load(folder / _RESULT)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chains", type=int)
    parser.add_argument("kills", type=int, choices=range(1, 6))
    parser.add_argument("--optim", default="salsa_adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="kill_chain_"))
    began = time.monotonic()
    finish(start(folder / "straight", given.optim), folder / "straight")
    seconds = time.monotonic() - began
    straight = torch.load(folder / "straight" / _RESULT)
    print(f"{given.optim}, straight run of {UPDATES} updates: {seconds:.1f} s, in {folder}")
    print("| chain | kills -> resumed from | seconds | differs in | distance of the weights |")
    print("|---|---|---|---|---|")
    elsewhere, happened = 0, 0
    for number in range(given.chains):
        seed = 1000 * given.seed + number
        began = time.monotonic()
        kills, result = chain(folder / f"chain{seed}", given.optim, given.kills, seed, seconds)
        found = differences(straight, result)
        cells = (
            str(seed),
            "; ".join(map(str, kills)) or "none",
            f"{time.monotonic() - began:.1f}",
            ", ".join(found) or "nothing",
            f"{distance(straight, result):.3g}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)
        happened += len(kills)
        elsewhere += bool(found)
    print(f"{given.chains} chains, {happened} kills, {elsewhere} ended elsewhere")
    return int(elsewhere > 0)


if __name__ == "__main__":
    sys.exit(main())
