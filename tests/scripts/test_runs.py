"""A run's folder: interrupting, resuming, starting anew."""

import functools
import shutil
import signal
import subprocess
import sys
import time

import pytest
import run_clm
import run_glue
import torch
from running import GLUE_FLAGS, SCRIPT_FLAGS, SCRIPTS, interrupt_in_trial, without_times
from safetensors.torch import load_file
from support import runs

# What the output folder of a run that went before holds, and what is not of such a run.
EARLIER = (
    *("trainer_state.json", "train_results.json", "eval_results.json", "all_results.json"),
    *("checkpoint-7/trainer_state.json", "checkpoint-8/optimizer.pt"),
)
MINE = (
    *("notes.txt", "my_results.json", "predict_results.json", "checkpoint-6/notes.txt"),
    *("checkpoint-best/trainer_state.json", "checkpoints-7-and-8/trainer_state.json"),
)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["glue", "clm"])
def test_interrupted_and_resumed_equals_the_straight_run(
    request, tmp_path, capsys, monkeypatch, bert_folder, text_file, job
):
    run = request.getfixturevalue(job)
    flags = [*("--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2)]
    flags += [*("--logging_steps", 1, "--per_device_train_batch_size", 4)]
    flags += ["--salsa_max_search_interval", 1]  # a search to interrupt at the update that is named
    if job == "glue":
        flags += ["--model_name_or_path", bert_folder]
    else:
        flags += ["--train_file", text_file, "--vocab_size", 400]
    straight = run(*flags, output_dir="straight")

    with monkeypatch.context() as patch:
        interrupt_in_trial(patch, update=3)
        with pytest.raises(SystemExit) as exit_:
            run(*flags)
    assert exit_.value.code == 130
    message = capsys.readouterr().err
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert f"Interrupted at step 2. The last checkpoint is {checkpoint}; to resume" in message
    assert "the same command with --resume_from_checkpoint true" in message

    resumed = run(*flags, "--resume_from_checkpoint", "true")
    a, b = (load_file(result.folder / "model.safetensors") for result in (straight, resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    histories = [
        without_times(result.json("trainer_state.json")["log_history"])
        for result in (straight, resumed)
    ]
    for history in histories:
        history[-2].pop("train_loss")  # of the part that ran last
    assert histories[0] == histories[1]
    assert "Before training" in resumed.stdout  # from the checkpoint's log


def test_interrupted_before_the_first_checkpoint(clm, capsys, monkeypatch, text_file):
    interrupt_in_trial(monkeypatch, update=1)
    with pytest.raises(SystemExit) as exit_:
        clm("--train_file", text_file, "--tokenizer", "bytes")
    assert exit_.value.code == 130
    message = capsys.readouterr().err
    assert "Interrupted at step 0. No checkpoint was saved yet" in message
    assert "--save_steps" in message
    assert "--overwrite_output_dir" in message


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(tmp_path, glue, bert_folder):
    folder = tmp_path / "out"
    flags = ["--model_name_or_path", str(bert_folder), "--save_strategy", "steps"]
    flags += ["--save_steps", "2", "--eval_strategy", "no"]
    process = subprocess.Popen(
        [
            *(sys.executable, str(SCRIPTS / "run_glue.py"), "--output_dir", str(folder)),
            *(*SCRIPT_FLAGS, *GLUE_FLAGS, *flags, "--max_steps", "1000000"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job would have it ignore Ctrl-C.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not list(folder.glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in message
    assert "to resume, give the same command with --resume_from_checkpoint true" in message

    (checkpoint,) = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    step = int(checkpoint.name.split("-")[1])
    result = glue(*flags, "--max_steps", step + 1, "--resume_from_checkpoint", "true")
    assert result.json("trainer_state.json")["global_step"] == step + 1


@pytest.fixture
def earlier_run(tmp_path):
    """The output folder of a run that went before, and files of the user's in it."""
    folder = tmp_path / "out"
    for name in (*EARLIER, *MINE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def files_in(folder):
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", [run_glue, run_clm], ids=["glue", "clm"])
def test_output_dir_in_use_is_refused(earlier_run, capsys, script):
    before = files_in(earlier_run)
    with pytest.raises(SystemExit) as exit_:
        script.main(["--output_dir", str(earlier_run), *SCRIPT_FLAGS])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert f"output_dir {earlier_run} is not empty" in message
    assert "--resume_from_checkpoint true" in message
    assert "--overwrite_output_dir" in message
    assert files_in(earlier_run) == before


@pytest.mark.slow
def test_overwrite_deletes_the_earlier_run_and_nothing_else(clm, earlier_run, text_file):
    flags = ("--train_file", text_file, "--tokenizer", "bytes", "--overwrite_output_dir")
    result = clm(*flags, "--max_steps", 3, "--save_strategy", "steps", "--save_steps", 1)
    for name in ("checkpoint-7", "checkpoint-8", "checkpoint-2"):  # the last one by rotation
        assert not (earlier_run / name).exists()
    for name in MINE:
        assert (earlier_run / name).read_text() == "{}"
    assert result.json("trainer_state.json")["global_step"] == 3
    assert {"train_loss", "eval_loss"} <= result.json("all_results.json").keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("greater_is_better", "limit", "kept"),
    [("true", 1, {4}), ("false", 1, {1}), ("false", 2, {1, 4})],
)
def test_rotation_keeps_the_best_checkpoint_and_what_is_not_its_own(
    clm, text_file, tmp_path, monkeypatch, greater_is_better, limit, kept
):
    """The end of the text, held out, is unlike the rest: with long steps its loss rises."""
    theirs = tmp_path / "out" / "checkpoint-best" / "notes.txt"

    def add_theirs(trainer, checkpoint):
        theirs.parent.mkdir()
        theirs.write_text("mine")
        return train_and_evaluate(trainer, checkpoint)

    train_and_evaluate = runs.train_and_evaluate
    monkeypatch.setattr(runs, "train_and_evaluate", add_theirs)
    result = clm(
        *("--train_file", text_file, "--tokenizer", "bytes", "--max_steps", 4),
        *("--optim", "salsa_adam"),
        *("--eval_strategy", "steps", "--eval_steps", 1, "--load_best_model_at_end", "true"),
        *("--save_strategy", "steps", "--save_steps", 1),
        *("--metric_for_best_model", "loss", "--greater_is_better", greater_is_better),
        *("--save_total_limit", limit),
    )
    assert theirs.read_text() == "mine"
    best = result.json("trainer_state.json")["best_global_step"]
    assert best == (4 if greater_is_better == "true" else 1)
    names = {path.name for path in result.folder.glob("checkpoint-*")}
    assert names == {"checkpoint-best", *(f"checkpoint-{step}" for step in kept)}


@pytest.mark.parametrize("script", [run_glue, run_clm], ids=["glue", "clm"])
def test_overwrite_waits_until_the_data_is_there(earlier_run, capsys, script):
    before = files_in(earlier_run)
    with pytest.raises(SystemExit):
        script.main(
            [
                *("--output_dir", str(earlier_run), *SCRIPT_FLAGS, "--overwrite_output_dir"),
                *("--train_file", "no.csv"),
                *(["--validation_file", "no.csv"] if script is run_glue else []),
            ]
        )
    assert "no.csv: no such file" in capsys.readouterr().err
    assert files_in(earlier_run) == before


@pytest.mark.slow
def test_overwrite_has_no_effect_on_a_resumed_run(clm, text_file):
    flags = ("--train_file", text_file, "--tokenizer", "bytes", "--overwrite_output_dir")
    clm(*flags)
    result = clm(*flags, "--max_steps", 4, "--resume_from_checkpoint", "true")
    history = result.json("trainer_state.json")["log_history"]
    assert history[0]["step"] == 0  # of the first run
    assert history[-1]["step"] == 4


@pytest.mark.slow
def test_half_written_checkpoint_is_not_resumed_from(clm, tmp_path, text_file, error):
    flags = ("--train_file", text_file, "--tokenizer", "bytes")
    clm(*flags)
    half = tmp_path / "out" / "checkpoint-9"
    shutil.copytree(half.parent / "checkpoint-2", half)
    (half / "optimizer.pt").write_bytes(b"")
    shutil.copytree(half, half.parent / "checkpoint-10")
    (half.parent / "checkpoint-10" / "trainer_state.json").unlink()
    result = clm(*flags, "--max_steps", 3, "--resume_from_checkpoint", "true")
    assert result.json("trainer_state.json")["global_step"] == 3
    (line,) = [line for line in result.stdout.splitlines() if "checkpoint-9" in line]
    assert line == (
        f"Resuming from {half.parent / 'checkpoint-2'}; passed over as incomplete: "
        "checkpoint-10 (it has no trainer_state.json), checkpoint-9 (optimizer.pt is empty)"
    )


def test_only_half_written_checkpoints(clm, tmp_path, text_file, error):
    flags = ("--train_file", text_file, "--tokenizer", "bytes")
    clm(*flags)
    complete = tmp_path / "out" / "checkpoint-2"
    half = complete.with_name("checkpoint-9")
    shutil.copytree(complete, half)
    (half / "model.safetensors").write_bytes(b"")
    (tmp_path / "out" / "trainer_state.json").unlink()
    message = error(run_clm, *flags, "--resume_from_checkpoint", half)
    assert (
        f"{half} is no complete checkpoint: model.safetensors is empty; {complete} is one"
        in message
    )
    shutil.rmtree(complete)
    message = error(run_clm, *flags, "--resume_from_checkpoint", half)
    assert message.endswith("is no complete checkpoint: model.safetensors is empty\n")
    message = error(run_clm, *flags, "--resume_from_checkpoint", "true")
    assert message.endswith(
        f"no checkpoint to resume from in {half.parent}; incomplete: checkpoint-9 "
        "(model.safetensors is empty)\n"
    )


def test_output_dir_that_is_a_file(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    assert f"output_dir {path} is a file" in error(run_clm, "--output_dir", path)
