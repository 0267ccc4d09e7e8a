"""Attention maps, score surfaces, the health of scorers, and their pictures."""

import copy
import math
from typing import Any

import matplotlib
import pytest
import torch
from transformers import (
    DeiTConfig,
    GPT2Config,
    T5EncoderModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from hf_neural_attention import NeuralScorer, analysis, patch
from tests.helpers.comparing import assert_same_state
from tests.helpers.neural_models import GPT2, VIT, liven
from tests.helpers.stock_models import FAMILIES


matplotlib.use("Agg")


@torch.no_grad()
def kill(scorer: Any) -> None:
    scorer.linear2.bias.fill_(-1e4)


@pytest.mark.parametrize("mode", ("replace", "residual"))
@pytest.mark.parametrize("family", (GPT2, VIT), ids=("gpt2", "vit"))
def test_attention_maps(family: Any, mode: str):
    model, inputs = family.neural(neural_layers=[1], neural_mode=mode).train(), family.inputs(labels=False)
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)).eval()
    maps = analysis.attention_maps(torch.nn.parallel.DataParallel(model), **inputs)
    assert model.training and not frozen.training and model.config._attn_implementation == "sdpa" and len(maps) == 3
    tokens = 12 if family is GPT2 else 17
    for weights in maps:
        assert weights.shape == (2, 4, tokens, tokens)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4, tokens), atol=1e-5)
    if family is GPT2:
        assert all(not weights.triu(1).any() for weights in maps)


def test_parts_with_implementations_of_their_own_keep_them():
    model = GPT2.neural(neural_layers=[1])
    model.transformer.config = copy.deepcopy(model.config)
    model.transformer.config._attn_implementation_internal = "eager"
    analysis.attention_maps(model, **GPT2.inputs(labels=False))
    assert (model.config._attn_implementation, model.transformer.config._attn_implementation) == ("sdpa", "eager")


def test_parts_with_a_copy_of_the_config_have_maps():
    family = FAMILIES["t5"]
    model = T5EncoderModel(family.model().config)
    inputs = {name: family.inputs()[name] for name in ("input_ids", "attention_mask")}
    assert [layer.shape for layer in analysis.attention_maps(model, **inputs)] == [(2, 4, 9, 9)] * 3
    assert model.config._attn_implementation == model.encoder.config._attn_implementation == "sdpa"


def test_maps_of_a_model_that_returns_tuples():
    model, inputs = FAMILIES["llama"].model().model, FAMILIES["llama"].inputs()  # with its head it fails without our doing
    expected = analysis.attention_maps(model, **inputs)
    model.config.return_dict = False
    found = analysis.attention_maps(model, **inputs)
    assert all(map(torch.equal, found, expected)) and model.config.return_dict is False


def test_models_without_maps_are_refused():
    model = FAMILIES["t5"].model()
    with pytest.raises(ValueError, match="gives no attention weights"):
        analysis.attention_maps(model, **FAMILIES["t5"].inputs())


@pytest.mark.parametrize("padded", (False, True))
def test_dot_product_maps(padded: bool):
    """A new residual layer computes the dot product: its own attention is that of the dot product, until it is trained."""
    model, inputs = patch(FAMILIES["llama"].model(), "all", proj_dim=4), FAMILIES["llama"].inputs(padded=False)
    if padded:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, 5:] = 0
    names = [layer.layer for layer in analysis.score_statistics(model, **inputs)]
    found = analysis.dot_product_maps(model, **inputs)
    assert list(found) == names
    for name, weights in zip(names, analysis.attention_maps(model, **inputs), strict=True):
        assert torch.allclose(found[name], weights, atol=1e-6)
    liven(model)
    others = analysis.dot_product_maps(model, **inputs)
    assert torch.allclose(others[names[0]], found[names[0]], atol=1e-6), "the first layer's queries and keys stay"
    assert not torch.allclose(others[names[0]], analysis.attention_maps(model, **inputs)[0], atol=1e-3)


