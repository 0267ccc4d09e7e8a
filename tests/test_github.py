"""The files in .github are what GitHub reads: they parse, have the keys that it wants, and name what exists."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml


ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
REPORT = "python -m hf_neural_attention"

# lists what GitHub takes in an issue form: at the top, and in the attributes of each kind of field
TOP_KEYS = {"name", "description", "title", "labels", "assignees", "projects", "type", "body"}
ATTRIBUTES = {
    "markdown": {"value"},
    "input": {"label", "description", "placeholder", "value"},
    "textarea": {"label", "description", "placeholder", "value", "render"},
    "dropdown": {"label", "description", "multiple", "options", "default"},
    "checkboxes": {"label", "description", "options"},
}

every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
every_form = pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)


def read(path: Path) -> dict[Any, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def called_targets(path: Path) -> set[str]:
    """Targets of make that a workflow runs, by name or as `target` of a matrix."""
    called = set()
    for job in read(path)["jobs"].values():
        of_matrix = job.get("strategy", {}).get("matrix", {}).get("target", [])
        for step in job["steps"]:
            for names in re.findall(r"^make (.+)$", step.get("run", ""), re.MULTILINE):
                called.update(of_matrix if names == "${{ matrix.target }}" else names.split())
    return called


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_there_is_a_workflow_and_a_form_for_each_purpose():
    assert {path.stem for path in WORKFLOWS} == {"docs", "lint", "tests", "versions"}
    assert {path.stem for path in FORMS} == {"bug", "family", "question"}
    assert read(GITHUB / "ISSUE_TEMPLATE" / "config.yml") == {"blank_issues_enabled": False}


@every_workflow
def test_workflows_have_what_github_needs(path: Path):
    content = read(path)
    assert content["name"] == path.stem
    events = content[True]  # looks up True, as which YAML reads the key `on`
    assert {"push", "pull_request"} <= set(events) or {"schedule", "pull_request"} <= set(events)
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"] <= 90
    for step in steps(path):
        assert ("run" in step) != ("uses" in step)
        assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]), "of GitHub's own, of a version"


@every_workflow
def test_workflows_run_targets_that_exist(path: Path):
    called = called_targets(path)
    assert called, "a workflow does what everybody can do by make"
    assert called <= make_targets()


def test_all_tests_are_run():
    tests = {target for target in make_targets() if target.startswith("test")} - {"test-oldest", "test-newest"}
    called = set().union(*map(called_targets, WORKFLOWS))
    assert {"test", "test-slow", "test-triton", "test-versions"} <= tests <= called


@every_workflow
def test_workflows_take_the_cpu_build_of_torch(path: Path):
    # keeps pip from taking a CUDA build, some gigabytes of it, on machines that have no GPU
    assert read(path)["env"]["PIP_EXTRA_INDEX_URL"].endswith("/whl/cpu")


def test_the_oldest_python_is_tested():
    (oldest,) = re.findall(r'^requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    versions = read(GITHUB / "workflows" / "tests.yml")["jobs"]["fast"]["strategy"]["matrix"]["python-version"]
    assert versions[0] == oldest and all(isinstance(version, str) for version in versions), "3.10 unquoted is 3.1"


@every_form
def test_forms_are_what_github_accepts(path: Path):
    content = read(path)
    assert {"name", "description", "body"} <= content.keys() <= TOP_KEYS
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert fields and len({field["id"] for field in fields}) == len(fields)
    assert len({field["attributes"]["label"] for field in fields}) == len(fields)
    for field in content["body"]:
        assert field.keys() <= {"type", "id", "attributes", "validations"}
        assert field["attributes"].keys() <= ATTRIBUTES[field["type"]]
        assert all(isinstance(text, str) and text.strip() for text in field["attributes"].values())
        assert field.get("validations", {}).keys() <= {"required"}


@every_form
def test_forms_ask_for_the_report(path: Path):
    (report,) = [field for field in read(path)["body"] if REPORT in field["attributes"].get("label", "")]
    assert report["validations"] == {"required": True} and report["attributes"]["render"] == "text"


def test_files_that_they_name_exist():
    text = "\n".join(path.read_text(encoding="utf-8") for path in GITHUB.rglob("*") if path.is_file())
    named = set(re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:md|py|txt))`", text))
    assert "model_cards/families/patchable_families.md" in named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_pull_request_template_names_the_checks():
    text = (GITHUB / "pull_request_template.md").read_text(encoding="utf-8")
    named = {word for line in re.findall(r"`make ([a-z -]+)`", text) for word in line.split()}
    assert {"lint", "types", "test", "coverage"} <= named <= make_targets()
    assert REPORT in text
