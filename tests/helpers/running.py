"""Runs recipes as users do."""

import subprocess
import sys
from pathlib import Path


RECIPES = Path(__file__).parents[2] / "recipes"


def run_in(folder: Path, script: str, *flags: object, fails: bool = False) -> str:
    """Runs a recipe in a process of its own, as a user would, and returns what it printed."""
    command = [sys.executable, str(RECIPES / script), *map(str, flags)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-3000:]
    assert not fails or "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout + done.stderr
