"""Tokens that may attend to nothing: stock models let them attend to everything wherever a mask is a finite number, scorers
give them zeros. That shows in padding alone, never in a row that counts."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCTC

from hf_neural_attention import patched
from tests.helpers.stock_models import FAMILIES


def compared(model: Any, inputs: dict[str, torch.Tensor], counts: torch.Tensor) -> None:
    """Mode "residual" leaves the rows that count, `[B, T]`, as they are, and makes others of the others."""
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        with patched(model, "all"):
            actual = model(**inputs).logits
    assert not counts.all()
    if model.config._attn_implementation == "eager":
        assert torch.equal(actual[counts], expected[counts])
    torch.testing.assert_close(actual[counts], expected[counts], rtol=0.0, atol=2e-6 * expected.abs().max().item())
    assert (actual - expected)[~counts].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_left_padding_of_t5s_decoder(implementation: str):
    inputs = FAMILIES["t5"].inputs()
    counts = torch.ones_like(inputs["decoder_input_ids"])
    counts[1, :2] = 0
    compared(FAMILIES["t5"].model(implementation), {**inputs, "decoder_attention_mask": counts}, counts.bool())


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_padding_of_parakeets_frames(implementation: str):
    torch.manual_seed(0)
    encoder = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "num_mel_bins": 16,
    }
    encoder |= {"subsampling_conv_channels": 8, "initializer_range": 0.2, "dropout": 0.0, "activation_dropout": 0.0}
    config = AutoConfig.for_model("parakeet_ctc", vocab_size=20, encoder_config=encoder)
    model = AutoModelForCTC.from_config(config, attn_implementation=implementation)
    lengths = torch.tensor([[96], [48]])  # frames, of which eight become one
    inputs = {"input_features": torch.randn(2, 96, 16), "attention_mask": torch.arange(96) < lengths}
    compared(model, inputs, torch.arange(12) < lengths // 8)
