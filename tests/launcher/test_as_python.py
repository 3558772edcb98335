"""What is run by the launcher cannot tell it from Python: each case is run by both."""

import signal
import subprocess
import sys
import textwrap

import pytest
from command_lines import LAUNCHER, ROOT, run_python

FACTS = """
import inspect, pickle, sys

def function(): ...

main = sys.modules["__main__"]
print(sys.argv, sys.path[0], __name__, __file__, __package__, type(__loader__), __doc__)
print(__spec__ and (__spec__.name, __spec__.origin))
print(vars(main) is globals(), function.__module__, pickle.loads(pickle.dumps(function)))
print(inspect.getsource(function), inspect.currentframe().f_code.co_filename)
print({"torch", "transformers", "accelerate", "numpy"} & set(sys.modules))
"""

SPAWN = """
import multiprocessing
from dataclasses import dataclass

@dataclass
class Task:
    number: int

def double(task):
    return Task(2 * task.number)

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(double, [Task(4)]))
"""

LEAVES = {
    "raises": "def f():\n    1 / 0\nf()",
    "raises from": "try:\n    1 / 0\nexcept ArithmeticError as e:\n    raise KeyError(1) from e",
    "no Python": "x = = 1",
    "with a status": "import sys; sys.exit(7)",
    "with words": "import sys; print(1); sys.exit('words')",
    "interrupted": "raise KeyboardInterrupt",
    "a hook of its own": "import sys\n"
    "sys.excepthook = lambda kind, value, tb: print(kind, value.__traceback__ is tb)\n"
    "raise ValueError",
    "at exit": "import atexit\natexit.register(print, 'bye')\n1 / 0",
}


@pytest.fixture
def script(tmp_path):
    """Writes a script into a folder of its own."""

    def write(text, name="script.py"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


def run_both(*command, folder):
    """Run a command by Python and by the launcher."""
    return run_python(*command, folder=folder), run_python(*LAUNCHER, *command, folder=folder)


def without_addresses(text):
    return [line.partition(" at 0x")[0] for line in text.splitlines()]


@pytest.mark.parametrize("form", ["relative", "absolute", "link", "module", "package"])
def test_facts(script, tmp_path, form):
    path = script(FACTS)
    script(FACTS, "__main__.py")
    script("", "__init__.py")
    (tmp_path / "link.py").symlink_to(path)
    command = {
        "relative": ["folder/script.py"],
        "absolute": [path],
        "link": ["link.py"],
        "module": ["-m", "folder.script"],
        "package": ["-m", "folder"],
    }[form]
    flags = ["--optim", "x", "-m", "--", "-h", "--salsa_c=1"]
    plain, launched = run_both(*command, *flags, folder=tmp_path)
    assert launched.returncode == plain.returncode == 0
    assert without_addresses(launched.stdout) == without_addresses(plain.stdout)
    assert "set()" in plain.stdout  # nothing heavy is loaded before the script loads it
    assert plain.stderr == ""
    assert launched.stderr == "hf_salsa: nothing was exchanged, for this process made no Trainer.\n"


def test_a_safe_path_is_left_alone(script, tmp_path):
    path = script("import sys; print(sys.path[0])")
    launched = run_python("-P", *LAUNCHER, path, folder=tmp_path)
    assert launched.stdout == run_python("-P", path, folder=tmp_path).stdout


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize("text", LEAVES.values(), ids=LEAVES)
def test_how_it_ends(script, tmp_path, text, as_module):
    path = script(text)
    script("", "__init__.py")
    command = ["-m", "folder.script"] if as_module else [path]
    plain, launched = run_both(*command, folder=tmp_path)
    assert launched.returncode == plain.returncode != 0
    assert launched.stdout == plain.stdout
    shown = [line for line in plain.stderr.splitlines() if "runpy" not in line]
    if as_module and "= =" in text:  # where Python shows its own frames
        shown = shown[-3:]
        assert launched.stderr.splitlines()[-3:] == shown
        assert "launcher.py" not in launched.stderr
    else:
        assert launched.stderr.splitlines() == shown


@pytest.fixture
def heeds_ctrl_c():
    """Processes that are started heed it, also where these tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c(script):
    path = script("import time\nprint('ready', flush=True)\ntime.sleep(60)")
    command = [sys.executable, *LAUNCHER, str(path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert errors.count("File ") == 1
    assert f'File "{path}", line ' in errors  # 3, or 2 if print is not back yet
    assert errors.endswith("KeyboardInterrupt\n")


def test_workers_that_are_spawned(script, tmp_path):
    plain, launched = run_both(script(SPAWN), folder=tmp_path)
    assert launched.stdout == plain.stdout == "[Task(number=8)]\n"


def test_a_script_that_is_not_there(tmp_path):
    plain, launched = run_both("missing.py", folder=tmp_path)
    assert launched.returncode == plain.returncode == 2
    assert "can't open file 'missing.py': [Errno 2] No such file" in launched.stderr
    assert "Traceback" not in launched.stderr


@pytest.mark.parametrize("name", ["missing", "missing.part", "folder.missing", "folder"])
def test_a_module_that_is_not_there(script, tmp_path, name):
    script("", "__init__.py")
    plain, launched = run_both("-m", name, folder=tmp_path)
    assert launched.returncode == plain.returncode == 1
    wanted = "folder.__main__" if name == "folder" else name
    assert f"No module named {wanted}" in launched.stderr
    assert "Traceback" not in launched.stderr


def test_a_package_that_cannot_be_imported_is_no_missing_module(script, tmp_path):
    script("import not_installed", "__init__.py")
    launched = run_python(*LAUNCHER, "-m", "folder.script", folder=tmp_path)
    assert launched.returncode == 1
    assert launched.stderr.endswith("ModuleNotFoundError: No module named 'not_installed'\n")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--salsa_c", "0.5", "script.py"], "unrecognized arguments: --salsa_c"),
        (["--opt", "salsa_sgd", "script.py"], "unrecognized arguments: --opt"),
        (["--optim"], "argument --optim: expected one argument"),
        ([], "the following arguments are required: SCRIPT"),
        (["-m"], "the following arguments are required: SCRIPT"),
    ],
)
def test_a_wrong_command_line(tmp_path, flags, complaint):
    launched = run_python(*LAUNCHER, *flags, folder=tmp_path)
    assert launched.returncode == 2
    assert launched.stderr.startswith("usage: python -m hf_salsa [-h] [--optim NAME] [-m] SCRIPT")
    assert f"python -m hf_salsa: error: {complaint}" in launched.stderr
