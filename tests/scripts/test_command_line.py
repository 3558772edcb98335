"""Flags, settings files, and mistakes: one line, status 2, nothing started."""

import dataclasses
import re
import subprocess
import sys

import pytest
import run_clm
import run_glue
from running import SCRIPT_FLAGS, SCRIPTS, ScriptResult
from support.command_line import UsageError, check_processes

from hf_salsa.settings import SettingFields


@pytest.mark.parametrize(
    ("flags", "complaints"),
    [
        (["--optim", "salsa_adma"], ["optim='salsa_adma'", "Did you mean 'salsa_adam'?"]),
        (["--optim", "salsa_adam", "--salsa_c", "1.5"], ["salsa_c", "1.5", "between 0 and 1"]),
        (["--optim", "salsa_adam", "--salsa_beta3", "1"], ["salsa_beta3", "[0, 1)"]),
        (["--salsa_beta3", "0.9"], ["salsa_beta3", "no such setting", "salsa_adam, salsa_sgd"]),
        (["--salsa_c", "much"], ["--salsa_c", "'much'"]),
        (["--salsa_intial_step_size", "1"], ["--salsa_intial_step_size",
                                             "Did you mean --salsa_initial_step_size?"]),
        (["--max_stepss=3"], ["unknown argument --max_stepss", "Did you mean --max_steps?"]),
        (["--max_step", "3"], ["unknown argument --max_step", "Did you mean --max_steps?"]),
        (["--deepspeed", "x.json"], ["deepspeed", "FSDP2", "DDP", "stock optimizer"]),
        (["--resume_from_checkpoint", "true"], ["no checkpoint to resume from"]),
        (["--resume_from_checkpoint", "nowhere"], ["nowhere is no complete checkpoint"]),
        (["--model_name_or_path", "nowhere/at-all"], ["nowhere/at-all did not load"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)  # fmt: skip
@pytest.mark.parametrize("script", [run_glue, run_clm], ids=["glue", "clm"])
def test_wrong_flags(error, script, flags, complaints):
    message = error(script, *flags)
    for complaint in complaints:
        assert complaint in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("max_stepss: 1", "unknown argument --max_stepss. Did you mean --max_steps?"),
        ("optim: salsa_adam\nsalsa_c: 1.5", "salsa_c=1.5 is not allowed: "),
        ("- 1", "settings.yaml holds no names with values"),
        ("a: [", "settings.yaml: while parsing"),
        (None, "settings.yaml"),
    ],
)
def test_wrong_settings_file(tmp_path, capsys, content, complaint):
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as exit_:
        run_glue.main([str(path)])
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message.startswith("run_glue.py: error: ")
    assert message.count("\n") == 1
    assert complaint in message


@pytest.mark.parametrize("script", [run_glue, run_clm], ids=["glue", "clm"])
def test_help_shows_the_settings_of_the_search_first(capsys, script):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    shown = capsys.readouterr().out
    usage = f"usage: {script.__name__}.py [SETTINGS.yaml] --output_dir FOLDER [--NAME VALUE ...]\n"
    assert shown.startswith(usage)
    groups = [line for line in shown.splitlines() if re.match(r"\w.*:$", line)]
    search = "the optimizer, and the settings of its line search:"
    assert groups[-2:] == [search, "model, data and training:"]
    of_search, others = shown[shown.index(search) :].split("\nmodel, data and training:\n")
    flags = re.findall(r"^  --(\w+)", of_search, re.MULTILINE)
    settings = [entry.name for entry in dataclasses.fields(SettingFields)]
    of_trainer = ["optim", "optim_args", "salsa_go_back", "salsa_head"]
    assert sorted(flags) == sorted([*of_trainer, *settings])
    assert "--salsa" not in others
    assert "--output_dir" in others
    assert "(default: None)" not in shown
    assert "(default: salsa_adam_plus)" in " ".join(shown.split())


def test_settings_from_a_yaml_file(tmp_path, capsys, bert_folder):
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"output_dir: {tmp_path / 'out'}\nmodel_name_or_path: {bert_folder}\noptim: salsa_sgd\n"
        "max_train_samples: 16\nmax_eval_samples: 8\nmax_steps: 5\nuse_cpu: true\n"
        "salsa_c: 0.2\neval_on_start: false\ndisable_tqdm: true\n"
    )
    run_glue.main([str(settings), "--max_steps", "1"])  # a flag wins
    result = ScriptResult(tmp_path / "out", capsys.readouterr().out)
    assert result.json("trainer_state.json")["global_step"] == 1
    assert "Before training" not in result.stdout
    assert "SaLSaSGD with c=0.2" in (result.folder / "README.md").read_text()


def test_processes_that_would_train_alone_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    check_processes(2)
    with pytest.raises(UsageError, match="2 processes .* need --use_cpu true"):
        check_processes(1)


@pytest.mark.slow
def test_mistake_in_a_real_process():
    command = [sys.executable, str(SCRIPTS / "run_clm.py"), "--train_file", "nowhere.txt"]
    process = subprocess.run([*command, *SCRIPT_FLAGS], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr == "run_clm.py: error: nowhere.txt: no such file\n"
