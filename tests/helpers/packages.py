"""What pyproject.toml and the files of constraints say of other packages.

    python -m tests.helpers.packages

prints, as a table, the oldest, pinned and newest versions that the tests run with, out of the environments that
`make test-versions` leaves.
"""

import platform
import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parents[2]
PINNED, OLDEST = "constraints.txt", "constraints-oldest.txt"
NEWEST_ENVIRONMENT = ROOT / ".venv-newest"


def project() -> dict:
    """The table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(*, tools: bool = True) -> list[Requirement]:
    """Everything that pyproject.toml names, but for its own extras; without `tools`, what users of some part need."""
    extras = project()["optional-dependencies"]
    lines = [*project()["dependencies"], *(line for name in extras if tools or name != "dev" for line in extras[name])]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != project()["name"]]


def pins(file: str) -> dict[str, str]:
    """Version of each package that a file of constraints names, by canonical name."""
    lines = [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "pins are exact and for any platform"
    pairs = [line.split("==") for line in lines]
    names = [canonicalize_name(name) for name, _ in pairs]
    assert len(set(names)) == len(names), f"{file} pins a package twice"
    return dict(zip(names, (version for _, version in pairs), strict=True))


def installed(environment: Path) -> dict[str, str]:
    """Version of each package in a virtual environment, by canonical name."""
    folders = [str(folder) for folder in environment.glob("lib/python*/site-packages")]
    return {canonicalize_name(found.name): found.version for found in distributions(path=folders)}


def table() -> str:
    """Markdown: what users need, and of the tools those that are older in one environment than in another."""
    oldest, pinned, newest = pins(OLDEST), pins(PINNED), installed(NEWEST_ENVIRONMENT)
    for_users = {canonicalize_name(requirement.name) for requirement in requirements(tools=False)}
    names = dict.fromkeys(canonicalize_name(requirement.name) for requirement in requirements())
    rows = [
        (name, oldest[name], pinned[name], newest.get(name, "-").partition("+")[0])
        for name in names
        if name in for_users or oldest[name] != pinned[name]
    ]
    head = ["| package | oldest | pinned | newest |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows), f"\nPython {platform.python_version()}"])


if __name__ == "__main__":
    if not NEWEST_ENVIRONMENT.exists():
        sys.exit(f"There is no {NEWEST_ENVIRONMENT.name}: run `make test-versions` first.")
    print(table())  # noqa: T201
