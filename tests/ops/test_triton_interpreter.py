"""The Triton kernels in Triton's interpreter, beyond what is asked of every backend.

The interpreter must be chosen before Triton is imported, and then holds for the whole process: `make test-triton` runs these
tests, and the cases of every backend that are Triton's, with TRITON_INTERPRET=1. They all have the mark `interpreter`.
"""

import os

import pytest
import torch

from hf_neural_attention.functional import neural_attention
from hf_neural_attention.ops import triton as backend
from hf_neural_attention.ops.triton_blocks import Blocks, choose_blocks, uses_cores
from tests.helpers.numerics import assert_equals_oracle, literal_attention, run_with_gradients
from tests.helpers.operation_cases import Case
from tests.helpers.operators import check_operators


pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: `make test-triton`"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def triton(*args, **arguments) -> torch.Tensor:
    return neural_attention(*args, **arguments, backend="triton")


@pytest.mark.parametrize("case", [Case(queries=50, keys=70, is_causal=True), Case(queries=40, mode="residual", mask="bool")])
def test_little_shared_memory(case: Case, monkeypatch: pytest.MonkeyPatch):
    tensors, scorer = case.draw()
    exact = run_with_gradients(literal_attention, tensors, scorer, torch.float64, **case.options)
    few = 12_000
    monkeypatch.setattr(backend, "shared_bytes", lambda device: few)
    sizes = (8 if case.mode == "residual" else 0, 8, (4, 2), 8)
    small, large = (choose_blocks("forward", *sizes, shared) for shared in (few, 1 << 20))
    assert small != large
    assert_equals_oracle(run_with_gradients(triton, tensors, scorer, torch.float64, **case.options), exact)


def test_features_that_lie_far_apart(monkeypatch: pytest.MonkeyPatch):
    case = Case(queries=40, mode="residual")
    tensors, scorer = case.draw()
    tensors = {name: tensor.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0) for name, tensor in tensors.items()}
    exact = run_with_gradients(literal_attention, tensors, scorer, torch.float64, **case.options)
    monkeypatch.setattr(backend, "MAX_ROW", 8)
    assert backend.within_reach(tensors["query"]).stride() != tensors["query"].stride()
    assert_equals_oracle(run_with_gradients(triton, tensors, scorer, torch.float64, **case.options), exact)


@pytest.mark.parametrize("keys", [16, 32, 64, 128])
def test_dropout_is_the_same_for_all_block_sizes(keys: int, monkeypatch: pytest.MonkeyPatch):
    tensors, scorer = Case(batch=1, queries=17, keys=150, proj_dim=1).draw()
    torch.manual_seed(3)
    expected = neural_attention(**tensors, scorer=scorer, dropout_p=0.4, backend="blockwise")
    monkeypatch.setattr(backend, "choose_blocks", lambda *arguments: Blocks(16, keys, 4, 1))
    torch.manual_seed(3)
    ours = triton(**tensors, scorer=scorer, dropout_p=0.4)
    assert_equals_oracle({"output": ours}, {"output": expected})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dropout_on_tensor_cores(dtype: torch.dtype):
    """The same pairs are dropped as elsewhere, forward and backward, and what is left is as near as half precision is."""
    tensors, scorer = Case(batch=1, queries=70, head_dim=16, proj_dim=16, is_causal=True).draw()
    assert uses_cores(scorer.hidden_dims, dtype.itemsize, 32)
    results = []
    for name in ("blockwise", "triton"):
        torch.manual_seed(3)
        options = {"dropout_p": 0.4, "is_causal": True, "backend": name}
        results.append(run_with_gradients(neural_attention, tensors, scorer, dtype, **options))
    for name, expected in results[0].items():
        error = (results[1][name].double() - expected.double()).norm() / expected.double().norm()
        assert error < 20 * torch.finfo(dtype).eps, (name, error)


def test_mask_of_the_lowest_number():
    # makes a row's largest score so low that the logarithm of its sum would vanish beside it
    tensors, scorer = Case(queries=5, mask="float").draw()
    tensors["attn_mask"] = tensors["attn_mask"].float().nan_to_num(neginf=0.0)
    tensors["attn_mask"][:, :, 2] = torch.finfo(torch.float32).min
    results = [
        run_with_gradients(neural_attention, tensors, scorer, torch.float32, backend=name) for name in ("blockwise", "triton")
    ]
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-5)


# Takes one unit and one query as small as can be, and all arguments that may be None
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, queries=3, keys=4, head_dim=6, value_dim=3, proj_dim=2, is_causal=True),
        Case(
            batch=1, queries=3, keys=4, head_dim=6, value_dim=3, proj_dim=2, per_head=True, mode="residual", mask="float",
            mask_shape=(1, 3, 4),
        ),
    ],
    ids=["least", "everything"],
)  # fmt: skip
def test_operators_are_registered_as_torch_wants_them(case: Case):
    tensors, scorer = case.draw()
    options = {"dropout_p": 0.25 if case.mask else 0.0, "is_causal": case.is_causal}
    check_operators(backend, "triton", triton, tensors, scorer, torch.float64, **options)


def test_under_torch_compile():
    tensors, scorer = Case(batch=1, queries=5, is_causal=True).draw()
    compiled = torch.compile(neural_attention, fullgraph=True, backend="aot_eager")
    results = [
        run_with_gradients(attend, tensors, scorer, torch.float64, is_causal=True, backend="triton")
        for attend in (neural_attention, compiled)
    ]
    assert_equals_oracle(results[1], results[0])
