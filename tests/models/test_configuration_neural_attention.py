"""Config fields of neural layers: defaults, round trips, and errors that say what is wrong and what is allowed."""

import json
import re
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from hf_neural_attention import NeuralGPT2Config, NeuralViTConfig
from tests.helpers.neural_models import GPT2, VIT, Family, both_families, scorers


DEFAULTS = {
    "neural_layers": [0],
    "neural_format_version": 1,
    "neural_proj_dim": None,
    "neural_hidden_dims": "auto",
    "neural_mode": "replace",
    "neural_per_head": False,
    "neural_compact": False,
    "neural_folded_from": None,
    "neural_init": "mirrored",
}
CHANGED = {
    "neural_layers": [0, -1],
    "neural_proj_dim": 6,
    "neural_hidden_dims": [5, 3],
    "neural_mode": "residual",
    "neural_per_head": True,
    "neural_init": "paper",
}
# Lists field, value, what the message says of it
INVALID = [
    *(
        ("neural_layers", value, '"all" or a list of distinct indices from -3 to 2')
        for value in ([3], [-4], [0, 0], [0, -3], [1, -2, 2], (0, 0))
    ),
    *(
        (
            "neural_layers",
            value,
            "doesn't match any type in (list[int], tuple[int, ...], typing.Literal['all'], <class 'NoneType'>)",
        )
        for value in ("ALL", "first", "", 0, 1.0, [0.0], ["0"], [True], {0: 1}, {0}, True)
    ),
    *(("neural_proj_dim", value, "None or an integer of at least 1") for value in (0, -1)),
    *(
        ("neural_proj_dim", value, "doesn't match any type in (<class 'int'>, <class 'NoneType'>)")
        for value in (2.0, "2", True, [2])
    ),
    *(
        ("neural_hidden_dims", value, '"auto", "paper" or a list of two integers of at least 1')
        for value in ([2], [2, 1, 1], [], [0, 1], [2, -1])
    ),
    *(
        (
            "neural_hidden_dims",
            value,
            "doesn't match any type in (list[int], tuple[int, ...], typing.Literal['auto', 'paper'], <",
        )
        for value in ([2.0, 1], [2, True], ["2", 1], 2, "21", "Paper", {2: 1})
    ),
    *(
        ("neural_mode", value, "one of ('replace', 'residual', 'thin')")
        for value in ("Replace", "add", "", None, 1, True, ["replace"])
    ),
    *(("neural_per_head", value, "expected bool") for value in (1, 0, None, "True", [True])),
    *(("neural_init", value, "one of ('mirrored', 'paper')") for value in ("Paper", "normal", "", None, 0, ["paper"])),
    *(("neural_format_version", value, "this code reads formats up to 1") for value in (0, 2)),
    *(("neural_format_version", value, "expected int") for value in ("1", 1.0, None, True)),
]
invalid_values = pytest.mark.parametrize(("field", "value", "allowed"), INVALID)


def everything(field: str, value: object, allowed: str) -> str:
    """Pattern of a message that names the field and what is allowed."""
    return f"(?s){field}.*{re.escape(allowed)}"


@both_families
def test_defaults_are_those_of_the_paper(family: Family):
    config = type(family.config())()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.neural_layer_indices == [0]
    stock = type(family.stock_config())().to_dict()
    ours = {name: value for name, value in config.to_dict().items() if name not in DEFAULTS}
    assert ours == {**stock, "model_type": f"neural_{stock['model_type']}"}


@both_families
def test_two_configs_do_not_share_the_default_list(family: Family):
    first, second = family.config(), family.config()
    first.neural_layers.append(1)
    assert second.neural_layers == [0]


@both_families
def test_round_trips_through_json_and_files(family: Family, tmp_path):
    config = family.config(**CHANGED)
    assert {name: getattr(config, name) for name in CHANGED} == CHANGED
    config.save_pretrained(tmp_path)
    from_file = type(config).from_pretrained(tmp_path)
    from_json = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
    for again in (from_file, from_json):
        # leaves out the version, which only `save_pretrained` writes
        ours, theirs = ({**each.to_dict(), "transformers_version": None} for each in (config, again))
        assert ours == theirs
        assert again.model_type == f"neural_{family.stem.lower()}"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"neural_{family.stem.lower()}"


@both_families
@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", [0, 1, 2]), ([-1], [2]), ([2, 0], [0, 2]), ([-3, 2], [0, 2]), ((1,), [1]), ([], [])],
    ids=repr,
)
def test_layers_are_resolved(family: Family, layers, expected):
    config = family.config(neural_layers=layers)
    assert config.neural_layer_indices == expected
    model = family.neural(neural_layers=layers)
    neural = [name.split(".")[2] for name, module in model.named_modules() if name.endswith(f"{family.attention_name}.scorer")]
    assert neural == [str(index) for index in expected]


