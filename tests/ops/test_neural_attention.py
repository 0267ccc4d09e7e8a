"""Every backend against the authors' formula, forward and every gradient."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from hf_neural_attention import neural_attention
from hf_neural_attention.models.neural_attention_masking import draw_dropout_seed, dropout_multiplier
from hf_neural_attention.models.neural_attention_scorer import CompactScorer, NeuralScorer
from tests.helpers.numerics import (
    CPU_BACKENDS,
    assert_equals_oracle,
    literal_attention,
    randomize,
    run_with_gradients,
)


pytestmark = pytest.mark.usefixtures("poisoned_memory")
# Chooses by mark what other processes run with another kernel: Triton's cases in its interpreter (`make test-triton`), the
# native ones for older processors (test_native.py)
MARKS = {"native": pytest.mark.instruction_set, "triton": pytest.mark.interpreter}
every_backend = pytest.mark.parametrize("backend", [pytest.param(name, marks=MARKS.get(name, ())) for name in CPU_BACKENDS])


@dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    queries: int = 7
    keys: int | None = None
    head_dim: int = 8
    value_dim: int | None = None
    proj_dim: int | None = 4
    hidden_dims: tuple[int, int] | None = None
    per_head: bool = False
    mode: str = "replace"
    scale: float | None = None
    is_causal: bool = False
    mask: str | None = None  # "bool" or "float"
    mask_shape: tuple[int, ...] | None = None  # default: the full one

    def draw(self) -> tuple[dict[str, torch.Tensor], NeuralScorer]:
        keys = self.queries if self.keys is None else self.keys
        kv_heads = self.kv_heads or self.heads
        tensors = {
            "query": torch.randn(self.batch, self.heads, self.queries, self.head_dim, dtype=torch.float64),
            "key": torch.randn(self.batch, kv_heads, keys, self.head_dim, dtype=torch.float64),
            "value": torch.randn(self.batch, kv_heads, keys, self.value_dim or self.head_dim, dtype=torch.float64),
        }
        if self.mask is not None:
            shape = (self.batch, self.heads, self.queries, keys) if self.mask_shape is None else self.mask_shape
            attends = torch.rand(shape) < 0.7
            added = torch.randn(shape, dtype=torch.float64).masked_fill(~attends, float("-inf"))
            tensors["attn_mask"] = attends if self.mask == "bool" else added
        scorer = NeuralScorer(
            self.head_dim, self.proj_dim, self.hidden_dims, self.mode, num_heads=self.heads if self.per_head else None
        ).double()
        randomize(scorer)
        return tensors, scorer

    @property
    def options(self) -> dict:
        return {"is_causal": self.is_causal, "scale": self.scale}


CASES = {
    "one token": Case(queries=1),
    "paper": Case(queries=63, head_dim=64, proj_dim=None, is_causal=True),
    "111 tokens": Case(batch=1, queries=111, head_dim=128, proj_dim=None),
    "head size 60": Case(queries=13, head_dim=60, proj_dim=1),
    "head size 100": Case(queries=13, head_dim=100, proj_dim=3, is_causal=True),
    "proj_dim 32": Case(queries=9, head_dim=32, proj_dim=32),
    "wide first layer": Case(hidden_dims=(16, 1)),
    "wide second layer": Case(hidden_dims=(3, 12), is_causal=True),
    "more keys": Case(queries=5, keys=11),
    "more keys, causal": Case(queries=5, keys=11, is_causal=True),
    "more queries, causal": Case(queries=11, keys=5, is_causal=True),
    "one query": Case(queries=1, keys=17, mask="bool", mask_shape=(17,)),
    "value size": Case(value_dim=5, is_causal=True),
    "grouped queries": Case(heads=6, kv_heads=2, is_causal=True),
    "multi-query": Case(heads=4, kv_heads=1, mask="float", mask_shape=(4, 7, 7)),
    "per head": Case(per_head=True, mask="bool"),
    "per head, grouped": Case(heads=4, kv_heads=2, per_head=True, is_causal=True),
    "per head, residual": Case(per_head=True, mode="residual", mask="float"),
    "residual": Case(queries=20, mode="residual", is_causal=True),
    "residual, scale": Case(mode="residual", scale=0.7, heads=4, kv_heads=2, mask="bool"),
    "residual, scale 0": Case(mode="residual", scale=0.0),
    "bool [Tq, Tk]": Case(mask="bool", mask_shape=(7, 7)),
    "bool [1, Tk]": Case(mask="bool", mask_shape=(1, 7)),
    "bool [B, 1, 1, Tk]": Case(mask="bool", mask_shape=(2, 1, 1, 7), is_causal=True),
    "bool [1, H, 1, Tk]": Case(mask="bool", mask_shape=(1, 2, 1, 7)),
    "bool [B, 1, Tq, Tk]": Case(mask="bool", mask_shape=(2, 1, 7, 7), is_causal=True),
    "float": Case(mask="float", is_causal=True),
    "float [Tq, 1]": Case(mask="float", mask_shape=(7, 1)),
    "float [H, 1, Tk]": Case(mask="float", mask_shape=(2, 1, 7), is_causal=True),
    "float [1, Tq, Tk]": Case(mask="float", mask_shape=(1, 7, 7)),
    "float [B, 1, 1, Tk]": Case(mask="float", mask_shape=(2, 1, 1, 7), queries=3, keys=7),
    "float [B, H, Tq, 1]": Case(mask="float", mask_shape=(2, 2, 7, 1)),
    "float [1, 1, 1, 1]": Case(mask="float", mask_shape=(1, 1, 1, 1)),
}  # fmt: skip


def compare_with_oracle(case: Case, backend: str) -> dict[str, torch.Tensor]:
    tensors, scorer = case.draw()
    exact = run_with_gradients(literal_attention, tensors, scorer, torch.float64, **case.options)
    ours = run_with_gradients(neural_attention, tensors, scorer, torch.float64, **case.options, backend=backend)
    assert_equals_oracle(ours, exact)
    return exact


@every_backend
@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient(name: str, backend: str):
    exact = compare_with_oracle(CASES[name], backend)
    if CASES[name].queries > 1 and CASES[name].mask is None:  # checks that the draws are lively: every input matters
        assert all(result.abs().max() > 0 for result in exact.values())


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


@every_backend
def test_a_thousand_tokens(backend: str):
    tensors, scorer = Case(batch=1, heads=1, queries=1000, is_causal=True, proj_dim=2).draw()
    with torch.no_grad():
        exact = literal_attention(**tensors, scorer=scorer, is_causal=True)
        ours = neural_attention(**tensors, scorer=scorer, is_causal=True, backend=backend)
    assert_equals_oracle({"output": ours}, {"output": exact})


@every_backend
@settings(derandomize=True, max_examples=40, deadline=None)
@given(data=st.data())
def test_any_sizes(backend: str, data: st.DataObject):
    sizes = st.integers(1, 9)
    kv_heads, groups = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    batch, queries, keys = data.draw(st.integers(1, 3)), data.draw(sizes), data.draw(sizes)
    full = (batch, kv_heads * groups, queries, keys)
    broadcast = tuple(data.draw(st.sampled_from((1, size))) for size in full)
    case = Case(
        batch=batch,
        heads=kv_heads * groups,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=data.draw(st.integers(1, 12)),
        value_dim=data.draw(sizes),
        proj_dim=data.draw(sizes),
        hidden_dims=data.draw(st.none() | st.tuples(sizes, sizes)),
        per_head=data.draw(st.booleans()),
        mode=data.draw(st.sampled_from(("replace", "residual"))),
        scale=data.draw(st.none() | st.floats(-2, 2)),
        is_causal=data.draw(st.booleans()),
        mask=data.draw(st.sampled_from((None, "bool", "float"))),
        mask_shape=broadcast[data.draw(st.integers(0, 3)) :],
    )
    compare_with_oracle(case, backend)


@every_backend
@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (9, 5), (6, 6)])
def test_causal_alignment_is_that_of_scaled_dot_product_attention(queries: int, keys: int, backend: str):
    case = Case(queries=queries, keys=keys, mode="residual", is_causal=True)
    tensors, _ = case.draw()
    scorer = NeuralScorer(case.head_dim, mode="residual").double()  # starts with a network that adds zero
    ours = neural_attention(**tensors, scorer=scorer, is_causal=True, backend=backend)
    torch.testing.assert_close(ours, scaled_dot_product_attention(**tensors, is_causal=True))
    assert not torch.allclose(ours, neural_attention(**tensors, scorer=scorer, backend=backend))


@every_backend
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_masks_mean_what_they_mean_to_scaled_dot_product_attention(mask: str, backend: str):
    tensors, _ = Case(mode="residual", mask=mask, mask_shape=(2, 1, 7, 7)).draw()
    tensors["attn_mask"][..., 0] = mask == "bool"  # leaves no row empty, where torch's own answer depends on its kernel
    scorer = NeuralScorer(8, mode="residual").double()
    ours = neural_attention(**tensors, scorer=scorer, backend=backend)
    torch.testing.assert_close(ours, scaled_dot_product_attention(**tensors))


@every_backend
@pytest.mark.parametrize("case", [Case(), Case(mode="residual", kv_heads=1), Case(per_head=True)], ids=str)
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_empty_rows_are_zero_with_zero_gradients(mask: str, case: Case, backend: str):
    case = replace(case, mask=mask, is_causal=True)
    tensors, scorer = case.draw()
    tensors["attn_mask"].fill_(mask == "bool")
    nothing = False if mask == "bool" else float("-inf")
    tensors["attn_mask"][0, :, 3] = nothing  # empties a row by the mask alone
    tensors["attn_mask"][1, :, 2, :3] = nothing  # empties it by mask and causality together
    results = run_with_gradients(neural_attention, tensors, scorer, torch.float64, **case.options, backend=backend)
    for name in ("output", "query", *(("attn_mask",) if mask == "float" else ())):
        assert not results[name][0, :, 3].any() and not results[name][1, :, 2].any(), name
        assert results[name][0, :, 2].any() and results[name][1, :, 3].any(), name
    assert not any(result.isnan().any() for result in results.values())

    tensors["attn_mask"].fill_(nothing)
    results = run_with_gradients(neural_attention, tensors, scorer, torch.float64, **case.options, backend=backend)
    assert not any(result.any() for result in results.values())


@every_backend
@pytest.mark.parametrize("case", [Case(keys=0), Case(keys=0, mode="residual", per_head=True, is_causal=True)], ids=str)
def test_without_keys_the_output_is_zero(case: Case, backend: str):
    tensors, scorer = case.draw()
    results = run_with_gradients(neural_attention, tensors, scorer, torch.float64, **case.options, backend=backend)
    assert results["output"].shape == (2, 2, 7, 8)
    assert not any(result.any() for result in results.values())


@every_backend
@pytest.mark.parametrize("case", [Case(queries=0, keys=3), Case(batch=0)], ids=str)
def test_without_queries_the_output_is_empty(case: Case, backend: str):
    tensors, scorer = case.draw()
    assert neural_attention(**tensors, scorer=scorer, backend=backend).shape == tensors["query"].shape


def heads_last(query, key, value, scorer, function, **options):
    """Takes `[B, T, H, D]`, as models keep it, and sees one key and value head as several."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    key, value = (tensor.expand(-1, query.shape[1], -1, -1) for tensor in (key, value))
    assert not (query.is_contiguous() or key.is_contiguous() or value.is_contiguous())
    return function(query, key, value, scorer, **options)


