"""The native CPU kernel, beyond what `test_neural_attention.py` asks of every backend: the borders of its tiles, blocks and
vectors, numbers far from 1, threads, memory, and its operators.

`HF_NEURAL_ATTENTION_CXXFLAGS` compiles other paths for older processors. What these change has the mark `instruction_set`,
here and in the tests of every backend, and runs again in a process of its own.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_neural_attention.functional import neural_attention
from hf_neural_attention.models.neural_attention_backends import BACKENDS
from hf_neural_attention.models.neural_attention_masking import draw_dropout_seed, dropout_multiplier
from hf_neural_attention.models.neural_attention_pytorch import Inputs
from hf_neural_attention.models.neural_attention_scorer import NeuralScorer
from hf_neural_attention.ops import native as backend
from hf_neural_attention.ops.native_build import load_library
from hf_neural_attention.ops.native_interface import BackwardResult, Problem, pack
from tests.helpers.numerics import assert_equals_oracle, assert_no_worse_than_reference, literal_attention, run_with_gradients
from tests.helpers.operation_cases import Case
from tests.helpers.operators import check_operators
from tests.helpers.running import run_python
from tests.ops.test_neural_attention import compare_with_oracle, with_projected_keys


WHY_NOT = BACKENDS["native"].reason_against(Inputs("cpu", torch.float64))

pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no native kernel: {WHY_NOT}"),
    pytest.mark.usefixtures("poisoned_memory"),
]
# Marks what runs for older processors too
portable = pytest.mark.instruction_set


def native(*args, **arguments) -> torch.Tensor:
    return neural_attention(*args, **arguments, backend="native")


# Takes sizes around the kernel's: blocks of 32 and 64 queries, tiles of 64 and 128 keys, vectors of 2 to 16 numbers
CASES = {
    **{f"{length} tokens": Case(batch=1, queries=length, is_causal=True) for length in (63, 64, 65, 127, 128, 129)},
    "129 queries, 63 keys": Case(batch=1, queries=129, keys=63, mask="float", mask_shape=(1, 129, 63)),
    "63 queries, 200 keys": Case(batch=1, queries=63, keys=200, is_causal=True, mask="bool"),
    **{
        f"layers of {first} and {second}": Case(batch=1, queries=70, hidden_dims=(first, second), is_causal=True)
        for first, second in ((1, 1), (2, 2), (5, 3), (8, 4), (4, 5), (16, 8), (3, 16), (32, 17))
    },
    **{
        f"residual, head {size}": Case(batch=1, queries=70, head_dim=size, value_dim=value, mode="residual", is_causal=True)
        for size, value in ((1, 1), (24, 60), (60, 24), (64, 64), (100, 7), (128, 100))
    },
    "everything": Case(
        heads=4, kv_heads=2, queries=130, keys=140, head_dim=20, value_dim=12, hidden_dims=(6, 3), per_head=True,
        mode="residual", scale=0.3, is_causal=True, mask="float", mask_shape=(2, 1, 130, 140),
    ),
}  # fmt: skip
LONG_CASES = {
    "a thousand tokens": Case(batch=1, heads=1, queries=1000, proj_dim=2, is_causal=True),
    "proj_dim 32": Case(batch=1, queries=130, head_dim=128, proj_dim=32),
    "groups of 4": Case(heads=8, kv_heads=2, queries=65, keys=130, mask="bool", mask_shape=(2, 1, 1, 130)),
}


@portable
@pytest.mark.parametrize("name", CASES)
def test_borders_of_tiles_blocks_and_vectors(name: str):
    compare_with_oracle(CASES[name], "native")


@portable
@pytest.mark.parametrize("name", LONG_CASES)
def test_borders_of_tiles_blocks_and_vectors_in_long_cases(name: str):
    compare_with_oracle(LONG_CASES[name], "native")


@portable
@pytest.mark.parametrize("case", [Case(heads=4, kv_heads=2), Case(heads=4, kv_heads=2, per_head=True)], ids=str)
def test_decoding_with_projected_keys(case: Case):
    case = replace(case, queries=1, keys=300, mask="bool", mask_shape=(2, 1, 1, 300))
    tensors, scorer = case.draw()
    exact = run_with_gradients(literal_attention, tensors, scorer, torch.float64)
    assert_equals_oracle(run_with_gradients(with_projected_keys, tensors, scorer, torch.float64, backend="native"), exact)


@portable
@pytest.mark.parametrize("offset", [0, 100])
def test_dropout_across_tiles(offset: int):
    tensors, scorer = Case(queries=70, keys=300, head_dim=12, mask="bool").draw()
    tensors["attn_mask"][..., :offset] = False
    torch.manual_seed(5)
    places = {"batch": range(2), "heads": range(2), "num_heads": 2, "rows": range(70), "num_columns": 300}
    multiplier = dropout_multiplier(draw_dropout_seed(0.3, torch.device("cpu")), 0.3, **places, dtype=torch.float64)
    exact = run_with_gradients(literal_attention, tensors, scorer, torch.float64, multiplier=multiplier)
    torch.manual_seed(5)
    assert_equals_oracle(run_with_gradients(native, tensors, scorer, torch.float64, dropout_p=0.3), exact)


def left_padded(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (keys >= 270).expand(300, 300)


def documents(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return queries // 75 == keys // 75


def window(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (queries - keys).abs() < 20


@portable
@pytest.mark.parametrize("mask", [left_padded, documents, window])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_tiles_that_a_mask_empties(mask, kind: str):
    tensors, scorer = Case(batch=1, queries=300).draw()
    attends = mask(torch.arange(300)[:, None], torch.arange(300))
    attends = attends[:1] if mask is left_padded else attends
    tensors["attn_mask"] = attends if kind == "bool" else torch.zeros(attends.shape).masked_fill(~attends, -math.inf)
    exact = run_with_gradients(literal_attention, tensors, scorer, torch.float64)
    assert_equals_oracle(run_with_gradients(native, tensors, scorer, torch.float64), exact)


@pytest.mark.parametrize("shape", [(1, 300), (300, 300)])
def test_tiles_that_a_mask_empties_are_not_read(shape: tuple[int, int]):
    tensors, scorer = Case(batch=1, queries=300).draw()
    attn_mask = torch.ones(shape, dtype=torch.bool)
    attn_mask[:, :260] = False
    expected = run_with_gradients(native, {**tensors, "attn_mask": attn_mask}, scorer, torch.float64)
    tensors["value"][:, :, :256] = torch.nan
    ours = run_with_gradients(native, {**tensors, "attn_mask": attn_mask}, scorer, torch.float64)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    tensors["key"][:, :, :256] = torch.inf  # leaves gradients out, since that of its own weight gets inf * 0, a NaN
    assert torch.equal(native(**tensors, scorer=scorer, attn_mask=attn_mask), expected["output"])
    assert native(**tensors, scorer=scorer).isnan().all()


floats = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def where_nan(name: str, dtype: torch.dtype) -> torch.Tensor:
    """Which outputs are NaN, `[70, 8]`, where token 43 has one in its query, key or value."""
    tensors, scorer = Case(batch=1, heads=1, queries=70, is_causal=True).draw()
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    tensors[name][:, :, 43, 3] = torch.nan
    return native(**tensors, scorer=scorer.to(dtype), is_causal=True).isnan().squeeze()


@portable
@floats
def test_nan_in_nan_out(dtype: torch.dtype):
    assert where_nan("query", dtype).all(dim=1).nonzero().tolist() == [[43]]
    assert where_nan("key", dtype)[43:].all()
    in_value = where_nan("value", dtype)
    assert in_value[43:, 3].all() and not in_value[:, :3].any()


@portable
@floats
def test_nan_of_a_later_key_stays_there(dtype: torch.dtype):
    assert not where_nan("key", dtype)[:43].any()


@portable
@pytest.mark.parametrize(
    "name", ["q_proj.bias", "k_proj.weight", "linear1.weight", "linear2.weight", "linear2.bias", "linear3.weight"]
)
def test_nan_in_weights(name: str):
    tensors, scorer = Case(queries=20, hidden_dims=(4, 3)).draw()
    scorer.get_parameter(name).data.fill_(torch.nan)
    assert native(**tensors, scorer=scorer).isnan().all()


def compare_outputs_in_float32(case: Case, factor: float = 1.0, **changes: torch.Tensor) -> None:
    ours, literal, exact = [], [], []
    for seed in range(9):
        torch.manual_seed(seed)
        tensors, scorer = case.draw()
        tensors = {name: tensor.float() for name, tensor in (tensors | changes).items()}
        scorer.linear3.weight.data *= factor
        for results, attend, dtype in (
            (ours, native, torch.float32),
            (literal, literal_attention, torch.float32),
            (exact, literal_attention, torch.float64),
        ):
            found = run_with_gradients(attend, tensors, scorer.float(), dtype, scale=factor, is_causal=case.is_causal)
            results.append({"output": found["output"]})
    assert_no_worse_than_reference(ours, literal, exact, torch.float32)


@portable
@pytest.mark.parametrize("factor", [1e-6, 1e2, 1e3, 1e4])
def test_scores_of_any_size(factor: float):
    case = Case(batch=1, queries=70, head_dim=16, mode="residual", is_causal=True)
    tensors, scorer = case.draw()
    scorer.linear3.weight.data *= factor
    ours, exact = (
        run_with_gradients(attend, tensors, scorer, torch.float64, scale=factor, is_causal=True)
        for attend in (native, literal_attention)
    )
    # scales the bound with the scores: a gradient is a difference of numbers as large, even where it is next to nothing
    size = max(1.0, factor)
    ours, exact = (
        {name: found if name == "output" else found / size for name, found in each.items()} for each in (ours, exact)
    )
    assert_equals_oracle(ours, exact)
    compare_outputs_in_float32(case, factor)


@portable
def test_backward_has_forward_s_weights_far_from_zero():
    # offsets all scores, since a softmax does not see it and training does not hold it down; rows then move their pivots
    tensors, scorer = Case(batch=1, heads=8, queries=140, head_dim=64, proj_dim=16).draw()
    scorer.reset_parameters()
    weight = scorer.linear3.weight
    scorer.linear2.bias.data.copy_(-1000 * weight[0] / weight.square().sum())
    query, key, value = (tensor.float() for tensor in tensors.values())
    value = torch.ones_like(value).requires_grad_()
    output = native(query[:, :, :1], key, value, scorer.float())
    (gradient,) = torch.autograd.grad(output.sum(), value)  # finds the one query's weights, once per number of a value
    assert (output - 1).abs().max() < 1e-6 and (gradient.sum(2) - 1).abs().max() < 1e-6


@portable
@pytest.mark.parametrize("added", [torch.finfo(torch.float32).min, -1e9, -1e4, 1e4, 1e9, 1e30])
@pytest.mark.parametrize("masked", [100, 140])
def test_masks_of_large_numbers(masked: int, added: float):
    case, attn_mask = Case(batch=1, queries=140), torch.zeros(2, 1, 140)
    attn_mask[1, :, :masked] = added  # masks for one head only
    tensors, scorer = case.draw()
    without = native(**tensors, scorer=scorer)
    ours, exact = (
        run_with_gradients(attend, {**tensors, "attn_mask": attn_mask}, scorer, torch.float64)
        for attend in (native, literal_attention)
    )
    for name, expected in exact.items():  # allows for float64, which has seven decimal places beside 1e9
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours["output"][:, 0], without[:, 0])
    assert torch.allclose(ours["output"][:, 1], without[:, 1], atol=1e-2) == (masked == 140 and abs(added) < 1e12)
    compare_outputs_in_float32(case, attn_mask=attn_mask)


def test_mixed_dtypes():
    tensors, scorer = Case(queries=20).draw()
    key, value = tensors["key"].float(), tensors["value"].to(torch.float8_e4m3fn)
    inputs = {"query": tensors["query"].bfloat16(), "key": key, "value": value, "scorer": scorer.float()}
    attn_mask = torch.randn(20, 20).to(torch.float8_e5m2)
    output = native(**inputs, attn_mask=attn_mask)
    assert output.dtype == torch.bfloat16
    blockwise = neural_attention(**inputs, attn_mask=attn_mask, backend="blockwise")
    torch.testing.assert_close(output, blockwise)


@pytest.mark.parametrize("case", [Case(), Case(mode="residual", per_head=True, heads=4, kv_heads=2, mask="float")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operators_are_registered_as_torch_wants_them(case: Case, dtype: torch.dtype):
    tensors, scorer = case.draw()
    options = {"dropout_p": 0.25 if case.mask else 0.0, "is_causal": True}
    check_operators(backend, "native", native, tensors, scorer, dtype, **options)


@pytest.mark.parametrize(
    ("compiler", "dynamic"),
    [("aot_eager", False), ("aot_eager", True), pytest.param("inductor", False, marks=pytest.mark.slow)],
)
def test_under_torch_compile(compiler: str, dynamic: bool):
    torch.compiler.reset()
    compiled = torch.compile(neural_attention, fullgraph=True, dynamic=dynamic, backend=compiler)
    for queries in (5, 9):
        tensors, scorer = Case(batch=1, queries=queries, mode="residual", mask="float", is_causal=True).draw()
        results = [
            run_with_gradients(attend, tensors, scorer, torch.float64, is_causal=True, backend="native")
            for attend in (neural_attention, compiled)
        ]
        assert_equals_oracle(results[1], results[0])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_what_cannot_be_allocated_is_an_error(monkeypatch):
    sizes = {"batch": 1, "heads": 1, "kv_heads": 1, "keys": 64, "head_dim": 8, "value_dim": 8, "hidden1": 2, "hidden2": 1}
    problem = pack(Problem, queries=1 << 50, weight_sets=1, num_threads=1, **sizes)
    library = load_library(torch.float32)
    assert library.backward(problem, pack(BackwardResult)) == 1

    class Full:
        backward = staticmethod(lambda *_: 1)

    query, key, value = torch.randn(3, 1, 1, 8, 8).requires_grad_().unbind()
    output = neural_attention(query, key, value, NeuralScorer(8), backend="native")
    monkeypatch.setattr("hf_neural_attention.ops.native.library_for", lambda _: Full())
    with pytest.raises(RuntimeError, match="cannot allocate memory for its backward pass: take a smaller batch"):
        output.sum().backward()


@pytest.mark.parametrize("count", [1, 2])
def test_same_bits_from_run_to_run(count: int, threads):
    case = Case(heads=4, kv_heads=2, queries=200, head_dim=32, mode="residual", mask="float", is_causal=True)
    tensors, scorer = case.draw()
    threads(count)
    results = []
    for _ in range(3):
        torch.manual_seed(1)
        results.append(run_with_gradients(native, tensors, scorer, torch.float32, dropout_p=0.1, is_causal=True))
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected) and torch.equal(results[2][name], expected), name


THREADS = """
import os, torch
from hf_neural_attention import NeuralScorer, neural_attention

