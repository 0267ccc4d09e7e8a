"""The compact form: folding computes the same, starts alive, and takes fewer numbers; what cannot be folded stays as it is."""

import copy
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import layer_norm, relu
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from hf_neural_attention import (
    NeuralCache,
    NeuralGPT2Config,
    NeuralGPT2LMHeadModel,
    NeuralViTConfig,
    NeuralViTModel,
    analysis,
    explain,
    patch_status,
)
from hf_neural_attention.models import neural_attention_compact
from hf_neural_attention.models.modeling_neural_attention import fold_own_model
from hf_neural_attention.models.neural_attention_cache import cache_nbytes
from hf_neural_attention.models.neural_attention_initialization import draw_compact_weights
from hf_neural_attention.models.neural_attention_scorer import CompactScorer
from tests.helpers import generating
from tests.helpers.comparing import assert_near, assert_same_state, backward, run
from tests.helpers.neural_models import (
    GPT2,
    VIT,
    Family,
    both_families,
    eager_and_sdpa,
    every_model,
    one_and_all_compact_layers,
    scorers,
)
from tests.helpers.versions import CACHE


WHOLE_FIELDS = {
    "one layer": {"neural_layers": [1]},
    "all layers": {"neural_layers": "all", "neural_proj_dim": 4},
    "wide": {"neural_layers": "all", "neural_proj_dim": 3, "neural_hidden_dims": [16, 2]},
    "one number": {"neural_layers": "all", "neural_hidden_dims": [1, 1]},
    "odd": {"neural_layers": "all", "neural_hidden_dims": [3, 5], "neural_per_head": True},
    "wider than a head": {"neural_layers": "all", "neural_hidden_dims": [32, 8]},
    "per head": {"neural_layers": [0, 2], "neural_per_head": True, "neural_proj_dim": 4},
    "thin": {"neural_layers": "all", "neural_proj_dim": 4, "neural_mode": "thin"},
}
whole_fields = pytest.mark.parametrize("fields", WHOLE_FIELDS.values(), ids=WHOLE_FIELDS)

# Allows a folded model's outputs, by the largest of them, rounding alone, of sums of some hundred numbers
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-5}


def lively(family: Family, **fields):
    """A model whose biases, too, are drawn, so that a bias that is lost shows."""
    model = family.neural(**fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@eager_and_sdpa
@both_families
@whole_fields
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_folding_computes_the_same(family: Family, fields: dict, dtype: torch.dtype, implementation: str):
    model = lively(family, attn_implementation=implementation, **fields).to(dtype)
    inputs = family.inputs(labels=False)
    inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    before, size = run(model, **inputs), model.num_parameters()
    fold_own_model(model)
    assert all(isinstance(scorer, CompactScorer) for scorer in scorers(model))
    # is larger where the first layer has more numbers than a key of these tiny heads
    assert (model.num_parameters() < size) == (scorers(model)[0].hidden_dims[0] < 8)
    assert model.config.neural_compact and model.config.neural_folded_from == type(model).__name__
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert_near(run(model, **inputs), before, BOUNDS[dtype])


@both_families
def test_folding_in_half_precision_rounds_once(family: Family):
    model = lively(family, neural_layers="all", neural_proj_dim=4)
    folded = copy.deepcopy(model)
    fold_own_model(folded)
    half = copy.deepcopy(model).bfloat16()
    fold_own_model(half)
    for name, tensor in folded.state_dict().items():
        exact = half.state_dict()[name].float()
        assert (exact - tensor).abs().max() <= 2e-2 * tensor.abs().max(), name


@every_model
def test_checkpoints_fold_while_they_are_loaded(family: Family, head: str, tmp_path):
    model = family.neural(head, neural_layers="all", neural_proj_dim=4)
    model.save_pretrained(tmp_path / "whole")
    folded, info = family.neural_class(head).from_pretrained(tmp_path / "whole", neural_compact=True, output_loading_info=True)
    assert not info["missing_keys"] and folded.config.neural_folded_from == str(tmp_path / "whole")
    fold_own_model(model)
    assert_same_state(folded, model)
    folded.save_pretrained(tmp_path / "compact")
    again = family.neural_class(head).from_pretrained(tmp_path / "compact", neural_compact=True)
    assert_same_state(again, folded)
    assert again.config.neural_compact and again.config.neural_folded_from == str(tmp_path / "whole")
    inputs = {"input_ids": torch.randint(3, 98, (2, 2, 8))} if head == "GPT2DoubleHeadsModel" else family.inputs(labels=False)
    assert torch.equal(run(again, **inputs), run(folded, **inputs))


def test_a_stock_checkpoint_keeps_values_and_outputs(tmp_path):
    stock = GPT2.stock()
    stock.save_pretrained(tmp_path)
    model = NeuralGPT2LMHeadModel.from_pretrained(tmp_path, neural_layers="all", neural_proj_dim=4, neural_compact=True)
    for ours, theirs in zip(model.transformer.h, stock.transformer.h, strict=True):
        assert torch.equal(ours.attn.c_attn.weight[:, 2 * 4 * 4 :], theirs.attn.c_attn.weight[:, 64:])
        assert torch.equal(ours.attn.c_proj.weight, theirs.attn.c_proj.weight)


def test_auto_classes_and_their_config(tmp_path):
    config = GPT2.config(neural_layers="all", neural_compact=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert isinstance(model, NeuralGPT2LMHeadModel)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_state(again, model)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda model: None, "it is compact already"),
        (lambda model: model.transformer.h[1].attn.register_forward_hook(print), "has forward hooks, which would be lost"),
        (
            lambda model: model.transformer.h[1].attn.c_proj.register_full_backward_hook(print),
            "has backward hooks, which would be lost",
        ),
        (lambda model: vars(model.transformer.h[1].attn).update(forward=print), "has a forward put there by hand"),
        (lambda model: model.to("meta"), "is on the meta device, without numbers"),
    ],
    ids=("compact", "hooks", "backward hooks", "forward", "meta"),
)
def test_what_is_not_folded_stays_as_it_is(prepare, reason: str):
    model = GPT2.neural(neural_layers="all", neural_compact=reason == "it is compact already")
    prepare(model)
    modules, state = list(model.modules()), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=reason):
        fold_own_model(model)
    assert list(model.modules()) == modules
    if "meta" not in reason:
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@both_families
def test_what_was_set_by_hand_stays(family: Family):
    model = family.neural(neural_layers="all")
    layers = [module for module in model.modules() if hasattr(module, "scorer")]
    for layer in layers:
        layer.is_causal = not layer.is_causal
        layer.attention_dropout = 0.25  # read by ViT's
    inputs = family.inputs(labels=False)
    before = run(model, **inputs)
    fold_own_model(model)
    assert_near(run(model, **inputs), before)
    folded = [module for module in model.modules() if hasattr(module, "scorer")]
    assert [layer.is_causal for layer in folded] == [layer.is_causal for layer in layers]
    assert all(layer.attention_dropout == 0.25 and not layer.training for layer in folded)


