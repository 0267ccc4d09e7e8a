"""`compact`: the same outputs with fewer numbers, round trips, what is refused, and what is said beforehand."""

import copy
import json
import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CLIPConfig,
    CLIPModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from hf_neural_attention import (
    compact,
    explain,
    from_pretrained,
    patch,
    patch_status,
)
from hf_neural_attention.patching.sizes import size_of
from tests.helpers import neural_models
from tests.helpers.compacted_models import every_setting, folded_families, inputs_of, neural
from tests.helpers.comparing import assert_far, assert_near, assert_same_state, run
from tests.helpers.stock_models import FAMILIES, IMAGE, SIZES, TEXT, Family
from tests.helpers.versions import CACHE


GPT2, VIT, BERT, T5, BART = (FAMILIES[name] for name in ("gpt2", "vit", "bert", "t5", "bart"))
# Allows, of the outputs' size, rounding of one product more or less, through three layers
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}


@folded_families
@every_setting
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_outputs_stay(family: Family, settings: dict, dtype: torch.dtype):
    model, inputs = neural(family, dtype=dtype, **settings), inputs_of(family, dtype)
    expected, stock = run(model, **inputs), run(family.model().to(dtype), **inputs)
    assert compact(model) is model
    assert_near(family.seen(run(model, **inputs)), family.seen(expected), BOUNDS[dtype])
    assert_far(family.seen(expected), family.seen(stock))
    assert all(layer.compact and layer.proj_dim is None for layer in patch_status(model))


@pytest.mark.parametrize("family", (GPT2, VIT, BERT), ids=("gpt2", "vit", "bert"))
def test_half_precision_loses_no_more(family: Family):
    """The 2x rule, against the same model in float64."""
    exact, rounded = neural(family), neural(family, dtype=torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())
    truth = family.seen(run(exact.double(), **inputs_of(family, torch.float64)))

    def error() -> float:
        outputs = family.seen(run(rounded, **inputs_of(family, torch.bfloat16)))
        return (outputs.double() - truth).abs().max().item()

    before = error()
    compact(rounded)
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    assert error() <= 2 * before


@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
def test_training_goes_on_alike(implementation: str):
    """Gradients of what both forms have, in training mode."""
    whole = neural(BERT, dtype=torch.float64).train()
    whole.set_attn_implementation(implementation)
    made = compact(copy.deepcopy(whole))
    inputs, gradients = BERT.inputs(), []
    for model in (whole, made):
        (model(**inputs).logits[inputs["attention_mask"].bool()] ** 2).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.scorer.linear2.weight"):
        assert_near(gradients[1][name], gradients[0][name], 1e-9)
    query = made.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert type(query) is nn.Linear and query.weight.shape == (16, 32) and query.weight.grad.abs().sum() > 0
    assert all(parameter.requires_grad for name, parameter in made.named_parameters() if not name.endswith("linear3.bias"))
    assert all(module.training for module in made.modules())


def test_rows_that_fill_a_head_are_not_read():
    model, inputs = compact(neural(BERT, hidden_dims=(3, 2))), BERT.inputs()
    key = model.get_submodule("bert.encoder.layer.0.attention.self.key")
    # copies, since DoRA divides by the norm of a row
    assert key.weight.shape == (16, 32) and torch.equal(key.weight[12:], key.weight[:4])
    expected = run(model, **inputs)
    model(**inputs).logits.sum().backward()
    assert not key.weight.grad[12:].any() and not key.bias.grad[12:].any() and key.weight.grad[:12].any()
    with torch.no_grad():
        key.weight[12:] = key.bias[12:] = 7.0
    assert torch.equal(run(model, **inputs), expected)


@pytest.mark.parametrize("family", (GPT2, VIT, BERT, T5), ids=("gpt2", "vit", "bert", "t5"))
def test_parameters_keep_by_name_what_is_frozen_and_their_dtype(family: Family):
    """Whoever trains the scorers alone goes on to do so; and a scorer of float32 in a bfloat16 model stays one."""
    model = neural(family, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".scorer." in name and not name.endswith("linear3.bias"))
    for scorer in neural_models.scorers(model):
        scorer.float()
    before = {name: (each.requires_grad, each.dtype) for name, each in model.named_parameters()}
    compact(model)
    after = {name: (each.requires_grad, each.dtype) for name, each in model.named_parameters()}
    assert {name: before.get(name, (False, torch.bfloat16)) for name in after} == after
    new = {name.rpartition(".")[2] for name in after.keys() - before.keys()}
    assert new == ({"bias"} if family is T5 else set())  # whose layers have none
    assert any(trains for trains, _ in after.values())