def test_compact_layers_have_no_dot_product():
    model, inputs = GPT2.neural(neural_layers=[1], neural_compact=True, neural_hidden_dims=[4, 2]), GPT2.inputs(labels=False)
    assert analysis.dot_product_maps(model, **inputs) == {}


def test_attention_over_an_image():
    weights = torch.rand(4, 17, 17)
    large = analysis.attention_over_image(weights, (16, 24))
    assert large.shape == (4, 16, 24)
    assert torch.equal(large[2, :4, :6], weights[2, 0, 1].expand(4, 6)) and large[1, 15, 23] == weights[1, 0, 16]
    assert torch.equal(analysis.attention_over_image(weights[3], (4, 4), query=5), weights[3, 5, 1:].view(4, 4))
    with pytest.raises(ValueError, match="make no square"):
        analysis.attention_over_image(torch.rand(16, 16), (8, 8))
    # two special tokens before two rows of three patches
    weights = torch.rand(8, 8)
    assert torch.equal(analysis.attention_over_image(weights, (2, 3), grid=(2, 3)), weights[0, 2:].view(2, 3))
    with pytest.raises(ValueError, match="8 tokens, of which 3 x 3 cannot be patches"):
        analysis.attention_over_image(weights, (3, 3), grid=(3, 3))
    assert analysis.patch_grid(DeiTConfig(patch_size=4), torch.zeros(1, 3, 8, 12)) == (2, 3)
    assert analysis.patch_grid(GPT2Config(), torch.zeros(1, 3, 8, 12)) is None


@pytest.mark.parametrize("num_heads", (None, 3))
def test_score_surface(num_heads: int | None):
    scorer = NeuralScorer(8, num_heads=num_heads)
    query, key, directions = torch.randn(8), torch.randn(8), torch.randn(2, 8)
    surface = analysis.score_surface(
        scorer, *directions, query=query, key=key, head=1 if num_heads else 0, extent=2.0, steps=5
    )
    assert surface.network.shape == surface.dot_product.shape == (5, 5)
    q, k = query + 1.0 * directions[0] / directions[0].norm(), key - 2.0 * directions[1] / directions[1].norm()
    heads = num_heads or 1
    from hf_neural_attention.models.neural_attention_reference import reference_scores

    scores = reference_scores(q.expand(1, heads, 1, 8), k.expand(1, heads, 1, 8), scorer.weights())
    assert torch.isclose(surface.network[3, 0], scores[0, -1 if num_heads is None else 1, 0, 0], rtol=1e-4)
    assert torch.isclose(surface.dot_product[3, 0], q @ k / math.sqrt(8), rtol=1e-4)
    twice = analysis.score_surface(scorer, *directions, query=query, key=key, extent=2.0, steps=5, scaling=2 / math.sqrt(8))
    assert torch.allclose(twice.dot_product, 2 * surface.dot_product)
    capped = analysis.score_surface(scorer, *directions, query=query, key=key, extent=2.0, steps=5, softcap=0.5)
    assert torch.allclose(capped.dot_product, 0.5 * torch.tanh(surface.dot_product / 0.5), atol=1e-6)
    default = analysis.score_surface(scorer)
    assert default.network.shape == (61, 61) and default.network.std() > 0


