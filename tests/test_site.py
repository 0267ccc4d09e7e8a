"""The site of the documents: it is built without a complaint, and needs nothing from a network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("mkdocs", reason="MkDocs is part of the extra `docs`")

ROOT = Path(__file__).parents[1]


BREAKS_A_LINK = """
def on_page_markdown(markdown, page, config, files):
    return markdown + "\\n[gone](gone.md)\\n"
"""


def build(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """As `make docs` does: a strict build that is quiet as well misses its own warnings."""
    [line] = re.findall(r"mkdocs (build.*)", (ROOT / "Makefile").read_text())
    command = [sys.executable, "-m", "mkdocs", *line.split(), "--site-dir", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_broken_link_is_an_error(tmp_path):
    hook, config = tmp_path / "hook.py", tmp_path / "mkdocs.yml"
    hook.write_text(BREAKS_A_LINK)
    hooks = f"hooks: [{ROOT}/docs/hooks.py, {hook}]"
    config.write_text(f"INHERIT: {ROOT}/mkdocs.yml\ndocs_dir: {ROOT}/docs\n{hooks}\nwatch: []\n")
    done = build(tmp_path / "site", "--config-file", str(config))
    assert done.returncode != 0 and "gone.md" in done.stderr


def test_it_has_the_layout_of_the_repository(site):
    for name in ("index.html", "docs/results.html", "recipes/index.html", "model_cards/studies/images/report.html"):
        assert (site / name).exists(), name
    assert not list(site.rglob("*.py"))


def test_formulas_are_rendered(site):
    page = (site / "hf_neural_attention/ops/index.html").read_text()
    source = (ROOT / "hf_neural_attention/ops/README.md").read_text()
    assert page.count("<math") == len(re.findall(r"\$`|```math", source)) > 20
    assert "$`" not in page and "$<code>" not in page


def test_docstrings_are_rendered(site):
    page = (site / "docs/api/patching.html").read_text()
    assert 'id="hf_neural_attention.patch"' in page
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))
    # checks that an entry for several arguments counts for each of them, and that a field has the comment behind it
    assert re.search(r"proj_dim \( ?int \| None, default: None ?\) . as in NeuralScorer", text)
    assert re.search(r"hidden_dims \( ?HiddenDims, default: \S*auto\S* ?\) . as in NeuralScorer", text)
    assert re.search(r"kl_uniform ?\( ?float ?\) . of attention that is the same for all keys", text)


def test_it_loads_nothing_from_a_network(site):
    for path in site.rglob("*.html"):
        assert not re.findall(r'(?:src|rel="stylesheet" href)="https?://[^"]*"', path.read_text()), path
