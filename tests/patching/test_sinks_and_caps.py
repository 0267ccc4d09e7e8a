"""Patched models whose stock attention has sinks or soft-caps its scores."""

import pytest
import torch

from hf_neural_attention import calibrate, patch, unpatch
from hf_neural_attention.analysis import attention_maps, dot_product_maps, score_statistics
from tests.helpers.comparing import assert_far
from tests.helpers.stock_models import GROUPED, Family


SELF_ATTENTION = ("model.layers.*.self_attn",)
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 4096}
CAPPED = {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.7}
WINDOW = {**GROUPED, "head_dim": 8, "sliding_window": 4}
# have no "sdpa"
GPT_OSS = Family("gpt_oss", "CausalLM", {**WINDOW, **EXPERTS}, SELF_ATTENTION)
GEMMA2 = Family("gemma2", "CausalLM", {**WINDOW, **CAPPED}, SELF_ATTENTION)
both = pytest.mark.parametrize("family", (GPT_OSS, GEMMA2), ids=("sinks", "soft cap"))
INPUTS = {
    "input_ids": torch.arange(3, 21).view(2, 9),
    "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9]),
}


def lively(family: Family):
    """With sinks that take some of the weight, and scores that a cap bends."""
    model = family.model("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(-1.0, 2.0, len(parameter)))
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**INPUTS).logits[INPUTS["attention_mask"].bool()]


@both
def test_residual_starts_as_the_stock_model(family: Family):
    model = lively(family)
    stock, tokens = logits(model), model.generate(**INPUTS, max_new_tokens=4, do_sample=False)
    patch(model, "all", mode="residual")
    assert torch.equal(logits(model), stock)
    assert torch.equal(model.generate(**INPUTS, max_new_tokens=4, do_sample=False), tokens)
    assert_far(logits(patch(unpatch(model), "all", mode="replace")), stock)
    assert torch.equal(logits(unpatch(model)), stock)


@both
def test_dot_product_maps_are_those_of_the_stock_model(family: Family):
    model = lively(family)
    stock = attention_maps(model, **INPUTS)
    for expected, found in zip(stock, dot_product_maps(patch(model, "all"), **INPUTS).values(), strict=True):
        rows = INPUTS["attention_mask"].bool()[:, None, :, None]
        assert torch.allclose(found.where(rows, 0.0), expected.where(rows, 0.0), atol=1e-6)


@pytest.mark.parametrize("mode", ("replace", "thin"))
def test_sinks_count_and_learn(mode: str):
    model = patch(lively(GPT_OSS), "all", mode=mode)
    before = logits(model)
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    attention = model.model.layers[1].self_attn
    assert attention.sinks.grad.abs().min() > 0 and attention.scorer.q_proj.weight.grad.abs().max() > 0
    with torch.no_grad():
        attention.sinks += 1.0
    assert_far(logits(model), before)


def test_a_cap_is_of_the_dot_product_alone():
    model = patch(lively(GEMMA2), "all", mode="replace")
    before = logits(model)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.01
    assert torch.equal(logits(model), before)
    patch(unpatch(model), "all", mode="residual")
    capped = logits(model)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert_far(logits(model), capped)


@both
def test_calibration_and_statistics(family: Family):
    model = lively(family)
    stock = score_statistics(model, **INPUTS)
    patch(model, "all", mode="residual")
    for ours, theirs in zip(score_statistics(model, **INPUTS), stock, strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], rel=1e-4)
    patch(unpatch(model), "all", mode="replace", hidden_dims=(16, 4), per_head=True)
    report = calibrate(model, [INPUTS] * 4, steps=60, progress=False)
    assert all(layer.kl_after < 0.7 * layer.kl_before for layer in report)


def test_scores_beside_sinks_of_each_query_are_not_looked_at():
    """As Inkling 2 has them, in the place of a logit per head."""
    model: torch.nn.Module = lively(GPT_OSS)
    score_statistics(model, **INPUTS)
    for module in model.modules():
        if hasattr(module, "sinks"):
            module.sinks = torch.nn.Parameter(module.sinks.detach().view(1, -1, 1, 1).expand(2, -1, 9, 1).clone())
    with pytest.raises(ValueError, match=r"sinks of shape \(2, 4, 9, 1\) are not a logit per head"):
        score_statistics(model, **INPUTS)