@every_backend
@pytest.mark.parametrize("mode", ["replace", "residual"])
def test_strided_inputs(mode: str, backend: str):
    tensors, scorer = Case(heads=3, kv_heads=1, mode=mode).draw()
    tensors = {name: tensor.transpose(1, 2).contiguous() for name, tensor in tensors.items()}
    # takes every second number of a wider tensor, and a mask that is expanded from one row
    tensors["query"] = tensors["query"].repeat_interleave(2, dim=-1)[..., ::2]
    mask = (torch.rand(1, 1, 1, 7) < 0.7).expand(2, 3, 7, 7)
    exact = run_with_gradients(heads_last, tensors, scorer, torch.float64, function=literal_attention, attn_mask=mask)
    ours = run_with_gradients(
        heads_last, tensors, scorer, torch.float64, function=neural_attention, attn_mask=mask, backend=backend
    )
    assert_equals_oracle(ours, exact)


@every_backend
def test_expanded_output_gradient(backend: str):
    tensors, scorer = Case().draw()
    query = tensors.pop("query").requires_grad_()
    gradients = [
        torch.autograd.grad(attend(query, **tensors, scorer=scorer).sum(), query)[0]  # passes a gradient of strides zero
        for attend in (literal_attention, lambda *args, **kwargs: neural_attention(*args, **kwargs, backend=backend))
    ]
    torch.testing.assert_close(*gradients)


