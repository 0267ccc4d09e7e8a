"""Models of this package, whole and compact, with weights that bitsandbytes and quanto have rounded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, QuantoConfig

from hf_neural_attention import compact, from_pretrained, patch
from hf_neural_attention.introspection import count
from tests.helpers.comparing import main_output, run
from tests.helpers.neural_models import GPT2, VIT, Family, scorers
from tests.helpers.stock_models import FAMILIES


LARGER = {"neural_layers": "all", "neural_hidden_dims": [16, 8]}
COMPACT = {**LARGER, "neural_compact": True}
BERT = FAMILIES["bert"]


def packed(**settings: Any) -> Any:
    return compact(patch(BERT.model(), "all", mode="replace", hidden_dims=(16, 8), **settings))


# Maps a name to how the model is made, and what it takes
MODELS: dict[str, tuple[Callable[[], Any], Family | Any]] = {
    "GPT-2": (lambda: GPT2.neural(**LARGER), GPT2),
    "compact GPT-2": (lambda: GPT2.neural(**COMPACT), GPT2),
    "compact GPT-2 per head": (lambda: GPT2.neural(**COMPACT, neural_per_head=True), GPT2),
    "ViT": (lambda: VIT.neural(**LARGER), VIT),
    "compact ViT": (lambda: VIT.neural(**COMPACT), VIT),
    "compact ViT per head": (lambda: VIT.neural(**COMPACT, neural_per_head=True), VIT),
    "compact BERT": (packed, BERT),
    "compact BERT per head": (lambda: packed(per_head=True), BERT),
}
every_model = pytest.mark.parametrize(("make", "family"), MODELS.values(), ids=MODELS)


def inputs_of(family: Any) -> dict[str, torch.Tensor]:
    return family.inputs() if family is BERT else family.inputs(labels=False)


def assert_rounded(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Other numbers than before, off by at most a twentieth of their size in the mean."""
    error = (actual.float() - expected).norm() / expected.norm()
    assert 0 < error < 0.05, error


@every_model
def test_bitsandbytes_rounds_all_layers(make: Callable[[], Any], family: Any, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    model, inputs = make(), inputs_of(family)
    expected = run(model, **inputs)
    model.save_pretrained(tmp_path / "plain")
    ours = from_pretrained(tmp_path / "plain", quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32)
    is_shared = scorers(model)[0].num_heads is None  # bitsandbytes leaves layers per head, as all that are no nn.Linear
    assert (scorers(ours)[0].linear2.weight.dtype is torch.int8) is is_shared
    assert_rounded(run(ours, **inputs), expected)
    ours.save_pretrained(tmp_path / "rounded")
    assert torch.equal(run(from_pretrained(tmp_path / "rounded"), **inputs), run(ours, **inputs))


@pytest.mark.parametrize("fields", [LARGER, COMPACT], ids=["whole", "compact"])
def test_four_bits_leave_scorers_and_the_output_layer(fields: dict[str, Any], tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    model, inputs = GPT2.neural(**fields, n_embd=128, n_head=2, vocab_size=256), inputs_of(GPT2)
    model.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[".*scorer", "lm_head"])
    ours = from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    assert ours.transformer.h[0].attn.c_attn.weight.dtype is torch.uint8
    assert count(ours.parameters())[0] == ours.num_parameters() == model.num_parameters()
    assert {parameter.dtype for parameter in scorers(ours)[0].parameters()} == {torch.float32}
    actual, expected = run(ours, **inputs), run(model, **inputs)
    assert 0 < (actual - expected).norm() / expected.norm() < 0.3


@every_model
def test_quanto_rounds_all_layers(make: Callable[[], Any], family: Any, tmp_path: Path):
    pytest.importorskip("optimum.quanto")
    model, inputs = make(), inputs_of(family)
    expected = run(model, **inputs)
    model.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8"))
    is_shared = scorers(model)[0].num_heads is None
    assert (type(scorers(ours)[0].linear2).__name__ == "QLinear") is is_shared
    if family is GPT2 and not is_shared:  # has Conv1D and layers per head alone, and quanto rounds nn.Linear
        assert torch.equal(run(ours, **inputs), expected)
    else:
        assert_rounded(run(ours, **inputs), expected)


@every_model
def test_gradients_pass_rounded_layers(make: Callable[[], Any], family: Any, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    make().save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_8bit=True)
    ours = from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32).train()
    embeddings = ours.base_model.embeddings if family is not GPT2 else ours.transformer.wte
    main_output(ours(**inputs_of(family))).square().mean().backward()
    gradients = [parameter.grad for parameter in embeddings.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