def count():
    return len(os.listdir("/proc/self/task"))

scorer, (query, key, value) = NeuralScorer(8), torch.randn(3, 1, 2, 200, 8)
before = count()
for number in (1, 2, 4):
    torch.set_num_threads(number)
    neural_attention(query, key, value, scorer, backend="native").sum().backward()
    print(count() - before)
torch.randn(1 << 20).exp()
print(count() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in Linux' way")
@pytest.mark.slow
def test_threads_are_as_many_as_torch_has_and_the_same_ones():
    assert run_python("-c", THREADS, OMP_NUM_THREADS="1").split() == ["0", "1", "3", "3"]


@pytest.mark.parametrize("num_pairs, expected", ((0, 1), (5_000, 1), (10_000, 2), (100_000, 3)))
def test_little_work_is_given_few_threads(num_pairs: int, expected: int):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert backend.num_threads_for(num_pairs) == expected
    finally:
        torch.set_num_threads(threads)


MEMORY = """
import resource, sys, torch
from hf_neural_attention import NeuralScorer, neural_attention

def step(length, heads):
    query, key, value = torch.randn(3, 1, heads, length, 64).requires_grad_().unbind()
    neural_attention(query, key, value, scorer, is_causal=True, backend="native").sum().backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

scorer = NeuralScorer(64)
step(64, 1)
before = peak()
step(16384, int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("heads", "most"),
    [
        (1, 16384**2),  # allows fewer bytes than a bool for every pair of one head
        (12, 2**30),
    ],
)
@pytest.mark.slow
def test_memory_of_forward_and_backward_grows_with_the_length_alone(heads: int, most: int):
    assert int(run_python("-c", MEMORY, str(heads))) < most


newer_here = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs an x86 processor with AVX2"
)


def run_compiled_with(flags: str, cache: Path, marks: str) -> None:
    """In a process of its own, what has such marks. The flags come after -march=native, so that they hold."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", marks]
    variables = {"HF_NEURAL_ATTENTION_CXXFLAGS": flags, "HF_NEURAL_ATTENTION_CACHE": str(cache)}
    assert " passed" in run_python("-m", "pytest", *options, Path(__file__).parent, **variables)


@newer_here
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "marks"),
    [
        pytest.param("-march=x86-64-v3", "instruction_set", id="AVX2"),
        pytest.param("-march=x86-64", 'instruction_set and not instruction_set(needs="AVX2")', id="SSE2"),
    ],
)
def test_on_older_processors(flags: str, marks: str, tmp_path: Path):
    run_compiled_with(flags, tmp_path, marks)
