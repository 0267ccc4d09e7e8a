"""The table of families that can be patched: what the script finds is what the table says, and the documents with it."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
CARD = ROOT / "model_cards" / "families" / "patchable_families"
RESULTS = json.loads(CARD.with_suffix(".json").read_text())["families"]
TRIED = ("gpt2", "bert", "t5", "vit", "gemma2", "gpt_oss", "mistral_large4", "xlnet")


def table_counts() -> Counter:
    return Counter(result["status"] for result in RESULTS.values())


@pytest.mark.slow
def test_the_script_finds_what_the_table_says(tmp_path):
    script = ROOT / "recipes" / "list_patchable_families.py"
    command = [sys.executable, str(script), *TRIED, "--output", str(tmp_path / "families")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "families.json").read_text())["families"]
    # finds it with other models, as the table's are those of Transformers' own tests, which no package holds
    assert {name: result["status"] for name, result in found.items()} == {
        name: RESULTS[name]["status"] for name in sorted(TRIED)
    }
    assert {result["configuration"] for result in found.values()} == {"shrunk"}
    assert [found[name]["status"] for name in TRIED] == [*["works"] * 6, "refused", "no interface"]
    assert "| gpt2 | works | GPT2Model | 2 of 2 |" in (tmp_path / "families.md").read_text()


def test_the_table_is_whole():
    text = CARD.with_suffix(".md").read_text()
    counts = table_counts()
    for status, count in counts.items():
        assert f"| {status} | {count} |" in text
        assert len(re.findall(rf"^\| \w+ \| {status} \| .*\|$", text, re.MULTILINE)) == count
    assert all(result.get("reason") for result in RESULTS.values() if result["status"] != "works")
    named = {"gpt2", "llama", "qwen3", "mistral", "gpt_neox", "opt", "phi", "bert", "roberta", "modernbert", "distilbert"}
    assert all(RESULTS[name]["status"] == "works" for name in named | {"t5", "bart", "vit", "dinov2"})


def test_the_documents_give_the_tables_figures():
    counts = table_counts()
    page = (ROOT / "docs" / "patching.md").read_text()
    assert f"Of {len(RESULTS)} model families" in page
    for status, count in counts.items():
        assert re.search(rf"\| {status} \| {count} \|", page), status
    trouble = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert f"has none: {counts['no interface']} of {len(RESULTS)} families do" in trouble
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"Of {len(RESULTS)} model families in Transformers 5.23, {counts['works']} work" in readme
    for status, words in {
        "works with inputs": "work with `example_inputs=`",
        "in part": "works in part" if counts["in part"] == 1 else "work in part",
        "refused": "are refused",
        "no interface": "do not use",
        "not tried": "could not be tried",
        "fails": "fail",
    }.items():
        assert counts[status] == 0 or f"{counts[status]} {words}" in readme
