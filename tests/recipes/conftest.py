"""Recipes run as users run them."""

import pytest

from tests.helpers.running import run_in


@pytest.fixture
def run_recipe(tmp_path):
    """`run_in` a folder of the test's own."""

    def run(script: str, *flags: object, fails: bool = False) -> str:
        return run_in(tmp_path, script, *flags, fails=fails)

    return run