@pytest.mark.parametrize("layers", ([0], [1, 2]))
@pytest.mark.parametrize("family", (GPT2, BERT), ids=("gpt2", "bert"))
def test_other_layers_stay_to_the_bit(family: Family, layers: list[int]):
    model = neural(family, layers)
    before, others = copy.deepcopy(model), set(range(3)) - set(layers)
    compact(model)
    for index in others:
        name = family.layers[index]
        assert type(model.get_submodule(name)) is type(before.get_submodule(name))
        assert_same_state(model.get_submodule(name), before.get_submodule(name))


@pytest.mark.parametrize("family", (T5, BART), ids=("t5", "bart"))
@pytest.mark.parametrize("settings", ({}, {"per_head": True}), ids=("shared", "per head"))
def test_cross_attention(family: Family, settings: dict):
    model = neural(family, lambda name, module: re.search("encoder_attn|EncDec", name), **settings)
    expected = run(model, **family.inputs())
    tokens = model.generate(family.inputs()["input_ids"], max_new_tokens=6, do_sample=False)
    compact(model)
    assert_near(run(model, **family.inputs()), expected)
    assert torch.equal(model.generate(family.inputs()["input_ids"], max_new_tokens=6, do_sample=False), tokens)


def test_several_parts():
    side = {**SIZES, "num_hidden_layers": 2, "projection_dim": 16}
    config = CLIPConfig(
        text_config={**side, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 98},
        vision_config={**side, "image_size": 16, "patch_size": 4},
    )
    torch.manual_seed(0)
    clip = patch(CLIPModel(config).eval(), "all", mode="replace")
    inputs = {"input_ids": torch.randint(3, 98, (2, 9)), "pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        expected = clip(**inputs).logits_per_image
        assert_near(compact(clip)(**inputs).logits_per_image, expected)
    assert len(patch_status(clip)) == 4


WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (5, 4), "num_conv_pos_embeddings": 4}
MORE = {
    "AlbertForMaskedLM": {**TEXT, "embedding_size": 16},  # one attention module for all layers
    "ElectraForMaskedLM": {**TEXT, "embedding_size": 16},
    "DeiTForImageClassification": IMAGE,
    "SwinForImageClassification": WINDOWS,  # hands its attention windows of an image as examples of a batch
    "Wav2Vec2ForCTC": {**SIZES, **CONVOLUTIONS, "num_conv_pos_embedding_groups": 2, "vocab_size": 99},
}


@pytest.mark.parametrize("name", MORE)
def test_more_families(name: str):
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**MORE[name])).eval()
    inputs: dict[str, torch.Tensor] = {"input_ids": torch.randint(3, 98, (2, 9))}
    if "Image" in name:
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    elif "CTC" in name:
        inputs = {"input_values": torch.randn(2, 800)}
    before = size_of(model)
    expected = run(patch(model, "all", mode="replace"), **inputs)
    assert_near(run(compact(model), **inputs), expected)
    assert size_of(model).num_parameters < before.num_parameters


def test_our_classes_inside_another_model(tmp_path):
    decoder = {**GPT2.model().config.to_dict(), "add_cross_attention": True, "is_decoder": True}
    config = VisionEncoderDecoderConfig(encoder=VIT.model().config.to_dict(), decoder=decoder)
    torch.manual_seed(0)
    model = patch(VisionEncoderDecoderModel(config).eval(), "all", mode="replace", hidden_dims=(4, 2))
    inputs = VIT.inputs() | {"decoder_input_ids": torch.randint(3, 98, (2, 5))}
    expected, before = run(model, **inputs), size_of(model).cache_bytes_per_token
    compact(model)
    assert_near(run(model, **inputs), expected)
    assert (before, size_of(model).cache_bytes_per_token) == (768, 576)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(from_pretrained(tmp_path), **inputs), run(model, **inputs))


@pytest.mark.parametrize("family", (GPT2, T5, BART), ids=("gpt2", "t5", "bart"))
@pytest.mark.parametrize("arguments", ({}, {"use_cache": False}, {"num_beams": 2}), ids=str)
def test_generation(family: Family, arguments: dict):
    model, inputs = neural(family, dtype=torch.float64), family.inputs()
    inputs.pop("decoder_input_ids", None)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False, **arguments)
    assert torch.equal(compact(model).generate(**inputs, max_new_tokens=8, do_sample=False, **arguments), expected)


def test_a_cache_holds_what_the_plan_says():
    config = BertConfig(**{**TEXT, "is_decoder": True})
    for make in (GPT2.model, lambda: BertLMHeadModel(config).eval()):
        model = patch(make(), "all", mode="replace", hidden_dims=(4, 2))
        plan = compact(model, dry_run=True)
        compact(model)
        cache = model(torch.arange(3, 8).unsqueeze(0), use_cache=True)[CACHE]
        held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
        assert held == 5 * plan.compact.cache_bytes_per_token == 5 * 0.75 * plan.stock.cache_bytes_per_token > 0


