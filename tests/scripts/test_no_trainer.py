"""run_glue_no_trainer.py, and both GLUE scripts in two processes as the README starts them."""

import itertools
import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import run_clm
import run_glue
import run_glue_no_trainer as script
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from running import tiny_bert_config
from safetensors.torch import load_file
from support import loop
from support.checkpoints import fault_of
from support.glue import load_embedded_data, make_model_and_tokenizer
from support.runs import last_checkpoint
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    set_seed,
)

from hf_salsa import OPTIMIZERS, BatchObjective

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# 44 examples in batches of 8: the last batch of an epoch, and the last update, are smaller.
FLAGS = {
    "use_cpu": True,
    "max_train_samples": 44,
    "max_eval_samples": 21,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
}


def command_line(**flags):
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of a tiny BERT and its tokenizer, with dropout and without."""
    _, tokenizer = make_model_and_tokenizer(load_embedded_data(), vocab_size=500)
    folders = {}
    for dropout in (0.1, 0.0):
        set_seed(0)
        config = tiny_bert_config(
            tokenizer, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
        )
        folders[dropout] = tmp_path_factory.mktemp("tiny")
        BertForSequenceClassification(config).save_pretrained(folders[dropout])
        tokenizer.save_pretrained(folders[dropout])
    return folders


def forget_accelerate():
    """Let the next Accelerator of this process be another one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def run(tmp_path, tiny):
    """Runs main in this process; returns the output folder and the results."""

    def run(output_dir="out", dropout=0.1, **flags):
        folder = tmp_path / output_dir
        forget_accelerate()
        settings = {"model_name_or_path": tiny[dropout], **FLAGS, "output_dir": folder, **flags}
        script.main(command_line(**settings))
        return folder, json.loads((folder / "all_results.json").read_text())

    yield run
    forget_accelerate()


def log(folder):
    (state,) = folder.glob("checkpoint-*/trainer_state.json")
    return json.loads(state.read_text())["log_history"]


