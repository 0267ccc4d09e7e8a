"""Padding is no text: on whichever side it is, and how much of it there is, it makes no difference."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_neural_attention import NeuralCache, analysis, calibrate, patch
from hf_neural_attention.patching.layers import tokens_of_queries
from tests.helpers.stock_models import FAMILIES, small_model


LENGTHS = (9, 5)


def padded(family: str, side: str, extra: int = 0) -> dict[str, torch.Tensor]:
    """Two texts of different lengths, with positions that do not depend on the side."""
    ids = torch.randint(3, 98, (2, 9), generator=torch.Generator().manual_seed(1))
    width = max(LENGTHS) + extra
    inputs = {name: torch.zeros(2, width, dtype=torch.long) for name in ("input_ids", "attention_mask", "position_ids")}
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        inputs["input_ids"][row, place] = ids[row, :length]
        inputs["attention_mask"][row, place] = 1
        inputs["position_ids"][row, place] = torch.arange(length)
    if FAMILIES[family].head == "Seq2SeqLM":
        del inputs["position_ids"]
        inputs |= {f"decoder_{name}": inputs[name].clone() for name in ("input_ids", "attention_mask")}
    return inputs


def figures(health: Any) -> list[float]:
    return [number for layer in health for number in layer[1:]]


@pytest.mark.parametrize(
    "family, implementation", (("gpt2", "eager"), ("llama", "sdpa"), ("mistral", "sdpa"), ("bert", "sdpa"))
)
def test_scorer_health(family: str, implementation: str):
    model = patch(FAMILIES[family].model(implementation), "all", mode="replace", proj_dim=8)
    expected = figures(analysis.scorer_health(model, **padded(family, "left")))
    for side, extra in (("right", 0), ("left", 23), ("right", 23)):
        actual = figures(analysis.scorer_health(model, **padded(family, side, extra)))
        assert actual == pytest.approx(expected, rel=1e-4), (side, extra)
    texts = [
        {name: tensor[[row], :length] for name, tensor in padded(family, "right").items()}
        for row, length in enumerate(LENGTHS)
    ]
    rows = [length - (0 if family == "bert" else 1) for length in LENGTHS]  # the first token of a text has no choice
    apart = [analysis.scorer_health(model, **text) for text in texts]
    for number, layer in enumerate(analysis.scorer_health(model, **padded(family, "right", 23))):
        mean = sum(health[number].entropy * count for health, count in zip(apart, rows, strict=True)) / sum(rows)
        assert layer.entropy == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("family, implementation", (("gpt2", "sdpa"), ("bert", "eager")))
def test_calibration(family: str, implementation: str):
    reports = []
    for side, extra in (("left", 0), ("right", 0), ("left", 23), ("right", 23)):
        torch.manual_seed(0)
        model = patch(FAMILIES[family].model(implementation), "all", mode="replace", proj_dim=8)
        batches = [padded(family, side, extra)] * 4
        reports.append([number for layer in calibrate(model, batches, steps=10, progress=False) for number in layer[1:4]])
    for report in reports[1:]:
        assert report == pytest.approx(reports[0], rel=1e-3)


def test_cross_attention():
    model = FAMILIES["bart"].model()
    patch(model, lambda name, module: "decoder" in name, mode="replace", proj_dim=8)
    first, *others = (
        figures(analysis.scorer_health(model, **padded("bart", side, extra)))[-7:]
        for side, extra in (("right", 0), ("right", 23))
    )
    assert all(other == pytest.approx(first, rel=1e-4) for other in others)
    inputs = padded("bart", "right", 23)
    counted = figures(analysis.scorer_health(model, **{**inputs, "decoder_attention_mask": torch.ones(2, 32)}))[-7:]
    assert counted != pytest.approx(first, rel=1e-4)


def statistics(scores: Any) -> list[float]:
    return [number for layer in scores for number in layer[2:]]


@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_queries_beside_other_keys(family: str):
    """Padding counts no more where keys are those of a cache too: an empty one of fixed length, or one with earlier tokens."""
    model, inputs = FAMILIES[family].model("sdpa"), padded(family, "right")
    expected = statistics(analysis.score_statistics(model, **inputs))
    fixed = StaticCache(model.config, max_cache_len=20)
    assert statistics(analysis.score_statistics(model, past_key_values=fixed, **inputs)) == pytest.approx(expected, rel=1e-4)
    assert fixed.get_seq_length() == 0, "is copied"
    earlier = DynamicCache(config=model.config)
    first = {name: tensor[:, :4] for name, tensor in inputs.items()}
    model(**first, past_key_values=earlier)  # with a history, which cannot be copied
    later = {name: tensor[:, 4:] for name, tensor in inputs.items()} | {"attention_mask": inputs["attention_mask"]}
    found = analysis.score_statistics(model, past_key_values=earlier, **later)
    assert earlier.get_seq_length() == 4
    keys = [float(position + 1) for length in LENGTHS for position in range(4, length)]
    uniform = torch.tensor(keys).log().mean().item()
    assert [layer.uniform_entropy for layer in found] == pytest.approx([uniform] * len(found), rel=1e-5)


def test_hybrid_caches_with_a_history_are_copied():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    kinds = {"layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = small_model("qwen3_next", **sizes, **linear, **kinds, **experts)
    ids = torch.randint(3, 98, (1, 6))
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], past_key_values=cache)
    one, two = (analysis.score_statistics(model, input_ids=ids[:, 4:], past_key_values=cache) for _ in range(2))
    assert one == two and cache.get_seq_length() == 4


def test_text_is_no_mask_of_what_looks_at_images():
    call: Any = SimpleNamespace(query=torch.zeros(1, 2, 3, 8), key=torch.zeros(1, 2, 8, 8))
    model, text = SimpleNamespace(config=SimpleNamespace()), {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}
    for index, expected in ((None, None), (0, [[1, 1, 0]])):
        module = torch.nn.Module()
        module.layer_idx = index
        tokens = tokens_of_queries(model, "layers.0.self_attn", module, text, call)
        assert (tokens if tokens is None else tokens.tolist()) == expected


def test_a_cache_without_keys_is_refused():
    model = patch(FAMILIES["llama"].model(), "all", mode="replace")
    with pytest.raises(ValueError, match="A `NeuralCache` keeps no keys that could be looked at"):
        analysis.queries_and_keys(model, **padded("llama", "right"), past_key_values=NeuralCache(model))
