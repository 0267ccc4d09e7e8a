"""Every family: patched, unpatched, trained, generating; under both attention implementations."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hf_neural_attention import patch, patch_status, patched, unpatch
from tests.helpers.comparing import assert_far, assert_near, run
from tests.helpers.neural_models import eager_and_sdpa, liven
from tests.helpers.stock_models import FAMILIES, Family


NEW_TOKENS = 6

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
decoders = pytest.mark.parametrize(
    "family", [family for family in FAMILIES.values() if family.generates], ids=lambda family: family.model_type
)
cross_attending = pytest.mark.parametrize("family", [FAMILIES["t5"], FAMILIES["bart"]], ids=("t5", "bart"))
both_modes = pytest.mark.parametrize("mode", ("residual", "replace"))


def inner_state(model: nn.Module) -> list[tuple[str, dict[str, Any], list[str]]]:
    """Of every module its attributes, by identity, and the names of its children and parameters."""
    return [
        (name, {key: id(value) for key, value in vars(module).items()}, [*module._modules, *module._parameters])
        for name, module in model.named_modules()
    ]


def is_cross_attention(name: str, module: nn.Module) -> bool:
    return name.endswith(("EncDecAttention", "encoder_attn"))


def assert_equal_at_birth(actual: torch.Tensor, expected: torch.Tensor, implementation: str) -> None:
    if implementation == "eager":
        assert torch.equal(actual, expected)
    else:
        assert_near(actual, expected)


@every_family
@eager_and_sdpa
def test_patch_and_unpatch(family: Family, implementation: str):
    model, inputs = family.model(implementation), family.inputs()
    before, state, expected = inner_state(model), copy.deepcopy(model.state_dict()), run(model, **inputs)

    assert patch(model, "all") is model
    assert [layer.layer for layer in patch_status(model)] == family.layers
    assert_equal_at_birth(family.seen(run(model, **inputs)), family.seen(expected), implementation)
    assert unpatch(model) is model
    assert inner_state(model) == before and torch.equal(run(model, **inputs), expected)

    patch(model, mode="replace")
    assert [layer.layer for layer in patch_status(model)] == family.layers[::3]
    assert_far(family.seen(run(model, **inputs)), family.seen(expected))
    unpatch(model)
    assert inner_state(model) == before and torch.equal(run(model, **inputs), expected)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@every_family
@both_modes
def test_eager_and_sdpa_agree(family: Family, mode: str):
    model, inputs = liven(patch(family.model(), "all", mode=mode, proj_dim=4)), family.inputs()
    expected = run(model, **inputs)
    model.set_attn_implementation("eager")
    assert_near(family.seen(run(model, **inputs)), family.seen(expected), 2e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.model_type != "t5"], ids=str)
def test_bfloat16_is_equal_to_the_bit_under_eager(family: Family):
    # leaves out T5, whose position biases stock attention rounds into the scores
    model = family.model("eager").to(torch.bfloat16)
    inputs = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in family.inputs().items()}
    expected = run(model, **inputs)
    assert torch.equal(family.seen(run(patch(model, "all"), **inputs)), family.seen(expected))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@every_family
@eager_and_sdpa
def test_first_training_step(family: Family, implementation: str):
    model, inputs = patch(family.model(implementation), "all").train(), family.inputs()
    labels = {
        "labels": torch.tensor([0, 1]) if "pixel_values" in inputs else inputs.get("decoder_input_ids", inputs["input_ids"])
    }
    scorers = {name: parameter for name, parameter in model.named_parameters() if ".scorer." in name}
    before = run(model.eval(), **inputs)
    loss = model.train()(**inputs, **labels).loss
    loss.backward()
    for name, parameter in scorers.items():
        # expects the last layer alone to move: it is zero at birth and passes no gradient on, and its bias changes nothing
        moves = name.endswith("linear3.weight")
        assert moves == bool(parameter.grad is not None and parameter.grad.abs().max() > 0), name
    torch.optim.SGD(scorers.values(), lr=1.0).step()
    assert not torch.equal(run(model.eval(), **inputs), before)
    assert model(**inputs, **labels).loss != loss


def generate(model: Any, inputs: dict[str, torch.Tensor], **arguments) -> torch.Tensor:
    """New tokens, of which there are always as many, all different."""
    inputs = {name: tensor for name, tensor in inputs.items() if name != "decoder_input_ids"}
    arguments = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": [0],
        **arguments,
    }
    return model.generate(**inputs, **arguments)[:, -NEW_TOKENS:]


@decoders
@eager_and_sdpa
@both_modes
def test_generating(family: Family, implementation: str, mode: str):
    stock, inputs = family.model(implementation), family.inputs()
    expected_of_stock = generate(stock, inputs)
    model = patch(stock, "all", mode=mode, proj_dim=4)
    if mode == "residual":
        assert torch.equal(generate(model, inputs), expected_of_stock)
    expected = generate(liven(model), inputs, use_cache=False)
    assert not torch.equal(expected, expected_of_stock)
    assert torch.equal(generate(model, inputs), expected)
    assert torch.equal(generate(model, inputs, cache_implementation="static"), expected)
    alone = {"input_ids": inputs["input_ids"][1:, 3:], "attention_mask": inputs["attention_mask"][1:, 3:]}
    if family.model_type != "bart":  # leaves out BART, whose encoder counts positions from the padding
        assert torch.equal(generate(model, alone), expected[1:])
    beams = generate(model, inputs, num_beams=2, use_cache=False)
    assert torch.equal(generate(model, inputs, num_beams=2), beams)


# Leaves out those that Transformers is about to drop, and marks as slow the one whose first use compiles C++ of quanto
QUANTIZED = pytest.param("quantized", marks=pytest.mark.slow)


@pytest.mark.parametrize("cache", ("dynamic", "static", QUANTIZED))
@pytest.mark.parametrize("name", ("gpt2", "mistral"))
def test_every_cache(name: str, cache: str):
    if cache == "quantized" and name == "mistral":
        pytest.skip("stock models with sliding windows refuse it")
    family = FAMILIES[name]
    stock, inputs = family.model(), family.inputs()
    arguments: dict[str, Any] = {"cache_implementation": cache}
    if cache == "quantized":
        arguments["cache_config"] = {"backend": "quanto", "q_group_size": 16}
    expected = generate(stock, inputs, **arguments)
    model = patch(stock, "all")
    # expects the same tokens with the same cache, since the model is the stock one to rounding
    assert torch.equal(generate(model, inputs, **arguments), expected)
    if cache != "quantized":  # leaves out the one that rounds
        tokens = generate(liven(model), inputs, use_cache=False)
        assert torch.equal(generate(model, inputs, **arguments), tokens) and not torch.equal(tokens, expected)


@cross_attending
@eager_and_sdpa
@pytest.mark.parametrize("padded", (False, True), ids=("no mask", "mask"))
def test_cross_attention(family: Family, implementation: str, padded: bool):
    model, inputs = family.model(implementation), family.inputs(padded)
    if not padded:
        del inputs["attention_mask"]
    expected, tokens = run(model, **inputs), generate(model, inputs)
    with patched(model, is_cross_attention):
        assert len(patch_status(model)) == 3
        assert_equal_at_birth(run(model, **inputs), expected, implementation)
        assert torch.equal(generate(model, inputs), tokens)
        # checks that every query sees every key: the last token of the text matters to the first one that is decoded
        liven(model)
        longer = {**inputs, "input_ids": inputs["input_ids"].roll(1)}
        assert_far(run(model, **longer)[:, 0], run(model, **inputs)[:, 0])
    with patched(model, is_cross_attention, mode="replace"):
        assert_far(run(model, **inputs), expected)
        assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))
        assert torch.equal(generate(model, inputs, cache_implementation="static"), generate(model, inputs))
    assert torch.equal(run(model, **inputs), expected)
