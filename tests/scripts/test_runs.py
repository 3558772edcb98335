"""A run's folder: interrupting, resuming, starting anew."""

import functools
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


@pytest.mark.parametrize("job", ["glue", "clm"])
def test_interrupted_and_resumed_equals_the_straight_run(
    request, tmp_path, capsys, monkeypatch, bert_folder, text_file, job
):
    run = request.getfixturevalue(job)
    flags = [*("--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2)]
    flags += [*("--logging_steps", 1, "--per_device_train_batch_size", 4)]
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
    """The output folder of a run that went before, and a file of the user's in it."""
    folder = tmp_path / "out"
    for checkpoint in ("checkpoint-7", "checkpoints-7-and-8"):
        (folder / checkpoint).mkdir(parents=True)
        (folder / checkpoint / "trainer_state.json").write_text("{}")
    for name in ("trainer_state.json", "predict_results.json", "notes.txt"):
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


def test_overwrite_deletes_the_earlier_run_and_nothing_else(clm, earlier_run, text_file):
    result = clm("--train_file", text_file, "--tokenizer", "bytes", "--overwrite_output_dir")
    assert not (earlier_run / "checkpoint-7").exists()
    assert not (earlier_run / "predict_results.json").exists()
    assert (earlier_run / "checkpoints-7-and-8").exists()
    assert (earlier_run / "notes.txt").exists()
    assert result.json("trainer_state.json")["global_step"] == 2


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


def test_overwrite_has_no_effect_on_a_resumed_run(clm, text_file):
    flags = ("--train_file", text_file, "--tokenizer", "bytes", "--overwrite_output_dir")
    clm(*flags)
    result = clm(*flags, "--max_steps", 4, "--resume_from_checkpoint", "true")
    history = result.json("trainer_state.json")["log_history"]
    assert history[0]["step"] == 0  # of the first run
    assert history[-1]["step"] == 4


def test_half_written_checkpoint_is_not_resumed_from(clm, tmp_path, text_file, error):
    flags = ("--train_file", text_file, "--tokenizer", "bytes")
    clm(*flags)
    half = tmp_path / "out" / "checkpoint-9"
    half.mkdir()
    result = clm(*flags, "--max_steps", 3, "--resume_from_checkpoint", "true")
    assert result.json("trainer_state.json")["global_step"] == 3
    (tmp_path / "out" / "trainer_state.json").unlink()
    message = error(run_clm, *flags, "--resume_from_checkpoint", half)
    assert f"{half} is no complete checkpoint" in message


def test_output_dir_that_is_a_file(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    assert f"output_dir {path} is a file" in error(run_clm, "--output_dir", path)
