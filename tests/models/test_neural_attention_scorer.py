"""The scorer as a module: the authors' names and formula, its two initialisations, adapters."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.functional import relu, scaled_dot_product_attention

from hf_neural_attention.models.neural_attention_scorer import NeuralScorer, effective_weights
from tests.helpers.numerics import literal_scores, randomize


def draw_tokens(*shape: int) -> list[torch.Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(3)]


class AuthorsAttention(nn.Module):
    """The scorer's part of the released code: its layers and its forward, without the projections around it."""

    def __init__(self, head_dim: int):
        super().__init__()
        down = head_dim // 32
        self.q_proj = nn.Linear(head_dim, down)
        self.k_proj = nn.Linear(head_dim, down)
        self.linear1 = nn.Linear(2 * down, down)
        self.linear2 = nn.Linear(down, down // 2)
        self.linear3 = nn.Linear(down // 2, 1)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        length = query.shape[2]
        q = self.q_proj(query).unsqueeze(3).expand(-1, -1, -1, length, -1)
        k = self.k_proj(key).unsqueeze(2).expand(-1, -1, length, -1, -1)
        hidden = relu(self.linear1(torch.cat((q, k), dim=-1)))
        scores = self.linear3(relu(self.linear2(hidden))).squeeze(-1)
        mask = torch.tril(torch.ones(length, length))
        return scores.masked_fill(mask == 0, float("-inf")).softmax(dim=-1) @ value


@pytest.mark.parametrize("head_dim", [64, 128])
def test_loads_and_computes_as_the_authors(head_dim: int):
    authors, ours = AuthorsAttention(head_dim).double(), NeuralScorer(head_dim).double()
    randomize_authors = {name: torch.randn_like(parameter) for name, parameter in authors.state_dict().items()}
    authors.load_state_dict(randomize_authors)
    query, key, value = draw_tokens(2, 3, 9, head_dim)
    expected = authors(query, key, value)
    assert not torch.allclose(ours(query, key, value, is_causal=True)[0], expected)
    ours.load_state_dict(authors.state_dict())
    torch.testing.assert_close(ours(query, key, value, is_causal=True)[0], expected)
    assert not torch.allclose(ours(query, key, value)[0], expected)


def test_state_dict_of_the_paper():
    shapes = {name: tuple(parameter.shape) for name, parameter in NeuralScorer(64).state_dict().items()}
    assert shapes == {
        "q_proj.weight": (2, 64), "q_proj.bias": (2,), "k_proj.weight": (2, 64), "k_proj.bias": (2,),
        "linear1.weight": (2, 4), "linear1.bias": (2,), "linear2.weight": (1, 2), "linear2.bias": (1,),
        "linear3.weight": (1, 1), "linear3.bias": (1,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ((8,), (2, (2, 1))),
        ((64,), (2, (2, 1))),
        ((128,), (4, (4, 2))),
        ((60, 5), (5, (5, 2))),
        ((64, 1), (1, (1, 1))),
        ((64, 4, [9, 7]), (4, (9, 7))),
        ((64, 7), (7, (7, 3))),
        ((64, 8), (8, (8, 2))),
        ((64, 16, "auto"), (16, (16, 2))),
        ((256,), (8, (8, 2))),
        ((256, None, "paper"), (8, (8, 4))),
        ((64, 16, None), (16, (16, 8))),  # as in checkpoints of earlier versions
    ],
)
def test_sizes(arguments: tuple, sizes: tuple):
    scorer = NeuralScorer(*arguments)
    assert (scorer.proj_dim, scorer.hidden_dims) == sizes
    assert scorer.linear1.weight.shape == (sizes[1][0], 2 * sizes[0])
    assert scorer.linear2.weight.shape == sizes[1][::-1]


def test_per_head_sizes_and_draws():
    scorer = NeuralScorer(64, proj_dim=4, num_heads=3)
    assert {name: parameter.shape[0] for name, parameter in scorer.named_parameters()} == dict.fromkeys(scorer.state_dict(), 3)
    for name, parameter in scorer.named_parameters():
        assert name.endswith("bias") or not torch.equal(parameter[0], parameter[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 0}, "`head_dim` is 0; a size must be at least 1"),
        ({"head_dim": 8, "proj_dim": 0}, "`proj_dim` is 0"),
        ({"head_dim": 8, "hidden_dims": (0, 1)}, r"`hidden_dims\[0\]` is 0"),
        ({"head_dim": 8, "hidden_dims": (4, -1)}, r"`hidden_dims\[1\]` is -1"),
        ({"head_dim": 8, "hidden_dims": "wide"}, "`hidden_dims` is 'wide'; it must be 'auto' or 'paper', or two sizes"),
        ({"head_dim": 8, "num_heads": 0}, "`num_heads` is 0"),
        ({"head_dim": 8, "mode": "add"}, "`mode` is 'add'; it must be one of 'replace', 'residual'"),
        ({"head_dim": 8, "init": "zero"}, "`init` is 'zero'; it must be one of "),
    ],
)
def test_errors(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        NeuralScorer(**arguments)


@pytest.mark.parametrize("num_heads", [None, 2])
def test_residual_starts_as_the_dot_product_and_learns(num_heads: int | None):
    scorer = NeuralScorer(16, mode="residual", num_heads=num_heads).double()
    query, key, value = draw_tokens(2, 2, 7, 16)
    output, _ = scorer(query, key, value, is_causal=True)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        scorer(query, key, value, scale=0.9)[0], scaled_dot_product_attention(query, key, value, scale=0.9)
    )
    (output - value).square().sum().backward()
    assert scorer.linear3.weight.grad.abs().min() > 0
    with torch.no_grad():
        scorer.linear3.weight -= 0.1 * scorer.linear3.weight.grad.sign()
    after, _ = scorer(query, key, value, is_causal=True)
    assert not torch.allclose(after, expected)
    (after - value).square().sum().backward()
    assert scorer.q_proj.weight.grad.abs().max() > 0  # checks that all layers learn from the second step on


