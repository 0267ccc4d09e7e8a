"""Mode "thin": the dot product of what a network would see, on every path."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_neural_attention import CompactScorer, NeuralScorer, explain, neural_attention, use_backend
from hf_neural_attention.models.neural_attention_scorer import PerHeadLinear


HEADS, KEY_HEADS, QUERIES, KEYS, HEAD_DIM, NUMBERS = 4, 2, 5, 7, 8, 3


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, HEADS, QUERIES, HEAD_DIM), (2, KEY_HEADS, KEYS, HEAD_DIM), (2, KEY_HEADS, KEYS, 6)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def make_scorer(per_head: bool = False, **settings: Any) -> NeuralScorer:
    torch.manual_seed(1)
    scorer = NeuralScorer(HEAD_DIM, NUMBERS, mode="thin", num_heads=HEADS if per_head else None, **settings).double()
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter)
    return scorer


def masks(name: str) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(2, 1, QUERIES, KEYS, generator=generator) > 0.4
    mask[0, 0, 2] = False  # a query with nothing to attend to
    if name == "float":
        return torch.randn(2, HEADS, QUERIES, KEYS, generator=generator, dtype=torch.float64).masked_fill(~mask, -math.inf)
    return mask if name == "bool" else None


def through(layer: Any, states: torch.Tensor) -> torch.Tensor:
    """What a linear layer makes, one for all heads or one each."""
    if isinstance(layer, PerHeadLinear):
        return torch.stack([states[:, h] @ layer.weight[h].T + layer.bias[h] for h in range(layer.num_heads)], dim=1)
    return layer(states)


def plain(scorer: NeuralScorer, query: Any, key: Any, value: Any, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
    key, value = (each.repeat_interleave(HEADS // KEY_HEADS, dim=1) for each in (key, value))
    scores = through(scorer.q_proj, query) @ through(scorer.k_proj, key).transpose(-1, -2) / math.sqrt(NUMBERS)
    seen = torch.ones(QUERIES, KEYS, dtype=torch.bool)
    seen = seen.tril() if is_causal else seen
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
    return scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num() @ value


@pytest.mark.parametrize("per_head", (False, True))
@pytest.mark.parametrize(("mask", "is_causal"), list(product(("none", "bool", "float"), (False, True))))
def test_thin_is_the_plain_formula_on_all_paths(mask: str, is_causal: bool, per_head: bool):
    scorer, (query, key, value) = make_scorer(per_head), tensors()
    expected = plain(scorer, query, key, value, masks(mask), is_causal)
    arguments: dict[str, Any] = {"attn_mask": masks(mask), "is_causal": is_causal}
    for backend in (None, "auto", "reference"):
        assert torch.allclose(neural_attention(query, key, value, scorer, backend=backend, **arguments), expected)
    with use_backend("reference"):
        assert torch.allclose(neural_attention(query, key, value, scorer, **arguments), expected)
    output, weights = scorer(query, key, value, masks(mask), 0.0, is_causal, need_weights=True)
    assert torch.allclose(output, expected) and weights.shape == (2, HEADS, QUERIES, KEYS)
    u, w = scorer.project_queries(query), scorer.project_keys(key)
    assert w.shape == (2, HEADS if per_head else KEY_HEADS, KEYS, NUMBERS)
    for states, projected in (((query, w), (False, True)), ((u, key), (True, False)), ((u, w), (True, True))):
        flags = dict(zip(("queries_projected", "keys_projected"), projected, strict=True))
        assert torch.allclose(neural_attention(*states, value, scorer, **arguments, **flags), expected)
    compact = CompactScorer((NUMBERS, 0), HEADS if per_head else None, mode="thin")
    assert torch.allclose(neural_attention(u, w, value, compact, **arguments), expected)
    assert not list(compact.parameters())


@pytest.mark.parametrize(("mask", "is_causal"), list(product(("none", "bool", "float"), (False, True))))
def test_sinks(mask: str, is_causal: bool):
    scorer, inputs = make_scorer(), [tensor.requires_grad_() for tensor in tensors()]
    sinks = torch.linspace(-1.0, 2.0, HEADS, dtype=inputs[0].dtype).requires_grad_()
    arguments: dict[str, Any] = {"attn_mask": masks(mask), "is_causal": is_causal}
    results = []
    for backend in (None, "reference"):
        output = neural_attention(*inputs, scorer, sinks=sinks, backend=backend, **arguments)
        results.append((output, *torch.autograd.grad(output.square().sum(), [*inputs, sinks])))
    assert all(torch.allclose(*pair) for pair in zip(*results, strict=True))
    assert not torch.allclose(results[0][0], neural_attention(*inputs, scorer, **arguments))


@pytest.mark.parametrize("backend", (None, "reference"))
def test_a_sink_of_minus_infinity_weighs_nothing(backend: str | None):
    scorer, inputs = make_scorer(), [tensor.requires_grad_() for tensor in tensors()]
    mask = torch.ones(QUERIES, KEYS, dtype=torch.bool)
    mask[1] = False
    results = []
    for sinks in (None, torch.full((HEADS,), -torch.inf, dtype=inputs[0].dtype)):
        output = neural_attention(*inputs, scorer, attn_mask=mask, sinks=sinks, backend=backend)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    assert not results[1][0][:, :, 1].any() and all(torch.allclose(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_it_computes_in_float32(dropout_p: float):
    """Under autocast, and of half precision, with dropout as without: networks do, with which it is compared."""
    scorer, low = make_scorer().float(), [tensor.bfloat16() for tensor in tensors()]

    def run(inputs: list[torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(5)
        return neural_attention(*inputs, scorer, dropout_p=dropout_p)

    expected = run([tensor.float() for tensor in low])
    assert torch.equal(run(low), expected.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run([tensor.float() for tensor in low]), expected)


def test_masks_of_numbers_that_float32_has_not():
    scorer, inputs = make_scorer().float(), [tensor.float() for tensor in tensors()]
    mask = torch.zeros(QUERIES, KEYS, dtype=torch.float64)
    mask[1] = torch.finfo(torch.float64).min
    assert not neural_attention(*inputs, scorer, attn_mask=mask)[:, :, 1].any()


@pytest.mark.parametrize("backend", (None, "reference"))
@pytest.mark.parametrize("mask", ("none", "bool", "float"))
def test_gradients(mask: str, backend: str | None):
    scorer = make_scorer()
    given = masks(mask)
    inputs = [tensor.requires_grad_() for tensor in tensors()] + list(scorer.parameters())

    def run(query: Any, key: Any, value: Any, *weights: torch.Tensor) -> torch.Tensor:
        return neural_attention(query, key, value, scorer, given, is_causal=True, backend=backend)

    assert torch.autograd.gradcheck(run, inputs)


def test_dropout_drops_what_the_reference_drops():
    scorer, inputs = make_scorer(), tensors()
    outputs = []
    for backend in (None, "reference"):
        torch.manual_seed(5)
        outputs.append(neural_attention(*inputs, scorer, dropout_p=0.5, backend=backend))
    assert torch.equal(*outputs) and not torch.allclose(outputs[0], neural_attention(*inputs, scorer))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_dtypes(dtype: torch.dtype):
    scorer, inputs = make_scorer().to(dtype), [each.to(dtype) for each in tensors()]
    expected = neural_attention(*(each.double() for each in inputs), make_scorer().to(dtype).double())
    output = neural_attention(*inputs, scorer)
    assert output.dtype == dtype and torch.allclose(output.double(), expected, atol=1e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("numbers", (3, 6, 8), ids=lambda numbers: f"{numbers} numbers, values of 6")
@pytest.mark.parametrize(("mask", "has_sinks"), (("none", False), ("bool", False), ("float", False), ("none", True)))
def test_a_fused_kernel_computes_it(numbers: int, mask: str, has_sinks: bool):
    """Queries and keys of another size than the values would be scored in memory, at the square of the length."""
    scorer = NeuralScorer(HEAD_DIM, numbers, mode="thin")
    inputs = [each.float().requires_grad_() for each in tensors()]
    given = masks(mask)
    settings = {"attn_mask": given if given is None or given.dtype == torch.bool else given.float()}
    settings |= {"sinks": torch.zeros(HEADS)} if has_sinks else {}
    with sdpa_kernel(SDPBackend.MATH):
        expected = neural_attention(*inputs, scorer, **settings)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises an error where that kernel would refuse
        output = neural_attention(*inputs, scorer, **settings)
    output.sum().backward()
    assert torch.allclose(output, expected, atol=1e-6)


def test_scores_start_with_a_spread_of_one_on_unit_normal_queries_and_keys():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 2000, 64)
    for numbers in (2, 16):
        scorer = NeuralScorer(64, numbers, mode="thin")
        scores = scorer.project_queries(query) @ scorer.project_keys(key).transpose(-1, -2) / math.sqrt(numbers)
        assert math.isclose(scores.std().item(), 1.0, rel_tol=0.05)


def test_what_thin_has_and_refuses():
    scorer = make_scorer()
    assert {name for name, _ in scorer.named_parameters()} == {
        f"{layer}.{part}" for layer in ("q_proj", "k_proj") for part in ("weight", "bias")
    }
    assert scorer.hidden_dims == (NUMBERS, 0) and NeuralScorer(8, 3, (3, 0), mode="thin").linear1 is None
    with pytest.raises(ValueError, match='mode "thin" has no hidden layers'):
        NeuralScorer(8, 3, (3, 2), mode="thin")
    with pytest.raises(ValueError, match='mode "thin" has no hidden layers'):
        CompactScorer((3, 2), mode="thin")
    with pytest.raises(ValueError, match="needs whole queries and keys"):
        CompactScorer((3, 2), mode="residual")
    query, key, value = tensors()
    assert explain(query, key, value, scorer)[0][1:3] == ("sdpa", True)
    assert explain(query, key, value, scorer, backend="reference")[0][1:3] == ("reference", False)
    with pytest.raises(ValueError, match="`query` and `key` have sizes 3 and 2"):
        neural_attention(query[..., :3], key[..., :2], value, CompactScorer((3, 0), mode="thin"))


def test_a_compact_scorer_knows_its_size_without_weights():
    query, key, value = (tensor[:, :KEY_HEADS] for tensor in tensors())
    key, query = key[:, :, :QUERIES], query[:, :, :QUERIES]
    scorer = CompactScorer((NUMBERS, 0), mode="thin")
    for call in (neural_attention, explain, lambda *given: scorer(*given[:3])):
        with pytest.raises(ValueError, match=rf"have sizes {HEAD_DIM} and {HEAD_DIM}; .*to {NUMBERS} numbers a head"):
            call(query, key, value[:, :, :QUERIES], scorer)
    assert neural_attention(query[..., :NUMBERS], key[..., :NUMBERS], value[:, :, :QUERIES], scorer).shape[-1] == 6