# --- compacts models of this package


@neural_models.both_families
@pytest.mark.parametrize("fields", ({"neural_layers": "all"}, {"neural_layers": [1], "neural_per_head": True}), ids=str)
def test_models_of_this_package(family: Any, fields: dict, tmp_path):
    model, inputs = family.neural(neural_proj_dim=4, **fields), family.inputs(labels=False)
    expected, plan = run(model, **inputs), compact(model, dry_run=True)
    assert not model.config.neural_compact and torch.equal(run(model, **inputs), expected)
    compact(model)
    assert_near(run(model, **inputs), expected)
    assert model.config.neural_compact and model.config.neural_folded_from == type(model).__name__
    assert plan.layers == patch_status(model) and plan.compact == size_of(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(from_pretrained(tmp_path), **inputs), run(model, **inputs))


# --- makes plans


@pytest.mark.parametrize("family", (GPT2, BERT, T5), ids=("gpt2", "bert", "t5"))
def test_dry_run_says_what_compact_then_does(family: Family):
    model = neural(family).train()
    before, modules, random = copy.deepcopy(model), [*map(id, model.modules())], torch.get_rng_state()
    plan = compact(model, dry_run=True)
    assert [*map(id, model.modules())] == modules and torch.equal(torch.get_rng_state(), random)
    assert_same_state(model, before)
    assert (plan.stock, plan.whole) == (size_of(family.model()), size_of(model))
    assert plan.whole.num_bytes == model.get_memory_footprint()
    compact(model)
    assert plan.layers == patch_status(model) and plan.compact == size_of(model) and plan.backends == explain(model)
    assert plan.compact.num_bytes == model.get_memory_footprint() < plan.stock.num_bytes < plan.whole.num_bytes
    text = str(plan)
    assert repr(plan) == text and f"{len(plan.layers)} attention layers would be compact" in text
    assert re.search(rf"compact +{plan.compact.num_parameters:,} +{plan.compact.num_bytes:,}", text)
    assert ("no cache" in text) == (family is BERT)


def test_dry_run_leaves_the_mode_of_every_module():
    """A module whose dropout somebody has switched off by itself, and one whose dropout alone is on."""
    model = neural(GPT2).train()
    first, second = (block.attn for block in model.transformer.h[:2])
    first.attn_dropout.eval()
    second.eval().resid_dropout.train()
    before = [module.training for module in model.modules()]
    compact(model, dry_run=True)
    assert [module.training for module in model.modules()] == before
    compact(model)
    first, second = (block.attn for block in model.transformer.h[:2])
    assert first.training and first.scorer.training and not first.attn_dropout.training
    assert not second.training and not second.scorer.training and second.resid_dropout.training


def test_status_is_plain_data():
    first, *_ = json.loads(json.dumps([layer._asdict() for layer in patch_status(compact(neural(GPT2)))]))
    assert first == {
        "layer": "transformer.h.0.attn",
        "head_dim": 4,
        "proj_dim": None,
        "hidden_dims": [4, 2],
        "mode": "replace",
        "per_head": False,
        "init": "mirrored",
        "compact": True,
        "num_parameters": 13,
        "num_bytes": 52,
    }


@pytest.mark.parametrize("family", (GPT2, BERT), ids=("gpt2", "bert"))
def test_a_module_with_several_places_stays_one(family: Family):
    model, inputs = neural(family), family.inputs() | ({"use_cache": False} if family is GPT2 else {})
    first, second, third = family.layers
    model.set_submodule(second, model.get_submodule(first))
    expected, before = run(model, **inputs), list(map(id, model.modules()))
    plan = compact(model, dry_run=True)
    assert list(map(id, model.modules())) == before
    scorers = {id(each): each for each in model.get_submodule(first).scorer.parameters()}
    scorers |= {id(each): each for each in model.get_submodule(third).scorer.parameters()}
    counted = sum(each.numel() for each in scorers.values())
    assert plan.stock.num_parameters == sum(each.numel() for each in model.parameters()) - counted
    compact(model)
    assert model.get_submodule(second) is model.get_submodule(first) is not model.get_submodule(third)
    assert_near(run(model, **inputs), expected)
    assert plan.layers == patch_status(model) and plan.compact == size_of(model)


def test_a_plan_says_where_nothing_gets_smaller():
    remark = "no smaller than the stock model. The compact form pays where `hidden_dims[0]` is well below the size of a head."
    for hidden_dims in ((2, 1), (7, 1), (8, 2), (32, 8)):  # of heads of 8 numbers
        plan = compact(neural(GPT2, hidden_dims=hidden_dims), dry_run=True)
        grows = plan.compact.num_parameters >= plan.stock.num_parameters
        assert grows == (hidden_dims[0] >= 8) == (remark in str(plan))