@pytest.mark.parametrize("num_heads", (None, 2))
def test_a_surface_around_queries_and_keys(num_heads: int | None):
    scorer, along = NeuralScorer(8, num_heads=num_heads), torch.nn.functional.normalize(torch.randn(8), dim=0)
    query, key = torch.randn(1, 2, 1, 8).expand(1, 2, 50, 8), torch.randn(1, 2, 1, 8) + 0.01 * torch.randn(1, 2, 50, 8)
    query = query + torch.linspace(-1, 1, 50)[:, None] * along  # lie on a line
    seen = analysis.QueriesAndKeys(query, key, 0.5)
    surface = analysis.surface_around(scorer, seen, head=1, steps=3)
    extent = 3 * float(torch.linspace(-1, 1, 50).std(correction=0))
    assert surface.query_steps.tolist() == pytest.approx([-extent, 0, extent], rel=1e-4)
    middle = query[0, 1].mean(0), key[0, 1].mean(0)
    assert surface.dot_product[1, 1] == pytest.approx(float(0.5 * middle[0] @ middle[1]), rel=1e-4)
    ends = {float(0.5 * (middle[0] + side * extent * along) @ middle[1]) for side in (-1, 1)}
    assert sorted(surface.dot_product[::2, 1].tolist()) == pytest.approx(sorted(ends), rel=1e-3)
    capped = analysis.surface_around(scorer, seen._replace(softcap=0.5), head=1, steps=3)
    assert torch.allclose(capped.dot_product, 0.5 * torch.tanh(surface.dot_product / 0.5), atol=1e-6)
    with pytest.raises(ValueError, match="`head` is 2; expected 0 to 1"):
        analysis.surface_around(scorer, seen, head=2)


def test_health_by_hand(monkeypatch):
    scorer, length = NeuralScorer(8), 6
    from hf_neural_attention.analysis.health import health_of_layer
    from hf_neural_attention.patching.calibration import Call

    query, key = torch.randn(2, 1, 2, length, 8)
    weights = scorer(query, key, key, is_causal=True, need_weights=True)[1]
    health = health_of_layer(scorer, Call(query, key, None, True, 0.3))
    rows = weights[:, :, 1:]  # leaves out the first query, which has no choice
    assert health.entropy == pytest.approx(torch.special.entr(rows).sum(-1).mean().item(), rel=1e-4)
    assert health.uniform_entropy == pytest.approx(sum(math.log(n) for n in range(2, 7)) / 5)
    assert health.active_units == health.active_pairs == 1.0 and not health.dead and health.score_std > 0.1
    monkeypatch.setattr("hf_neural_attention.analysis.health.NUMBERS_AT_ONCE", 1)  # takes one query at a time
    again = health_of_layer(scorer, Call(query, key, None, True, 0.3))
    assert again[:5] == health[:5] and again[5:] == pytest.approx(health[5:], rel=1e-5)


def test_queries_and_keys():
    model, inputs = GPT2.neural(neural_layers=[1]), GPT2.inputs()
    [(name, (queries, keys, scaling, softcap))] = analysis.queries_and_keys(model, **inputs).items()
    assert name == "transformer.h.1.attn" and queries.shape == keys.shape == (2, 4, 12, 8)
    assert scaling == pytest.approx(1 / math.sqrt(8)) and softcap is None
    states = model.transformer(inputs["input_ids"], output_hidden_states=True).hidden_states[1]
    states = model.transformer.h[1].attn.c_attn(model.transformer.h[1].ln_1(states))
    assert torch.allclose(queries, states[..., :32].unflatten(-1, (4, 8)).transpose(1, 2), atol=1e-5)
    assert torch.allclose(keys, states[..., 32:64].unflatten(-1, (4, 8)).transpose(1, 2), atol=1e-5)


def test_each_head_has_a_health_of_its_own():
    model = GPT2.neural(neural_layers="all", neural_per_head=True)
    with torch.no_grad():
        model.transformer.h[1].attn.scorer.linear2.bias[2].fill_(-1e4)
    before = [module.config for module in model.modules() if hasattr(module, "scorer")]
    health = analysis.scorer_health(model, **GPT2.inputs())
    assert [(layer.scorers, layer.dead) for layer in health] == [(4, 0), (4, 1), (4, 0)]
    assert health[1].active_units == 0.75 and "1 dead" in str(health)
    assert all(a is b for a, b in zip(before, (m.config for m in model.modules() if hasattr(m, "scorer")), strict=True))


