"""What scores of attention layers are like, and how they are started."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    OlmoConfig,
    ViTConfig,
    ViTForImageClassification,
)

from hf_neural_attention import NeuralViTConfig, NeuralViTForImageClassification, analysis, patch, start_scores
from hf_neural_attention.models.neural_attention_initialization import mirrored_weights, relu_sum_spread
from hf_neural_attention.models.neural_attention_reference import first_layer_of_key, first_layer_of_query
from hf_neural_attention.patching.layers import tokens_of_queries
from tests.helpers.comparing import assert_same_state
from tests.helpers.neural_models import GPT2
from tests.helpers.stock_models import FAMILIES


SIZES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))}


def stock_vit() -> Any:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES)).eval()


# Has enough units for spreads of small models on a few images to be near what is expected of them
SHAPE: dict[str, Any] = {"neural_proj_dim": 8, "neural_hidden_dims": "paper"}


def neural_vit(**fields: Any) -> Any:
    torch.manual_seed(0)
    return NeuralViTForImageClassification(NeuralViTConfig(**{**SIZES, **fields}, neural_layers="all")).eval()


def spreads(model: Any, inputs: dict[str, Any]) -> list[float]:
    return [layer.spread for layer in analysis.score_statistics(model, **inputs)]


def test_statistics_are_those_of_the_scores():
    torch.manual_seed(0)
    model = GPT2.stock()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4)
    inputs = GPT2.inputs(labels=False)
    found = analysis.score_statistics(model, **inputs)
    maps = analysis.attention_maps(model, **inputs)
    for layer, weights in zip(found, maps, strict=True):
        rows = weights[:, :, 1:]  # the first query sees one key: no choice
        assert math.isclose(layer.entropy, torch.special.entr(rows).sum(-1).mean(), rel_tol=1e-4)
        assert math.isclose(layer.saturated, (rows.amax(-1) > 0.99).float().mean(), abs_tol=1e-6)
        seen = torch.arange(weights.shape[-1]) <= torch.arange(weights.shape[-1])[:, None]
        # takes scores back from the weights, up to what the softmax leaves out of each row
        logs = [weights[:, :, row, seen[row]].log() for row in range(1, len(seen))]
        squares = sum((each - each.mean(-1, keepdim=True)).square().sum() for each in logs)
        freedom = sum(each[..., 1:].numel() for each in logs)
        assert math.isclose(layer.spread, (squares / freedom).sqrt(), rel_tol=1e-3)
    assert {layer.scorer for layer in found} == {"dot product"} and "saturated" in str(found)


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_looking_at_scores_changes_nothing(implementation: str):
    model, inputs = FAMILIES["t5"].model(implementation), FAMILIES["t5"].inputs()
    before = model(**inputs).logits
    layers = analysis.score_statistics(model, **inputs)
    assert len(layers) == 9 and torch.equal(model(**inputs).logits, before)
    # takes in position biases, which are no scores, but shape attention
    assert all(0 < layer.entropy < layer.uniform_entropy for layer in layers)


def test_observed_layers_hand_on_what_they_would_otherwise():
    """Later layers' figures are of the model as it is."""
    model, inputs = FAMILIES["llama"].model(), FAMILIES["llama"].inputs(padded=False)
    maps = analysis.attention_maps(model, **inputs)
    for layer, weights in zip(analysis.score_statistics(model, **inputs), maps, strict=True):
        assert math.isclose(layer.entropy, torch.special.entr(weights[:, :, 1:]).sum(-1).mean(), rel_tol=1e-4)


