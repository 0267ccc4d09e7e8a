"""The paper's architecture: how large its embeddings are, what they do to the first layer, and that models load again."""

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from hf_neural_attention import patch, patch_status
from hf_neural_attention.analysis import score_statistics
from tests.helpers.comparing import assert_same_state
from training.causal_models import predicts_the_next_token
from training.paper_models import (
    PaperDecoderConfig,
    PaperDecoderForCausalLM,
    PaperEncoderConfig,
    PaperEncoderForImageClassification,
    sinusoids,
)


WIDTH = 64
TOKENS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def decoder(**fields: Any) -> PaperDecoderForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32, "d_model": WIDTH}
    special = dict.fromkeys(("pad_token_id", "forced_eos_token_id")) | {"decoder_start_token_id": 0, "eos_token_id": 0}
    config = PaperDecoderConfig(
        vocab_size=50,
        max_position_embeddings=16,
        init_std=(3 * WIDTH) ** -0.5,
        **sizes,
        **special,
        **fields,
    )
    return PaperDecoderForCausalLM(config).eval()


def encoder(**fields: Any) -> PaperEncoderForImageClassification:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "hidden_size": WIDTH}
    config = PaperEncoderConfig(
        image_size=16, patch_size=4, num_labels=3, initializer_range=(3 * WIDTH) ** -0.5, **sizes, **fields
    )
    return PaperEncoderForImageClassification(config).eval()


def first_input(model: Any, layer: Any, **inputs: Any) -> torch.Tensor:
    """What a model's first layer gets."""
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    return seen[0]


@pytest.mark.parametrize("fields, factor", (({}, 1 + math.sqrt(WIDTH)), ({"embedding_factor": 2.0}, 2.0)))
def test_embeddings_are_multiplied_and_positions_added(fields: dict, factor: float):
    model = decoder(**fields)
    positions = model.model.decoder.embed_positions.weight[:12]
    words = model.get_input_embeddings().weight[TOKENS].detach()
    assert words.std().item() == pytest.approx(1.0, rel=0.1)
    found = first_input(model, model.model.decoder.layers[0], input_ids=TOKENS)
    assert torch.allclose(found, factor * words + positions, atol=1e-5)
    images = encoder(**fields)
    embeddings = images.vit.embeddings
    tokens = torch.cat((embeddings.cls_token.expand(2, 1, -1), embeddings.patch_embeddings(PIXELS)), dim=1)
    found = first_input(images, images.vit.layers[0], pixel_values=PIXELS)
    assert torch.allclose(found, factor * tokens + sinusoids(17, WIDTH), atol=1e-5)


def test_only_the_authors_embeddings_saturate_the_first_layer():
    factor = 1 + math.sqrt(WIDTH)
    kinds = {
        "authors": {},
        "unit": {"embedding_std": 1 / factor},
        "normalised": {"normalise_embeddings": True},
        "not multiplied": {"embedding_factor": 1.0},
    }
    layers = {name: score_statistics(decoder(**fields), input_ids=TOKENS) for name, fields in kinds.items()}
    assert layers["authors"][0].spread > 10 and layers["authors"][0].saturated > 0.5
    assert all(layers[name][0].spread < 1 and layers[name][0].saturated == 0 for name in kinds if name != "authors")
    assert all(found[1].spread < 1 for found in layers.values())
    images = {
        name: score_statistics(encoder(**fields), pixel_values=PIXELS)
        for name, fields in kinds.items()
        if name in ("authors", "normalised")
    }
    assert images["authors"][0].spread > 5 * images["normalised"][0].spread


def test_blocks_normalise_after_each_sublayer():
    model = encoder()
    with torch.no_grad():
        states = model.vit(PIXELS).last_hidden_state
    assert states.mean(-1).abs().max() < 1e-5 and states.var(-1, unbiased=False) == pytest.approx(torch.ones(2, 17), abs=1e-3)
    assert not any("encoder_attn" in name for name, _ in decoder().named_parameters())
    assert not predicts_the_next_token(decoder(), "decoder")


def test_the_head_has_weights_of_its_own_and_starts_by_guessing():
    model = decoder()
    head, embeddings = model.lm_head.weight, model.get_input_embeddings().weight
    assert head.data_ptr() != embeddings.data_ptr() and head.std().item() == pytest.approx((3 * WIDTH) ** -0.5, rel=0.1)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(input_ids=TOKENS).logits[:, :-1].mT, TOKENS[:, 1:])
    assert loss.item() == pytest.approx(math.log(50), abs=1.0)


@pytest.mark.parametrize("kind", ("decoder", "encoder"))
@pytest.mark.parametrize("is_patched", (False, True))
def test_they_load_again(kind: str, is_patched: bool, tmp_path: Any):
    model: Any = decoder(normalise_embeddings=True) if kind == "decoder" else encoder(normalise_embeddings=True)
    auto_class: Any = AutoModelForCausalLM if kind == "decoder" else AutoModelForImageClassification
    inputs = {"input_ids": TOKENS} if kind == "decoder" else {"pixel_values": PIXELS}
    if is_patched:
        patch(model, "all", mode="replace")
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and len(patch_status(loaded)) == 2 * is_patched
    assert_same_state(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