def test_inputs_that_reach_no_layer():
    inputs = FAMILIES["t5"].inputs()
    model = patch(FAMILIES["t5"].model(), ["encoder.block.0.layer.0.SelfAttention"], mode="replace")
    encoded = model.encoder(inputs["input_ids"])
    with pytest.raises(ValueError, match="reach none of these layers"):
        analysis.scorer_health(model, encoder_outputs=encoded, decoder_input_ids=inputs["input_ids"])


def test_health_of_models():
    for family in (FAMILIES["gpt2"], FAMILIES["llama"], FAMILIES["bert"], FAMILIES["vit"]):
        model = patch(family.model(), "all", mode="replace", proj_dim=4)
        state = copy.deepcopy(model.state_dict())
        kill(model.get_submodule(family.layers[1]).scorer)
        health = analysis.scorer_health(model, **family.inputs())
        assert [layer.layer for layer in health] == family.layers and [layer.dead for layer in health] == [0, 1, 0]
        assert health[1].score_std == 0.0 and health[1].entropy == pytest.approx(health[1].uniform_entropy, rel=1e-4)
        assert health[0].entropy < health[0].uniform_entropy and "dead" in str(health).splitlines()[2]
        assert model.state_dict().keys() == state.keys()
    residual = liven(patch(FAMILIES["gpt2"].model(), "all"))
    assert not any(layer.dead for layer in analysis.scorer_health(residual, **FAMILIES["gpt2"].inputs()))
    with pytest.raises(ValueError, match="has no neural layer"):
        analysis.scorer_health(FAMILIES["gpt2"].model(), **FAMILIES["gpt2"].inputs())


def train_watched(folder: Any, *callbacks: Any, prepare: Any = None) -> Any:
    """A model whose last scorer is dead, after four steps with dropout."""
    torch.manual_seed(1)
    model = GPT2.neural(neural_layers="all", resid_pdrop=0.5).train()
    kill(model.transformer.h[2].attn.scorer)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 98, (8, 12))]
    arguments = TrainingArguments(
        str(folder), max_steps=4, logging_steps=1, report_to="none", use_cpu=True, per_device_train_batch_size=2
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    return trainer


def test_the_callback_logs_and_warns_once(tmp_path, caplog):
    trainer = train_watched(tmp_path, analysis.ScorerHealthCallback(GPT2.inputs(labels=False), every=2))
    logged = [entry for entry in trainer.state.log_history if "scorer/transformer.h.0.attn/entropy" in entry]
    assert logged and logged[0]["scorer/transformer.h.2.attn/score_std"] == 0.0
    assert caplog.text.count("The scorer of transformer.h.2.attn seems dead") == 1 and "transformer.h.0" not in caplog.text
    # compares with training without the callback, whose forward must draw no random numbers and leave modes alone
    assert_same_state(trainer.model, train_watched(tmp_path).model)


def test_the_callback_logs_scores_of_any_layer(tmp_path):
    inputs = GPT2.inputs(labels=False)
    trainer = train_watched(tmp_path, analysis.ScoreCallback(inputs, every=2))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = {f"scores/transformer.h.{i}.attn/{name}" for i in range(3) for name in ("spread", "entropy", "saturated")}
    assert [names <= entry.keys() for entry in logged] == [True, False, True, False]
    resumed = analysis.ScoreCallback(inputs, every=2)  # counts on from the history, as after a checkpoint
    history = [{"loss": 1.0}, {"loss": 0.9}, {"loss": 0.8}]
    for state in (TrainerState(log_history=history[:2]), TrainerState(log_history=history)):
        resumed.on_log(None, state, None, model=trainer.model, logs=state.log_history[-1])
    assert [len(entry) > 1 for entry in history] == [False, False, True]
    spreads = [[entry[f"scores/transformer.h.{i}.attn/spread"] for i in range(3)] for entry in (logged[0], logged[2])]
    assert spreads[0][2] == 0.0 < spreads[0][0] != spreads[1][0]
    assert_same_state(trainer.model, train_watched(tmp_path).model)
    # keeps them out of what an evaluation returns, of which a search takes the sum where nothing else is measured
    assert {*trainer.evaluate(trainer.train_dataset)} & names == set()
    stock = GPT2.stock()
    (layer, *_), figures = analysis.score_statistics(stock, **inputs), analysis.ScoreCallback(inputs).look(stock)
    assert figures["scores/transformer.h.0.attn/saturated"] == layer.saturated and len(figures) == 9


def test_what_is_put_behind_the_callback_sees_its_figures(tmp_path):
    class Reporter(TrainerCallback):
        def __init__(self):
            self.seen: list[dict[str, float]] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    def first(callback: Any, trainer: Any) -> None:  # repeats what the callback's docstring recommends
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(callback)))

    reporter, callback = Reporter(), analysis.ScorerHealthCallback(GPT2.inputs(labels=False))
    train_watched(tmp_path, reporter, callback, prepare=lambda trainer: first(callback, trainer))
    assert "scorer/transformer.h.0.attn/entropy" in reporter.seen[0]


