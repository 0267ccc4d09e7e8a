"""`--push_to_hub`, and `Trainer.push_to_hub`, to a Hub on the loopback interface, and back from there."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_neural_attention import patch
from hf_neural_attention.export import add_code_of_saved
from tests.helpers.hub import Hub, running_hub
from tests.helpers.running import run_in
from training.arms import Arm
from training.publishing import publish


TINY = (
    *("--vocab_size", 300, "--block_size", 32, "--n_embd", 16, "--n_layer", 2, "--n_head", 2, "--max_train_samples", 8),
    *("--max_eval_tokens", 100, "--max_steps", 2, "--report_to", "none", "--per_device_train_batch_size", 4),
    *("--output_dir", "tiny", "--push_to_hub", "True", "--hub_model_id", "somebody/tiny"),
)
LOAD = """
import sys
sys.modules["hf_neural_attention"] = None  # importing it fails, as where it is not installed
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("somebody/tiny-neural", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
AutoTokenizer.from_pretrained("somebody/tiny-neural")
assert type(AutoModelForCausalLM.from_pretrained("somebody/tiny-dot")).__name__ == "GPT2LMHeadModel"
"""
LOAD_PATCHED = """
import sys
sys.modules["hf_neural_attention"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("neural", trust_remote_code=True)
assert type(model).__name__ == "PatchedLlamaForCausalLM" and hasattr(model.model.layers[0].self_attn, "scorer")
model.save_pretrained("again")
"""
TRAINER = """
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from hf_neural_attention import NeuralGPT2Config, NeuralGPT2LMHeadModel
model = NeuralGPT2LMHeadModel(NeuralGPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2))
data = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 4, "labels": [[3, 4, 5]] * 4})
arguments = TrainingArguments(
    "trained", max_steps=2, report_to="none", use_cpu=True, push_to_hub=True, hub_model_id="somebody/trained"
)
trainer = Trainer(model, arguments, train_dataset=data)
trainer.train()
trainer.push_to_hub()
loaded = AutoModelForCausalLM.from_pretrained("somebody/trained")
assert type(loaded) is NeuralGPT2LMHeadModel
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, which processes that are started meanwhile take for the real one."""
    with running_hub() as hub:
        for name, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        yield hub


def script(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_a_recipe_publishes_both_models(hub: Hub, tmp_path: Path):
    hub.fails_at = 507
    said = run_in(tmp_path, "language_modeling.py", *TINY, fails=True)
    assert "hf upload somebody/tiny-dot tiny/dot" in said and (tmp_path / "tiny/neural/results.json").exists()
    hub.fails_at = None
    said = run_in(tmp_path, "language_modeling.py", *TINY)
    assert "finished before" in said and "Uploaded: somebody/tiny-neural, 2 steps" in said
    for arm in ("dot", "neural"):
        names = set(hub.repositories[f"somebody/tiny-{arm}"])
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "comparison.png"} <= names
        assert not any("checkpoint-" in name or name.endswith(".bin") for name in names)
    assert b"hf_secret" not in b"".join(hub.repositories["somebody/tiny-neural"].values())
    script(LOAD, tmp_path)


@pytest.mark.slow
def test_trainer(hub: Hub, tmp_path: Path):
    script(TRAINER, tmp_path)
    assert "model.safetensors" in hub.repositories["somebody/trained"]


@pytest.mark.slow
def test_patched_models_bring_their_code(tmp_path: Path, monkeypatch):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9, "intermediate_size": 16}
    sent = []
    monkeypatch.setattr("training.publishing.upload", lambda folder, name, *args, **options: sent.append(name))
    for arm in (Arm.DOT, Arm.NEURAL):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
        (patch(model) if arm is Arm.NEURAL else model).save_pretrained(tmp_path / arm)
        (tmp_path / arm / "results.json").write_text('{"steps": 2}')
    publish(tmp_path, [Arm.DOT, Arm.NEURAL], TrainingArguments(str(tmp_path), hub_model_id="somebody/llama"))
    assert sent == ["somebody/llama-dot", "somebody/llama-neural"] and not list((tmp_path / "dot").glob("*.py"))
    script(LOAD_PATCHED, tmp_path)
    script(LOAD_PATCHED.replace('"neural", ', '"again", '), tmp_path)  # is what that has saved, code and all


def test_models_of_classes_of_their_own_go_without_code(tmp_path: Path):
    class Own(LlamaForCausalLM):
        pass

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9, "intermediate_size": 16}
    patch(Own(LlamaConfig(**sizes))).save_pretrained(tmp_path)
    add_code_of_saved(tmp_path)
    assert not list(tmp_path.glob("*.py"))
