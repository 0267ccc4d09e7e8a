"""Patches and patched models on a Hub: uploaded to one on the loopback interface, and loaded back from there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.hub import Hub, running_hub


ROOT = Path(__file__).parents[2]

PROLOGUE = """
import torch
from tests.helpers.comparing import run
from tests.helpers.stock_models import FAMILIES
from tests.patching.test_saving import patched_model
from hf_neural_attention import from_pretrained, load_patch, save_patch
from hf_neural_attention.patching import patch_status
"""

PUSH = """
for name in ("gpt2", "llama"):
    model = patched_model(FAMILIES[name])
    model.push_to_hub(f"somebody/whole-{name}")
save_patch(model, "llama-patch", push_to_hub=True, repo_id="somebody/llama-patch")
torch.save(run(model, **FAMILIES["llama"].inputs()), "expected.pt")
"""

LOAD = """
family = FAMILIES["llama"]
expected = torch.load("expected.pt")
whole = from_pretrained("somebody/whole-llama")
assert torch.equal(run(whole, **family.inputs()), expected) and len(patch_status(whole)) == 3
assert torch.equal(run(load_patch(family.model(), "somebody/llama-patch"), **family.inputs()), expected)
from transformers import AutoModelForCausalLM
assert type(AutoModelForCausalLM.from_pretrained("somebody/whole-gpt2")).__name__ == "NeuralGPT2LMHeadModel"
"""

FAIL = """
try:
    save_patch(patched_model(FAMILIES["llama"]), "broken", push_to_hub=True, repo_id="somebody/llama-patch")
except Exception as error:
    print(type(error).__name__, error)
family = FAMILIES["llama"]
assert torch.equal(run(load_patch(family.model(), "broken"), **family.inputs()), torch.load("expected.pt"))
"""


def script(hub: Hub, folder: Path, code: str) -> str:
    environment = os.environ | hub.environment(folder) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROLOGUE + code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.slow
def test_push_and_load(tmp_path: Path):
    with running_hub() as hub:
        script(hub, tmp_path, PUSH)
        assert hub.repositories["somebody/llama-patch"].keys() >= {
            "README.md",
            "neural_patch.json",
            "neural_patch.safetensors",
        }
        assert b'"neural_attention_patch"' in hub.repositories["somebody/whole-llama"]["config.json"]
        script(hub, tmp_path, LOAD)
        hub.fails_at = 507
        assert "507" in script(hub, tmp_path, FAIL)
