"""The patching recipe from a checkpoint to a fine-tuned, saved, patched model, for text and for images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_neural_attention import from_pretrained
from patch_and_finetune import stages_table
from tests.helpers.running import run_in
from training.reporting import Task
from training.text import TextArguments, load_text


QUICK = (
    *("--neural_layers", "all", "--neural_proj_dim", 4, "--max_steps", 4, "--save_steps", 2, "--logging_steps", 1),
    *("--report_to", "none", "--per_device_train_batch_size", 4, "--learning_rate", 0.01, "--output_dir", "run"),
)
REPLACE = ("--neural_mode", "replace", "--calibration_steps", 5, "--calibration_batches", 2)
TEXT = ("--block_size", 32, "--max_train_samples", 32, "--max_eval_tokens", 200)
IMAGES = ("--image_size", 8, "--max_train_samples", 32, "--max_eval_samples", 20, "--dataset_name", "embedded")


def text_checkpoint(folder: Path) -> Path:
    """A Llama: no class of ours, and with a tokenizer."""
    arguments = TextArguments(vocab_size=300)
    texts = load_text(arguments)["train"]["text"][:50]
    GPT2Tokenizer().train_new_from_iterator(texts, vocab_size=300).save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder


def image_checkpoint(folder: Path) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=10, **sizes)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_text(tmp_path: Path):
    command = ("--model_name_or_path", text_checkpoint(tmp_path / "llama"), *QUICK, *REPLACE, *TEXT)
    printed = run_in(tmp_path, "patch_and_finetune.py", *command, "--card", "cards/patched")
    stages = json.loads((tmp_path / "run/stages.json").read_text())
    assert stages.keys() == {"checkpoint", "patched", "calibration", "calibrated"}
    assert stages["checkpoint"]["test_perplexity_stride"] != stages["patched"]["test_perplexity_stride"]
    assert [layer["layer"] for layer in stages["calibration"]] == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert "| calibrated |" in printed and "| fine-tuned |" in printed
    card = (tmp_path / "cards/patched.md").read_text()
    assert "stage by stage" in card and "hf_neural_attention.from_pretrained" in card and "Calibration: KL" in card

    tuned, saved = from_pretrained(tmp_path / "run/neural"), load_file(tmp_path / "run/neural/model.safetensors")
    assert any("scorer" in name for name in saved) and not tuned.training
    state = tuned.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    record = json.loads((tmp_path / "run/neural/results.json").read_text())
    assert record["scorer_parameters"] > 0 and record["steps"] == 4
    # leaves no patch behind, whose scorers would fit no weights but those that were tuned with them
    assert not (tmp_path / "run/neural/patch").exists()
    assert "finished before" in run_in(tmp_path, "patch_and_finetune.py", *command)
    refused = run_in(tmp_path, "patch_and_finetune.py", *command, "--neural_per_head", "True", fails=True)
    assert "holds another run" in refused and "neural_per_head" in refused


@pytest.mark.slow
def test_a_compact_model_is_fine_tuned(tmp_path: Path):
    compact = (*QUICK, *REPLACE, *IMAGES, "--neural_compact", "True")
    printed = run_in(
        tmp_path, "patch_and_finetune.py", "--model_name_or_path", image_checkpoint(tmp_path / "vit"), *compact,
        "--ignore_mismatched_sizes", "True", "--card", "card",
    )  # fmt: skip
    assert "| calibrated |" in printed and "made compact" in (tmp_path / "card.md").read_text()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run/neural")
    assert type(model).__name__ == "NeuralViTForImageClassification" and model.config.neural_compact
    record = json.loads((tmp_path / "run/neural/results.json").read_text())
    assert record["parameters"] < json.loads((tmp_path / "run/dot/results.json").read_text())["parameters"]
    # is refused with the reason of `compact`, before anything is fitted
    refused = run_in(
        tmp_path, "patch_and_finetune.py", "--model_name_or_path", text_checkpoint(tmp_path / "llama"), *QUICK[:-1], "other",
        *REPLACE, *TEXT, "--neural_compact", "True", fails=True,
    )  # fmt: skip
    assert "rotary" in refused and not (tmp_path / "other/stages.json").exists()


@pytest.mark.slow
def test_images(tmp_path: Path):
    command = (
        "--model_name_or_path",
        image_checkpoint(tmp_path / "vit"),
        *QUICK,
        *IMAGES,
        "--ignore_mismatched_sizes",
        "True",
    )
    printed = run_in(tmp_path, "patch_and_finetune.py", *command)
    stages = json.loads((tmp_path / "run/stages.json").read_text())
    assert stages.keys() == {"checkpoint", "patched"}  # calibrates nothing in residual mode
    assert "| patched |" in printed and "calibrated" not in printed
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run/neural")
    assert type(model).__name__ == "NeuralViTForImageClassification" and model.config.neural_mode == "residual"
    assert (tmp_path / "run/neural/predictions.png").stat().st_size > 0


def test_what_is_missing_is_said(tmp_path: Path):
    assert "--model_name_or_path" in run_in(tmp_path, "patch_and_finetune.py", "--output_dir", "run", fails=True)
    assert "--block_size" in run_in(tmp_path, "patch_and_finetune.py", "--help")


def test_the_table_of_stages():
    task = Task("", "", "", None, "test_accuracy", True, {"test_accuracy": "test accuracy"}, str, "")
    figures = [{"validation_accuracy": value, "test_accuracy": value + 0.01} for value in (0.5, 0.25, 0.4, 0.6, 0.7)]
    calibration = [{"layer": "a", "kl_before": 1.0, "kl_after": 0.5, "kl_uniform": 2.0}]
    stages = {"checkpoint": figures[0], "patched": figures[1], "calibrated": figures[2], "calibration": calibration}
    results = {"dot": {"metrics": figures[3]}, "neural": {"metrics": figures[4]}}
    lines = stages_table(stages, results, task).splitlines()
    assert lines[0] == "Accuracy, stage by stage:"
    assert "| checkpoint | 0.5 | 0.5 | 0.51 | 0.51 |" in lines and "| patched |  | 0.25 |  | 0.26 |" in lines
    assert "| fine-tuned | 0.6 | 0.7 | 0.61 | 0.71 |" in lines and "| `a` | 1.000 | 0.500 | 2.000 |" in lines
    assert "calibrated" not in stages_table({"checkpoint": figures[0]}, {"dot": {"metrics": figures[3]}}, task)