@pytest.mark.parametrize("spread", (0.25, 1.0, 4.0))
@pytest.mark.parametrize(
    "fields",
    (None, {}, {"neural_mode": "residual"}, {"neural_mode": "thin"}, {"neural_compact": True}, {"neural_init": "paper"}),
)
def test_scores_start_with_the_spread_that_is_asked_for(fields: dict[str, Any] | None, spread: float):
    fields = fields and {**SHAPE, **fields}
    model = stock_vit() if fields is None else neural_vit(**fields)
    report = start_scores(model, images(), spread)
    assert spreads(model, images()) == pytest.approx([spread] * 2, rel=0.01)
    assert [layer.after for layer in report] == pytest.approx([spread] * 2, rel=0.01) and report.measured
    assert all(layer.before < 0.9 and layer.factor != 1.0 for layer in report) and "in closed form" not in str(report)
    wanted = "scorer.linear3" if fields and fields.get("neural_init") else "q_proj, k_proj"
    assert {layer.changed for layer in report} == {wanted}
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "linear3.bias" not in name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", (None, "replace", "thin"))
def test_every_family_can_be_started(family: str, mode: str | None):
    model, inputs = FAMILIES[family].model(), FAMILIES[family].inputs()
    if mode is not None:
        patch(model, "all", mode=mode, proj_dim=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = start_scores(model, inputs, 1.5)
    assert spreads(model, inputs) == pytest.approx([1.5] * len(report), rel=0.01) and len(report) >= 3
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(any(name.startswith(layer.layer) for layer in report) for name in changed)


def test_fused_projections_keep_their_values():
    model = GPT2.stock()
    old = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    start_scores(model, GPT2.inputs(labels=False), 2.0)
    new, size = model.transformer.h[0].attn.c_attn.weight, old.shape[0]
    assert torch.equal(new[:, 2 * size :], old[:, 2 * size :]) and not torch.equal(new[:, : 2 * size], old[:, : 2 * size])
    assert torch.allclose(new[:, :size] / old[:, :size], new[:, size : 2 * size] / old[:, size : 2 * size], rtol=1e-3)


@pytest.mark.parametrize("fields", (None, {}, {"neural_mode": "thin"}, {"neural_compact": True}))
def test_closed_form_is_what_independent_normal_tokens_have(fields: dict[str, Any] | None):
    """Hidden states that a norm hands on, of which each is drawn by itself."""
    model = stock_vit() if fields is None else neural_vit(**SHAPE, **fields)
    report = start_scores(model)
    assert not report.measured and [layer.after for layer in report] == pytest.approx([1.0, 1.0])
    generator = torch.Generator().manual_seed(3)
    norms = [layer.layernorm_before for layer in model.vit.layers]
    for norm in norms:
        norm.register_forward_hook(lambda norm, args, output: torch.randn(output.shape, generator=generator))
    assert spreads(model, images()) == pytest.approx([1.0, 1.0], rel=0.06)


@pytest.mark.parametrize("sizes", ((16, 4, 4, 2), (16, 2, 2, 1), (8, 8, 3, 5)))
def test_spread_within_rows_of_a_network(sizes: tuple[int, int, int, int]):
    torch.manual_seed(1)
    weights = mirrored_weights(*sizes)
    (of_query, _), (of_key, _) = first_layer_of_query(weights), first_layer_of_key(weights)
    u, w = torch.randn(2000, sizes[0]) @ of_query.T, torch.randn(2000, sizes[0]) @ of_key.T
    coefficients = (weights.weight3 @ weights.weight2).squeeze(0)
    scores = (u[:, None] + w).relu() @ coefficients
    expected = relu_sum_spread(coefficients, of_query @ of_query.T, of_key @ of_key.T)
    assert math.isclose(expected, scores.var(-1).mean().sqrt(), rel_tol=0.05)
    assert expected < scores.std()


def test_uniform_attention_stays_uniform():
    model, inputs = stock_vit(), images()
    report = start_scores(model, inputs, 0.0)
    assert [layer.after for layer in report] == [0.0, 0.0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(**inputs, labels=torch.zeros(6, dtype=torch.long)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = analysis.score_statistics(model, **inputs)
    assert all(layer.spread == 0.0 and math.isclose(layer.entropy, layer.uniform_entropy, rel_tol=1e-5) for layer in layers)
    with pytest.raises(ValueError, match="would not stay zero"):
        start_scores(neural_vit(), inputs, 0.0)


@pytest.mark.parametrize("spread", (0.0, 1.5))
def test_some_layers_alone(spread: float):
    model, inputs = stock_vit(), images()
    before = copy.deepcopy(model)
    report = start_scores(model, inputs, spread, layers=[-1])
    assert [layer.layer for layer in report] == ["vit.layers.1.attention"] and len(spreads(model, inputs)) == 2
    assert spreads(model, inputs)[1] == pytest.approx(spread, rel=0.01)
    assert_same_state(model.vit.layers[0], before.vit.layers[0])
    start_scores(model, inputs, 2.0, layers=["vit.layers.0.attention"])
    assert spreads(model, inputs)[0] == pytest.approx(2.0, rel=0.01)
    refused(model, r"`layers` is \[2\], but 2 is no layer", inputs, layers=[2])
    refused(model, "`layers` is empty", inputs, layers=[])


def refused(model: Any, match: str, *arguments: Any, **more: Any) -> None:
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=match):
        start_scores(model, *arguments, **more)
    assert_same_state(model, before)


def test_trained_models_are_refused_unless_it_is_allowed():
    model = stock_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**images(), labels=torch.zeros(6, dtype=torch.long)).loss.backward()
    optimizer.step()
    refused(model, "seems to be trained: the gains of 'vit.layers.0.layernorm_before' differ", images())
    start_scores(model, images(), allow_trained=True)
    assert spreads(model, images()) == pytest.approx([1.0, 1.0], rel=0.01)


def test_signs_of_training():
    """Also where gains stay equal, as rounding may keep them, and where no norm has any."""
    model = stock_vit()
    model.vit.layers[1].layernorm_after.bias.data[0] = 1e-3
    refused(model, "seems to be trained: the biases of 'vit.layers.1.layernorm_after' differ", images())
    olmo, inputs = tiny_causal(OlmoConfig), text()
    olmo.config._name_or_path = olmo.name_or_path = "some/olmo"
    refused(olmo, "seems to be trained: it was loaded from 'some/olmo', and no norm of it has gains", inputs)
    start_scores(tiny_causal(OlmoConfig), inputs)


def text() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 99, (4, 16), generator=torch.Generator().manual_seed(1))}


