"""What the documents show works: Python blocks run, commands and flags exist, links lead somewhere.

A document's Python blocks run in order and in one namespace, see `namespace`.
"""

import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader

import hf_salsa

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"

# First line of a Python block that cannot run here -> why.
CANNOT_RUN: dict[str, str] = {}


def documents():
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    found += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "scripts").rglob("*.md")]
    found += [ROOT / "model_cards" / "README.md"]
    return sorted(f"{path.relative_to(ROOT)}" for path in found)


class Block(NamedTuple):
    """A fenced block: the word behind its fence, its text, and where it starts."""

    language: str
    text: str
    line: int


def blocks(document):
    """The fenced blocks of a document, indented ones (in lists, in tables' cells) too."""
    found, fence, language, lines, start = [], None, "", [], 0
    for number, line in enumerate((ROOT / document).read_text().splitlines(), start=1):
        match = re.match(r"\s*(```+)(\S*)", line)
        if fence is None and match:
            fence, language, lines, start = match[1], match[2], [], number + 1
        elif fence is not None and line.strip() == fence:
            indent = min((len(x) - len(x.lstrip()) for x in lines if x.strip()), default=0)
            found.append(Block(language, "\n".join(x[indent:] for x in lines), start))
            fence = None
        elif fence is not None:
            lines.append(line)
    assert fence is None, f"{document}: a block that is not closed"
    return found


def prose(document):
    """A document without its fenced blocks."""
    text = (ROOT / document).read_text()
    return re.sub(r"^\s*(```+).*?^\s*\1\s*$", "", text, flags=re.MULTILINE | re.DOTALL)


def first_line(block):
    return block.text.strip().splitlines()[0]


def with_python(block):
    return block.language in ("python", "py")


each_document = pytest.mark.parametrize("document", documents())


# --- Python


@pytest.fixture
def namespace(bert, sentences, tmp_path, monkeypatch):
    """What the blocks take for given: the package's names, a model, data, a loss."""
    monkeypatch.chdir(tmp_path)  # they write to "out"
    model = bert(dropout=0.0)
    return {
        **{name: getattr(hf_salsa, name) for name in hf_salsa.__all__},
        "torch": torch,
        "model": model,
        "train_dataset": sentences,
        "eval_dataset": sentences[:16],
        "loader": DataLoader(sentences, batch_size=8),
        "loss_fn": lambda batch: model(**batch).loss,
    }


@pytest.mark.parametrize(
    "document", [name for name in documents() if any(map(with_python, blocks(name)))]
)
def test_python_blocks_run(document, namespace):
    before = {name: p.detach().clone() for name, p in namespace["model"].named_parameters()}
    for block in filter(with_python, blocks(document)):
        source = "\n" * (block.line - 1) + block.text  # lines are numbered as in the document
        code = compile(source, str(ROOT / document), "exec")
        if first_line(block) not in CANNOT_RUN:
            exec(code, namespace)
    if document == "README.md":  # it shows training, so something must have been trained
        now = dict(namespace["model"].named_parameters())
        assert any(not torch.equal(now[name], value) for name, value in before.items())


def test_blocks_that_cannot_run_exist():
    shown = {first_line(b) for name in documents() for b in blocks(name) if with_python(b)}
    assert not CANNOT_RUN.keys() - shown
    assert all(CANNOT_RUN.values())


# --- commands


def commands(block):
    """The commands of a shell block, as lists of words."""
    if block.language not in ("", "bash", "sh", "shell", "console"):
        return []
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        command = []
        for word in [*words, "&&"]:
            if word in ("&&", "||", "|", ";"):
                found.append(command)
                command = []
            else:
                command.append(word)
    return [command for command in found if command]


def is_script(word):
    return re.fullmatch(r"(\./)?scripts/[\w/]+\.py", word) is not None


def is_flag(word):
    return re.match(r"--?[A-Za-z]", word) is not None


