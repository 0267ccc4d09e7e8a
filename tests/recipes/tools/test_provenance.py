"""What is said of a command is what can be typed again, without secrets."""

import re
import subprocess
import sys

import pytest
from transformers import TrainingArguments

from tools import provenance
from tools.command_lines import parse_arguments
from tools.provenance import ROOT, command_line, commit


@pytest.mark.parametrize("flag", ["--hub_token", "--hub-token", "--push_to_hub_token"])
@pytest.mark.parametrize("equals", [False, True])
def test_commands_keep_no_secret(monkeypatch, flag: str, equals: bool):
    secret = [f"{flag}=hf_secret"] if equals else [flag, "hf_secret"]
    monkeypatch.setattr(sys, "argv", ["recipe.py", *secret, "--tokenizer_name", "a b"])
    assert command_line() == f"python recipe.py {flag} ... --tokenizer_name 'a b'"


def test_a_secret_has_no_abbreviation():
    with pytest.raises(SystemExit, match="hub_tok"):
        parse_arguments(TrainingArguments, words=["--output_dir", "a", "--use_cpu", "True", "--hub_tok", "hf_secret"])


def test_a_recipe_is_named_from_the_root_of_the_repository(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(ROOT / "recipes" / "study.py"), "--seeds", "1"])
    assert command_line() == "python recipes/study.py --seeds 1"


def test_the_commit_is_told_where_there_is_one(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True
        )

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None
    (tmp_path / "file").write_text("one")
    git("init")
    git("add", "file")
    git("commit", "-m", "one")
    clean = commit()
    assert re.fullmatch("[0-9a-f]{12}", clean or "")
    (tmp_path / "file").write_text("two")
    assert commit() == f"{clean}+"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