def tiny_causal(config_class: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(config_class(**sizes, vocab_size=99, pad_token_id=0, **fields)).eval()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_models_with_rotary_embeddings_start_in_half_precision(dtype: torch.dtype):
    model = tiny_causal(LlamaConfig, num_key_value_heads=2).to(dtype)
    start_scores(model, text())
    assert spreads(model, text()) == pytest.approx([1.0] * 3, rel=0.02)


def test_queries_that_are_clipped_in_place():
    model = tiny_causal(OlmoConfig, clip_qkv=1e3)
    start_scores(model, text())
    assert spreads(model, text()) == pytest.approx([1.0] * 3, rel=0.01)
    refused(tiny_causal(OlmoConfig, clip_qkv=1e-3), "do not grow as the weights that make them", text())


def test_modules_that_attend_several_times_in_one_forward_are_refused():
    """As those of images that come in chunks, of which the first alone would be looked at."""
    model = stock_vit()
    attention = model.vit.layers[1].attention
    once = attention.forward
    attention.forward = lambda *given, **more: [once(*given, **more) for _ in range(2)][1]
    with pytest.raises(ValueError, match=r"'vit\.layers\.1\.attention': it calls its attention function several times"):
        start_scores(model, images())


class InTwoParts(nn.Module):
    """Projects some tokens, then the others, as merged self- and cross-attention does."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.linear(part) for part in (states[:, :3], states[:, 3:])], 1)


@pytest.mark.parametrize("shared", (False, True))
def test_layers_that_are_called_several_times_are_made_larger_once(shared: bool):
    model = stock_vit()
    for layer in model.vit.layers:
        attention = layer.attention
        attention.k_proj = attention.q_proj if shared else InTwoParts(attention.k_proj)
    for inputs in (images(), None) if shared else (images(),):  # slices of what a norm hands on have no closed form
        report = start_scores(model, inputs, 1.5)
        assert [layer.changed for layer in report] == ["q_proj" if shared else "q_proj, k_proj.linear"] * 2
        assert inputs is None or spreads(model, inputs) == pytest.approx([1.5] * 2, rel=0.01)


def test_models_set_to_kernels_with_masks_of_their_own_are_looked_at():
    model, expected = stock_vit(), spreads(stock_vit(), images())
    model.set_attn_implementation("flex_attention")
    assert spreads(model, images()) == pytest.approx(expected, rel=1e-4)
    start_scores(model, images())
    assert model.config._attn_implementation == "flex_attention"
    assert spreads(model, images()) == pytest.approx([1.0, 1.0], rel=0.01)


def test_models_without_sdpa_are_looked_at_under_eager():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 40}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    inputs = {"input_ids": torch.arange(3, 12)[None]}
    model.set_attn_implementation("eager")
    expected = spreads(model, inputs)
    model.set_attn_implementation("flex_attention")
    assert spreads(model, inputs) == pytest.approx(expected, rel=1e-4)
    assert model.config._attn_implementation == "flex_attention"


def test_padded_queries_of_text_that_looks_at_images_do_not_count():
    mask, cross = torch.tensor([[1, 1, 0]]), nn.Module()

    def tokens(is_encoder_decoder: bool, num_queries: int = 3, **inputs: Any) -> torch.Tensor | None:
        model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=is_encoder_decoder))
        call: Any = SimpleNamespace(query=torch.zeros(1, 1, num_queries, 2), key=torch.zeros(1, 1, 5, 2))
        return tokens_of_queries(model, "text.layers.0.crossattention", cross, inputs, call)

    everything = torch.ones(1, 1)
    assert tokens(False, attention_mask=mask) is mask
    assert torch.equal(tokens(False, 4, attention_mask=mask), everything)
    assert torch.equal(tokens(False), everything)
    # is what the encoder gets, unless the decoder stands alone
    assert torch.equal(tokens(True, attention_mask=mask), everything)
    assert tokens(True, attention_mask=1 - mask, decoder_attention_mask=mask) is mask
    assert tokens(True, attention_mask=mask, encoder_hidden_states=everything) is mask


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_few_rows_at_a_time(implementation: str, monkeypatch: pytest.MonkeyPatch):
    """So that no layer that is looked at holds all its scores."""
    model, inputs = FAMILIES["llama"].model(implementation), FAMILIES["llama"].inputs()
    expected = analysis.score_statistics(model, **inputs)
    monkeypatch.setattr("hf_neural_attention.attending.NUMBERS_AT_ONCE", 100)
    for layer, whole in zip(analysis.score_statistics(model, **inputs), expected, strict=True):
        assert layer[2:] == pytest.approx(whole[2:], rel=1e-4)


def test_what_cannot_be_started_is_said_and_nothing_changes():
    refused(stock_vit(), "`spread` is -1", spread=-1)
    refused(stock_vit(), "`spread` is nan", spread=math.nan)
    one_token = {"input_ids": torch.full((2, 1), 5)}
    refused(tiny_causal(LlamaConfig), "no query of these inputs may see two keys or more: give longer", one_token)
    refused(neural_vit(neural_init="paper"), 'only scorers that start "mirrored" have a closed form; give `inputs`')
    dead = neural_vit()
    dead.vit.layers[1].attention.scorer.linear2.bias.data.fill_(-1e4)
    refused(dead, "'vit.layers.1.attention': its scores have a spread of 0.0.*may be dead", images())
    used = neural_vit(neural_mode="residual")
    used.vit.layers[0].attention.scorer.linear3.weight.data.fill_(1.0)
    refused(used, "is not new", images())
    refused(nn.Sequential(nn.Linear(2, 2)), "cannot be reached")
    tokens = torch.randint(3, 90, (2, 6))
    filled = tiny_causal(LlamaConfig)
    cache = filled(tokens).past_key_values
    refused(filled, "A cache among the `inputs` holds keys already", {"input_ids": tokens, "past_key_values": cache})
    shared = tiny_causal(LlamaConfig)
    attention = shared.model.layers[1].self_attn
    attention.v_proj.weight = attention.k_proj.weight
    refused(
        shared, r"'model\.layers\.1\.self_attn': 'model\.layers\.1\.self_attn\.v_proj' has weights of its queries and keys too"
    )
    with torch.inference_mode():
        refused(stock_vit(), r"outside of `torch\.inference_mode\(\)`")
    capped = tiny_causal(Gemma2Config, attn_logit_softcapping=2.0)
    refused(capped, r"its dot products are capped at 2\.0; give `inputs`")


def test_thin_scorers_with_biases_are_scaled_themselves():
    """Since their scores do not grow as queries and keys do."""
    model = neural_vit(neural_mode="thin")
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".scorer." not in name}
    with torch.no_grad():
        for layer in model.vit.layers:
            layer.attention.scorer.q_proj.bias.normal_()
    start_scores(model, images())
    assert spreads(model, images()) == pytest.approx([1.0, 1.0], rel=0.01)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())


def test_models_that_cannot_be_run_are_refused():
    with pytest.raises(ValueError, match="has weights without numbers"):
        start_scores(stock_vit().to("meta"))
    model = stock_vit()
    model.set_attn_implementation("eager")
    attention = model.vit.layers[1].attention
    attention.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
    start_scores(model, images())  # leaves out what is not reached
    model.vit.layers[0].attention.forward = attention.forward
    refused(model, "These inputs reach none of the attention layers", images())


def test_embeddings_without_a_norm_need_inputs():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99, n_positions=16, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config)
    model.transformer.h[0].ln_1 = nn.Identity()
    inputs = {"input_ids": torch.randint(3, 99, (4, 16))}
    refused(model, "its input is not what a norm hands on; give `inputs`")
    start_scores(model, inputs)
    assert spreads(model, inputs) == pytest.approx([1.0], rel=0.01)
