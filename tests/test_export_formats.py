"""Exported graphs: torch.export's, and ONNX run in onnxruntime, with other batch sizes and lengths than at their export."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM
from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter, base

from hf_neural_attention import (
    NeuralGPT2Config,
    NeuralGPT2LMHeadModel,
    NeuralViTConfig,
    NeuralViTForImageClassification,
    compact,
    patch,
)
from tests.helpers.versions import CACHE


if not hasattr(base, "ExportedModel"):
    pytest.skip("Transformers exports models that can be called, saved and loaded from 5.23 on", allow_module_level=True)

# ignores what torch has deprecated, since its own and Transformers' exporters use it
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "DeprecationWarning")]

EXPORTERS: dict[str, Any] = {"torch.export": (DynamoExporter, DynamoConfig), "ONNX": (OnnxExporter, OnnxConfig)}
FORMS: dict[str, dict[str, Any]] = {
    "replace": {},
    "residual": {"neural_mode": "residual"},
    "compact": {"neural_compact": True},
    "one compact layer": {"neural_compact": True, "neural_layers": [0]},
}


def export(kind: str, model: Any, inputs: dict[str, Any], folder: Path) -> Any:
    """Exported with every dimension dynamic; what is ONNX saved, and loaded again."""
    exporter, config = EXPORTERS[kind]
    exported = exporter().export(model, inputs, config(dynamic=True))
    if kind != "ONNX":
        return exported
    exported.save_pretrained(folder)
    return base.ExportedModel.from_pretrained(folder)


def gpt2(form: str) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
    fields = {"neural_layers": "all", **FORMS[form], "bos_token_id": 1, "eos_token_id": 2}
    model = NeuralGPT2LMHeadModel(NeuralGPT2Config(**sizes, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("linear3.weight"):  # draws it anew, since it is zero at birth in residual mode
                parameter.normal_()
    return model


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPORTERS)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_gpt2(kind: str, form: str, tmp_path: Path):
    model = gpt2(form)
    inputs = {"input_ids": torch.randint(3, 98, (2, 7))}
    exported = export(kind, model, inputs, tmp_path)
    for batch, length in ((2, 7), (3, 11), (5, 40)):
        ids = torch.randint(3, 98, (batch, length))
        assert_near(exported(input_ids=ids).logits, model(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPORTERS)
@pytest.mark.parametrize("form", ("replace", "compact", "one compact layer"))
@torch.no_grad()
def test_gpt2_with_its_cache(kind: str, form: str, tmp_path: Path):
    model, ids = gpt2(form), torch.randint(3, 98, (2, 7))
    cache = copy.deepcopy(getattr(model(ids, use_cache=True), CACHE))
    inputs = {"input_ids": ids[:, :2], "attention_mask": torch.ones(2, 9, dtype=torch.long), CACHE: cache}
    exported = export(kind, model, inputs, tmp_path)
    ids = torch.randint(3, 98, (3, 13))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # pads on the left
    expected = model(ids, attention_mask=mask).logits
    cache = getattr(model(ids[:, :10], attention_mask=mask[:, :10], use_cache=True), CACHE)
    assert_near(exported(input_ids=ids[:, 10:], attention_mask=mask, **{CACHE: cache}).logits, expected[:, 10:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPORTERS)
@pytest.mark.parametrize("form", ("replace", "compact", "one compact layer"))
@torch.no_grad()
def test_vit(kind: str, form: str, tmp_path: Path):
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields: dict[str, Any] = {"neural_layers": "all", "initializer_range": 0.2, **FORMS[form]}
    model = NeuralViTForImageClassification(NeuralViTConfig(**sizes, **fields)).eval()
    exported = export(kind, model, {"pixel_values": torch.randn(2, 3, 16, 16)}, tmp_path)
    pixels = torch.randn(5, 3, 16, 16)
    assert_near(exported(pixel_values=pixels).logits, model(pixels).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPORTERS)
@torch.no_grad()
def test_patched_models(kind: str, tmp_path: Path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}
    model = patch(LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48)), "all", mode="replace").eval()
    exported = export(kind, model, {"input_ids": torch.randint(3, 98, (2, 7))}, tmp_path)
    ids = torch.randint(3, 98, (3, 12))
    assert_near(exported(input_ids=ids).logits, model(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPORTERS)
@torch.no_grad()
def test_patched_models_that_are_compact(kind: str, tmp_path: Path):
    """Packed heads, with rows that are not read."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}
    model = patch(BertForMaskedLM(BertConfig(**sizes)).eval(), "all", mode="replace", hidden_dims=(3, 2))
    compact(model)
    exported = export(kind, model, {"input_ids": torch.randint(3, 98, (2, 7))}, tmp_path)
    ids = torch.randint(3, 98, (3, 12))
    assert_near(exported(input_ids=ids).logits, model(ids).logits)
