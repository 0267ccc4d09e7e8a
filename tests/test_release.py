"""`.ci/release` stops before it builds anything if the checkout is not what a release should be."""

import datetime
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_neural_attention import __version__


ROOT = Path(__file__).parents[1]


class Checkout:
    """A repository of the files that the release looks at, committed and ready for it."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in (".ci/release", "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml", ".gitignore"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / "hf_neural_attention", folder / "hf_neural_attention")
        # wraps the interpreter of these tests, to take the package from the folder that it is started in
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nPYTHONPATH=. exec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        log = (folder / "CHANGELOG.md").read_text(encoding="utf-8")
        log = re.sub(r"(?<=^## \[Unreleased\]\n).*?(?=^## )", "\n", log, flags=re.MULTILINE | re.DOTALL)
        (folder / "CHANGELOG.md").write_text(log, encoding="utf-8")
        self.replace("CHANGELOG.md", f"## [{__version__}]", f"## [{__version__}] - {datetime.date.today()}")
        self.git("init", "--quiet")
        self.commit()

    def git(self, *words: str) -> None:
        identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.com", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *words], cwd=self.folder, check=True, capture_output=True, timeout=60)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "A commit")

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text(encoding="utf-8")
        heading = next((line for line in text.splitlines() if line.startswith(old)), old)
        assert heading in text
        (self.folder / name).write_text(text.replace(heading, new, 1), encoding="utf-8")

    def release(self) -> str:
        """What it says when it fails, as it must: there are no tests here that it could run."""
        done = subprocess.run([".ci/release"], cwd=self.folder, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode != 0 and not (self.folder / "dist").exists()
        return done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if shutil.which("git") is None or shutil.which("bash") is None:
        pytest.skip("git or bash is not installed")
    return Checkout(tmp_path)


def test_a_checkout_that_is_ready_gets_to_the_tests(checkout: Checkout):
    said = checkout.release()
    assert f"version {__version__}" in said and "== Tests of" in said and "release:" not in said


def test_changes_in_the_work_tree(checkout: Checkout):
    (checkout.folder / "forgotten.txt").touch()
    said = checkout.release()
    assert "release: the work tree has changes" in said and "forgotten.txt" in said and "== Tests of" not in said


def test_a_version_that_is_tagged_already(checkout: Checkout):
    checkout.git("tag", f"v{__version__}")
    assert f"release: there is a tag v{__version__} already" in checkout.release()


@pytest.mark.parametrize(
    ("name", "old", "new", "complaint"),
    [
        ("CITATION.cff", "version: ", "version: 0.0.9", "CITATION.cff has version 0.0.9"),
        ("CHANGELOG.md", f"## [{__version__}]", f"## [{__version__}]", "CHANGELOG.md has no heading"),
        ("CHANGELOG.md", "## [Unreleased]", "## [Unreleased]\n\n- Something new.", "has lines under [Unreleased]"),
    ],
    ids=("citation", "no day", "unreleased"),
)
def test_files_that_say_something_else(checkout: Checkout, name: str, old: str, new: str, complaint: str):
    checkout.replace(name, old, new)
    checkout.commit()
    said = checkout.release()
    assert complaint in said and "== Tests of" not in said