def assert_same_weights(*folders):
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize(
    "flags",
    [
        *({"optim": name} for name in OPTIMIZERS),
        {"optim": "adamw_torch", "learning_rate": 1e-3},
    ],
    ids=lambda flags: flags["optim"],
)
def test_trains_and_saves(run, tiny, flags):
    folder, results = run(**flags)
    assert results["epoch"] == 2
    assert results["num_processes"] == 1
    assert results["eval_accuracy"] * 21 == pytest.approx(round(results["eval_accuracy"] * 21))
    assert ("salsa/trials" in results) == (flags["optim"] != "adamw_torch")
    before = load_file(tiny[0.1] / "model.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert "classifier.weight" in moved
    assert [entry["epoch"] for entry in log(folder)] == [1, 2]


@pytest.mark.parametrize("optim", ["adamw_torch", "salsa_adam", "salsa_adam_plus"])
def test_gradients_are_clipped_as_trainer_clips_them(run, monkeypatch, optim):
    """At every update, all of them; with the paper's methods not at all."""
    clipped, clip = [], Accelerator.clip_grad_norm_

    def counting(accelerator, parameters, max_norm, norm_type=2):
        parameters = list(parameters)
        clipped.append((len(parameters), max_norm))
        return clip(accelerator, parameters, max_norm, norm_type)

    by_objective, clip_of_objective = [], BatchObjective.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", counting)
    monkeypatch.setattr(
        BatchObjective,
        "clip_grad_norm_",
        lambda self, norm: by_objective.append(norm) or clip_of_objective(self, norm),
    )
    rate = {"learning_rate": 1e-3} if optim == "adamw_torch" else {}
    run(optim=optim, gradient_accumulation_steps=2, **rate)
    updates = 2 * 3
    assert [norm for _, norm in clipped] == [1.0] * (updates if optim == "adamw_torch" else 0)
    assert all(number > 10 for number, _ in clipped)
    assert by_objective == [1.0] * (updates if optim == "salsa_adam_plus" else 0)


def test_learns_from_own_files(run, tmp_path):
    """Is it the first word or the second one? With an uneven split for evaluation."""
    file = tmp_path / "own.csv"
    rows = [f"the {word} is {other},{word}" for word, other in [("list", "set"), ("set", "list")]]
    file.write_text("\n".join(["sentence,label", *rows * 22]))
    _, results = run(train_file=file, validation_file=file, num_train_epochs=15, dropout=0.0)
    assert results["eval_accuracy"] == 1


def test_accumulation_gives_the_same_step_sizes(run):
    """1 x 8 = 2 x 4, without dropout."""
    histories = []
    for accumulation in (1, 2):
        folder, _ = run(
            f"accumulation{accumulation}",
            dropout=0.0,
            max_train_samples=40,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        histories.append(log(folder))
    for one, two in zip(*histories, strict=True):
        assert two["learning_rate"] == pytest.approx(one["learning_rate"], rel=1e-4)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["salsa/trials"] == one["salsa/trials"]
        assert two["eval_accuracy"] == one["eval_accuracy"]


def test_bf16(run):
    losses = []
    for precision in ("no", "bf16"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Evaluating the objective again")
            folder, _ = run(precision, mixed_precision=precision)
        losses.append(log(folder)[0]["loss"])
        weights = load_file(folder / "model.safetensors").values()
        assert {value.dtype for value in weights} == {torch.float32}
    assert losses[0] != losses[1]  # autocast was on
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_that_the_gradient_scaler_skips_is_dropped(run, monkeypatch, accumulation):
    """As fp16 has it, without a GPU: one micro-batch's gradients overflow."""
    optimizers = []
    backward_passes = itertools.count(1)

    def make_accelerator(args):
        accelerator = make(args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return accelerator

    class Overflowing(script.BatchObjective):
        def __init__(self, model, optimizer, **kwargs):
            super().__init__(model, optimizer, **kwargs)
            optimizers.append(optimizer.optimizer)
            model.classifier.weight.register_hook(
                lambda grad: grad * torch.inf if next(backward_passes) == 3 else grad
            )

    make = loop.make_accelerator
    monkeypatch.setattr(loop, "make_accelerator", make_accelerator)
    monkeypatch.setattr(script, "BatchObjective", Overflowing)
    run(
        max_train_samples=32,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        optim="sls_adam",
    )
    assert optimizers[0].counters.skipped_steps == 1
    assert optimizers[0].counters.searches == 2 * 4 - 1


@pytest.mark.parametrize(
    "flags",
    [
        {"optim": "salsa_adam", "mixed_precision": "bf16"},
        {"optim": "adamw_torch", "learning_rate": 1e-3},
    ],
    ids=lambda flags: flags["optim"],
)
def test_resumed_run_equals_the_straight_run(run, monkeypatch, flags):
    """Interrupted after the first epoch: bit for bit, dropout on."""
    flags = {**flags, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    straight, _ = run("straight", **flags)

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    save = loop.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run("resumed", **flags)
    resumed, _ = run("resumed", **flags, resume_from_checkpoint=True)
    assert log(resumed) == log(straight)
    assert_same_weights(resumed, straight)


def test_checkpoints_that_another_wrote_stay(run, tmp_path):
    for name in ("checkpoint-best", "checkpoint-3", "checkpoint-5"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "notes.txt").write_text("mine")
    (tmp_path / "out" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    folder, _ = run(overwrite_output_dir=True)
    names = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert names == ["checkpoint-12", "checkpoint-3", "checkpoint-best"]


@pytest.mark.parametrize("flags", [{}, {"optim": "adamw_torch", "learning_rate": 1e-3}], ids=str)
def test_its_checkpoints_are_complete_and_damage_is_seen(run, capsys, flags):
    folder, _ = run(**flags)
    checkpoint = last_checkpoint(folder)
    assert checkpoint == folder / "checkpoint-12"
    for name in ("optimizer.bin", "random_states_0.pkl", "model.safetensors"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:99])
        assert fault_of(checkpoint).startswith(f"{name} cannot be read")
        with pytest.raises(SystemExit):
            run(**flags, resume_from_checkpoint=True)
        assert "no checkpoint to resume from" in capsys.readouterr().err
        (checkpoint / name).unlink()
        assert fault_of(checkpoint).startswith("it has no ")
        (checkpoint / name).write_bytes(content)
    assert fault_of(checkpoint) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision=fp16 needs a GPU"),
        ({"learning_rate": 1e-3}, "learning_rate has no meaning with optim=salsa_adam_plus:"),
        ({"optim": "adamw_torch"}, "optim=adamw_torch needs a learning_rate"),
        ({"num_train_epochs": 0}, "num_train_epochs must be at least 1, got 0"),
        ({"optim": "salsa"}, "invalid choice: 'salsa'"),
        ({"output_dir": ROOT / "tests"}, "is not empty"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_mistakes_are_one_line(run, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        run(**flags)
    assert exit.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("run_glue_no_trainer.py: error: ")
    assert message in error


@pytest.mark.parametrize("main", [run_glue.main, run_clm.main, script.main])
def test_launched_processes_that_would_train_apart_are_refused(main, monkeypatch, capsys, tmp_path):
    """What torchrun does without --use_cpu where there is no GPU."""
    forget_accelerate()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path)])
    assert "2 processes on a machine without a GPU need --use_cpu" in capsys.readouterr().err


# --- Two processes


def launch(line, **flags):
    """Run a launch line of the README, with `flags` after it."""
    done = subprocess.run(
        [*shlex.split(line), *command_line(**flags)],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PET_STANDALONE": "1",  # torchrun on a free port: another run may hold the usual one
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_trains_as_one_process_does(run, tiny, tmp_path):
    """2 x 4 = 1 x 8 in step sizes, losses and metrics; 21 examples are 21, not 22."""
    flags = {**FLAGS, "model_name_or_path": tiny[0.0], "max_train_samples": 40}
    one, _ = run("one", **flags)
    two = tmp_path / "two"
    launch(
        "torchrun --nproc_per_node 2 scripts/run_glue_no_trainer.py",
        **{**flags, "per_device_train_batch_size": 4, "output_dir": two},
    )
    assert json.loads((two / "all_results.json").read_text())["num_processes"] == 2
    assert len(list(two.glob("checkpoint-10/random_states_*.pkl"))) == 2
    for single, double in zip(log(one), log(two), strict=True):
        assert double == pytest.approx(single, rel=1e-3)


def test_every_process_trains_the_same_tokenizer():
    data = load_embedded_data()
    one, two = (make_model_and_tokenizer(data)[1].get_vocab() for _ in range(2))
    assert one == two


@pytest.mark.slow
@pytest.mark.distributed
def test_accelerate_launch_starts_two_processes(tmp_path):
    """On the embedded data, model and tokenizer."""
    launch(
        "accelerate launch --multi_gpu --num_processes 2 scripts/run_glue_no_trainer.py",
        **{**FLAGS, "num_train_epochs": 1},
        output_dir=tmp_path,
    )
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["num_processes"] == 2
    assert results["salsa/trials"] > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_run_glue_under_torchrun(tmp_path):
    """`Trainer`, to the finished model card."""
    launch(
        "torchrun --nproc_per_node 2 scripts/run_glue.py",
        output_dir=tmp_path,
        use_cpu=True,
        max_steps=2,
        max_train_samples=32,
        max_eval_samples=21,
        per_device_train_batch_size=4,
    )
    card = (tmp_path / "README.md").read_text()
    assert "processes: 2\n" in card
    assert "total_train_batch_size: 8\n" in card
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["eval_accuracy"] * 21 == pytest.approx(round(results["eval_accuracy"] * 21))