def test_residual_cannot_be_compact():
    with pytest.raises(ValueError, match="mode 'residual', whose dot product needs whole queries and keys"):
        fold_own_model(GPT2.neural(neural_layers="all", neural_mode="residual"))
    with pytest.raises(StrictDataclassError, match="dot product needs whole queries and keys"):
        NeuralGPT2Config(neural_mode="residual", neural_compact=True)


@pytest.mark.parametrize("per_head", (False, True))
@pytest.mark.parametrize("hidden_dims", [(2, 1), (4, 2), (16, 2), (16, 8)], ids=str)
def test_it_starts_alive_with_a_spread_of_one(hidden_dims: tuple[int, int], per_head: bool):
    active, spread = [], []
    states = layer_norm(torch.randn(64, 96), (96,))
    for _ in range(250):  # draws 4 heads each time: 1,000 scorers
        drawn = draw_compact_weights("mirrored", 96, hidden_dims, 4, per_head)
        layers = drawn.of_pairs
        u, w = states @ drawn.query_weight.mT, states @ drawn.key_weight.mT
        first = relu(u.unsqueeze(2) + w.unsqueeze(1)).flatten(1, 2)
        second = relu(first @ layers.weight2.mT + layers.bias2.unsqueeze(-2))
        active.append((second > 0).any(dim=-1).float().mean(dim=-1))
        spread.append((second @ layers.weight3.mT).squeeze(-1).std(dim=-1))
    active, spread = torch.cat(active), torch.cat(spread)
    assert active.shape == (1000,) and active.min() == 1.0
    assert spread.min() > 0.5 and spread.max() < 1.6 and abs(spread.mean().item() - 1) < 0.05


@both_families
@pytest.mark.parametrize("init", ("mirrored", "paper"))
def test_a_new_model_draws_its_first_layer(family: Family, init: str):
    fields = {"neural_layers": "all", "neural_hidden_dims": [4, 2], "neural_init": init}
    model = family.neural(neural_compact=True, **fields)
    attention = model.get_submodule(model.base_model_prefix)
    attention = attention.h[0].attn if family is GPT2 else attention.layers[0].attention
    size = attention.projection_size
    weight = attention.c_attn.weight[:, :size].T if family is GPT2 else attention.q_proj.weight
    # stands for 1 / sqrt(2), half of a unit's length, or for a uniform draw of the paper's; not for `initializer_range`
    norms = weight.norm(dim=-1)
    expected = {"mirrored": 1 / math.sqrt(2), "paper": 0.3}[init]
    assert abs(norms.mean().item() / expected - 1) < (0.3 if init == "mirrored" else 0.6)


