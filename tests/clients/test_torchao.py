"""torchao's quantisers, whose weights are tensors of their own kind inside plain linear layers."""

from typing import Any

import pytest
import torch
from transformers import TorchAoConfig

from hf_neural_attention import compact, explain, from_pretrained, patch, save_patch
from hf_neural_attention.patching import PatchError
from tests.helpers.comparing import run
from tests.helpers.neural_models import liven, scorers
from tests.helpers.stock_models import FAMILIES


pytest.importorskip("torchao", reason="torchao is not installed")

from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis


LLAMA, BERT = FAMILIES["llama"], FAMILIES["bert"]

# leaves out float8 activations, which torchao itself refuses on CPUs
QUANTISERS = {
    "int8 weights": (Int8WeightOnlyConfig(), 8),
    "int8 weights and activations": (Int8DynamicActivationInt8WeightConfig(), 8),
    "intx weights": (IntxWeightOnlyConfig(torch.int4, PerAxis(0)), 4),
    "intx weights, int8 activations": (Int8DynamicActivationIntxWeightConfig(torch.int4, PerAxis(0)), 4),
    "float8 weights": (Float8WeightOnlyConfig(), 4),  # e4m3 has 3 bits of mantissa and the leading one
}
every_quantiser = pytest.mark.parametrize(("quantiser", "bits"), QUANTISERS.values(), ids=QUANTISERS.keys())


def neural(**settings) -> Any:
    return patch(LLAMA.model(), "all", proj_dim=4, **settings)


@every_quantiser
@pytest.mark.parametrize("settings", ({"mode": "replace"}, {"mode": "residual"}, {"mode": "replace", "per_head": True}))
def test_quantised_scorers_score_by_what_their_weights_stand_for(quantiser: Any, bits: int, settings: dict):
    model = liven(neural(**settings))
    plain = [scorer.weights() for scorer in scorers(model)]
    quantize_(model, quantiser)
    shared = "per_head" not in settings  # torchao leaves layers per head as they are, as all that are no nn.Linear
    for scorer, expected in zip(scorers(model), plain, strict=True):
        assert (type(scorer.linear1.weight) is torch.nn.Parameter) is not shared
        for ours, exact in zip(scorer.weights(), expected, strict=True):
            assert (ours - exact).abs().max() <= exact.abs().max() * 2.0 ** (1 - bits)
            assert type(ours) in (torch.Tensor, torch.nn.Parameter)
        if shared:
            assert torch.equal(scorer.weights()[0], scorer.q_proj.weight.dequantize())
    assert run(model, **LLAMA.inputs()).isfinite().all()


@every_quantiser
def test_new_residual_scorers_say_nothing_when_quantised(quantiser: Any, bits: int):
    # takes new residual scorers, whose `linear3` is rows of zeros, of which float8 makes NaN
    model = neural(mode="residual")
    quantize_(model, quantiser)
    assert all(not scorer.weights().weight3.any() for scorer in scorers(model))


def test_quantised_scorers_compile():
    model, inputs = liven(neural(mode="residual")), LLAMA.inputs()
    quantize_(model, Int8WeightOnlyConfig())
    expected = run(model, **inputs)
    assert torch.equal(run(torch.compile(model, backend="eager", fullgraph=True), **inputs), expected)


def test_a_quantised_model_is_patched_saved_and_explained(tmp_path):
    liven(neural(mode="residual")).save_pretrained(tmp_path / "plain")
    settings = TorchAoConfig(Int8WeightOnlyConfig())
    loaded = from_pretrained(tmp_path / "plain", quantization_config=settings, dtype=torch.float32)
    expected = run(loaded, **LLAMA.inputs())
    assert "the weight is quantised (Int8Tensor); the numbers that it stands for are used" in str(explain(loaded))
    with pytest.raises(PatchError, match=r"linear1\.weight.*quantised weights.*`save_pretrained` saves all"):
        save_patch(loaded, tmp_path / "patch")
    assert not (tmp_path / "patch").exists()
    loaded.save_pretrained(tmp_path / "quantised")
    assert torch.equal(run(from_pretrained(tmp_path / "quantised"), **LLAMA.inputs()), expected)
    stock = LLAMA.model()
    quantize_(stock, Int8WeightOnlyConfig())
    before = run(stock, **LLAMA.inputs())
    assert torch.allclose(run(patch(stock, "all"), **LLAMA.inputs())[0], before[0], atol=1e-4)


@every_quantiser
def test_compact_layers_are_quantised(quantiser: Any, bits: int):
    model = compact(patch(BERT.model(), "all", mode="replace", proj_dim=4))
    expected = run(model, **BERT.inputs())
    quantize_(model, quantiser)
    assert all(type(scorer.linear2.weight) is not torch.nn.Parameter for scorer in scorers(model))
    # leaves out the padding token, whose row of zeros float8 makes NaN in the stock model, too
    actual, expected = run(model, **BERT.inputs())[..., 1:], expected[..., 1:]
    assert actual.isfinite().all() and not torch.equal(actual, expected)
    whole = patch(BERT.model(), "all", mode="replace", proj_dim=4)
    quantize_(whole, quantiser)
    with pytest.raises(PatchError, match="sharded or quantised"):
        compact(whole)
