"""Checkpoints: stock ones keep every weight, ours come back bit for bit, and names on disk are the published ones."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from hf_neural_attention import from_pretrained, start_scores
from hf_neural_attention.models.neural_attention_interface import neural_modules
from tests.helpers.comparing import assert_far, assert_near, assert_same_state, run, transformers_log
from tests.helpers.neural_models import (
    ALL,
    GPT2,
    VARIANTS,
    VIT,
    Family,
    all_variants,
    both_families,
    every_model,
    one_and_all_layers,
    one_and_all_whole_layers,
    scorers,
    whole_and_compact,
)


LOW_PRECISIONS = (torch.float32, torch.bfloat16)


def load(model_class, folder: Path, **arguments):
    """Model and loading info (which names the keys as the live model does)."""
    return model_class.from_pretrained(folder, output_loading_info=True, **arguments)


def names_on_disk(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def assert_only_scorers_missing(info: dict, model, besides: frozenset = frozenset()) -> None:
    assert set(info["unexpected_keys"]) == set(besides) and not info["mismatched_keys"] and not info["error_msgs"]
    assert set(info["missing_keys"]) == {name for name in model.state_dict() if ".scorer." in name}
    assert info["missing_keys"]


@every_model
@one_and_all_whole_layers
def test_a_stock_checkpoint_keeps_every_weight(family: Family, head: str, fields: dict, tmp_path):
    stock = family.stock(head)
    stock.save_pretrained(tmp_path)
    with transformers_log() as log:
        model, info = load(family.neural_class(head), tmp_path, **fields)
    assert_only_scorers_missing(info, model)
    assert any("scorer" in message and "MISSING" in message for message in log), "the loader must say what is new"
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stock.state_dict().items())
    inputs = family.inputs(labels=False)
    if head == "GPT2DoubleHeadsModel":
        inputs = {"input_ids": inputs["input_ids"][:, None]}
    assert_far(run(model.eval(), **inputs), run(stock, **inputs))


def save_as_of_old(stock, folder: Path) -> None:
    """As Transformers 4 did: torch's own format, the masks of attention among the weights, and `torch_dtype` in the config."""
    folder.mkdir()
    state, size = stock.state_dict(), stock.config.n_positions
    for layer in range(stock.config.n_layer):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, size, size, dtype=torch.uint8).tril()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, folder / "pytorch_model.bin")
    config = stock.config.to_dict() | {"torch_dtype": "float32", "transformers_version": "4.20.1", "n_ctx": size}
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))


@one_and_all_whole_layers
def test_an_old_checkpoint_keeps_every_weight(fields: dict, tmp_path: Path):
    saved, folder = GPT2.stock(), tmp_path / "old"
    save_as_of_old(saved, folder)
    stock, stock_info = load(transformers.GPT2LMHeadModel, folder)
    model, info = load(GPT2.neural_class(), folder, **fields)
    # allows for old buffers, which a stock model does not expect either, if it says so
    assert_only_scorers_missing(info, model, besides=frozenset(stock_info["unexpected_keys"]))
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in saved.state_dict().items())
    ids = torch.randint(stock.config.vocab_size, (1, 32))
    assert_far(run(model, input_ids=ids), run(stock, input_ids=ids))
    residual = GPT2.neural_class().from_pretrained(folder, neural_mode="residual", **fields)
    assert_near(run(residual, input_ids=ids), run(stock, input_ids=ids))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (GPT2, "transformer.h.0.attn.scorer.{}"),
        (VIT, "vit.encoder.layer.0.attention.scorer.{}"),
    ],
    ids=("GPT2", "ViT"),
)
def test_names_on_disk(family: Family, expected: str, tmp_path):
    stock, model = family.stock(), family.neural()
    stock.save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "neural")
    scorer_names = {
        expected.format(f"{layer}.{kind}")
        for layer in ("q_proj", "k_proj", "linear1", "linear2", "linear3")
        for kind in ("weight", "bias")
    }
    assert names_on_disk(tmp_path / "neural") == names_on_disk(tmp_path / "stock") | scorer_names
    assert not names_on_disk(tmp_path / "stock") & scorer_names
    assert sorted(path.name for path in (tmp_path / "neural").glob("*.safetensors")) == ["model.safetensors"]
    assert not list((tmp_path / "neural").glob("*.bin"))


