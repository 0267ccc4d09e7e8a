"""The Triton backend: when it can run, how kernels are cut, what compiles for GPUs that are not here; and on one that is.

The kernels themselves are tested in Triton's interpreter, by what has the mark `interpreter`.
"""

import importlib.util
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_neural_attention.models.neural_attention_masking import draw_dropout_seed
from hf_neural_attention.models.neural_attention_pytorch import Inputs
from hf_neural_attention.models.neural_attention_scorer import NeuralScorer
from hf_neural_attention.ops import triton as backend
from hf_neural_attention.ops.triton_blocks import choose_blocks, needed_bytes, padded, uses_cores
from tests.helpers.numerics import assert_no_worse_than_reference, literal_attention, run_with_gradients
from tests.helpers.operation_cases import CASES, Case
from tests.helpers.running import run_in, run_python
from tests.ops.test_low_precision import LOW_PRECISION


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")


def gpu(test):
    return pytest.mark.gpu(needs_gpu(test))


# Runs `python -m hf_neural_attention` with fewer tokens: two blocks of them
CHECK = """
import sys
import hf_neural_attention.ops.triton
assert "hf_neural_attention.ops.triton_kernels" not in sys.modules  # before one runs
from hf_neural_attention import __main__ as program
program.LENGTH = 40
status = program.main()
assert "hf_neural_attention.ops.triton_kernels" in sys.modules
sys.exit(status)
"""


@pytest.mark.slow
def test_the_interpreter_runs_where_it_is_asked_for_and_kernels_are_imported_then():
    assert re.search(r"^  triton +cpu +ok: ", run_python("-c", CHECK, TRITON_INTERPRET="1"), flags=re.MULTILINE)


def test_reasons_against():
    assert backend.unavailable_reason(Inputs("cuda", torch.int8, 64)).startswith("it computes in torch.float16")
    assert backend.unavailable_reason(Inputs("cuda", torch.float16, 257)) == "its heads have at most 256 numbers, not 257"
    if not INTERPRETED:
        assert "it runs on GPUs, and the tensors are on 'cpu'" in backend.unavailable_reason(Inputs("cpu", torch.float32, 64))
        assert "interpreter only" in backend.unavailable_reason(Inputs("cuda", torch.float64, 64))
        tensors, scorer = Case().draw()
        with pytest.raises(ValueError, match="runs on GPUs"):
            backend.triton_attention(*tensors.values(), scorer.weights())


@pytest.mark.parametrize("kernel", ["forward", "query", "key"])
@pytest.mark.parametrize("shared", [65536, 101376, 166912, 232448])
def test_blocks_fit(kernel: str, shared: int):
    for itemsize in (2, 4):
        for head_dim in (16, 64, 100, 128, 256):
            for query_dim in (0, head_dim):
                for hidden in ((2, 1), (8, 4), (16, 8)):
                    blocks = choose_blocks(kernel, query_dim, head_dim, hidden, itemsize, shared)
                    sizes = (padded(query_dim) if query_dim else 0, padded(head_dim))
                    assert needed_bytes(blocks, kernel, sizes, itemsize) <= shared or blocks[:2] == (16, 16)
    assert choose_blocks(kernel, 256, 256, (2, 1), 4, 0) == (16, 16, blocks.warps, 1)


def test_which_networks_are_for_tensor_cores():
    assert uses_cores((16, 8), 2, 32) and uses_cores((16, 2), 2, 32)
    assert not uses_cores((16, 8), 4, 32) and not uses_cores((16, 8), 2, 64)
    assert not uses_cores((2, 1), 2, 32) and not uses_cores((32, 8), 2, 32) and not uses_cores((16, 16), 2, 32)