@both_families
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    ("shape", "sizes"), [("auto", (16, 2)), ("paper", (16, 8)), (None, (16, 8)), ([16, 4], (16, 4))], ids=str
)
def test_shapes_outlast_a_file(family: Family, shape: Any, sizes: tuple[int, int], compact: bool, tmp_path):
    fields = {} if shape == "auto" else {"neural_hidden_dims": shape}
    family.neural(neural_proj_dim=16, neural_compact=compact, **fields).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["neural_hidden_dims"] == shape
    model = type(family.neural()).from_pretrained(tmp_path)
    assert model.config.neural_hidden_dims == shape and scorers(model)[0].hidden_dims == sizes


@both_families
def test_the_other_fields_reach_the_scorer(family: Family):
    (scorer, other) = scorers(type(family.neural())(family.config(**CHANGED)))
    assert (scorer.proj_dim, scorer.hidden_dims, scorer.mode, scorer.num_heads, scorer.init) == (
        6,
        (5, 3),
        "residual",
        4,
        "paper",
    )
    assert other.linear1.weight.shape == (4, 5, 12)
    (default,) = scorers(family.neural())
    # expects the smallest size, since head_dim is 8, and the paper's 1/32 of it is less
    assert (default.proj_dim, default.hidden_dims, default.mode, default.num_heads) == (2, (2, 1), "replace", None)
    assert default.init == "mirrored"


@both_families
@invalid_values
def test_invalid_values_are_refused_at_construction(family: Family, field: str, value, allowed: str):
    with pytest.raises(StrictDataclassError, match=everything(field, value, allowed)):
        family.config(**{field: value})


@both_families
def test_none_means_the_default_layers(family: Family):
    assert family.config(neural_layers=None).neural_layers == [0]


@pytest.mark.parametrize("family", (GPT2,))
@invalid_values
def test_invalid_values_set_later_are_refused_at_once_or_by_the_model(family: Family, field: str, value, allowed: str):
    config = family.config()
    before = getattr(config, field)
    if "distinct indices" in allowed:  # expects the error later, since the number of layers may still change
        setattr(config, field, value)
        with pytest.raises(ValueError, match=everything(field, value, allowed)):
            family.neural_class()(config)
    else:
        with pytest.raises(StrictDataclassError, match=everything(field, value, allowed)):
            setattr(config, field, value)
        assert getattr(config, field) == before


@both_families
def test_the_config_of_a_stock_model_is_refused(family: Family):
    stock = family.stock().config
    with pytest.raises(TypeError, match=f"got a {type(stock).__name__}, .*expected a Neural{type(stock).__name__}"):
        family.neural_class()(stock)


def test_invalid_values_set_later_are_refused_by_vit():
    config = VIT.config()
    config.neural_layers = [3]
    with pytest.raises(ValueError, match=re.escape("`neural_layers` is [3], of which 3 is no layer")):
        VIT.neural_class()(config)


@both_families
def test_invalid_values_in_a_file_are_refused(family: Family, tmp_path):
    family.config(neural_layers=[2]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"neural_mode": "replace"', '"neural_mode": "multiply"'))
    with pytest.raises(
        StrictDataclassError, match=r"'neural_mode' expected one of \('replace', 'residual', 'thin'\), got multiply"
    ):
        type(family.config()).from_pretrained(tmp_path)


@both_families
def test_fields_can_be_overridden_while_loading(family: Family, tmp_path):
    family.stock().save_pretrained(tmp_path)
    model = family.neural_class().from_pretrained(tmp_path, neural_layers=[-1], neural_proj_dim=3)
    assert model.config.neural_layer_indices == [2] and scorers(model)[0].proj_dim == 3


@both_families
def test_a_stock_config_file_loads_and_becomes_ours(family: Family, tmp_path):
    stock = family.stock_config(initializer_range=0.125)
    stock.save_pretrained(tmp_path)
    config = type(family.config()).from_pretrained(tmp_path)
    assert config.initializer_range == 0.125 and config.neural_layers == [0]
    assert config.model_type == config.to_dict()["model_type"] == f"neural_{stock.model_type}"
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"neural_{stock.model_type}"


def test_gpt2_names_of_sizes_have_their_stock_aliases():
    config = NeuralGPT2Config(n_layer=5, n_head=2, n_embd=8, neural_layers=[-5, 4])
    assert config.num_hidden_layers == 5 and config.neural_layer_indices == [0, 4]
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="`neural_layers` is"):
        _ = config.neural_layer_indices


def test_dtype_and_labels_are_kept(tmp_path):
    config = NeuralViTConfig(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1}, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    again = NeuralViTConfig.from_pretrained(tmp_path)
    assert again.id2label == {0: "cat", 1: "dog"} and again.dtype == torch.bfloat16
