"""Which checkpoints are a run's own, and which of them are complete."""

import json
import shutil

import pytest
import run_clm
from running import CLM_FLAGS, SCRIPT_FLAGS
from support.checkpoints import checkpoints_in, fault_of
from support.embedded_data import python_documentation
from support.runs import last_checkpoint

FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What `Trainer` leaves of a run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    text = folder / "text.txt"
    text.write_text(python_documentation()[:9000])
    flags = ["--output_dir", str(folder / "out"), *SCRIPT_FLAGS, *CLM_FLAGS, "--tokenizer", "bytes"]
    run_clm.main([*flags, "--train_file", str(text), "--eval_strategy", "no"])
    return folder / "out" / "checkpoint-2"


@pytest.fixture
def checkpoint(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out" / "checkpoint-9")


def empty(path):
    path.write_bytes(b"")


def cut_off(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 9 // 10])


def test_complete(checkpoint):
    assert fault_of(checkpoint) is None
    assert last_checkpoint(checkpoint.parent) == checkpoint


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.unlink(), "it has no {}"),
        (empty, "{} is empty"),
        (cut_off, "{} cannot be read"),
    ],
    ids=["missing", "empty", "cut off"],
)
def test_incomplete(finished, checkpoint, name, damage, fault):
    damage(checkpoint / name)
    found = fault_of(checkpoint)
    if fault.startswith("it has no"):  # of what may have several names, the kind is named
        assert found.startswith("it has no ")
    else:
        assert found.startswith(fault.format(name))
    assert last_checkpoint(checkpoint.parent) is None
    older = shutil.copytree(finished, checkpoint.parent / "checkpoint-2")
    assert last_checkpoint(checkpoint.parent) == older


@pytest.mark.parametrize("content", ["{}", "[2]", '{"global_step": null}'])
def test_a_state_that_does_not_say_its_step(checkpoint, content):
    (checkpoint / "trainer_state.json").write_text(content)
    assert fault_of(checkpoint) == "trainer_state.json does not say its global_step"


def test_a_lacking_shard_of_the_weights(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert fault_of(checkpoint) == f"{index.name} names {shards['b']}, which is missing"
    shutil.copy(checkpoint / shards["a"], checkpoint / shards["b"])
    assert fault_of(checkpoint) is None
    empty(index)
    assert fault_of(checkpoint) == "model.safetensors.index.json is empty"


def test_sharded_by_fsdp(checkpoint):
    """As FSDP2 saves it: a folder for the weights and one for the optimizer."""
    for name, whole in (("pytorch_model_fsdp_0", "model.safetensors"), ("optimizer_0", FILES[1])):
        (checkpoint / whole).unlink()
        (checkpoint / name).mkdir()
        assert fault_of(checkpoint).startswith("it has no ")
        (checkpoint / name / ".metadata").write_bytes(b"")
        assert fault_of(checkpoint) == f"{name}/.metadata is empty"
        (checkpoint / name / ".metadata").write_bytes(b"written last")
    assert fault_of(checkpoint) is None


def test_what_a_checkpoint_of_ours_is(tmp_path):
    files = {
        "checkpoint-10": "trainer_state.json",
        "checkpoint-9": "optimizer.pt",  # interrupted while it was saved
        "checkpoint-11": "optimizer.bin",
        "checkpoint-7": "mine.txt",
        "checkpoint-best": "trainer_state.json",
        "checkpoint-5-old": "trainer_state.json",
        "checkpoints-5": "trainer_state.json",
    }
    for folder, name in files.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}")
    (tmp_path / "checkpoint-12").symlink_to(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-13").write_text("a file")
    names = [path.name for path in checkpoints_in(tmp_path)]
    assert names == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]
    assert checkpoints_in(tmp_path / "nowhere") == []
