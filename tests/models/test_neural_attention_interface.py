"""Attaching scorers, the attention function, and what runs under which attention implementation."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_neural_attention import NeuralScorer, neural_attention
from hf_neural_attention.models import neural_attention_interface as interface
from hf_neural_attention.models.neural_attention_interface import (
    ATTENTION_NAME,
    UNSUPPORTED_ARGUMENTS,
    NeuralConfigView,
    attach_scorer,
    detach_scorer,
    neural_attention_forward,
    normalize_mask,
)
from tests.helpers.comparing import assert_far, assert_near, run, use
from tests.helpers.neural_models import GPT2, VIT, Family, all_variants, both_families, one_and_all_layers, scorers


REFUSED = {
    "flash_attention_2": "kernel computes dot products",
    "flash_attention_3": "kernel computes dot products",
    "flex_attention": "kernel computes dot products",
    ATTENTION_NAME: "what single layers run",
}
refused = pytest.mark.parametrize(("name", "reason"), REFUSED.items(), ids=REFUSED.keys())


def attention_of(model, layer: int = 0):
    base = model.base_model
    return base.h[layer].attn if hasattr(base, "h") else base.layers[layer].attention


@both_families
@all_variants
def test_eager_and_sdpa_agree(family: Family, fields: dict):
    sdpa = family.neural(**fields)
    assert sdpa.config._attn_implementation == "sdpa"
    eager = use(sdpa, "eager")
    assert eager.config._attn_implementation == "eager"
    inputs = family.inputs(labels=False)
    expected = run(sdpa, **inputs)
    assert_near(run(eager, **inputs), expected)
    back = use(eager, "sdpa")
    assert torch.equal(run(back, **inputs), expected)


@both_families
@one_and_all_layers
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-2), (torch.float16, 8e-3)], ids=("bf16", "fp16"))
def test_eager_and_sdpa_agree_in_low_precision(family: Family, fields: dict, dtype: torch.dtype, tolerance: float):
    # allows for a handful of roundings of 2^-8 and 2^-11, as three layers of attention, projections and feed-forward make
    model = family.neural(**fields)
    inputs = family.inputs(labels=False)
    expected = run(model, **inputs)
    model = model.to(dtype)
    sdpa, eager = run(model, **inputs), run(use(model, "eager"), **inputs)
    assert sdpa.dtype == eager.dtype == dtype
    assert_near(sdpa.float(), expected, tolerance)
    assert_near(eager.float(), expected, tolerance)


@both_families
@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
def test_implementation_chosen_while_loading(family: Family, implementation: str, tmp_path):
    model = family.neural()
    model.save_pretrained(tmp_path)
    loaded = family.neural_class().from_pretrained(tmp_path, attn_implementation=implementation)
    assert loaded.config._attn_implementation == implementation
    inputs = family.inputs(labels=False)
    assert torch.equal(run(loaded, **inputs), run(use(model, implementation), **inputs))


@both_families
@refused
def test_other_implementations_are_refused_at_load(family: Family, name: str, reason: str, tmp_path):
    family.neural().save_pretrained(tmp_path)
    for make in (
        lambda: family.neural_class().from_pretrained(tmp_path, attn_implementation=name),
        lambda: family.neural_class()._from_config(family.config(), attn_implementation=name),
        lambda: family.neural_class()(family.config(attn_implementation=name)),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            make()
        assert repr(name) in str(error.value) and "'eager', 'sdpa'" in str(error.value)
        assert f"Neural{family.stem}" in str(error.value)


@both_families
def test_unknown_names_get_the_message_of_stock_models(family: Family):
    for model in (family.neural(), family.stock()):
        with pytest.raises(ValueError, match='Specified `attn_implementation="foo"` is not supported'):
            model.set_attn_implementation("foo")
        assert model.config._attn_implementation == "sdpa"
        with pytest.raises(ValueError, match='Specified `attn_implementation="foo"` is not supported'):
            type(model)._from_config(model.config, attn_implementation="foo")


@both_families
@refused
@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
def test_other_implementations_are_refused_later_and_nothing_changes(
    family: Family, name: str, reason: str, implementation: str
):
    model = use(family.neural(), implementation)
    inputs = family.inputs(labels=False)
    expected = run(model, **inputs)
    for change in (name, {"": name}):
        with pytest.raises(ValueError, match=reason):
            model.set_attn_implementation(change)
        assert model.config._attn_implementation == implementation
        assert torch.equal(run(model, **inputs), expected)


def test_a_module_that_cannot_be_neural_stays_what_it_is():
    module = torch.nn.Linear(2, 2)
    for _ in range(2):
        with pytest.raises(AttributeError, match="config"):
            attach_scorer(module, NeuralScorer(8))
    assert not hasattr(module, "scorer")


@both_families
def test_the_whole_model_cannot_run_our_function_without_scorers(family: Family):
    # expects an error, since a stock model accepts any registered name and would look for scorers that are not there
    stock = family.stock()
    stock.set_attn_implementation(ATTENTION_NAME)
    with pytest.raises(ValueError, match="what single layers run"):
        stock(**family.inputs())


@both_families
@one_and_all_layers
def test_attention_maps_of_all_layers_under_eager(family: Family, fields: dict):
    model = use(family.neural(**fields), "eager")
    inputs = family.inputs(labels=False)
    attentions = model(**inputs, output_attentions=True).attentions
    length = 12 if family is GPT2 else 17
    assert len(attentions) == 3 and all(weights.shape == (2, 4, length, length) for weights in attentions)
    for weights in attentions:
        assert (weights.sum(dim=-1) - 1).abs().max() < 1e-5 and weights.min() >= 0
        if family is GPT2:
            assert weights.triu(1).abs().max() == 0
    # checks that these weights were used: the maps of a stock twin differ where the layer is neural
    stock = family.stock(attn_implementation="eager")
    kept = stock.state_dict()
    same = {name: tensor for name, tensor in model.state_dict().items() if name in kept and tensor.shape == kept[name].shape}
    stock.load_state_dict(same, strict=False)
    assert_far(attentions[0], stock(**inputs, output_attentions=True).attentions[0])


@both_families
def test_attention_maps_are_the_weights_that_were_used(family: Family):
    model = use(family.neural(neural_layers="all"), "eager")
    attention, seen = attention_of(model), {}
    attention.scorer.register_forward_hook(lambda module, args, output: seen.update(value=args[2], output=output[0]))
    weights = model(**family.inputs(labels=False), output_attentions=True).attentions[0]
    assert_near(weights @ seen["value"], seen["output"])


@both_families
def test_attention_maps_elsewhere_are_as_in_the_stock_model(family: Family, caplog: pytest.LogCaptureFixture):
    stock, model = family.stock(), family.neural(neural_layers="all")
    inputs = family.inputs(labels=False)
    # expects no maps under sdpa, a warning where the stock model has one, and an error when the config asks for them
    assert stock(**inputs, output_attentions=True).attentions == ()
    interface.logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        assert model(**inputs, output_attentions=True).attentions == ()
    assert ('`output_attentions=True` needs "eager"' in caplog.text) == (family is VIT)
    for each in (stock, model):
        with pytest.raises(ValueError, match="`output_attentions`"):
            each.config.output_attentions = True
    assert "attentions" not in use(model, "eager")(**inputs)


@both_families
@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
def test_hidden_states(family: Family, implementation: str):
    stock = family.stock(attn_implementation=implementation)
    inputs = family.inputs(labels=False)
    expected = stock(**inputs, output_hidden_states=True).hidden_states
    residual = family.twin(stock, neural_layers="all", neural_mode="residual")(
        **inputs, output_hidden_states=True
    ).hidden_states
    assert len(residual) == len(expected) == 4
    for actual, wanted in zip(residual, expected, strict=True):
        assert_near(actual, wanted)
    neural = family.twin(stock, neural_layers=[1])(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(neural[1], expected[1])
    assert_far(neural[2], expected[2])


@both_families
def test_attach_and_detach(family: Family):
    model = family.stock()
    inputs = family.inputs(labels=False)
    expected, names = run(model, **inputs), list(model.state_dict())
    attention = attention_of(model)
    config, scorer = attention.config, NeuralScorer(attention.head_dim)
    attach_scorer(attention, scorer)
    assert attention.scorer is scorer and attention.config.base is config is model.config
    assert_far(run(model, **inputs), expected)
    with pytest.raises(ValueError, match=f"{family.stem}Attention has a scorer already; detach it first"):
        attach_scorer(attention, NeuralScorer(attention.head_dim))
    assert attention.scorer is scorer
    assert detach_scorer(attention) is scorer
    assert attention.config is config and list(model.state_dict()) == names
    assert torch.equal(run(model, **inputs), expected)
    with pytest.raises(ValueError, match=f"{family.stem}Attention has no scorer"):
        detach_scorer(attention)


@both_families
def test_attaching_equals_our_classes_and_survives_earlier_output_capture(family: Family):
    model = family.stock(attn_implementation="eager")
    inputs = family.inputs(labels=False)
    # calls once before attaching, since the first call that asks for attention maps installs the hooks that record them
    model(**inputs, output_attentions=True)
    neural = use(family.twin(model, neural_layers="all"), "eager")
    for layer in range(3):
        attach_scorer(attention_of(model, layer), copy.deepcopy(attention_of(neural, layer).scorer))
    ours, theirs = (each(**inputs, output_attentions=True) for each in (model, neural))
    assert torch.equal(ours.logits, theirs.logits) and len(ours.attentions) == 3
    assert all(torch.equal(a, b) for a, b in zip(ours.attentions, theirs.attentions, strict=True))


@both_families
def test_a_second_stock_model_is_untouched(family: Family):
    inputs = family.inputs(labels=False)
    stock = family.stock()
    expected = run(stock, **inputs)
    stock_function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    neural = family.neural(neural_layers="all")
    neural(**inputs)
    neural.set_attn_implementation("eager")
    neural(**inputs)
    assert torch.equal(run(stock, **inputs), expected) and stock.config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is stock_function and not scorers(stock)
    assert AttentionInterface._global_mapping[ATTENTION_NAME] is neural_attention_forward


def test_config_view_is_the_config_but_for_one_name():
    config = GPT2.config()
    view = NeuralConfigView(config)
    assert view._attn_implementation == ATTENTION_NAME and config._attn_implementation != ATTENTION_NAME
    assert view.n_embd == 32 and view.to_dict() == config.to_dict()
    view.initializer_range = 0.5
    assert config.initializer_range == 0.5
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = view.no_such_field
    both = copy.deepcopy({"config": config, "view": view})
    assert both["view"].base is both["config"] is not config


# Lists implementation, queries, keys, causal module -> causal, keys that count
NO_MASK = [
    ("sdpa", 7, 7, True, (True, 7)),  # training and prefill
    ("sdpa", 1, 8, True, (False, 8)),  # decoding one token
    ("sdpa", 7, 12, True, (True, 7)),  # prefill of a static cache
    ("sdpa", 7, 7, False, (False, 7)),  # images
    ("sdpa", 3, 5, False, (False, 5)),
    ("eager", 7, 7, True, (False, 7)),
    ("eager", 1, 8, True, (False, 8)),
]


@pytest.mark.parametrize(("implementation", "queries", "keys", "is_causal", "expected"), NO_MASK)
def test_what_no_mask_means(implementation: str, queries: int, keys: int, is_causal: bool, expected: tuple):
    assert normalize_mask(implementation, None, queries, keys, is_causal) == (None, *expected)


def test_masks_are_cut_and_their_lowest_number_becomes_infinite():
    lowest = torch.finfo(torch.float32).min
    mask, causal, keys = normalize_mask("eager", torch.tensor([[[[0.0, -3.0, lowest, -torch.inf, 0.0]]]]), 1, 4, True)
    assert mask.tolist() == [[[[0.0, -3.0, -torch.inf, -torch.inf]]]] and not causal and keys == 4
    bools = torch.rand(2, 1, 3, 6) > 0.5
    mask, causal, keys = normalize_mask("sdpa", bools, 3, 6, True)
    assert torch.equal(mask, bools) and not causal and keys == 6
    with pytest.raises(ValueError, match=re.escape("mask of shape (2, 6); expected 4 dimensions")):
        normalize_mask("sdpa", torch.ones(2, 6), 3, 6, True)
    with pytest.raises(ValueError, match=re.escape("mask of dtype torch.int64; expected bool (True attends) or float")):
        normalize_mask("sdpa", torch.ones(2, 1, 3, 6, dtype=torch.int64), 3, 6, True)


@pytest.mark.parametrize("argument", UNSUPPORTED_ARGUMENTS)
def test_arguments_that_only_a_dot_product_honours_are_refused(argument: str):
    attention = attention_of(VIT.neural())
    tensors = torch.randn(3, 1, 4, 5, 8)
    with pytest.raises(ValueError, match=f"cannot honour .*`{argument}`"):
        neural_attention_forward(attention, *tensors, None, **{argument: torch.ones(4)})
    # passes None, by which models say that they do without
    assert neural_attention_forward(attention, *tensors, None, **{argument: None})[0].shape == (1, 5, 4, 8)


@pytest.mark.parametrize(
    ("causal_module", "argument", "causal"), [(True, None, True), (False, None, False), (True, False, False)]
)
def test_attention_function_computes_the_operation(causal_module: bool, argument: bool | None, causal: bool):
    scorer = NeuralScorer(8, proj_dim=4)
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    config = NeuralConfigView(SimpleNamespace(_attn_implementation="sdpa"))
    module = SimpleNamespace(config=config, is_causal=causal_module, scorer=scorer)
    output, weights = neural_attention_forward(module, query, key, value, None, is_causal=argument)
    expected = neural_attention(query, key, value, scorer, is_causal=causal)
    assert torch.equal(output, expected.transpose(1, 2)) and output.is_contiguous() and weights is None
    assert_far(expected, neural_attention(query, key, value, scorer, is_causal=not causal))


@pytest.mark.parametrize("kind", ("none", "bool", "float"))
@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
@pytest.mark.parametrize("mode", ("replace", "residual"))
def test_position_biases_are_added_to_the_scores(kind: str, implementation: str, mode: str):
    scorer = NeuralScorer(8, proj_dim=4, mode=mode)
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    key, value = (torch.cat((tensor, torch.randn(2, 4, 2, 8)), dim=2) for tensor in (key, value))  # a cache of fixed size
    bias, causal = torch.randn(1, 4, 5, 7, requires_grad=True), torch.ones(5, 7, dtype=torch.bool).tril()
    floats = torch.zeros(1, 1, 5, 7).masked_fill(~causal, torch.finfo(torch.float32).min)
    mask = {"none": None, "bool": causal[None, None], "float": floats}[kind]
    module = SimpleNamespace(config=NeuralConfigView(SimpleNamespace(_attn_implementation=implementation)), scorer=scorer)
    output, _ = neural_attention_forward(module, query, key, value, mask, position_bias=bias)
    sees_all = kind == "none" and implementation == "eager"
    expected = neural_attention(query, key, value, scorer, bias if sees_all else bias.masked_fill(~causal, -torch.inf))
    assert_near(output.transpose(1, 2), expected)
    assert_far(output, neural_attention_forward(module, query, key, value, mask)[0])
    gradients = [torch.autograd.grad(each.square().sum(), bias)[0] for each in (output, expected)]
    assert_near(*gradients)


def test_scores_that_gpt2_upcasts_are_upcast_with_a_network_too():
    model = GPT2.neural(neural_layers="all", neural_mode="residual", reorder_and_upcast_attn=True)
    model = use(model.to(torch.bfloat16), "eager")
    dtypes = []
    scorer = scorers(model)[0]
    scorer.register_forward_hook(lambda module, args, output: dtypes.extend([args[0].dtype, args[1].dtype, args[2].dtype]))
    logits = model(**GPT2.inputs(labels=False)).logits
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16] and logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    dtypes.clear()
    use(model, "sdpa")(**GPT2.inputs(labels=False))
    assert dtypes == [torch.bfloat16] * 3
