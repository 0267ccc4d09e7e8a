"""How `layers` names what `patch` takes: indices of each stack, names, predicates."""

from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModel, MarianConfig, MarianForCausalLM

from hf_neural_attention import patch
from hf_neural_attention.patching import PatchError
from tests.helpers.neural_models import planned_layers
from tests.helpers.stock_models import FAMILIES, SIZES, small_model


GPT2, T5 = FAMILIES["gpt2"], FAMILIES["t5"]


@pytest.mark.parametrize(
    ("layers", "indices"),
    [
        ((0,), [0]),
        ([-1], [2]),
        ([2, 0], [0, 2]),
        (range(1, 3), [1, 2]),
        (np.arange(2), [0, 1]),
        ("all", [0, 1, 2]),
        ([0, -1], [0, 2]),
    ],
    ids=str,
)
def test_indices_count_each_stack_by_itself(layers: Any, indices: list[int]):
    for family in (GPT2, T5):
        assert planned_layers(family.model(), layers) == [
            stack.replace("*", str(i)) for stack in family.stacks for i in indices
        ]


def test_names_and_predicates():
    model = T5.model()
    cross = "decoder.block.1.layer.1.EncDecAttention"
    assert planned_layers(model, [cross, "encoder.block.0.layer.0.SelfAttention"]) == [
        "encoder.block.0.layer.0.SelfAttention",
        cross,
    ]
    assert planned_layers(model, lambda name, module: module.is_causal) == T5.layers[3:]
    assert len(planned_layers(model, lambda name, module: True)) == 9


def test_stacks_of_every_kind():
    clip = AutoConfig.for_model("clip")
    for part in (clip.text_config, clip.vision_config):
        part.hidden_size, part.num_hidden_layers, part.num_attention_heads, part.intermediate_size = 32, 3, 4, 48
    clip.text_config.vocab_size, clip.vision_config.image_size, clip.vision_config.patch_size = 99, 16, 4
    model = AutoModel.from_config(clip)
    assert planned_layers(model, [-1]) == ["text_model.encoder.layers.2.self_attn", "vision_model.encoder.layers.2.self_attn"]
    crossing = GPT2.model(add_cross_attention=True)
    assert planned_layers(crossing, "all") == GPT2.layers
    assert planned_layers(crossing, lambda name, module: module.is_cross_attention)[0] == "transformer.h.0.crossattention"
    # leaves cross-attention of a decoder that is taken by itself, which no run reaches
    sizes = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "d_model": 32, "vocab_size": 99}
    marian = MarianConfig(**sizes, pad_token_id=0, max_position_embeddings=64, forced_eos_token_id=None)
    decoder = MarianForCausalLM(marian)
    assert planned_layers(decoder, "all") == [f"model.decoder.layers.{index}.self_attn" for index in range(2)]
    with pytest.raises(PatchError, match=r"could not be seen|No run of the model reached"):
        patch(decoder, ["model.decoder.layers.0.encoder_attn"])
    # counts stages of blocks as one stack, and shared weights as one layer
    swin = small_model("swin", embed_dim=16, depths=[1, 2], num_heads=[2, 4], image_size=32, window_size=4, patch_size=2)
    blocks = ["0.blocks.0", "1.blocks.0", "1.blocks.1"]
    assert planned_layers(swin, "all") == [f"encoder.layers.{block}.attention" for block in blocks]
    assert {layer.head_dim for layer in patch(swin, "all", dry_run=True).layers} == {8}
    albert = small_model("albert", embedding_size=16, **SIZES)
    assert planned_layers(albert, "all") == ["encoder.albert_layer_groups.0.albert_layers.0.attention"]
    # mixes two kinds of attention, of which one fetches its function
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    mixed = small_model("qwen3_next", num_experts=2, num_experts_per_tok=1, head_dim=8, layer_types=kinds, **SIZES)
    assert planned_layers(mixed, [0]) == ["layers.1.self_attn"]


def test_self_attention_of_layers_whose_name_says_cross():
    part = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text, image = {**part, "vocab_size": 99}, {**part, "image_size": 16, "patch_size": 4}
    model = small_model("bridgetower", text_config=text, vision_config=image, **part)
    stacks = ("text_model.encoder.layer", "cross_modal_image_layers", "cross_modal_text_layers")
    assert planned_layers(model, "all") == [f"{stack}.{index}.attention.self" for stack in stacks for index in range(2)]
