"""What `patch` and its companions report, change and leave alone."""

import json
import re

import pytest
import torch
from transformers import GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_neural_attention import NeuralScorer, explain, patch, patch_status, patched, unpatch
from hf_neural_attention.models.neural_attention_interface import attach_scorer
from hf_neural_attention.patching import PatchError
from hf_neural_attention.patching.sizes import size_of
from tests.helpers.comparing import assert_far, assert_near, run
from tests.helpers.neural_models import scorers
from tests.helpers.stock_models import FAMILIES


GPT2, T5, LLAMA = FAMILIES["gpt2"], FAMILIES["t5"], FAMILIES["llama"]
SETTINGS = {"proj_dim": 4, "hidden_dims": [6, 3], "mode": "replace", "per_head": True, "init": "paper"}


def test_dry_run_says_what_patch_then_does():
    model = GPT2.model()
    random = torch.get_rng_state()
    plan = patch(model, [0, 2], dry_run=True, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), random) and not scorers(model) and not patch_status(model)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    patch(model, [0, 2], **SETTINGS)
    assert patch_status(model) == plan.layers and explain(model) == plan.backends
    added = sum(parameter.numel() for scorer in scorers(model) for parameter in scorer.parameters())
    assert (plan.layers.num_parameters, plan.layers.num_bytes, plan.model_parameters) == (added, 4 * added, numbers)
    assert plan.stock == size_of(GPT2.model()) and plan.patched == size_of(model) and plan.stock.cache_bytes_per_token == 768
    text = str(plan)
    assert repr(plan) == text and f"2 attention layers would become neural, with {added:,} new parameters" in text
    assert re.search(r"transformer.h.2.attn +8 +4 +\(6, 3\) +replace +True +paper", text) and "backend" in text


def test_status_is_plain_data():
    model = GPT2.model()
    assert not patch_status(model) and str(patch_status(model)) == "no neural layer"
    patch(model, "all", **SETTINGS)
    status = patch_status(model)
    first, *_ = json.loads(json.dumps([layer._asdict() for layer in status]))
    assert first == {
        "layer": "transformer.h.0.attn",
        "head_dim": 8,
        **SETTINGS,
        "compact": False,
        "num_parameters": 604,
        "num_bytes": 2416,
    }
    assert str(status).splitlines()[-1].split() == ["total", "1,812", "7,248"]


def test_settings_reach_the_scorers():
    scorer = scorers(patch(LLAMA.model(), **SETTINGS))[0]
    assert (scorer.proj_dim, scorer.hidden_dims, scorer.mode, scorer.num_heads, scorer.init) == (
        4,
        (6, 3),
        "replace",
        4,
        "paper",
    )
    trainable = {name for name, parameter in scorer.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in scorer.named_parameters()} - {"linear3.bias"}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("training", (False, True))
def test_scorers_are_as_their_layer(dtype: torch.dtype, training: bool):
    model = patch(GPT2.model().to(dtype).train(training))
    (scorer,) = scorers(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(module.training == training for module in scorer.modules())


def test_frozen_models_stay_frozen():
    model = GPT2.model().requires_grad_(False)
    patch(model)
    assert {name.split(".scorer.")[-1] for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name for name, parameter in NeuralScorer(8).named_parameters() if parameter.requires_grad
    }


def test_patched_restores_after_an_exception():
    model, inputs = GPT2.model(), GPT2.inputs()
    expected = run(model, **inputs)

    def fail() -> None:
        with patched(model, "all", mode="replace") as same:
            assert same is model
            assert_far(run(model, **inputs), expected)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert not patch_status(model) and torch.equal(run(model, **inputs), expected)
    with patched(model):
        unpatch(model)
    with pytest.raises(PatchError), patched(model, [7]):
        pytest.fail("the block ran")
    assert torch.equal(run(model, **inputs), expected)


def test_no_other_model_notices():
    model, inputs = GPT2.model(), GPT2.inputs()
    twin = GPT2LMHeadModel(model.config).eval()  # shares the config object
    assert twin.config is model.config
    twin.load_state_dict(model.state_dict())
    expected, functions = run(twin, **inputs), dict(ALL_ATTENTION_FUNCTIONS)
    patch(model, "all", mode="replace")
    assert_far(run(model, **inputs), expected)
    assert torch.equal(run(twin, **inputs), expected) and not patch_status(twin)
    assert torch.equal(run(GPT2.model(), **inputs), expected)
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions and model.config._attn_implementation == "sdpa"
    with patched(twin, [1]):
        assert len(patch_status(model)) == 3
    assert torch.equal(run(twin, **inputs), expected)


def test_unpatching_what_was_attached_by_hand():
    model, inputs = GPT2.model(), GPT2.inputs()
    expected = run(model, **inputs)
    attach_scorer(model.transformer.h[0].attn, NeuralScorer(8))
    assert [layer.mode for layer in patch_status(model)] == ["replace"]
    assert torch.equal(run(unpatch(model), **inputs), expected)


def test_position_biases_count_in_both_modes():
    model, inputs = T5.model(), T5.inputs()
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    for mode in ("residual", "replace"):
        with patched(model, "all", mode=mode):
            expected = run(model, **inputs)
            with torch.no_grad():
                bias.weight.mul_(-3)
                assert_far(run(model, **inputs), expected)
                bias.weight.div_(-3)
            model(**inputs).logits.square().mean().backward()
            assert bias.weight.grad.abs().max() > 0
            model.zero_grad()
            assert_near(run(model, **inputs), expected)