def with_projected_keys(query, key, value, scorer, **options):
    return neural_attention(query, scorer.project_keys(key), value, scorer, keys_projected=True, **options)


@every_backend
@pytest.mark.parametrize(
    "case",
    [
        Case(heads=4, kv_heads=2, is_causal=True, hidden_dims=(3, 2)),
        Case(heads=4, kv_heads=2, per_head=True, mask="float"),
        Case(queries=1, keys=33, mask="bool", mask_shape=(2, 1, 1, 33)),
    ],
    ids=str,
)
def test_projected_keys(case: Case, backend: str):
    tensors, scorer = case.draw()
    exact = run_with_gradients(literal_attention, tensors, scorer, torch.float64, **case.options)
    ours = run_with_gradients(with_projected_keys, tensors, scorer, torch.float64, **case.options, backend=backend)
    assert_equals_oracle(ours, exact)
    heads = case.heads if case.per_head else case.kv_heads or case.heads
    projected = scorer.project_keys(tensors["key"])
    assert projected.shape == (case.batch, heads, case.keys or case.queries, scorer.hidden_dims[0])
    assert scorer.bfloat16().project_keys(tensors["key"].bfloat16()).dtype == torch.float32


@every_backend
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("case", [Case(is_causal=True), Case(heads=4, kv_heads=2, mask="float")], ids=str)
def test_dropout(case: Case, dropout_p: float, backend: str):
    tensors, scorer = case.draw()
    torch.manual_seed(5)
    places = {"batch": range(case.batch), "heads": range(case.heads), "num_heads": case.heads, "rows": range(case.queries)}
    seed = draw_dropout_seed(dropout_p, torch.device("cpu"))
    multiplier = dropout_multiplier(seed, dropout_p, **places, num_columns=case.queries, dtype=torch.float64)
    exact = run_with_gradients(literal_attention, tensors, scorer, torch.float64, multiplier=multiplier, **case.options)
    torch.manual_seed(5)
    ours = run_with_gradients(
        neural_attention, tensors, scorer, torch.float64, dropout_p=dropout_p, backend=backend, **case.options
    )
    assert_equals_oracle(ours, exact)
    torch.manual_seed(6)
    other = neural_attention(**tensors, scorer=scorer, dropout_p=dropout_p, backend=backend, **case.options)
    assert torch.equal(other, ours["output"]) == (dropout_p == 1.0)


