"""The checkpoints in a run's folder: which are the run's own, which are complete, which may go.

A checkpoint may be cut off anywhere: the disk is full, the process is killed. Whether it is
complete is therefore decided by reading it, as far as that is cheap.
"""

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerState, TrainingArguments

STATE_NAME = "trainer_state.json"  # both of Trainer and of the plain loop, which write it last
# What a run needs to go on, and the names that Trainer, its FSDP and Accelerate give it. FSDP2
# writes the file .metadata after all shards.
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0/.metadata")
_RANDOM_STREAMS = ("rng_state*.pth", "random_states_*.pkl")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "pytorch_model_fsdp_0/.metadata")
_SCHEDULER = ("scheduler.pt", "scheduler.bin")


def numbered_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the folders checkpoint-<number> in `output_dir`, in the order of their numbers."""
    folders = [
        path
        for path in Path(output_dir).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Return those that a run wrote, complete or not; only these may be deleted."""
    written = (STATE_NAME, "optimizer.pt", "optimizer.bin")
    return [
        path
        for path in numbered_checkpoints(output_dir)
        if any((path / name).is_file() for name in written)
    ]


def fault_of(checkpoint: Path) -> str | None:
    """Return why a run cannot go on from `checkpoint`, or None if it is complete."""
    if not (checkpoint / STATE_NAME).is_file():
        return f"it has no {STATE_NAME}"
    needed = {"optimizer": _OPTIMIZER, "random streams": _RANDOM_STREAMS, "weights": _WEIGHTS}
    # The plain loop has a scheduler with AdamW alone.
    if not list(checkpoint.glob("random_states_*.pkl")):
        needed["scheduler"] = _SCHEDULER
    files = [
        checkpoint / STATE_NAME,
        *checkpoint.glob("*.index.json"),
        *checkpoint.glob("*config.json"),
    ]
    for kind, patterns in needed.items():
        found = [path for pattern in patterns for path in sorted(checkpoint.glob(pattern))]
        if not found:
            return f"it has no {kind} ({', '.join(patterns)})"
        files += found
    files += [path for name in _SCHEDULER for path in checkpoint.glob(name)]
    for path in files:
        fault = _fault_of_file(path)
        if fault is not None:
            return f"{path.relative_to(checkpoint)} {fault}"
    return None


def _fault_of_file(path: Path) -> str | None:
    if path.stat().st_size == 0:
        return "is empty"
    try:
        if path.suffix == ".safetensors":
            safe_open(path, "pt")  # reads the header, which states the length
        elif path.suffix in (".pt", ".pth", ".bin", ".pkl"):
            with zipfile.ZipFile(path) as saved:  # torch.save's; its list of contents is at the end
                if not any(name.endswith("data.pkl") for name in saved.namelist()):
                    return "was not written to its end"
        elif path.suffix == ".json":
            return _fault_of_json(path)
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return f"cannot be read ({error})"
    return None


def _fault_of_json(path: Path) -> str | None:
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    if path.name == STATE_NAME:
        step = content.get("global_step") if isinstance(content, dict) else None
        return None if isinstance(step, int) else "does not say its global_step"
    if not path.name.endswith(".index.json"):
        return None  # it could be read
    shards = sorted(set(content["weight_map"].values()))
    lacking = [name for name in shards if not (path.parent / name).is_file()]
    return f"names {lacking[0]}, which is missing" if lacking else None


class Rotation(TrainerCallback):
    """Keeps `save_total_limit` checkpoints and the best one, as `Trainer` does.

    But deletes no other than the run's own: `Trainer` takes any folder checkpoint-* for one.

    Args:
        args: The arguments of the trainer, which from now on leaves the rotation to this.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.limit, args.save_total_limit = args.save_total_limit, None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any
    ) -> None:
        if args.should_save and self.limit:
            newest = Path(args.output_dir, f"checkpoint-{state.global_step}")
            self._delete_all_but(self.limit, args, {newest, *_best(state)})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any
    ) -> None:
        if args.should_save and self.limit == 1 and _best(state):
            self._delete_all_but(1, args, _best(state))

    def _delete_all_but(self, limit: int, args: TrainingArguments, kept: set[Path]) -> None:
        # By time: a run that was resumed from an old checkpoint writes lower numbers.
        own = sorted(checkpoints_in(args.output_dir), key=lambda path: path.stat().st_mtime)
        spare = len(own) - max(limit, len(kept))
        for checkpoint in [path for path in own if path not in kept][: max(spare, 0)]:
            shutil.rmtree(checkpoint, ignore_errors=True)


def _best(state: TrainerState) -> set[Path]:
    return {Path(state.best_model_checkpoint)} if state.best_model_checkpoint else set()