def test_the_callback_warns_again_when_more_heads_die(caplog):
    model = GPT2.neural(neural_layers=[0], neural_per_head=True, neural_mode="residual")
    callback, state = analysis.ScorerHealthCallback(GPT2.inputs(labels=False)), TrainerState(log_history=[{}])
    bias = model.transformer.h[0].attn.scorer.linear2.bias
    for heads in (0, 1, 1, 3):
        with torch.no_grad():
            bias[:heads] = -1e4
        callback.on_log(None, state, None, model=model, logs={"loss": 1.0})
    assert len(caplog.records) == 2
    assert "1 of the 4 scorers of transformer.h.0.attn seems dead" in caplog.text and "3 of the 4 scorers" in caplog.text


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("mode", ("replace", "residual"))
def test_health_is_that_of_the_weights_that_the_model_has(mode: str, masked: bool):
    """Entropy by hand from the maps, under padding and autocast."""
    model = liven(patch(FAMILIES["llama"].model(), "all", mode=mode, proj_dim=4))
    inputs = FAMILIES["llama"].inputs(padded=False)
    if masked:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, :5] = 0  # pads on the left
    health = analysis.scorer_health(model, **inputs)
    for layer, weights in zip(health, analysis.attention_maps(model, **inputs), strict=True):
        chosen = (weights > 0).sum(-1) > 1
        entropy = torch.special.entr(weights).sum(-1)[chosen].mean()
        assert layer.entropy == pytest.approx(entropy.item(), rel=1e-4) and layer.entropy <= layer.uniform_entropy
    with torch.autocast("cpu", torch.bfloat16):
        rounded = analysis.scorer_health(model, **inputs)
    for layer, other in zip(health, rounded, strict=True):
        assert other.entropy == pytest.approx(layer.entropy, rel=2e-2) and other.uniform_entropy == layer.uniform_entropy


def test_pictures(tmp_path):
    from matplotlib import pyplot as plt

    model = GPT2.neural(neural_layers="all")
    inputs = GPT2.inputs(labels=False)
    maps = analysis.attention_maps(model, **inputs)
    tokens = ["$$", "$a_{$", *(str(i) for i in range(10))]  # begin no formulas
    axes = [analysis.draw_attention(maps[0][0, 0], tokens, title="head 0")]
    axes += analysis.draw_surface(analysis.score_surface(model.transformer.h[0].attn.scorer))
    axes += analysis.draw_health(analysis.scorer_health(model, **inputs))
    image = torch.rand(16, 16, 3).numpy()
    axes.append(analysis.draw_attention_over_image(analysis.attention_over_image(torch.rand(17, 17), (16, 16)), image))
    for number, ax in enumerate(axes):
        ax.figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 2000
    _, given = plt.subplots(1, 2)
    assert analysis.draw_surface(analysis.score_surface(NeuralScorer(8)), given)[0] is given[0]
    plt.close("all")
