"""The launcher in this process: what it makes of a command line, and what it hides."""

import functools
import json
import sys
import traceback

import pytest

from hf_salsa import exchange, launcher

WRITES = """
import json, sys
main = sys.modules["__main__"]
facts = [sys.argv, __name__, __file__, __spec__ and __spec__.name, vars(main) is globals()]
with open(sys.argv[1], "w") as file:
    json.dump(facts, file)
"""


@pytest.fixture
def launch(monkeypatch, tmp_path):
    """Runs a command line; afterwards this process is as it was."""
    for name in ("argv", "path", "meta_path"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))
    # Not the present one: torch's process groups leave one that marks each line with the rank.
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(exchange, "asked", exchange.asked)
    monkeypatch.setattr(exchange, "searching_trainer", functools.cache(lambda cls: cls))
    sys.path.insert(0, str(tmp_path))  # where Python puts the current folder
    yield lambda *command: launcher.main([str(word) for word in command])
    for name in [name for name in sys.modules if name.partition(".")[0] == "launched_package"]:
        del sys.modules[name]


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "launched_package"
    folder.mkdir()
    for name in ("script", "__main__"):
        (folder / f"{name}.py").write_text(WRITES)
    (folder / "__init__.py").touch()
    (folder / "fails.py").write_text("def f():\n    1 / 0\nf()")
    return folder


def test_a_script(launch, package, tmp_path):
    script, out = package / "script.py", tmp_path / "facts.json"
    launch(script, out, "-m", "--optim")
    argv = [str(script), str(out), "-m", "--optim"]
    assert json.loads(out.read_text()) == [argv, "__main__", str(script), None, True]
    assert sys.path[0] == str(package)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("launched_package.script", "launched_package.script"),
        ("launched_package", "launched_package.__main__"),
    ],
)
def test_a_module(launch, package, tmp_path, name, spec):
    out = tmp_path / "facts.json"
    launch("-m", name, out)
    file = str(package / f"{spec.rpartition('.')[2]}.py")
    assert json.loads(out.read_text()) == [[file, str(out)], "__main__", file, spec, True]
    assert sys.path[0] == str(tmp_path)


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (([], []), (None, None)),
        ((["--optim", "a"], ["--x", "--optim=b", "c"]), ("a", "b")),
        ((["--optim=a"], ["--optim", "b", "--optim", "c"]), ("a", "c")),
        (([], ["--optim"]), (None, None)),
        (([], ["--optim_args", "c=0.4", "--opt", "d"]), (None, None)),
    ],
)
def test_whose_flag_it_is(launch, package, tmp_path, flags, asked):
    before, behind = flags
    launch(*before, package / "script.py", tmp_path / "facts.json", *behind)
    assert exchange.asked == exchange.Asked(*asked)


@pytest.mark.parametrize("form", ["script", "module"])
def test_a_traceback_begins_in_the_script(launch, package, capsys, form):
    command = {"script": [package / "fails.py"], "module": ["-m", "launched_package.fails"]}[form]
    with pytest.raises(ZeroDivisionError) as raised:
        launch(*command)
    assert "launcher.py" in "".join(traceback.format_tb(raised.value.__traceback__))
    sys.excepthook(raised.type, raised.value, raised.value.__traceback__)
    lines = capsys.readouterr().err.splitlines()
    shown = [line.strip() for line in lines if line.startswith("  File ")]
    file = package / "fails.py"
    assert shown == [f'File "{file}", line 3, in <module>', f'File "{file}", line 2, in f']


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["missing.py"], 2),
        (["-m", "launched_package.missing"], f"{sys.executable}: No module named "),
        (["--unknown", "missing.py"], 2),
    ],
)
def test_what_is_not_there(launch, package, command, status):
    with pytest.raises(SystemExit) as leaving:
        launch(*command)
    if status != 2:
        status += command[-1]
    assert leaving.value.code == status


def test_a_module_whose_package_fails_is_not_missing(launch, package):
    (package / "__init__.py").write_text("import not_installed")
    with pytest.raises(ModuleNotFoundError, match="No module named 'not_installed'"):
        launch("-m", "launched_package.script")


def test_it_says_when_no_trainer_was_made(launch, package, tmp_path, capsys):
    launch(package / "script.py", tmp_path / "facts.json")
    assert capsys.readouterr().err == (
        "hf_salsa: nothing was exchanged, for this process made no Trainer.\n"
    )
    (package / "trains.py").write_text("import hf_salsa.exchange as e; e.searching_trainer(int)")
    launch(package / "trains.py")
    assert capsys.readouterr().err == ""
