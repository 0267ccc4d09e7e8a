"""Recipes are scripts side by side: their tests import them from the folder that they are in."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
sys.path.insert(0, str(RECIPES))


def run_in(folder: Path, script: str, *flags: object, fails: bool = False) -> str:
    """Runs a recipe in a process of its own, as a user would, and returns what it printed."""
    command = [sys.executable, str(RECIPES / script), *map(str, flags)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-3000:]
    assert not fails or "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture
def run_recipe(tmp_path):
    """`run_in` a folder of the test's own."""

    def run(script: str, *flags: object, fails: bool = False) -> str:
        return run_in(tmp_path, script, *flags, fails=fails)

    return run