@functools.cache
def known_flags(script, *subcommand):
    """Every flag that the help of a script names."""
    path, shown = ROOT / script, io.StringIO()
    argv, sys_path = sys.argv, list(sys.path)
    try:
        sys.argv = [str(path), *subcommand, "--help"]
        sys.path.insert(0, str(path.parent))
        with pytest.raises(SystemExit) as exit_, redirect_stdout(shown):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, sys_path
    assert not exit_.value.code, f"{script} {' '.join(subcommand)} --help"
    return frozenset(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", shown.getvalue()))


def scripts_with_flags(document):
    """(line of its block, script, its subcommand, the flags it is given) of each command."""
    for block in blocks(document):
        for command in commands(block):
            places = [i for i, word in enumerate(command) if is_script(word)]
            if places:
                script, rest = command[places[0]].removeprefix("./"), command[places[0] + 1 :]
                subcommand = rest[:1] if rest and re.fullmatch(r"[a-z_]+", rest[0]) else []
                flags = [word.partition("=")[0] for word in rest if is_flag(word)]
                yield block.line, script, subcommand, flags


@each_document
def test_scripts_exist_and_know_the_flags(document):
    wrong = []
    for line, script, subcommand, flags in scripts_with_flags(document):
        if not (ROOT / script).is_file():
            wrong.append(f"{document}:{line}: {script} does not exist")
            continue
        known = known_flags(script, *subcommand) if flags else ()  # examples have no parser
        wrong += [
            f"{document}:{line}: {script} knows no {flag}" for flag in flags if flag not in known
        ]
    assert not wrong


@each_document
def test_flags_without_a_script_are_known_to_one(document):
    """In blocks that show flags alone, for any script of one's own."""
    lone = [
        word.partition("=")[0]
        for block in blocks(document)
        for command in commands(block)
        if is_flag(command[0])
        for word in command
        if is_flag(word)
    ]
    assert not [flag for flag in lone if flag not in known_flags("scripts/run_clm.py")]


def test_the_documents_show_commands():
    """The checks above have something to check."""
    shown = [entry for name in documents() for entry in scripts_with_flags(name)]
    assert len(shown) >= 5
    assert "--optim" in known_flags("scripts/run_clm.py")
    assert "--optim_ize" not in known_flags("scripts/run_clm.py")


def names_nothing(word):
    """Whether a word is a path below a folder of the repository, or a test, that is not there."""
    path, _, test = word.partition("::")
    if re.fullmatch(r"(scripts|tests|hf_salsa|docs|model_cards)/[\w./-]*(::\w+)?", word):
        files = [ROOT / path]
    elif re.fullmatch(r"test_\w+\.py(::\w+)?", word):  # no two have the same name
        files = list(TESTS.rglob(path))
    else:
        return False
    if not files or not files[0].exists():
        return True
    return bool(test) and f"def {test}(" not in files[0].read_text()


@each_document
def test_files_that_commands_and_prose_name_exist(document):
    """Paths below the folders of the repository, and tests by name."""
    if document == "CHANGELOG.md":
        pytest.skip("it names what there was at the time")
    words = [w for block in blocks(document) for command in commands(block) for w in command]
    words += [word for code in re.findall(r"`([^`\n]+)`", prose(document)) for word in code.split()]
    assert not [word for word in words if names_nothing(word)]


def test_readme_fits_a_few_screens():
    """It is the face of the project: whatever is longer goes to docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


def readme_command(readme, words):
    """What .ci/run takes for one of the two commands of a README."""
    script = (ROOT / ".ci" / "run").read_text()
    function = re.search(r"^readme_command\(\) \{\n.*?^\}\n", script, re.MULTILINE | re.DOTALL)[0]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'{function} readme_command "$1"', "bash", words],
        cwd=readme.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ci_finds_the_two_commands_in_the_readme(tmp_path):
    main_job = readme_command(ROOT / "README.md", "scripts/run_")
    assert re.match(r"python3 -m venv .* scripts/run_clm\.py --output_dir \S+", main_job)
    tests = readme_command(ROOT / "README.md", "-m pytest")
    assert re.match(r"python3 -m venv .* -m pytest --cov$", tests.strip())
    # Wherever they stand, after other blocks that install and run.
    readme = tmp_path / "README.md"
    readme.write_text(
        "```bash\npip install .\npython scripts/run_glue.py\npython -m pytest\n```\n"
        f"python3 -m venv of a sentence: scripts/run_clm.py\n```bash\n{tests}{main_job}```\n"
    )
    assert readme_command(readme, "scripts/run_") == main_job
    assert readme_command(readme, "-m pytest") == tests


def test_no_two_test_files_have_the_same_name():
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


# --- links


def anchors(path):
    """The names under which GitHub lets a document's headings be linked."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", text, flags=re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(words.replace(" ", "-"))
    return found


@each_document
def test_links_inside_the_repository_resolve(document):
    text = prose(document)
    targets = re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    targets += re.findall(r"^\[[^\]]+\]: +(\S+)", text, flags=re.MULTILINE)
    wrong = []
    for target in targets:
        if re.match(r"[a-z]+:", target):  # https:, mailto:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        inside = file.exists() and ROOT in (file.resolve(), *file.resolve().parents)
        if not inside or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            wrong.append(target)
    assert not wrong