@both_families
@all_variants
@pytest.mark.parametrize("dtype", LOW_PRECISIONS, ids=str)
def test_one_file_round_trip(family: Family, fields: dict, dtype: torch.dtype, tmp_path):
    model = family.neural(**fields).to(dtype)
    model.save_pretrained(tmp_path)
    again, info = load(family.neural_class(), tmp_path)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert again.dtype == dtype
    assert_same_state(again, model)
    inputs = family.inputs(labels=False)
    assert torch.equal(run(again, **inputs), run(model, **inputs))


@both_families
@one_and_all_layers
@pytest.mark.parametrize("dtype", LOW_PRECISIONS, ids=str)
def test_sharded_round_trip(family: Family, fields: dict, dtype: torch.dtype, tmp_path):
    model = family.neural(**fields).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3 and not list(tmp_path.glob("*.bin"))
    again, info = load(family.neural_class(), tmp_path)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_state(again, model)
    # saves shards again from a model that was loaded from shards
    again.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert_same_state(family.neural_class().from_pretrained(tmp_path / "again"), model)


@every_model
@pytest.mark.parametrize("is_compact", (False, True), ids=("whole", "compact"))
def test_every_class_round_trips_through_its_auto_class(family: Family, head: str, is_compact: bool, tmp_path):
    model = family.neural(head, neural_layers=[0, -1], neural_compact=is_compact)
    model.save_pretrained(tmp_path)
    auto = {
        "Model": transformers.AutoModel,
        "LMHeadModel": transformers.AutoModelForCausalLM,
        "DoubleHeadsModel": family.neural_class(head),  # names its class, since no Auto table has it
    }.get(head.removeprefix(family.stem)) or getattr(transformers, f"Auto{head.replace(family.stem, 'Model')}")
    again = auto.from_pretrained(tmp_path)
    assert type(again) is family.neural_class(head)
    assert_same_state(again, model)
    assert transformers.AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()