@every_backend
@pytest.mark.parametrize("case", [Case(queries=130), Case(queries=30, mode="residual", heads=4, kv_heads=2)], ids=str)
def test_later_tokens_leave_earlier_outputs_as_they_are(case: Case, backend: str):
    tensors, scorer = replace(case, is_causal=True).draw()
    before = neural_attention(**tensors, scorer=scorer, is_causal=True, backend=backend)
    for name in tensors:
        for position in (1, case.queries // 2, case.queries - 1):
            changed = {**tensors, name: tensors[name].clone()}
            changed[name][:, :, position] += 3.0
            after = neural_attention(**changed, scorer=scorer, is_causal=True, backend=backend)
            assert torch.equal(after[:, :, :position], before[:, :, :position])
            assert not torch.equal(after[:, :, position], before[:, :, position])


@every_backend
def test_gradcheck(backend: str):
    tensors, scorer = Case(queries=3, keys=4, heads=2, kv_heads=1, head_dim=3, mode="residual", mask="float").draw()
    tensors["attn_mask"][0, 0, 1] = float("-inf")
    parameters = {name: parameter for name, parameter in scorer.named_parameters() if parameter.requires_grad}
    finite = tensors["attn_mask"].nan_to_num(neginf=0.0)
    blocked = tensors["attn_mask"] == float("-inf")

    def attend(query, key, value, added, *weights):
        inputs = (query, key, value, added.masked_fill(blocked, float("-inf")), 0.0, True)
        called = torch.func.functional_call(
            scorer, dict(zip(parameters, weights, strict=True)), inputs, {"backend": backend}, strict=False
        )
        return called[0]

    inputs = [tensors["query"], tensors["key"], tensors["value"], finite, *(p.detach() for p in parameters.values())]
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    # checks one random direction where a call takes 0.1 seconds: the full Jacobian takes two minutes in the interpreter
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=backend == "triton")
    if backend == "reference":
        assert torch.autograd.gradgradcheck(attend, inputs)


