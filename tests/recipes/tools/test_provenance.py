"""What is said of a command is what can be typed again, without secrets."""

import sys

import pytest

from tools.provenance import ROOT, command_line


@pytest.mark.parametrize("secret", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]])
def test_commands_keep_no_secret(monkeypatch, secret):
    monkeypatch.setattr(sys, "argv", ["recipe.py", *secret, "--tokenizer_name", "a b"])
    assert command_line() == "python recipe.py --hub_token ... --tokenizer_name 'a b'"


def test_a_recipe_is_named_from_the_root_of_the_repository(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(ROOT / "recipes" / "study.py"), "--seeds", "1"])
    assert command_line() == "python recipes/study.py --seeds 1"