@both_families
@pytest.mark.parametrize(
    "arguments", ({"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}), ids=str
)
@one_and_all_layers
def test_loading_onto_devices(family: Family, arguments: dict, fields: dict, tmp_path):
    model = family.neural(**fields)
    model.save_pretrained(tmp_path)
    again = family.neural_class().from_pretrained(tmp_path, **arguments)
    assert_same_state(again, model)
    # loads a stock checkpoint too, whose scorers have to be born after the load
    family.stock().save_pretrained(tmp_path / "stock")
    born = family.neural_class().from_pretrained(tmp_path / "stock", **fields, **arguments)
    assert all(torch.isfinite(parameter).all() and not parameter.is_meta for parameter in born.parameters())
    assert all(scorer.linear3.weight.abs().max() > 0 for scorer in scorers(born))


@both_families
@one_and_all_layers
def test_from_the_meta_device(family: Family, fields: dict):
    with torch.device("meta"):
        model = family.neural_class()(family.config(**fields))
    assert all(parameter.is_meta for parameter in model.parameters())
    filled = family.neural(**fields)
    model.load_state_dict(filled.state_dict(), assign=True)
    model.tie_weights()
    assert_same_state(model, filled)
    inputs = family.inputs(labels=False)
    assert torch.equal(run(model.eval(), **inputs), run(filled, **inputs))


@both_families
@whole_and_compact
def test_only_the_last_bias_is_frozen_also_after_loading(family: Family, fields: dict, tmp_path):
    model = family.neural(**fields)
    model.save_pretrained(tmp_path / "neural")
    family.stock().save_pretrained(tmp_path / "stock")
    loaded = [
        family.neural_class().from_pretrained(tmp_path / kind, **fields, device_map=device_map)
        for kind in ("neural", "stock")
        for device_map in (None, "cpu")
    ]
    for each in (model, *loaded):
        frozen = {name for name, parameter in each.named_parameters() if not parameter.requires_grad}
        assert frozen == {name for name in each.state_dict() if name.endswith("scorer.linear3.bias")} and len(frozen) == 3


@both_families
@pytest.mark.parametrize("is_compact", (False, True))
def test_loaded_scorers_can_be_drawn_again(family: Family, is_compact: bool, tmp_path):
    """Transformers marks what it loads for ever, and its initialisation leaves that."""
    family.neural(neural_layers="all", neural_compact=is_compact, neural_hidden_dims=[4, 2]).save_pretrained(tmp_path)
    model = family.neural_class().from_pretrained(tmp_path)
    for module in neural_modules(model).values():
        before = {name: tensor.clone() for name, tensor in module.state_dict().items() if name.startswith("scorer.")}
        (module if is_compact else module.scorer).reset_parameters()
        after = module.state_dict()
        assert all(not torch.equal(after[name], old) for name, old in before.items() if name.endswith("weight"))
    report = start_scores(model, family.inputs(labels=False))
    assert all(0.3 < layer.before < 3.0 for layer in report), "what is drawn together fits each other"


@both_families
@whole_and_compact
def test_base_and_head_load_each_other(family: Family, fields: dict, tmp_path):
    base = family.neural(family.base, **fields)
    base.save_pretrained(tmp_path / "base")
    for head in family.heads:
        model, info = load(family.neural_class(head), tmp_path / "base")
        assert not info["unexpected_keys"] - {"pooler.dense.weight", "pooler.dense.bias"}
        assert not any("scorer" in key for key in info["missing_keys"])
        expected, state = base.state_dict(), model.base_model.state_dict()
        assert all(torch.equal(expected[name], tensor) for name, tensor in state.items() if name in expected)
        model.save_pretrained(tmp_path / head)
        again, info = load(family.neural_class(family.base), tmp_path / head)
        assert not any("scorer" in key for key in info["missing_keys"] | info["unexpected_keys"])
        # checks that only heads are unexpected in a base model, and only what a head does without is missing
        stock_base = family.stock_class(family.base)
        family.stock(head).save_pretrained(tmp_path / "stock")
        stock_info = load(stock_base, tmp_path / "stock")[1]
        assert info["missing_keys"] == stock_info["missing_keys"]
        assert info["unexpected_keys"] == stock_info["unexpected_keys"]
        again_state = again.state_dict()
        assert all(torch.equal(again_state[name], tensor) for name, tensor in state.items() if name in again_state)


@both_families
def test_a_neural_checkpoint_loads_where_the_fields_differ(family: Family, tmp_path):
    family.neural(neural_layers="all").save_pretrained(tmp_path)
    fewer, info = load(family.neural_class(), tmp_path, neural_layers=[1])
    assert not info["missing_keys"] and len(info["unexpected_keys"]) == 20 and len(scorers(fewer)) == 1
    with transformers_log() as log, pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        family.neural_class().from_pretrained(tmp_path, neural_proj_dim=5)
    assert any("scorer.q_proj.weight" in message and "MISMATCH" in message for message in log)


@both_families
@pytest.mark.parametrize("name", VARIANTS)
def test_pickle_and_deepcopy(family: Family, name: str, tmp_path):
    model = family.neural(**VARIANTS[name])
    inputs = family.inputs(labels=False)
    expected = run(model, **inputs)
    torch.save(model, tmp_path / "model.pt")
    for again in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert_same_state(again, model)
        assert torch.equal(run(again, **inputs), expected)
        # checks that the copy shares one config of its own, so that what is set on it reaches every layer
        assert again.config is not model.config and again.base_model.config is again.config
        attentions = [module for module in again.modules() if hasattr(module, "scorer")]
        assert all(attention.config.base is again.config for attention in attentions) and attentions
        again.set_attn_implementation("eager")
        assert model.config._attn_implementation == "sdpa"
        assert all(weights is not None for weights in again(**inputs, output_attentions=True).attentions)
        assert_near(run(again, **inputs), expected)


def test_saved_config_does_not_name_our_attention_function(tmp_path):
    model = GPT2.neural(neural_layers="all")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "neural_attention" not in json.dumps(saved)
    assert saved["architectures"] == ["NeuralGPT2LMHeadModel"]


def test_auto_tokenizer_and_image_processor_beside_a_neural_config(tmp_path):
    # writes folders as old checkpoints have them, where only the model's config says which class to use
    GPT2.config().save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (tmp_path / "text" / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "text")
    assert isinstance(tokenizer, transformers.GPT2Tokenizer) and tokenizer("aab").input_ids == [0, 2]
    VIT.config().save_pretrained(tmp_path / "images")
    (tmp_path / "images" / "preprocessor_config.json").write_text(json.dumps({"size": 16}))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "images")
    assert type(processor).__name__.startswith("ViTImageProcessor")


@pytest.mark.parametrize("kind", ("neural", "stock"))
def test_the_config_is_read_once(kind: str, tmp_path, monkeypatch):
    """Each time is a request to the Hub."""
    (GPT2.neural(**ALL) if kind == "neural" else GPT2.stock()).save_pretrained(tmp_path)
    read, original = [], transformers.PreTrainedConfig._get_config_dict.__func__
    monkeypatch.setattr(
        transformers.PreTrainedConfig,
        "_get_config_dict",
        classmethod(lambda cls, *args, **kwargs: read.append(args) or original(cls, *args, **kwargs)),
    )
    for fields in ({}, {"neural_layers": "all"}, {"neural_compact": True}):
        read.clear()
        model = GPT2.neural_class().from_pretrained(tmp_path, **fields)
        ours = len(read)
        read.clear()
        GPT2.stock_class().from_pretrained(tmp_path)
        assert ours == len(read) and "_neural_stored" not in model.config.to_dict()


@both_families
@pytest.mark.parametrize("stored", ("stock", "whole"))
def test_a_config_asks_for_the_compact_form_as_the_argument_does(family: Family, stored: str, tmp_path):
    fields = {"neural_layers": "all", "neural_hidden_dims": [4, 2]}
    (family.stock() if stored == "stock" else family.neural(**fields)).save_pretrained(tmp_path)
    model_class = family.neural_class()
    asked = {**fields, "neural_compact": True}
    configs = [family.config(**asked), model_class.config_class.from_pretrained(tmp_path, **asked)]
    ways = [lambda: model_class.from_pretrained(tmp_path, **asked)]
    ways += [lambda config=config: model_class.from_pretrained(tmp_path, config=config) for config in configs]
    configs[0].save_pretrained(tmp_path / "elsewhere")
    family.config(**fields).save_pretrained(tmp_path / "whole")
    for place, more in ((tmp_path / "elsewhere", {}), (str(tmp_path / "whole"), {"neural_compact": True})):
        ways.append(lambda place=place, more=more: model_class.from_pretrained(tmp_path, config=place, **more))
    if stored == "whole":
        auto_class = transformers.AutoModelForCausalLM if family is GPT2 else transformers.AutoModelForImageClassification
        ways.append(lambda: auto_class.from_pretrained(tmp_path, neural_compact=True))
    models = []
    for way in ways:
        torch.manual_seed(1)
        models.append(way())
    for model in models:
        assert_same_state(model, models[0])
        assert model.config.neural_compact and model.config.neural_folded_from == str(tmp_path)
    assert all(config.neural_compact and config.neural_folded_from is None for config in configs)


@both_families
def test_a_compact_checkpoint_cannot_be_loaded_whole(family: Family, tmp_path):
    model = family.neural(neural_layers="all", neural_compact=True)
    model.save_pretrained(tmp_path)
    model_class = family.neural_class()
    config = model_class.config_class.from_pretrained(tmp_path, neural_compact=False)
    for load in (
        lambda: model_class.from_pretrained(tmp_path, neural_compact=False),
        lambda: model_class.from_pretrained(tmp_path, config=config),
        lambda: from_pretrained(tmp_path, neural_compact=False),
    ):
        with pytest.raises(ValueError, match=f"{tmp_path} is compact, which cannot be undone, and `neural_compact` is False"):
            load()
    # trains a new whole model of the same sizes
    assert not model_class(config).config.neural_compact


def test_weights_without_a_config_are_taken_as_they_are(tmp_path):
    model = GPT2.neural(neural_layers="all", neural_compact=True)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert_same_state(GPT2.neural_class().from_pretrained(tmp_path, config=model.config), model)