def test_replace_takes_no_notice_of_scale():
    scorer, tokens = NeuralScorer(16).double(), draw_tokens(2, 2, 7, 16)
    assert torch.equal(scorer(*tokens, scale=5.0)[0], scorer(*tokens)[0])


def test_the_last_bias_is_frozen_and_has_no_effect():
    scorer, tokens = NeuralScorer(16).double(), draw_tokens(2, 2, 7, 16)
    trainable = {name for name, parameter in scorer.named_parameters() if parameter.requires_grad}
    assert trainable == set(scorer.state_dict()) - {"linear3.bias"}
    for backend in ("reference", "blockwise"):
        before, _ = scorer(*tokens, backend=backend)
        with torch.no_grad():
            scorer.linear3.bias += 3.0
        torch.testing.assert_close(scorer(*tokens, backend=backend)[0], before)


def test_attention_weights_on_request():
    scorer, (query, key, value) = NeuralScorer(16).double(), draw_tokens(2, 2, 7, 16)
    output, weights = scorer(query, key, value, is_causal=True, need_weights=True)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 7, dtype=torch.float64))
    assert not weights.triu(1).any()
    torch.testing.assert_close(weights @ value, output)
    assert scorer(query, key, value, is_causal=True)[1] is None


def birth(init: str, proj_dim: int, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of many scorers, one per head, on unit-normal tokens of their own: the share of pairs where a unit of the second
    hidden layer is active, and the standard deviation of scores; both `[draws]`."""
    scorer = NeuralScorer(32, proj_dim, init=init, num_heads=draws)
    query, key = torch.randn(2, 1, draws, 64, 32)
    with torch.no_grad():
        weights = scorer.weights()
        q = query[0] @ weights.q_weight.mT + weights.q_bias.unsqueeze(1)
        k = key[0] @ weights.k_weight.mT + weights.k_bias.unsqueeze(1)
        first = weights.weight1 @ torch.cat(torch.broadcast_tensors(q.mT.unsqueeze(3), k.mT.unsqueeze(2)), dim=1).flatten(
            2
        ) + weights.bias1.unsqueeze(2)
        second = relu(weights.weight2 @ relu(first) + weights.bias2.unsqueeze(2))
        scores = (weights.weight3 @ second).squeeze(1)
    return (second > 0).any(dim=1).double().mean(dim=-1), scores.std(dim=-1)


@pytest.mark.parametrize("proj_dim", [1, 2, 3, 4, 8, 16])
def test_mirrored_is_never_dead_and_spreads_by_one(proj_dim: int):
    active, spread = (torch.cat(parts) for parts in zip(*(birth("mirrored", proj_dim, 100) for _ in range(10)), strict=True))
    assert active.shape == (1000,)
    # needs two mirrored units: a single one is active for half of the pairs
    assert active.min() == 1.0 if proj_dim > 1 else active.min() > 0.2
    assert spread.min() > 0.5
    assert spread.max() < 1.6
    assert abs(spread.mean().item() - 1) < 0.05


def test_paper_is_often_dead_and_almost_uniform():
    active, spread = birth("paper", 2, 300)
    assert 0.2 < (active == 0).double().mean() < 0.45
    assert spread[active > 0].median() < 0.05  # leaves out the dead ones
    mirrored, _ = birth("mirrored", 2, 300)
    assert (mirrored > 0).all()


def test_birth_scores_are_the_scores():
    scorer = NeuralScorer(32, 4).double()
    query, key, _ = draw_tokens(2, 1, 9, 32)
    torch.testing.assert_close(literal_scores(query, key, scorer).softmax(-1), scorer(query, key, key, need_weights=True)[1])


def test_paper_draws_as_nn_linear():
    scorer = NeuralScorer(64, 4, init="paper", num_heads=2000)
    for layer in scorer.layers:
        bound = 1 / math.sqrt(layer.in_features)
        for parameter in (layer.weight, layer.bias):
            assert parameter.abs().max() <= bound
            assert parameter.abs().max() > 0.99 * bound
            assert abs(parameter.std().item() * math.sqrt(3) / bound - 1) < 0.05  # checks that the draws are uniform
            assert abs(parameter.mean().item()) < 0.1 * bound


def test_initializations_follow_the_seed():
    for init in ("mirrored", "paper"):
        states = []
        for seed in (4, 4, 5):
            torch.manual_seed(seed)
            states.append(NeuralScorer(16, init=init).state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not torch.equal(states[0]["q_proj.weight"], states[2]["q_proj.weight"])


@pytest.mark.parametrize("init", ["mirrored", "paper"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_construction_in_other_default_dtypes(dtype: torch.dtype, init: str):
    # builds under another default dtype, as Transformers does
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        scorer = NeuralScorer(16, init=init)
    finally:
        torch.set_default_dtype(before)
    assert {parameter.dtype for parameter in scorer.parameters()} == {dtype}
    assert scorer.linear1.weight.abs().max() > 0


def test_small_changes_of_adapters_survive_beside_large_biases_in_half_precision():
    scorer = NeuralScorer(16, proj_dim=8, mode="replace").to(torch.bfloat16)
    with torch.no_grad():
        scorer.q_proj.bias.fill_(8.0)
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=2), scorer)
    layer = adapted.q_proj
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A["default"].weight.fill_(0.01)
        layer.lora_B["default"].weight.fill_(0.25)
    weight, bias = effective_weights(layer)
    # sums two ranks of 0.01 * 0.25, a hundredth of what bfloat16 tells apart beside 8
    assert torch.allclose(weight.float(), torch.full_like(weight.float(), 0.005), rtol=0.2) and (bias == 8.0).all()


def test_an_adapter_that_starts_at_zero_changes_nothing_under_autocast():
    from peft import LoraConfig, inject_adapter_in_model

    scorer, inputs = NeuralScorer(16, 4), torch.randn(3, 1, 2, 7, 16)
    scorer.q_proj.bias.data.fill_(5.0)
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), copy.deepcopy(scorer))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(adapted(*inputs)[0], scorer(*inputs)[0])


def test_loaded_weights_are_left_but_by_a_reset():
    scorer = NeuralScorer(16)
    before = copy.deepcopy(scorer.state_dict())
    scorer.q_proj.weight._is_hf_initialized = True
    scorer.fill()
    after = scorer.state_dict()
    assert torch.equal(after["q_proj.weight"], before["q_proj.weight"])
    assert not torch.equal(after["k_proj.weight"], before["k_proj.weight"])
    assert not torch.equal(after["linear1.weight"], before["linear1.weight"])
    scorer.reset_parameters()
    assert not torch.equal(scorer.q_proj.weight, before["q_proj.weight"])


def test_meta_device_draws_nothing():
    before = torch.get_rng_state()
    with torch.device("meta"):
        scorer = NeuralScorer(16)
    assert all(parameter.is_meta for parameter in scorer.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_lora_is_honoured(backend: str):
    scorer, tokens = NeuralScorer(16, 4), [token.float() for token in draw_tokens(2, 2, 7, 16)]
    randomize(scorer)
    plain, _ = scorer(*tokens, backend=backend)
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "linear1"]), scorer)
    torch.testing.assert_close(adapted(*tokens, backend=backend)[0], plain)  # checks that the adapter starts as nothing
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    output, _ = adapted(*tokens, backend=backend)
    assert not torch.allclose(output, plain)

    output.square().sum().backward()
    adapters = {name: parameter for name, parameter in adapted.named_parameters() if "lora_" in name}
    assert len(adapters) == 4
    assert all(parameter.grad.abs().max() > 0 for parameter in adapters.values())

    for layer in (adapted.q_proj, adapted.linear1):
        layer.merge()
    merged = NeuralScorer(16, 4)
    merged.load_state_dict(
        {name.replace("base_layer.", ""): p for name, p in adapted.state_dict().items() if "lora" not in name}
    )
    torch.testing.assert_close(output, merged(*tokens, backend=backend)[0])
