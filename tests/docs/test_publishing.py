"""What lies beside the package when it is published: metadata, hosted CI, issue templates."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FORMS = [path for path in FORMS if path.name != "config.yml"]


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["dynamic"]
    found = re.findall(r"^__version__ = ", (ROOT / "hf_salsa" / "__init__.py").read_text(), re.M)
    assert len(found) == 1
    assert "version:" not in (ROOT / "CITATION.cff").read_text().replace("cff-version:", "")


def test_no_invented_address():
    """There is no public repository yet: no link may claim one."""
    assert "urls" not in PROJECT
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *FORMS]:
        hosts = set(re.findall(r"https?://([^/\s)\]>]+)", path.read_text()))
        assert hosts <= {"arxiv.org"}, path


def test_hosted_ci_runs_what_every_machine_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step["run"] for step in workflow["jobs"]["run"]["steps"] if "run" in step]
    assert commands == ["bash .ci/run"]
    triggers = workflow[True]  # YAML reads `on` as a truth value
    assert {"push", "pull_request"} <= set(triggers)
    needed = PROJECT["requires-python"].removeprefix(">=")
    (setup,) = (s for s in workflow["jobs"]["run"]["steps"] if "setup-python" in s.get("uses", ""))
    assert setup["with"]["python-version"] == needed


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_template_asks_for_the_warning_and_the_log_line(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    fields = {entry["id"]: entry for entry in form["body"]}
    assert len(fields) == len(form["body"])
    for name in ("replay", "log"):
        assert fields[name]["validations"]["required"] is True
    messages = (ROOT / "hf_salsa" / "optimizers" / "messages.py").read_text()
    (quoted,) = re.findall(r'"([^"]+)"', fields["replay"]["attributes"]["description"])[:1]
    assert quoted in messages
    for entry in ("learning_rate", "salsa/searches", "salsa/trials", "salsa/interval"):
        assert entry in fields["log"]["attributes"]["description"]


def test_there_are_issue_templates():
    assert {path.name for path in FORMS} == {"bug.yml", "training.yml"}
