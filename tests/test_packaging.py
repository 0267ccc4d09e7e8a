"""Wheel and sdist: they build without a network, hold what they should, and work where there is no checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from hf_neural_attention import __version__


ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with the sdist, built from the checkout, and the wheel, built from that sdist."""
    pytest.importorskip("hatchling", reason="the build backend is part of the extra `dev`")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions) -> Path:
    return distributions / f"hf_neural_attention-{__version__}-py3-none-any.whl"


def package_files() -> set[str]:
    files = (path for path in (ROOT / "hf_neural_attention").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"hf_neural_attention-{__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == package_files()
    assert "hf_neural_attention/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"hf_neural_attention-{__version__}.dist-info/METADATA").decode())
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [requirement for requirement in metadata.get_all("Requires-Dist", []) if "extra ==" not in requirement]
    assert {requirement.split(">")[0].split("<")[0] for requirement in required} == {
        "accelerate",
        "filelock",
        "huggingface-hub",
        "safetensors",
        "torch",
        "transformers",
        "tqdm",
    }
    assert metadata.get_payload().startswith("#"), "the README is what the registry shows"


def test_sdist_holds_what_a_clone_needs(distributions):
    prefix = f"hf_neural_attention-{__version__}"
    with tarfile.open(distributions / f"{prefix}.tar.gz") as archive:
        names = {name.removeprefix(f"{prefix}/") for name in archive.getnames()}
    files = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt"}
    assert (
        files | package_files() | {".ci/run", "docs/results.md", "mkdocs.yml", "pyproject.toml", "tests/conftest.py"} <= names
    )
    unwanted = ("runs/", ".venv/", "build/", "dist/", ".git/")
    assert not [name for name in names if name.startswith(unwanted) or "__pycache__" in name]


def test_installed_wheel_works_without_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    code = f"""
import sys
from pathlib import Path

# an editable install puts the checkout there
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path({str(ROOT)!r})]

from importlib.metadata import version

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_neural_attention
from hf_neural_attention import NeuralGPT2Config, NeuralGPT2LMHeadModel

sizes = dict(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
model = NeuralGPT2LMHeadModel(NeuralGPT2Config(**sizes)).eval()
model.save_pretrained("model")
loaded = AutoModelForCausalLM.from_pretrained("model")
ids = torch.arange(8)[None]
assert type(loaded) is NeuralGPT2LMHeadModel
assert torch.equal(loaded(ids).logits, model(ids).logits)

ours = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "hf_neural_attention"]
assert len(ours) > 5
assert all(Path(file).is_relative_to({str(target)!r}) for file in ours), ours
print(hf_neural_attention.__version__, version("hf_neural_attention"))
"""
    output = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert output.split() == [__version__, __version__]
