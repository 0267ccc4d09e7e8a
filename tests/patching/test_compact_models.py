"""Compact models once they are made: checkpoints, cards, what looks inside them, and the packed layers."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, ViTConfig, ViTModel

from hf_neural_attention import (
    CompactScorer,
    NeuralGPT2Config,
    NeuralGPT2LMHeadModel,
    NeuralViTConfig,
    NeuralViTForImageClassification,
    NeuralViTModel,
    compact,
    export_to_hub,
    from_pretrained,
    neural_attention,
    patch_status,
)
from hf_neural_attention.analysis import (
    attention_maps,
    draw_surface,
    queries_and_keys,
    score_statistics,
    score_surface,
    scorer_health,
)
from hf_neural_attention.models.neural_attention_packing import PackedScorer
from hf_neural_attention.patching import PatchError
from hf_neural_attention.patching.sizes import size_of, stock_twin
from tests.helpers.compacted_models import WITH_CLASSES, every_setting, folded_families, neural
from tests.helpers.comparing import assert_far, assert_near, run
from tests.helpers.stock_models import FAMILIES, Family


GPT2, VIT, BERT, T5 = (FAMILIES[name] for name in ("gpt2", "vit", "bert", "t5"))
GUIDE = (Path(__file__).parents[2] / "docs/compact-form.md").read_text()
BRACKETS = str.maketrans("()", "[]")


# --- compacts models that have run


@folded_families
def test_attentions_are_recorded_as_before(family: Family):
    model, inputs = neural(family, implementation="eager"), family.inputs()
    with torch.no_grad():
        before = model(**inputs, output_attentions=True)
        after = compact(model)(**inputs, output_attentions=True)
    for name in ("attentions", "encoder_attentions", "decoder_attentions"):
        for ours, theirs in zip(after.get(name) or (), before.get(name) or (), strict=True):
            assert_near(ours, theirs)
    assert any(after.get(name) for name in ("attentions", "encoder_attentions"))


# --- saves and loads checkpoints


@folded_families
@every_setting
def test_round_trip(family: Family, settings: dict, tmp_path: Path):
    model = compact(neural(family, [0, -1], **settings))
    expected, inputs = run(model, **family.inputs()), family.inputs()
    model.save_pretrained(tmp_path / "once")
    loaded = from_pretrained(tmp_path / "once")
    assert torch.equal(run(loaded, **inputs), expected) and patch_status(loaded) == patch_status(model)
    frozen = [name for name, parameter in loaded.named_parameters() if not parameter.requires_grad]
    networks = [layer for layer in patch_status(model) if layer.mode != "thin"]  # a dot product has no bias to freeze
    assert len(frozen) == len(networks) and all(name.endswith("linear3.bias") for name in frozen)
    loaded.save_pretrained(tmp_path / "twice")
    assert torch.equal(run(from_pretrained(tmp_path / "twice"), **inputs), expected)
    content = json.loads((tmp_path / "twice" / "config.json").read_text())
    stock = type(model).__name__
    if family.model_type in WITH_CLASSES:
        assert type(loaded).__name__ == f"Neural{stock}" and content["neural_compact"]
        assert content["neural_folded_from"] == stock
    else:
        assert type(loaded) is type(model) and content["neural_attention_patch"]["folded_from"] == stock


def test_auto_classes_load_it_without_the_word_patch(tmp_path):
    model = compact(neural(GPT2))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, NeuralGPT2LMHeadModel)
    assert torch.equal(run(loaded, **GPT2.inputs()), run(model, **GPT2.inputs()))


@pytest.mark.parametrize("settings", ({}, {"per_head": True}, {"init": "paper"}), ids=("shared", "per head", "paper"))
@pytest.mark.parametrize("family", (BERT, T5), ids=("bert", "t5"))
def test_a_config_makes_new_weights(family: Family, settings: dict, tmp_path):
    """Of each layer, with scores that spread, and others for another seed."""
    compact(neural(family, **settings)).save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    spreads = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        model = getattr(transformers, f"AutoModelFor{family.head}").from_config(AutoConfig.from_pretrained(tmp_path)).eval()
        assert patch_status(model) == patch_status(loaded)
        spreads.append([layer.spread for layer in score_statistics(model, **family.inputs()) if layer.scorer == "replace"])
    assert len(spreads[0]) == len(patch_status(model)) and spreads[0] == spreads[2] != spreads[1]
    assert "init" in settings or all(0.2 < spread < 3 for spread in spreads[0]), spreads[0]


@pytest.mark.parametrize("family", (GPT2, BERT), ids=("gpt2", "bert"))
def test_loading_folds(family: Family, tmp_path):
    model = neural(family)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, neural_compact=True)
    assert all(layer.compact for layer in patch_status(loaded))
    assert_near(run(loaded, **family.inputs()), run(model, **family.inputs()))


def test_damaged_checkpoints(tmp_path):
    compact(neural(BERT, [0])).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    layers = content["neural_attention_patch"]["layers"]
    (name,) = layers
    for change, match in (
        ({name: layers[name] | {"query_layer": "nowhere"}}, "make no compact layer.*nowhere"),
        ({name: layers[name] | {"hidden_dims": [0, 2]}}, "make no compact layer.*hidden_dims"),
        ({"elsewhere": layers[name]}, "no such module"),
        (layers | {"bert.encoder.layer.1.attention.self": layers[name]}, "lacks weights of its neural layers"),
    ):
        path.write_text(
            json.dumps(content | {"neural_attention_patch": content["neural_attention_patch"] | {"layers": change}})
        )
        with pytest.raises((PatchError, RuntimeError), match=f"{match}|size mismatch|ignore_mismatched_sizes"):
            from_pretrained(tmp_path)


@pytest.mark.parametrize("family", (GPT2, VIT), ids=WITH_CLASSES)
def test_the_card(family: Family, tmp_path):
    model = compact(neural(family))
    export_to_hub(model, tmp_path, remote_code=False)
    card = (tmp_path / "README.md").read_text()
    stock, here = size_of(family.model()), size_of(model)
    assert f"folded from `{type(model).__name__}`" in card
    assert f"| stock `{type(model).__name__}` | {stock.num_parameters:,} | {stock.num_bytes:,} |" in card
    assert f"| this model | {here.num_parameters:,} | {here.num_bytes:,} |" in card
    assert here.num_parameters < stock.num_parameters and size_of(stock_twin(model)) == stock
    loaded = from_pretrained(tmp_path)
    assert torch.equal(run(loaded, **family.inputs()), run(model, **family.inputs()))
    assert size_of(stock_twin(loaded)) == stock and size_of(loaded) == here


# --- looks inside


@pytest.mark.parametrize("family", (GPT2, BERT), ids=("gpt2", "bert"))
@pytest.mark.parametrize("settings", ({}, {"per_head": True}), ids=("shared", "per head"))
def test_analysis(family: Family, settings: dict):
    whole = neural(family, **settings)
    inputs, made = family.inputs(), compact(copy.deepcopy(whole))
    for actual, expected in zip(attention_maps(made, **inputs), attention_maps(whole, **inputs), strict=True):
        assert_near(actual, expected, 1e-4)
    for actual, expected in zip(scorer_health(made, **inputs), scorer_health(whole, **inputs), strict=True):
        assert actual[:3] == expected[:3] and actual[3:] == pytest.approx(expected[3:], rel=1e-4)
    seen, projected = (queries_and_keys(model, **inputs)[family.layers[0]] for model in (whole, made))
    scorer: Any = whole.get_submodule(family.layers[0]).scorer
    assert_near(projected.query, scorer.project_queries(seen.query).detach(), 1e-4)
    assert_near(projected.key, scorer.project_keys(seen.key).detach(), 1e-4)
    made_scorer = made.get_submodule(family.layers[0]).scorer
    centre = {"query": projected.query[0, 0, 0], "key": projected.key[0, 0, 0]}
    surface = score_surface(made_scorer, **centre, steps=3)
    whole_surface = score_surface(scorer, query=seen.query[0, 0, 0], key=seen.key[0, 0, 0], steps=3)
    assert surface.dot_product is None and surface.network.std() > 0
    assert surface.network[1, 1].item() == pytest.approx(whole_surface.network[1, 1].item(), rel=1e-4, abs=1e-5)


ADAPTERS = {
    "LoRA": lambda peft: peft.LoraConfig(r=2),
    "DoRA": lambda peft: peft.LoraConfig(r=2, use_dora=True),
    "IA3": lambda peft: peft.IA3Config(),
    "AdaLoRA": lambda peft: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10),
    "OFT": lambda peft: peft.OFTConfig(oft_block_size=4, target_modules="all-linear"),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to", "ignore:Invalid `oft_block_size`")
@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("family", (GPT2, BERT, T5), ids=("gpt2", "bert", "t5"))
def test_adapters_where_peft_puts_them_by_default(family: Family, method: str, tmp_path):
    """`hidden_dims` that fill no whole number of heads, so that there are rows that are not read."""
    import peft

    if family is GPT2 and method == "OFT":
        pytest.skip("peft has no OFT for Conv1D, of which GPT-2 is made, stock too")
    model, inputs = compact(neural(family, hidden_dims=(3, 2))), family.inputs()
    inputs["labels"] = inputs.get("decoder_input_ids", inputs["input_ids"])
    before = run(model, **inputs)
    adapted = peft.get_peft_model(copy.deepcopy(model), ADAPTERS[method](peft))
    assert_near(run(adapted.eval(), **inputs), before)
    optimizer = torch.optim.Adam((each for each in adapted.parameters() if each.requires_grad), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        adapted.train()(**inputs).loss.backward()
        optimizer.step()
    trained = run(adapted.eval(), **inputs)
    assert trained.isfinite().all()
    assert_far(trained, before)
    changed = {
        name.split(".lora_")[0].split(".ia3_")[0].split(".oft_")[0]
        for name, each in adapted.named_parameters()
        if each.grad is not None
    }
    inside = family.layers[0]
    narrow = {"gpt2": "c_attn", "bert": "key" if method == "IA3" else "query", "t5": "k" if method == "IA3" else "q"}
    assert f"base_model.model.{inside}.{narrow[family.model_type]}" in changed
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model, tmp_path)
    assert_near(run(again.eval(), **inputs), trained)
    assert_near(run(adapted.merge_and_unload(), **inputs), trained, 1e-4)


def test_pictures_of_a_surface_without_a_dot_product():
    pytest.importorskip("matplotlib").use("agg")
    (ax,) = draw_surface(score_surface(CompactScorer((4, 2))))
    assert ax.get_title() == "network"


# --- packs layers


@pytest.mark.parametrize("sizes", [(4, 8, 4, 4), (3, 8, 4, 2), (16, 8, 4, 4), (1, 64, 12, 12)])
def test_packing_and_unpacking(sizes: tuple[int, int, int, int]):
    first, size, num_heads, num_key_heads = sizes
    scorer = PackedScorer(
        (first, 2),
        num_query_heads=num_heads,
        num_key_heads=num_key_heads,
        stock_head_dim=size,
        query_layer="q",
        key_layer="k",
    )
    u, w = torch.randn(2, num_heads, 5, first), torch.randn(2, num_key_heads, 7, first)

    def packed(states: torch.Tensor) -> torch.Tensor:
        flat = states.transpose(1, 2).flatten(2)
        flat = nn.functional.pad(flat, (0, -flat.shape[-1] % size))
        return flat.unflatten(2, (-1, size)).transpose(1, 2)

    assert all(map(torch.equal, scorer.unpack(packed(u), packed(w)), (u, w)))
    value = torch.randn(2, num_key_heads, 7, 6)
    assert torch.equal(scorer(packed(u), packed(w), value)[0], neural_attention(u, w, value, scorer))
    with pytest.raises(ValueError, match="a compact layer hands on"):
        scorer.unpack(torch.randn(2, num_heads, 5, first + 1), packed(w))


@pytest.mark.parametrize("row", re.findall(r"^\| (?:GPT-2 124M|ViT-B/16) .*\|$", GUIDE, re.MULTILINE))
def test_the_counts_of_the_documents(row: str):
    """Of models on the meta device, which hold no numbers."""
    name, hidden_dims, *counts = [cell.strip() for cell in row.strip("|").split("|")]
    fields = {
        "neural_compact": True,
        "neural_layers": "all",
        "neural_hidden_dims": json.loads(hidden_dims.translate(BRACKETS)),
    }
    with torch.device("meta"):
        if name.startswith("GPT-2"):
            model: Any = NeuralGPT2LMHeadModel(NeuralGPT2Config(**fields))
        else:
            model = NeuralViTForImageClassification(NeuralViTConfig(**fields, num_labels=1000))
    cells = [size.cells for size in (size_of(stock_twin(model)), size_of(model))]
    shown = [f"{cell:,}" if isinstance(cell, int) else cell for index in (0, 2) for cell in (cells[0][index], cells[1][index])]
    assert counts == shown


@pytest.mark.parametrize("pools", (True, False))
def test_the_stock_model_of_a_card_has_the_same_parts(pools: bool):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    with torch.device("meta"):
        stock = ViTModel(ViTConfig(**sizes), add_pooling_layer=pools)
        model = NeuralViTModel(NeuralViTConfig(**sizes, neural_compact=True), add_pooling_layer=pools)
    assert size_of(stock_twin(model)) == size_of(stock)
