"""Recipes are scripts side by side: their tests import them from the folder that they are in."""

import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "recipes"), str(HERE)]

from running import run_in


@pytest.fixture
def run_recipe(tmp_path):
    """`run_in` a folder of the test's own."""

    def run(script: str, *flags: object, fails: bool = False) -> str:
        return run_in(tmp_path, script, *flags, fails=fails)

    return run
