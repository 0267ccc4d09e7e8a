"""Queries that come projected, on every backend, forward and backward: the same as those that the operation projects."""

import pytest
import torch

from hf_neural_attention import CompactScorer, NeuralScorer, neural_attention
from tests.helpers.numerics import assert_equals_oracle, literal_attention, run_with_gradients
from tests.helpers.operation_cases import CASES, every_backend


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def attend_to_projected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scorer: NeuralScorer, *, form: str, **options
) -> torch.Tensor:
    """The operation on `u`, and on `w` as well unless `form` is "queries"."""
    u = scorer.project_queries(query)
    if form == "queries":
        return neural_attention(u, key, value, scorer, queries_projected=True, **options)
    w = scorer.project_keys(key)
    if form == "both":
        return neural_attention(u, w, value, scorer, queries_projected=True, keys_projected=True, **options)
    compact = CompactScorer(scorer.hidden_dims, scorer.num_heads)
    compact.linear2, compact.linear3 = scorer.linear2, scorer.linear3
    return neural_attention(u, w, value, compact, **options)


@every_backend
@pytest.mark.parametrize("form", ("queries", "both", "compact"))
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.mode == "replace"])
def test_projected_queries(name: str, form: str, backend: str):
    case = CASES[name]
    tensors, scorer = case.draw()
    exact = run_with_gradients(literal_attention, tensors, scorer, torch.float64, **case.options)
    ours = run_with_gradients(attend_to_projected, tensors, scorer, torch.float64, **case.options, form=form, backend=backend)
    assert_equals_oracle(ours, exact)


@every_backend
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_projected_queries_give_outputs_of_the_values_dtype(dtype: torch.dtype, backend: str):
    tensors, scorer = CASES["paper"].draw()
    query, key, value = (tensors[name].to(dtype) for name in ("query", "key", "value"))
    scorer = scorer.to(dtype)
    whole = neural_attention(query, key, value, scorer, is_causal=True, backend=backend)
    u, w = scorer.project_queries(query), scorer.project_keys(key)
    assert u.dtype == torch.float32
    projected = neural_attention(
        u, w, value, scorer, is_causal=True, backend=backend, queries_projected=True, keys_projected=True
    )
    assert projected.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps * whole.abs().max().float().item()
    # compares what computes in float32 either way; the reference computes in the dtype of what it is given
    if backend != "reference":
        assert (projected.float() - whole.float()).abs().max().item() <= tolerance


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 2, 3, 8), {"queries_projected": True}, r"with `queries_projected` this scorer expects \[B, H, Tq, 4\] and"),
        ((1, 2, 3, 4), {}, "have sizes 4 and 8; this scorer was made for head_dim 8"),
        ((1, 2, 3, 4), {"queries_projected": True, "keys_projected": True}, "`queries_projected` and `keys_projected`"),
    ],
)
def test_errors_of_projected_queries(shape: tuple, options: dict, message: str):
    key = value = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=message):
        neural_attention(torch.randn(shape), key, value, NeuralScorer(8, hidden_dims=(4, 2)), **options)
    residual = NeuralScorer(8, hidden_dims=(4, 2), mode="residual")
    with pytest.raises(ValueError, match="needs whole queries"):
        residual.project_queries(key)
    with pytest.raises(ValueError, match="whole queries and keys"):
        neural_attention(torch.randn(1, 2, 3, 4), key, value, residual, queries_projected=True)
