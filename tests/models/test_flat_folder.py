"""The models folder is what the Hub gets: its files must work there by themselves, without this package."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_neural_attention


MODELS = Path(hf_neural_attention.__file__).parent / "models"

SAVE = """
import torch
from hf_neural_attention import NeuralGPT2Config, NeuralGPT2LMHeadModel

NeuralGPT2Config.register_for_auto_class()
NeuralGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")
sizes = dict(vocab_size=99, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
model = NeuralGPT2LMHeadModel(NeuralGPT2Config(neural_layers="all", **sizes)).eval()
model.save_pretrained("saved")
torch.save(model(torch.arange(10)[None]).logits, "logits.pt")
"""

LOAD = """
import shutil, sys
sys.modules["hf_neural_attention"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM

shutil.copytree("saved", "again")
# the copy of the code that is loaded last takes the place of the first among the attention functions
models = [AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval() for name in ("saved", "again")]
assert len({type(model) for model in models}) == 2
assert all(type(model).__module__.startswith("transformers_modules.") for model in models)
assert all(torch.equal(model(torch.arange(10)[None]).logits, torch.load("logits.pt")) for model in models)
"""

LOAD_BESIDE = """
import torch
from transformers import AutoModelForCausalLM

copy = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True).eval()
assert type(copy).__module__.startswith("transformers_modules.")
import hf_neural_attention
installed = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True).eval()  # preferred, once it is imported
assert type(installed) is hf_neural_attention.NeuralGPT2LMHeadModel
assert all(torch.equal(model(torch.arange(10)[None]).logits, torch.load("logits.pt")) for model in (copy, installed))
"""


@pytest.mark.parametrize("file", sorted(MODELS.glob("*.py")), ids=lambda file: file.stem)
def test_files_import_siblings_and_the_two_libraries_only(file):
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    tree = ast.parse(file.read_text())
    # collects imports that are tried, and serve only where they succeed
    optional = {id(child) for node in ast.walk(tree) if isinstance(node, ast.Try) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and "." not in node.module and (MODELS / f"{node.module}.py").exists(), node.module
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                assert name.split(".")[0] in allowed or (
                    id(node) in optional and name in ("hf_neural_attention.ops", "accelerate.utils")
                ), name


@pytest.mark.slow
def test_a_saved_model_with_its_code_runs_without_the_package_and_beside_it(tmp_path):
    # fixes the backend that the package and copies of the code have in common
    own = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_NEURAL_ATTENTION_BACKEND": "blockwise"}
    environment = os.environ | own
    for script in (SAVE, LOAD, LOAD_BESIDE):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
