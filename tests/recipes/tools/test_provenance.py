"""What is said of a command is what can be typed again, without secrets."""

import sys

import pytest

from tools.provenance import command_line


@pytest.mark.parametrize("secret", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]])
def test_commands_keep_no_secret(monkeypatch, secret):
    monkeypatch.setattr(sys, "argv", ["recipe.py", *secret, "--tokenizer_name", "a b"])
    assert command_line() == "python recipe.py --hub_token ... --tokenizer_name 'a b'"
