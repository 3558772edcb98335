"""The examples: each runs as it stands, offline, and its loss falls."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("scripts/examples/*.py"))
NOTEBOOKS = sorted(ROOT.glob("scripts/examples/*.ipynb"))
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


@pytest.mark.parametrize("path", [*EXAMPLES, *NOTEBOOKS], ids=lambda path: path.name)
def test_the_readme_links_every_example(path):
    (line,) = re.findall(rf"^- .*\(scripts/examples/{path.name}\).*$", readme(), re.MULTILINE)
    assert len(line) <= 110


def readme():
    return (ROOT / "README.md").read_text()


def run_offline(command, folder):
    """Run an example in `folder`, where the runs/ that it leaves goes; return what it printed."""
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | offline | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert finished.returncode == 0, finished.stderr
    # Of the processor: the clock's hold what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    # Ours are UserWarnings; the one of torch says that there is no accelerator.
    warned = [line for line in finished.stderr.splitlines() if "UserWarning" in line]
    assert not [line for line in warned if "pin_memory" not in line]
    return finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", [marked(path) for path in EXAMPLES])
def test_an_example_runs_and_its_loss_falls(path, tmp_path):
    pytest.importorskip(NEEDS.get(path.name, "torch"))
    printed = run_offline([str(path)], tmp_path)
    summaries = [match for line in printed.splitlines() if (match := SUMMARY.search(line))]
    assert summaries, printed
    for summary in summaries:
        before, after, step_size, searches = map(float, summary.groups())
        assert after < 0.5 * before
        assert step_size > 0
        assert searches > 0
    assert "bit for bit: False" not in printed


def cells(path):
    return json.loads(path.read_text())["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_holds_no_output(path):
    """Its figures would be typed by hand, as it were: nothing would compare them with a run."""
    assert json.loads(path.read_text())["nbformat"] == 4
    of_code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert of_code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in of_code)
    ids = [cell["id"] for cell in cells(path)]
    assert len(set(ids)) == len(ids)
    assert f"| `{path.name}` |" in path.with_name("README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_its_losses_fall(path, tmp_path):
    """Its cells in order and in one namespace, as a kernel has them."""
    run_cells = (
        "import json, sys\n"
        "namespace = {'__name__': '__main__'}\n"
        "for cell in json.load(open(sys.argv[1]))['cells']:\n"
        "    if cell['cell_type'] == 'code':\n"
        "        exec(compile(''.join(cell['source']), cell['id'], 'exec'), namespace)\n"
    )
    printed = run_offline(["-c", run_cells, str(path)], tmp_path)
    falls = re.findall(r"^loss (\d+\.\d+) -> (\d+\.\d+)$", printed, re.MULTILINE)
    assert len(falls) == 2  # of the line search, and of the baseline
    assert all(float(after) < 0.5 * float(before) for before, after in falls)
    assert re.search(r"^median step size \d\.\de[-+]\d+, \d+ searches", printed, re.MULTILINE)
