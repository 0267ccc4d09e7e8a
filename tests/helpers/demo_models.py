"""Small models for the page of recipes/demo: what `make quickstart` leaves, in sizes of tests, and one for images."""

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, ViTImageProcessorPil

from hf_neural_attention import NeuralGPT2Config, NeuralGPT2LMHeadModel, NeuralViTConfig, NeuralViTForImageClassification


TEXT = "The import statement binds names."


def make_models(folder: Path) -> None:
    """Writes runs/quickstart/neural, runs/quickstart/dot and runs/images/neural, with a checkpoint that is no choice."""
    torch.manual_seed(0)
    tokenizer = GPT2Tokenizer().train_new_from_iterator([TEXT] * 3, vocab_size=270)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    spread: Any = {"initializer_range": 0.2}  # lets attention show in what such small models predict
    quickstart = folder / "runs" / "quickstart"
    for model, name in (
        (NeuralGPT2LMHeadModel(NeuralGPT2Config(**sizes, **spread)), "neural"),
        (GPT2LMHeadModel(GPT2Config(**sizes, **spread)), "dot"),
        (GPT2LMHeadModel(GPT2Config(**sizes, **spread)), "dot/checkpoint-2"),
    ):
        model.save_pretrained(quickstart / name)
        tokenizer.save_pretrained(quickstart / name)
    small = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = NeuralViTConfig(
        **small, **spread, num_attention_heads=2, neural_layers=[0], id2label={0: "cat", 1: "dog", 2: "owl"}
    )
    NeuralViTForImageClassification(config).save_pretrained(folder / "runs/images/neural")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "runs/images/neural")
