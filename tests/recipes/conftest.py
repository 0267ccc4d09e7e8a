"""Recipes are scripts side by side: their tests import them from the folder that they are in."""

import sys

import pytest
from running import RECIPES, run_in


sys.path.insert(0, str(RECIPES))


@pytest.fixture
def run_recipe(tmp_path):
    """`run_in` a folder of the test's own."""

    def run(script: str, *flags: object, fails: bool = False) -> str:
        return run_in(tmp_path, script, *flags, fails=fails)

    return run
