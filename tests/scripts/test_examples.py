"""The examples: each runs as it stands, offline, and its loss falls."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted(Path(__file__).parents[2].glob("scripts/examples/*.py"))
FAST = {"plain_pytorch.py"}  # the others import transformers, or train for more than five seconds
NEEDS = {
    "lora.py": "peft",
    "sentence_encoder.py": "sentence_transformers",
    "trl_sft.py": "trl",
}
SUMMARY = re.compile(r"loss (\d+\.\d+) -> (\d+\.\d+), step size (\d\.\de[-+]\d+), (\d+) searches$")


def marked(path):
    marks = () if path.name in FAST else (pytest.mark.slow,)
    return pytest.param(path, id=path.name, marks=marks)


def test_there_are_examples():
    assert {path.name for path in EXAMPLES} >= FAST | set(NEEDS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_hides_no_library(path):
    assert len(path.read_text().splitlines()) <= 60
    # Python looks beside a script first: `import trl` must not find an example.
    assert path.stem not in sys.stdlib_module_names | {*NEEDS.values(), "accelerate", "torch"}
    assert not re.search(r"\._\w|import _", path.read_text())  # public names only
    assert f"| `{path.name}` |" in path.with_name("README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", [marked(path) for path in EXAMPLES])
def test_an_example_runs_and_its_loss_falls(path, tmp_path):
    pytest.importorskip(NEEDS.get(path.name, "torch"))
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    finished = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,  # the folder runs/ that it leaves behind goes here
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    # Ours are UserWarnings; the one of torch says that there is no accelerator.
    warned = [line for line in finished.stderr.splitlines() if "UserWarning" in line]
    assert not [line for line in warned if "pin_memory" not in line]
    summaries = [match for line in finished.stdout.splitlines() if (match := SUMMARY.search(line))]
    assert summaries, finished.stdout
    for summary in summaries:
        before, after, step_size, searches = map(float, summary.groups())
        assert after < 0.5 * before
        assert step_size > 0
        assert searches > 0
    assert "bit for bit: False" not in finished.stdout
