"""Every backend against the authors' formula, forward and every gradient."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from hf_neural_attention import neural_attention
from hf_neural_attention.models.neural_attention_masking import draw_dropout_seed, dropout_multiplier
from hf_neural_attention.models.neural_attention_scorer import NeuralScorer
from tests.helpers.numerics import assert_equals_oracle, literal_attention, run_with_gradients
from tests.helpers.operation_cases import CASES, Case, every_backend


pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
@pytest.mark.parametrize("case", [Case(), Case(mode="residual", per_head=True)], ids=str)
def test_sinks_that_weigh_nothing(case: Case, backend: str):
    """Also in rows without keys, where they are all that there is."""
    tensors, scorer = replace(case, mask="bool", mask_shape=(2, 1, 7, 7)).draw()
    tensors["attn_mask"][0, 0, 3] = False
    plain = run_with_gradients(neural_attention, tensors, scorer, torch.float64, **case.options, backend=backend)
    for sink in (-torch.inf, -1e4):
        with_sinks = tensors | {"sinks": torch.full((case.heads,), sink, dtype=torch.float64)}
        results = run_with_gradients(neural_attention, with_sinks, scorer, torch.float64, **case.options, backend=backend)
        assert not results.pop("sinks").any()
        for name, result in plain.items():
            torch.testing.assert_close(results[name], result, msg=name)


@every_backend
@pytest.mark.parametrize("queries", [1, 20])
def test_a_nan_in_a_mask_comes_out(queries: int, backend: str):
    tensors, scorer = Case(queries=queries, keys=20, mask="float", mask_shape=(queries, 20)).draw()
    tensors["attn_mask"] = torch.zeros(queries, 20, dtype=torch.float64)
    tensors["attn_mask"][0, 3] = torch.nan
    output = neural_attention(**tensors, scorer=scorer, backend=backend)
    assert output[:, :, 0].isnan().all() and output[:, :, 1:].isfinite().all()


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
        (
            {"sinks": torch.ones(3)},
            r"`sinks` has shape \(3,\) and dtype torch.float32; expected a logit per query head, \[2\]",
        ),
        ({"softcap": 0.0}, "`softcap` is 0.0; expected a number above 0"),
        ({"backend": "fast"}, "`backend` is 'fast'; it must be one of 'auto', 'native', 'triton'"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_argument(change: dict, message: str):
    arguments = {name: torch.ones(2, 2, 7, 8) for name in ("query", "key", "value")} | {"scorer": NeuralScorer(8)}
    neural_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        neural_attention(**(arguments | change))
