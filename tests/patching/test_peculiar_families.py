"""Families that ask for more than others: decoders that stand alone, keys of both sides, arguments that are left over."""

from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

from hf_neural_attention import patch, patched
from hf_neural_attention.patching import ProbeError, UnsupportedLayerError
from hf_neural_attention.patching.module_names import stack_name
from tests.helpers.comparing import assert_near
from tests.helpers.stock_models import BART, FAMILIES, GROUPED, latent_model


GROUPED_HEADS = {**GROUPED, "num_hidden_layers": 2, "head_dim": 8, "initializer_range": 0.2}
IMAGES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 20}
IMAGES |= {"patch_size": 5}
TOKENS = torch.arange(3, 10).unsqueeze(0)


def stacks(model: Any, **settings) -> set[str]:
    return {stack_name(layer.layer) for layer in patch(model, "all", dry_run=True, **settings).layers}


@torch.no_grad()
def assert_patchable(model: Any, inputs: dict[str, torch.Tensor], **settings) -> None:
    """To the bit in mode "residual" under eager attention, and otherwise in mode "replace"."""
    model.eval().set_attn_implementation("eager")
    expected = model(**inputs)[0]
    with patched(model, "all", **settings):
        assert torch.equal(model(**inputs)[0], expected)
    with patched(model, "all", mode="replace", **settings):
        assert not torch.allclose(model(**inputs)[0], expected)
    assert torch.equal(model(**inputs)[0], expected)


@pytest.mark.parametrize("name", ("BartForCausalLM", "MarianForCausalLM", "PegasusForCausalLM"))
def test_decoders_that_stand_alone(name: str):
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**BART)).eval()
    assert stacks(model) == {"model.decoder.layers.*.self_attn"}
    assert [layer.layer for layer in patch(model, [0], dry_run=True).layers] == ["model.decoder.layers.0.self_attn"]
    assert_patchable(model, {"input_ids": TOKENS})
    with pytest.raises(ProbeError, match=r"'model.decoder.layers.0.encoder_attn' would .*: no run .* Its own run passed"):
        patch(model, ["model.decoder.layers.0.encoder_attn"], example_inputs={"input_ids": TOKENS})


