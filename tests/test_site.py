"""The site of the documents: it is built without a complaint, and needs nothing from a network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("mkdocs", reason="MkDocs is part of the extra `docs`")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


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