@pytest.mark.parametrize(("hip", "lanes"), [(None, 32), ("6.4", 64)])
def test_all_of_amds_gpus_take_the_blocks_of_those_for_computing(hip, lanes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    assert backend.warp_lanes.__wrapped__(torch.device("cuda")) == lanes
    assert backend.warp_lanes.__wrapped__(torch.device("cpu")) == 32


def compile_ahead_of_time(folder: Path, *flags: str) -> list[dict]:
    card = folder / "card"
    variables = {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_INTERPRET": "0"}
    run_in(folder, "compile_triton_kernels.py", *flags, "--output", card, **variables)
    assert card.with_suffix(".md").read_text().count("\n| ") >= 3
    results = json.loads(card.with_suffix(".json").read_text())["results"]
    for row in results:
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert row["registers"] <= (512 if row["target"].startswith("gfx") else 255), row
    return results


@pytest.mark.slow
def test_kernels_compile_ahead_of_time(tmp_path: Path):
    results = compile_ahead_of_time(tmp_path, "--targets", "sm_90", "--dtypes", "bf16", "--modes", "replace", "--sizes", "0")
    assert len(results) == 3
    assert not any(row["spilled_bytes"] for row in results)


@pytest.mark.slow
def test_kernels_compile_ahead_of_time_for_all(tmp_path: Path):
    targets = ("--targets", "sm_80", "sm_90", "gfx942")
    results = compile_ahead_of_time(tmp_path, *targets, "--modes", "replace", "--sizes", "0", "2")
    assert len(results) == 3 * 3 * 3 * 2
    results = compile_ahead_of_time(tmp_path, *targets, "--dtypes", "bf16", "--modes", "masked", "--sizes", "0")
    assert len(results) == 3 * 3
    results = compile_ahead_of_time(tmp_path, *targets, "--dtypes", "bf16", "--modes", "capped", "--sizes", "0")
    assert len(results) == 3 * 3


def on_gpu(query, key, value, scorer, attn_mask=None, dropout_seed=None, sinks=None, **options):
    """The Triton backend on the GPU for inputs, weights and gradients on the CPU."""
    options.pop("scale", None)
    weights = type(scorer.weights())(*(weight.cuda() for weight in scorer.weights()))
    if attn_mask is not None:
        attn_mask = attn_mask.view((1,) * (4 - attn_mask.dim()) + attn_mask.shape).cuda()
    inputs = (tensor.cuda() for tensor in (query, key, value))
    if sinks is not None:
        options["sinks"] = sinks.cuda()
    return backend.triton_attention(*inputs, weights, attn_mask=attn_mask, dropout_seed=dropout_seed, **options).cpu()


def gpu_options(case: Case, scorer: NeuralScorer) -> dict:
    scale = scorer.head_dim**-0.5 if case.scale is None else case.scale
    options = {"is_causal": case.is_causal, "residual_scale": scale if case.mode == "residual" else None}
    return options if case.softcap is None else options | {"softcap": case.softcap}


def compare_on_gpu(case: Case, dtype: torch.dtype) -> None:
    ours, literal, exact = [], [], []
    for seed in range(5):
        torch.manual_seed(seed)
        tensors, scorer = case.draw()
        tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        scorer = scorer.to(dtype)
        exact.append(run_with_gradients(literal_attention, tensors, scorer, torch.float64, **case.options))
        literal.append(run_with_gradients(literal_attention, tensors, scorer, dtype, **case.options))
        ours.append(run_with_gradients(on_gpu, tensors, scorer, dtype, **gpu_options(case, scorer)))
    assert_no_worse_than_reference(ours, literal, exact, dtype)


@gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_output_and_every_gradient(name: str):
    compare_on_gpu(CASES[name], torch.float32)


@gpu
@pytest.mark.parametrize("name", LOW_PRECISION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gpu_no_worse_than_the_formula_in_the_same_dtype(dtype: torch.dtype, name: str):
    compare_on_gpu(LOW_PRECISION[name], dtype)


@gpu
@pytest.mark.parametrize("case", [Case(queries=130), Case(queries=130, mode="residual", heads=4, kv_heads=2)], ids=str)
def test_gpu_later_tokens_leave_earlier_outputs_as_they_are(case: Case):
    tensors, scorer = replace(case, is_causal=True).draw()
    tensors, scorer = {name: tensor.float() for name, tensor in tensors.items()}, scorer.float()
    options = gpu_options(replace(case, is_causal=True), scorer)
    before = on_gpu(**tensors, scorer=scorer, **options)
    for name in tensors:
        for position in (1, 65, 129):
            changed = {**tensors, name: tensors[name].clone()}
            changed[name][:, :, position] += 3.0
            after = on_gpu(**changed, scorer=scorer, **options)
            assert torch.equal(after[:, :, :position], before[:, :, :position])
            assert not torch.equal(after[:, :, position], before[:, :, position])


@gpu
def test_gpu_dropout_and_repeated_runs():
    tensors, scorer = Case(queries=150, head_dim=32, proj_dim=2, is_causal=True).draw()
    tensors, scorer = {name: tensor.float() for name, tensor in tensors.items()}, scorer.float()
    seed = draw_dropout_seed(0.3, torch.device("cpu"))
    arguments = {"is_causal": True, "dropout_p": 0.3}
    blockwise = run_with_gradients(run_blockwise, tensors, scorer, torch.float32, dropout_seed=seed, **arguments)
    ours = [
        run_with_gradients(on_gpu, tensors, scorer, torch.float32, dropout_seed=seed.cuda(), **arguments) for _ in range(2)
    ]
    for name, expected in blockwise.items():
        assert torch.equal(ours[0][name], ours[1][name]), name
        torch.testing.assert_close(ours[0][name], expected, rtol=1e-4, atol=1e-4)


def run_blockwise(query, key, value, scorer, **options):
    from hf_neural_attention.models.neural_attention_blockwise import blockwise_attention

    return blockwise_attention(query, key, value, scorer.weights(), **options)
