"""What the files around the code say agrees with the code and with each other."""

import ast
import os
import re
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from hf_neural_attention import __version__
from tests.helpers.packages import OLDEST, PINNED, pins, project, requirements


ROOT = Path(__file__).parents[1]

ENVIRONMENT_VARIABLE = re.compile(r"""(?:environ(?:\.get|\.setdefault|\.pop)?|getenv)\s*[\[(]\s*["'](\w+)["']""")
# finds paths below folders where people and machines keep their own files
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:home|Users|root|work|opt|mnt|srv)/\w|\b[A-Z]:\\Users\\")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def documented_variables() -> set[str]:
    return set(re.findall(r"^\| `(\w+)` \|", read("CONTRIBUTING.md"), flags=re.MULTILINE))


def variables_in(*folders: str) -> set[str]:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {name for path in files for name in ENVIRONMENT_VARIABLE.findall(path.read_text(encoding="utf-8"))}


def test_citation():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == __version__
    assert citation["license"] == project()["license"]
    assert citation["authors"] == [{"name": "The hf_neural_attention authors"}]
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["DiGiugno", "Mahmood"]
    assert {"type": "other", "value": "arXiv:2502.17206", "description": "arXiv identifier"} in paper["identifiers"]


def test_changelog_names_the_version():
    assert re.search(rf"^## \[{re.escape(__version__)}\]", read("CHANGELOG.md"), flags=re.MULTILINE)


def test_license_is_complete_and_ours():
    text = read("LICENSE")
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Copyright 2026 The hf_neural_attention authors" in text


@pytest.mark.parametrize("requirement", requirements(), ids=str)
@pytest.mark.parametrize("file", (PINNED, OLDEST))
def test_constraints_satisfy_pyproject(file: str, requirement: Requirement):
    assert requirement.specifier.contains(pins(file)[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_lower_bounds_are_what_the_oldest_environment_runs(requirement: Requirement):
    (bound,) = [each.version for each in requirement.specifier if each.operator in (">=", "==")]
    oldest = pins(OLDEST)[canonicalize_name(requirement.name)]
    assert f"{oldest}.".startswith(f"{bound}."), "a bound that no test runs is a guess"


def test_torch_is_the_same_in_both_constraints():
    assert pins(OLDEST)["torch"] == pins(PINNED)["torch"], "other versions come as CUDA builds only, and are not tested"


@pytest.mark.parametrize("document", ("README.md", "docs/versions.md"))
def test_tables_of_versions_are_those_of_the_constraints(document: str):
    rows = re.findall(r"^ *\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \| [\w. ]+ \|$", read(document), flags=re.MULTILINE)
    assert {"torch", "transformers"} <= {name.lower() for name, *_ in rows}
    for name, oldest, pinned in rows:
        name = canonicalize_name(name)
        assert (oldest, pinned) == (pins(OLDEST)[name], pins(PINNED)[name]), f"{document}: {name}"
    if document == "docs/versions.md":
        tools = {"griffelib", "latex2mathml", "markdown", "mkdocs", "mkdocs-material", "mkdocstrings", "mkdocstrings-python"}
        needed = {canonicalize_name(requirement.name) for requirement in requirements(tools=False)}
        assert needed - tools <= {canonicalize_name(name) for name, *_ in rows}


def test_oldest_python_runs_every_dependency():
    oldest = project()["requires-python"].removeprefix(">=")
    for requirement in requirements():
        try:
            needed = distribution(requirement.name).metadata["Requires-Python"]
        except ModuleNotFoundError:  # skips an extra that is not installed
            continue
        assert needed is None or SpecifierSet(needed).contains(f"{oldest}.0"), f"{requirement.name} needs Python {needed}"


def test_environment_variables_are_documented():
    used = variables_in("hf_neural_attention", "recipes", "tests")
    assert {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM"} <= used, "the search itself works"
    assert used - documented_variables() == set()


def test_documented_environment_variables_exist():
    sources = [*(ROOT / "hf_neural_attention").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    sources += [*(ROOT / "tests").rglob("*.py"), ROOT / "Makefile"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert documented_variables()
    assert not [name for name in documented_variables() if not re.search(rf"\b{name}\b", text)]


def test_ci_runs_every_test():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    targets = set(re.findall(r"^(test[a-z-]*):.*##", read("Makefile"), flags=re.MULTILINE))
    targets -= {"test-newest", "test-oldest", "test-versions"}
    called = set(re.findall(r"^make (test.*)$", read(".ci/run"), re.MULTILINE))
    assert {"test", "test-slow", "test-triton", "test-clients"} <= targets == called


def test_no_path_of_a_machine():
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    assert MACHINE_PATH.search("see " + "/" + "home/someone/data"), "the search itself works"
    found = []
    for name in listing.stdout.split("\0"):
        path = ROOT / name
        if not name or not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # skips pictures
            continue
        found += [f"{name}:{number}: {line}" for number, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert not found, "\n".join(found)


def test_text_files_have_one_encoding_everywhere():
    """Not that of whoever runs the code, which on Windows cannot hold what a model writes."""
    found = []
    for path in [path for folder in ("hf_neural_attention", "recipes", "docs") for path in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
            is_text = called == "write_text" or (called == "read_text" and not node.args)
            if is_text and not any(keyword.arg == "encoding" for keyword in node.keywords):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