@pytest.mark.parametrize(
    "change, message",
    (
        ({"query": torch.ones(2, 7, 8)}, r"`query` has shape \(2, 7, 8\); expected 4 dimensions"),
        ({"value": torch.ones(8)}, r"`value` has shape \(8,\); expected 4 dimensions"),
        ({"key": torch.ones(2, 2, 7, 8, dtype=torch.int64)}, "`key` has dtype torch.int64; expected a floating-point"),
        ({"query": torch.ones(2, 2, 7, 9)}, "`query` and `key` have sizes 9 and 8; this scorer was made for head_dim 8"),
        ({"key": torch.ones(2, 2, 7, 4)}, "`query` and `key` have sizes 8 and 4"),
        ({"query": torch.ones(3, 2, 7, 8)}, "all need the same batch size"),
        ({"value": torch.ones(2, 1, 7, 8)}, "key and value also the same heads and length"),
        ({"value": torch.ones(2, 2, 6, 8)}, "key and value also the same heads and length"),
        ({"query": torch.ones(2, 3, 7, 8)}, "`query` has 3 heads, which is no multiple of the 2 key and value heads"),
        ({"scorer": NeuralScorer(8, num_heads=4)}, "`query` has 2 heads; this scorer has weights for 4"),
        ({"dropout_p": 1.1}, "`dropout_p` is 1.1; expected a probability"),
        ({"dropout_p": -0.1}, "`dropout_p` is -0.1; expected a probability"),
        ({"dropout_p": float("nan")}, "`dropout_p` is nan; expected a probability"),
        ({"attn_mask": torch.ones(7, 7, dtype=torch.int64)}, "`attn_mask` has dtype torch.int64; expected bool"),
        ({"attn_mask": torch.ones(6, 7)}, r"`attn_mask` has shape \(6, 7\), which does not broadcast to \(2, 2, 7, 7\)"),
        ({"attn_mask": torch.ones(1, 2, 2, 7, 7)}, r"does not broadcast to \(2, 2, 7, 7\)"),
        ({"keys_projected": True}, r"with `keys_projected` this scorer expects \[B, H, Tq, 8\] and \[B, 2, Tk, 2\]"),
        (
            {"keys_projected": True, "scorer": NeuralScorer(8, mode="residual")},
            '`keys_projected` does not go with `mode="residual"`',
        ),
        ({"backend": "fast"}, "`backend` is 'fast'; it must be one of 'auto', 'native', 'triton'"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_argument(change: dict, message: str):
    arguments = {name: torch.ones(2, 2, 7, 8) for name in ("query", "key", "value")} | {"scorer": NeuralScorer(8)}
    neural_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        neural_attention(**(arguments | change))