def test_cross_attention_of_pix2struct_is_none_of_self_attention():
    text = {"vocab_size": 99, "hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    image = {"hidden_size": 32, "patch_embed_hidden_size": 12, "d_ff": 48, "d_kv": 8, "seq_len": 16}
    image |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("pix2struct", text_config=text, vision_config=image)
    model = transformers.Pix2StructForConditionalGeneration(config)
    inputs = {"flattened_patches": torch.rand(1, 7, 14), "decoder_input_ids": TOKENS}  # as many patches as tokens
    assert stacks(model, example_inputs=inputs) == {
        "encoder.encoder.layer.*.attention",
        "decoder.layer.*.self_attention.attention",
    }


def test_keys_of_both_sides():
    text = {**GROUPED_HEADS, "layer_types": ["full_attention", "sliding_attention"]}
    encoder = {"text_config": text, "vision_config": IMAGES, "hidden_size": 32, "mm_tokens_per_image": 4}
    tokens = {"image_token_index": 4, "boi_token_index": 5, "eoi_token_index": 6}
    config = AutoConfig.for_model("t5gemma2", encoder={**encoder, **tokens}, decoder=text, image_token_index=4)
    model = AutoModel.from_config(config)
    assert {"encoder.text_model.layers.*.self_attn", "decoder.layers.*.self_attn"} <= stacks(model)
    assert_patchable(model, {"input_ids": TOKENS + 7, "decoder_input_ids": TOKENS[:, :5] + 7})


@pytest.fixture(scope="module")
def granite_speech() -> Any:
    torch.manual_seed(0)
    encoder = {"hidden_dim": 32, "num_layers": 2, "num_heads": 4, "dim_head": 8, "feedforward_mult": 2, "input_dim": 20}
    encoder |= {"output_dim": 16, "context_size": 20, "max_pos_emb": 32}
    projector = {"model_type": "blip_2_qformer", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "granite_speech",
        text_config={"model_type": "granite", **GROUPED_HEADS},
        encoder_config=encoder,
        projector_config={**projector, "intermediate_size": 48, "encoder_hidden_size": 32},
        audio_token_id=98,
        window_size=15,
        downsample_rate=5,
    )
    return transformers.GraniteSpeechForConditionalGeneration(config).eval()


def test_queries_that_are_shared_by_a_batch_of_keys(granite_speech: Any):
    # has two windows of three audio tokens in each of two examples, for whose four windows there is one query
    ids = torch.cat([torch.full((2, 6), 98), TOKENS.expand(2, -1)], dim=1)
    inputs = {"input_ids": ids, "input_features": torch.randn(2, 30, 20)}
    assert len(stacks(granite_speech)) == len(stacks(granite_speech, example_inputs=inputs)) == 2
    assert_patchable(granite_speech, inputs, example_inputs=inputs)
    names = ["model.projector.qformer.encoder.layer.0.crossattention.attention"]
    with torch.no_grad():
        expected = granite_speech(**inputs).logits
        with patched(granite_speech, names, example_inputs=inputs):
            assert_near(granite_speech(**inputs).logits, expected)


def test_example_inputs_need_not_reach_every_part():
    text = {"model_type": "llama", **GROUPED_HEADS}
    config = AutoConfig.for_model("llava", text_config=text, vision_config={"model_type": "clip_vision_model", **IMAGES})
    model = AutoModel.from_config(config)
    both = {"language_model.layers.*.self_attn", "vision_tower.encoder.layers.*.self_attn"}
    assert stacks(model) == stacks(model, example_inputs={"input_ids": TOKENS}) == both
    assert_patchable(model, {"input_ids": TOKENS}, example_inputs={"input_ids": TOKENS})
    cache = model(input_ids=TOKENS).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert (
        patch(model, "all", dry_run=True, example_inputs={"input_ids": TOKENS}).stock.cache_bytes_per_token
        == held / TOKENS.numel()
    )


def test_caches_that_keep_other_numbers_than_attention_gets_are_not_counted():
    plan = patch(latent_model(), "all", dry_run=True)
    assert plan.stock.cache_bytes_per_token is None and "unknown" in str(plan)


def test_arguments_that_are_left_over_change_nothing():
    model = FAMILIES["llama"].model()
    inputs = {"input_ids": TOKENS, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    assert stacks(model, example_inputs=inputs) == {"model.layers.*.self_attn"}
    assert_patchable(model, inputs, example_inputs=inputs)


def test_what_code_keeps_of_a_run_has_numbers_after_a_patch():
    config = AutoConfig.for_model("dinov3_vit", **{**IMAGES, "image_size": 25, "num_register_tokens": 1})
    model, other = AutoModel.from_config(config), AutoModel.from_config(config)
    patch(model, "all")
    inputs = {"pixel_values": torch.rand(1, 3, 25, 25)}
    with torch.no_grad():
        assert all(type(each(**inputs).last_hidden_state) is torch.Tensor for each in (model, other))


def test_channels_that_attend_to_channels():
    sizes = {"embed_dim": [16, 32], "depths": [1, 1], "num_heads": [2, 4], "num_groups": [2, 4], "window_size": 2}
    sizes |= {"patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True]}
    vision = AutoConfig.for_model("florence_vision", **sizes)
    model = transformers.models.florence2.modeling_florence2.Florence2VisionBackbone(vision)
    inputs = {"hidden_states": torch.randn(1, 3, 24, 24)}
    with pytest.raises(UnsupportedLayerError, match=r"channel_block.channel_attn.*: channels that attend to channels"):
        patch(model, lambda name, module: "channel" in name, example_inputs=inputs)


@pytest.mark.skipif("inkling2_text" not in CONFIG_MAPPING, reason="this Transformers does not have Inkling 2 yet")
def test_sinks_of_each_query():
    fields = {**GROUPED, "num_hidden_layers": 2, "head_dim": 8}
    model = AutoModel.from_config(AutoConfig.for_model("inkling2_text", **fields))
    with pytest.raises(UnsupportedLayerError, match="sinks that are not a logit per head"):
        patch(model, "all")
