"""Scripts of the form of transformers' examples, unchanged, against the same scripts edited."""

import functools
import json
import shutil
from pathlib import Path

import pytest
from command_lines import LAUNCHER, run_python
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parent / "scripts"
NAMES = sorted(path.stem for path in SCRIPTS.glob("run_*.py"))
FLAGS = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]
FLAGS += ["--per_device_train_batch_size", "4", "--max_steps", "6", "--logging_steps", "2"]
EVERY_FLAG = [*FLAGS, "--save_strategy", "no", "--do_train", "--do_eval"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# The line of a script -> the edited one.
EDITS = {
    "from transformers import Trainer, TrainingArguments": "from hf_salsa import SaLSaTrainer as "
    "Trainer, SaLSaTrainingArguments as TrainingArguments",
    "from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments": "from hf_salsa import "
    "SaLSaSeq2SeqTrainer as Seq2SeqTrainer, SaLSaSeq2SeqTrainingArguments as "
    "Seq2SeqTrainingArguments",
    "from transformers import Trainer\n": "from hf_salsa import SaLSaTrainer as Trainer\n",
}


def edit(folder):
    """Copy the scripts into a folder and edit them."""
    shutil.copytree(SCRIPTS, folder)
    for path in folder.glob("*.py"):
        text = path.read_text()
        for line, edited in EDITS.items():
            text = text.replace(line, edited)
        path.write_text(text)
        uses_trainer = path.stem not in ("tiny", "every_script")
        assert ("from hf_salsa import" in text) == uses_trainer
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs every script, launched and edited; returns the folder and stderr of each of the two."""

    @functools.cache
    def run(processes):
        folder = tmp_path_factory.mktemp("runs")
        several = TORCHRUN if processes > 1 else []
        ways = {
            "launched": [*LAUNCHER, SCRIPTS / "every_script.py"],
            "edited": [edit(folder / "scripts") / "every_script.py"],
        }
        results = []
        for way, command in ways.items():
            done = run_python(*several, *command, folder / way, *EVERY_FLAG, folder=folder)
            assert done.returncode == 0, done.stderr[-3000:]
            results.append((folder / way, done.stderr))
        return results

    return run


def log_of(folder):
    """The log without what depends on the clock."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        {key: value for key, value in entry.items() if not key.endswith(("runtime", "per_second"))}
        for entry in history
    ]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
@pytest.mark.parametrize("name", NAMES)
def test_an_unchanged_script_trains_as_the_edited_one(runs, name, processes):
    launched, edited = (folder / name / "out" for folder, _ in runs(processes))
    weights = "model.safetensors"
    assert (launched / weights).read_bytes() == (edited / weights).read_bytes()
    log = log_of(launched)
    assert log == log_of(edited)
    assert 2 < log[-1]["salsa/searches"] < 6
    assert log[-1]["epoch"] == 6 * 4 * processes / 32
    assert "SaLSaAdamPlus" in (launched / "README.md").read_text()
    assert (launched / "all_results.json").exists()
    assert b"hf_salsa" in (launched / "training_args.bin").read_bytes()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_one_line_says_what_was_exchanged(runs, processes):
    (_, launched), (_, edited) = runs(processes)
    said = [line for line in launched.splitlines() if line.startswith("hf_salsa: ")]
    trainers = ["QuestionAnsweringTrainer", "Seq2SeqTrainer", "Trainer", "WeightedTrainer"]
    assert sorted(said) == [
        f"hf_salsa: {trainer}'s optimizer was exchanged for SaLSaAdamPlus (the default)."
        for trainer in trainers
    ]
    assert "hf_salsa: " not in edited


def test_accelerate_launch_and_workers_that_are_spawned(tmp_path):
    flags = ["--output_dir", tmp_path, *FLAGS, "--dataloader_num_workers", "1"]
    command = [*LAUNCHER, "--optim", "salsa_sgd", SCRIPTS / "spawn_workers.py", *flags]
    accelerate = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = run_python(*accelerate, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("hf_salsa: Trainer's optimizer was exchanged for SaLSaSGD") == 1
    assert log_of(tmp_path)[-1]["salsa/searches"] == 6


def test_an_unknown_optimizer_is_an_error_before_training(tmp_path):
    script = SCRIPTS / "run_mlm.py"
    done = run_python(*LAUNCHER, "--optim", "salsa_adm", script, "--output_dir", tmp_path, *FLAGS)
    assert done.returncode == 1
    error = "ValueError: optim='salsa_adm' is not an optimizer. Did you mean 'salsa_adam'?"
    assert done.stderr.splitlines()[-1].startswith(error)
    shown = [line for line in done.stderr.splitlines() if line.startswith("  File ")]
    assert shown[0].startswith(f'  File "{script}", line')


# SFT by TRL, edited: its own script with our trainer and arguments.
EDITED_SFT = """
from dataclasses import dataclass

import trl
from trl.scripts import sft

from hf_salsa import SaLSaArgumentsMixin, SaLSaTrainerMixin


@dataclass
class SFTConfig(SaLSaArgumentsMixin, trl.SFTConfig):
    pass


class SFTTrainer(SaLSaTrainerMixin, trl.SFTTrainer):
    pass


trl.SFTConfig, trl.SFTTrainer = SFTConfig, SFTTrainer
sft.main(*sft.make_parser().parse_args_and_config(fail_with_unknown_args=False))
"""


def test_trl_sft(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(SCRIPTS)
    from tiny import sentences, train_tokenizer

    set_seed(0)
    tokenizer = train_tokenizer()
    tokenizer.eos_token = tokenizer.sep_token
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)
    config = GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(model)
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": text}) for text in sentences(32)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "edited.py").write_text(EDITED_SFT)

    flags = ["--model_name_or_path", model, "--dataset_name", tmp_path / "data", *FLAGS]
    flags += ["--bf16", "false", "--salsa_steps_to_double", "4", "--save_strategy", "no"]
    ways = {"launched": [*LAUNCHER, "-m", "trl.scripts.sft"], "edited": ["edited.py"]}
    weights = []
    for way, command in ways.items():
        done = run_python(*command, "--output_dir", tmp_path / way, *flags, folder=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append((tmp_path / way / "model.safetensors").read_bytes())
        said = "hf_salsa: SFTTrainer's optimizer was exchanged for SaLSaAdamPlus (the default)."
        assert done.stderr.count(said) == (way == "launched")
    assert weights[0] == weights[1]