@pytest.mark.parametrize("init", ("mirrored", "paper"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
@both_families
def test_a_new_model_in_another_dtype(family: Family, dtype: torch.dtype, init: str):
    """Starts with the same numbers, rounded; in float64 with others, since stock layers before draw more there."""
    config = family.config(neural_layers="all", neural_compact=True, neural_hidden_dims=[4, 2], neural_init=init)
    models = []
    for each in (torch.float32, dtype):
        torch.manual_seed(0)
        models.append(AutoModel.from_config(config, dtype=each))
    scorer = "layers.1.attention.scorer" if family is VIT else "h.1.attn.scorer"
    for expected, found in zip(*(model.get_submodule(scorer).parameters() for model in models), strict=True):
        assert found.dtype == dtype and torch.equal(found, (found.float() if dtype == torch.float64 else expected).to(dtype))


@every_model
def test_a_new_model_draws_each_first_layer_once(family: Family, head: str, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        neural_attention_compact, "draw_compact_weights", lambda *args: drawn.append(args) or draw_compact_weights(*args)
    )
    model = family.neural_class(head)(family.config(neural_layers="all", neural_compact=True, neural_hidden_dims=[4, 2]))
    assert len(drawn) == 3 and all(parameter.isfinite().all() for parameter in model.parameters())


def test_sizes_are_as_computed():
    with torch.device("meta"):
        gpt2 = NeuralGPT2LMHeadModel(NeuralGPT2Config(neural_layers="all", neural_compact=True, neural_proj_dim=2))
        vit = NeuralViTModel(
            NeuralViTConfig(neural_layers="all", neural_compact=True, neural_hidden_dims=[16, 2]), add_pooling_layer=False
        )
    d, heads, layers = 768, 12, 12
    saved = layers * (2 * (d * d + d) - 2 * (d + 1) * heads * 2 - (2 * 1 + 1 + 1 + 1))
    assert gpt2.num_parameters() == 124_439_808 - saved == 110_708_604
    assert round(vit.num_parameters() / 1e6, 1) == 75.2


@both_families
@eager_and_sdpa
def test_hooks_are_called_as_in_a_stock_model(family: Family, implementation: str):
    """In stock's order, with what stock hands them; and what they return takes the place of what they saw."""

    def shapes(value):
        if isinstance(value, (tuple, list)):
            return [shapes(each) for each in value]
        return tuple(value.shape) if isinstance(value, torch.Tensor) else value

    def calls(model):
        seen = []
        parts = [
            (name, module)
            for name, module in model.named_modules()
            if name.endswith((".attn", ".attention", ".c_attn", ".c_proj", "_proj"))
            and ".mlp." not in name
            and ".scorer" not in name
        ]
        for name, module in parts:
            # shows when the projections whose width differs are called, not what they return
            known = shapes if not name.endswith((".c_attn", ".q_proj", ".k_proj")) else lambda value: None
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: seen.append((name, "before", shapes(args), sorted(kwargs))),
                with_kwargs=True,
            )
            module.register_forward_hook(
                lambda _, args, output, name=name, known=known: seen.append((name, "after", known(output)))
            )
            module.register_full_backward_hook(
                lambda _, given, had, name=name, known=known: seen.append((name, "backward", known(had)))
            )
        backward(model, **family.inputs())
        return seen

    fields = {"attn_implementation": implementation}
    stock = calls(family.stock(**fields))
    compact = family.neural(neural_layers="all", neural_compact=True, neural_proj_dim=4, **fields)
    assert calls(compact) == stock and len(stock) >= 3 * 3 * 3

    inputs = family.inputs(labels=False)
    before = run(compact, **inputs)
    attention = compact.get_submodule("transformer.h.1.attn" if family is GPT2 else "vit.layers.1.attention")
    hook = attention.register_forward_hook(lambda _, args, output: (torch.zeros_like(output[0]), *output[1:]))
    assert (run(compact, **inputs) - before).abs().max() > 1e-3
    hook.remove()
    assert torch.equal(run(compact, **inputs), before)


@pytest.mark.parametrize("static", (False, True))
def test_stock_caches_hold_what_the_scorer_sees(static: bool):
    model = GPT2.neural(n_embd=48, n_head=3, neural_layers="all", neural_compact=True, neural_hidden_dims=[2, 1])
    stock = GPT2.stock(n_embd=48, n_head=3)
    sizes = []
    for each in (model, stock):
        cache = StaticCache(each.config, 12) if static else DynamicCache(config=each.config)
        run(each, **GPT2.inputs(labels=False), **{CACHE: cache})
        assert [layer.keys.shape[-1] for layer in cache.layers] == [2 if each is model else 16] * 3
        sizes.append(cache_nbytes(cache))
    assert sizes[0] / sizes[1] == (2 + 16) / (16 + 16)
    with pytest.raises(ValueError, match="which is compact: its layers hand every cache"):
        NeuralCache(model)


def test_a_prompt_in_chunks_fills_a_static_cache():
    """`generate` then gives its layers room ahead of time, for keys of the size that the config says."""
    model = generating.neural(neural_layers="all", neural_compact=True, neural_hidden_dims=[2, 1])
    inputs = generating.prompt()
    expected = generating.generate(model, inputs)
    chunked = generating.generate(model, inputs, cache_implementation="static", prefill_chunk_size=4)
    assert torch.equal(chunked, expected)


def test_a_cache_that_has_no_room_says_so_itself():
    """Only a cache with keys of another size is said to have such: what else goes wrong in one is said as in a stock model."""

    class Full(DynamicCache):
        def update(self, *args, **kwargs):
            raise torch.OutOfMemoryError("no room")

    model = GPT2.neural(neural_layers="all", neural_compact=True)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        run(model, **GPT2.inputs(labels=False), **{CACHE: Full()})


def test_a_family_without_compact_attention_says_so(monkeypatch):
    """As one with rotary positions, which somebody may add."""
    for parent in NeuralGPT2LMHeadModel.__mro__:
        if "compact_attention_class" in vars(parent):
            monkeypatch.delattr(parent, "compact_attention_class")
    with pytest.raises(ValueError, match="has no compact attention"):
        GPT2.neural(neural_layers="all", neural_compact=True)


def test_scorer_errors():
    with pytest.raises(ValueError, match=r"`hidden_dims\[1\]` is 0"):
        CompactScorer((2, 0))
    with pytest.raises(ValueError, match="`init` is 'zero'"):
        CompactScorer((2, 1), init="zero")
    scorer = CompactScorer((4, 2))
    assert {name for name, each in scorer.named_parameters() if each.requires_grad} == {
        "linear2.weight",
        "linear2.bias",
        "linear3.weight",
    }
    tokens = torch.randn(3, 1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"this scorer expects \[B, H, Tq, 4\] and \[B, 2, Tk, 4\]"):
        scorer(*tokens)


def test_a_vit_is_as_the_paper_s_form():
    model = VIT.neural(neural_layers="all", neural_compact=True, neural_hidden_dims=[16, 2])
    layer = model.vit.layers[0].attention
    assert layer.q_proj.weight.shape == layer.k_proj.weight.shape == (4 * 16, 32)


def test_one_head():
    model, inputs = (
        lively(VIT, neural_layers="all", num_attention_heads=1, neural_hidden_dims=[3, 5]),
        VIT.inputs(labels=False),
    )
    expected = run(model, **inputs)
    fold_own_model(model)
    assert_near(run(model, **inputs), expected)


@both_families
@one_and_all_compact_layers
def test_tools_see_compact_layers(family: Family, fields: dict, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    model, inputs = family.neural(**fields), family.inputs(labels=False)
    layers = patch_status(model)
    assert len(layers) == (1 if fields["neural_layers"] == [0] else 3)
    assert {(each.compact, each.head_dim, each.proj_dim, each.hidden_dims) for each in layers} == {(True, 4, None, (4, 2))}
    whole = explain(family.neural(neural_layers=fields["neural_layers"], neural_hidden_dims=[4, 2]))
    assert explain(model) == whole and [each.layer for each in whole] == [each.layer for each in layers]
    maps = analysis.attention_maps(model, **inputs)
    health, statistics = analysis.scorer_health(model, **inputs), analysis.score_statistics(model, **inputs)
    assert len(maps) == len(statistics) == 3 and len(health) == len(layers) and not any(layer.dead for layer in health)
    chosen = (maps[0] > 0).sum(-1) > 1  # leaves out the first token of a text, which has no choice
    assert health[0].entropy == pytest.approx(torch.special.entr(maps[0]).sum(-1)[chosen].mean().item(), rel=1e-4)
    seen = analysis.queries_and_keys(model, **inputs)
    assert all(query.shape == key.shape == (2, 4, maps[0].shape[-1], 4) for query, key, *_ in seen.values())
    axes = [analysis.draw_attention(maps[0][0, 0], [str(i) for i in range(maps[0].shape[-1])])]
    axes += analysis.draw_surface(analysis.score_surface(scorers(model)[0]))
    axes += analysis.draw_health(health)
    for number, ax in enumerate(axes):
        ax.figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 2000
