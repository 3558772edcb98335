"""Runs that were killed, and checkpoints on a full disk (15, 17)."""

import builtins
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kill_chain
import pytest
import torch
import transformers.modeling_utils
from support.checkpoints import fault_of, numbered_checkpoints
from support.runs import last_checkpoint
from transformers import TrainerCallback

from hf_salsa import OPTIMIZERS

SCRIPT = Path(kill_chain.__file__)


@pytest.mark.slow
def test_killed_twice(tmp_path):
    for seed in range(4):  # on a machine whose speed changes, a run may end before it is killed
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "1", "2", "--seed", str(seed)],
            env={
                **os.environ,
                "PYTHONPATH": str(SCRIPT.parents[1]),
                "OMP_NUM_THREADS": "1",
                "TMPDIR": str(tmp_path),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        if (said := done.stdout.splitlines()[-1]) == "1 chains, 2 kills, 0 ended elsewhere":
            break
    else:
        pytest.fail(said)


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_resumed_at_every_fifth_step(tmp_path, optim):
    """Weights, step sizes, counters, groups, trace and log; in the middle of an epoch, too."""
    straight = kill_chain.make_trainer(tmp_path, optim, updates=25)
    straight.train()
    expected = kill_chain.outcome(straight)
    assert len(expected["step sizes"]) == 25
    checkpoints = numbered_checkpoints(tmp_path)[:-1]
    assert [path.name for path in checkpoints] == [f"checkpoint-{n}" for n in (5, 10, 15, 20)]
    for checkpoint in checkpoints:
        resumed = kill_chain.make_trainer(tmp_path / "resumed", optim, updates=25)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        found = kill_chain.outcome(resumed)
        assert kill_chain.differences(expected, found) == [], checkpoint.name


class Rests(TrainerCallback):
    """After the twelfth step comes no search for long, as where the step size has come to rest."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 12:
            for group in optimizer.param_groups:
                group.update(search_interval=10, steps_since_search=0)


@pytest.mark.parametrize("optim", ["salsa_adam", "salsa_sgd_plus"])
def test_the_log_goes_on_where_no_search_comes_first(tmp_path, optim):
    """A resumed process logs the latest search of the run, though another process made it."""
    straight = kill_chain.make_trainer(tmp_path, optim, updates=16)
    straight.add_callback(Rests())
    straight.train()
    resumed = kill_chain.make_trainer(tmp_path / "resumed", optim, updates=16)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert resumed.line_search.last_search is None
    expected, found = kill_chain.outcome(straight), kill_chain.outcome(resumed)
    assert expected["log"][-2]["salsa/slope"] == straight.line_search.last_search.slope
    assert kill_chain.differences(expected, found) == []


def test_the_comparison_sees_one_bit(tmp_path):
    trainer = kill_chain.make_trainer(tmp_path, "salsa_adam", updates=2)
    trainer.train()
    one, other = kill_chain.outcome(trainer), kill_chain.outcome(trainer)
    assert kill_chain.differences(one, other) == []
    name = next(iter(other["weights"]))
    other["weights"][name].view(torch.int32).view(-1)[0] ^= 1
    other["counters"]["trials"] += 1
    assert kill_chain.differences(one, other) == ["counters", "weights"]


class FullDisk:
    """Counts the files that are written below a folder; the one of that number is cut short."""

    def __init__(self, monkeypatch, folder, full_at=None):
        self.folder, self.full_at, self.written = folder, full_at, []
        self.inside = False
        self._replace(monkeypatch, torch, "save", 1)
        self._replace(monkeypatch, transformers.modeling_utils, "safe_save_file", 1)
        self._replace(monkeypatch, builtins, "open", 0)

    def _replace(self, monkeypatch, module, name, position):
        write = getattr(module, name)

        def writing(*args, **kwargs):
            path = args[position] if len(args) > position else None
            reads = name == "open" and "w" not in [*args[1:2], kwargs.get("mode", "")][0]
            if self.inside or reads or not str(path).startswith(str(self.folder)):
                return write(*args, **kwargs)
            self.written.append(Path(path).name)
            if len(self.written) - 1 != self.full_at:
                return write(*args, **kwargs)
            self.inside = True
            result = write(*args, **kwargs)
            if name == "open":
                result.close()
            os.truncate(path, os.path.getsize(path) // 2)
            self.inside = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(module, name, writing)


@pytest.mark.slow
def test_disk_full_at_every_file(tmp_path):
    """The run stops, and the scripts go on from the checkpoint before."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = FullDisk(monkeypatch, tmp_path / "whole" / "checkpoint-10")
        kill_chain.make_trainer(tmp_path / "whole", "salsa_adam", updates=10).train()
    present = {path.name for path in (tmp_path / "whole" / "checkpoint-10").iterdir()}
    assert set(disk.written) == present  # no file is written in another way
    assert last_checkpoint(tmp_path / "whole").name == "checkpoint-10"
    for number, name in enumerate(disk.written):
        out = tmp_path / f"full{number}"
        trainer = kill_chain.make_trainer(out, "salsa_adam", updates=10)
        with pytest.MonkeyPatch.context() as monkeypatch:
            FullDisk(monkeypatch, out / "checkpoint-10", number)
            with pytest.raises(OSError, match="No space"):
                trainer.train()
        assert (out / "checkpoint-10" / name).exists()
        assert fault_of(out / "checkpoint-10") is not None, name
        assert last_checkpoint(out) == out / "checkpoint-5", name


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    kill_chain.make_trainer(folder, "salsa_adam", updates=10).train()
    return folder


# What `Trainer` never reads when it resumes.
UNREAD = "training_args.bin"


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "config.json",
        UNREAD,
    ],
)
def test_every_file_cut_short(two_checkpoints, tmp_path, name, share):
    """Such a checkpoint is passed over, or the run goes on from it as if nothing were."""
    out = shutil.copytree(two_checkpoints, tmp_path / "out")
    newest = out / "checkpoint-10"
    os.truncate(newest / name, int((newest / name).stat().st_size * share))
    if name == UNREAD:
        assert last_checkpoint(out) == newest
        resumed = kill_chain.make_trainer(out, "salsa_adam", updates=12)
        resumed.train(resume_from_checkpoint=str(newest))
        assert resumed.state.global_step == 12
    else:
        assert last_checkpoint(out) == out / "checkpoint-5"


def test_no_other_file_in_a_checkpoint(two_checkpoints):
    cut = test_every_file_cut_short.pytestmark[0].args[1]
    names = [getattr(name, "values", [name])[0] for name in cut]
    assert sorted(path.name for path in (two_checkpoints / "checkpoint-10").iterdir()) == sorted(
        names
    )
