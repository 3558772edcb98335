"""The package from outside: what importing it loads, what it offers, what its wheel holds."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import hf_salsa

ROOT = Path(__file__).parents[1]


def run_python(code):
    """Run `code` in a fresh interpreter and return what it prints, word by word."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


HEAVY = ["transformers", "accelerate", "torch.distributed.tensor", "torch.distributed.fsdp"]


@pytest.mark.parametrize(
    ("statement", "light"),
    [
        ("import hf_salsa", ["torch", "numpy", *HEAVY]),
        ("from hf_salsa import SaLSaAdam, BatchObjective", HEAVY),
        ("from hf_salsa import OPTIMIZERS", HEAVY),
        ("import hf_salsa.rules", ["torch", *HEAVY]),
        ("import hf_salsa.settings", ["torch", *HEAVY]),
    ],
)
def test_importing_loads_no_more_than_it_needs(statement, light):
    loaded = run_python(f"import sys; {statement}; print(*sys.modules)")
    assert "hf_salsa" in loaded
    assert not set(light) & set(loaded)


def test_training_in_a_plain_loop_loads_no_more():
    """A step with a search, clipped; nothing is imported on the way."""
    code = """
import sys, torch
from hf_salsa import BatchObjective, SaLSaAdam
model = torch.nn.Linear(2, 1)
optimizer = SaLSaAdam(model.parameters())
objective = BatchObjective(model, optimizer)
objective.record(lambda x: model(x).square().mean(), torch.ones(4, 2)).backward()
objective.clip_grad_norm_(1.0)
optimizer.step()
assert optimizer.counters.searches == 1
print(*sys.modules)
"""
    assert not {"transformers", "accelerate"} & set(run_python(code))


@pytest.mark.parametrize("name", hf_salsa.__all__)
def test_every_public_name_resolves(name):
    assert getattr(hf_salsa, name) is getattr(hf_salsa, name)
    namespace = {}
    exec(f"from hf_salsa import {name}", namespace)
    assert namespace[name] is getattr(hf_salsa, name)
    if name != "OPTIMIZERS":
        assert namespace[name].__name__ == name
        assert namespace[name].__doc__


def test_public_names():
    """These, and no others but further optimizers."""
    published = {
        "BatchObjective",
        "OPTIMIZERS",
        "SLSAdam",
        "SLSSGD",
        "SaLSaAdam",
        "SaLSaAdamPlus",
        "SaLSaArgumentsMixin",
        "SaLSaSGD",
        "SaLSaSGDPlus",
        "SaLSaSeq2SeqTrainer",
        "SaLSaSeq2SeqTrainingArguments",
        "SaLSaTrainer",
        "SaLSaTrainerMixin",
        "SaLSaTrainingArguments",
        "head_groups",
    }
    further = {cls.__name__ for cls in hf_salsa.OPTIMIZERS.values()} - published
    assert published <= set(hf_salsa.__all__) <= published | further
    assert len(set(hf_salsa.__all__)) == len(hf_salsa.__all__)


def test_dir_lists_all_public_names_before_they_are_loaded():
    code = "import hf_salsa; names = dir(hf_salsa); print(*names)"
    names = run_python(code)
    assert set(hf_salsa.__all__) <= set(names)
    assert {"__all__", "__version__"} <= set(names)
    assert names == sorted(names)
    assert set(hf_salsa.__all__) <= set(dir(hf_salsa))


def test_type_checkers_see_the_same_names():
    """They read the imports under TYPE_CHECKING, Python reads the table."""
    source = (ROOT / "hf_salsa" / "__init__.py").read_text()
    stated = dict(re.findall(r"^    from \.([\w.]+) import \w+ as (\w+)$", source, re.MULTILINE))
    names = re.findall(r"^    from \.[\w.]+ import (\w+) as \1$", source, re.MULTILINE)
    assert sorted(names) == sorted(hf_salsa.__all__)
    assert stated  # in the form that re-exports


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'hf_salsa' has no attribute 'SalsaAdam'"):
        _ = hf_salsa.SalsaAdam
    assert not hasattr(hf_salsa, "salsa_adam")
    with pytest.raises(ImportError, match="SalsaAdam"):
        exec("from hf_salsa import SalsaAdam")


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", hf_salsa.__version__)
    assert version("hf_salsa") == hf_salsa.__version__


def test_the_changelog_has_the_version():
    assert f"\n## {hf_salsa.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "hf_salsa", source / "hf_salsa", ignore=shutil.ignore_patterns("__pycache__")
    )
    # What a checkout has beside it and a wheel must not have.
    for name in ("tests", "scripts"):
        (source / name).mkdir()
        (source / name / "stray.py").touch()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path)]
    try:  # with the setuptools that is here, if it is new enough; else pip fetches one
        here = int(version("setuptools").split(".")[0])
    except ModuleNotFoundError:
        here = 0
    wanted = int(re.search(r"setuptools>=(\d+)", (ROOT / "pyproject.toml").read_text())[1])
    isolation = ["--no-build-isolation"] if here >= wanted else []
    built = subprocess.run(
        [*command, *isolation, str(source)], capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"hf_salsa-{hf_salsa.__version__}.dist-info/"
    held = {name for name in names if not name.startswith(info)}
    files = [path for path in (ROOT / "hf_salsa").rglob("*") if path.is_file()]
    package = {f"{path.relative_to(ROOT)}" for path in files if "__pycache__" not in path.parts}
    assert held == package
    other = {name for name in package if not name.endswith(".py")}
    assert "hf_salsa/py.typed" in other
    assert len(other) == 2  # and the template of the model card
    assert any(name.endswith(".md") for name in other)
    assert {"hf_salsa/rules/salsa.py", "hf_salsa/optimizers/adam.py"} <= held
    assert info + "licenses/LICENSE" in names
