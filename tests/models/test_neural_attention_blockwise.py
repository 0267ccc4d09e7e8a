"""What is the blockwise backend's own: its blocks, its memory, its registration with torch. Values: tests/ops."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_neural_attention import neural_attention
from hf_neural_attention.models import neural_attention_blockwise as blockwise
from hf_neural_attention.models.neural_attention_scorer import NeuralScorer
from tests.helpers.numerics import assert_equals_oracle, randomize, run_with_gradients


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 2, *[st.integers(1, 150)] * 2),
    width=st.integers(1, 40),
    is_causal=st.booleans(),
    block_numbers=st.sampled_from([1, 100, 10_000, 1 << 20]),
)
def test_blocks_cover_every_pair_once_and_are_small(sizes: tuple, width: int, is_causal: bool, block_numbers: int):
    covered = torch.zeros(sizes, dtype=torch.int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK_NUMBERS", block_numbers)
        for block in blockwise.cut_into_blocks(*sizes, width, is_causal):
            examples, heads, rows = (slice(r.start, r.stop) for r in (block.batch, block.heads, block.rows))
            covered[examples, heads, rows, : block.num_keys] += 1
            one_row = width * block.num_keys
            assert len(block.batch) * len(block.heads) * len(block.rows) * one_row <= max(block_numbers, one_row)
    needed = torch.ones(sizes[2:], dtype=torch.int).tril() if is_causal else torch.ones(sizes[2:], dtype=torch.int)
    assert covered.max() == 1
    assert (covered >= needed).all()


def test_the_wider_hidden_layer_bounds_a_block(monkeypatch: pytest.MonkeyPatch):
    widths = []

    def cut(batch: int, heads: int, queries: int, keys: int, width: int, is_causal: bool):
        widths.append(width)
        return cut_into_blocks(batch, heads, queries, keys, width, is_causal)

    cut_into_blocks = blockwise.cut_into_blocks
    monkeypatch.setattr(blockwise, "cut_into_blocks", cut)
    for hidden_dims in ((4, 2), (2, 64)):
        neural_attention(*torch.zeros(3, 1, 1, 5, 8), NeuralScorer(8, 2, hidden_dims), backend="blockwise")
    assert {*widths} == {4, 64}


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_results_do_not_depend_on_the_blocks(per_head: bool, is_causal: bool, monkeypatch: pytest.MonkeyPatch):
    batch, heads, queries, keys, proj_dim = 2, 4, 24, 20, 4
    scorer = NeuralScorer(8, proj_dim, mode="residual", num_heads=heads if per_head else None).double()
    randomize(scorer)
    tensors = {
        "query": torch.randn(batch, heads, queries, 8, dtype=torch.float64),
        "key": torch.randn(batch, 2, keys, 8, dtype=torch.float64),
        "value": torch.randn(batch, 2, keys, 5, dtype=torch.float64),
        "attn_mask": torch.randn(batch, 1, queries, keys, dtype=torch.float64),
    }
    results, counts = [], []
    for numbers in (1 << 20, 8_000, 4_000, 1_000, 1):
        monkeypatch.setattr(blockwise, "BLOCK_NUMBERS", numbers)
        counts.append(sum(1 for _ in blockwise.cut_into_blocks(batch, heads, queries, keys, proj_dim, is_causal)))
        torch.manual_seed(1)
        results.append(
            run_with_gradients(
                neural_attention, tensors, scorer, torch.float64, dropout_p=0.3, is_causal=is_causal, backend="blockwise"
            )
        )
    assert counts[0] == 1
    assert counts == sorted(set(counts))
    assert counts[-1] == batch * heads * queries
    for result in results[1:]:
        assert_equals_oracle(result, results[0])


def measure_memory(backend: str, length: int, folder: Path) -> tuple[int, int]:
    """Bytes of the largest allocation, and of all that lives at once, in forward and backward.

    The profiler sees inside operators, which a TorchDispatchMode does not.
    """
    tensors = [torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3)]
    scorer = NeuralScorer(16, proj_dim=8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        neural_attention(*tensors, scorer, is_causal=True, backend=backend).sum().backward()
    trace = folder / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    live = peak = largest = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak, largest = max(peak, live), max(largest, event["args"]["Bytes"])
    return largest, peak


def test_memory_grows_linearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blockwise, "BLOCK_NUMBERS", 1 << 17)
    lengths = (256, 512, 1024)
    ours = [measure_memory("blockwise", length, tmp_path) for length in lengths]
    reference = [measure_memory("reference", length, tmp_path) for length in lengths[:2]]
    pairs = [2 * length**2 * 4 for length in lengths]  # counts the bytes of a float32 number for every pair
    for (largest, _), every_pair in zip(reference, pairs, strict=False):
        assert largest >= 16 * every_pair  # counts the concatenation of q' and k'
    assert reference[1][1] > 3.5 * reference[0][1]
    assert ours[-1][0] <= 4 * blockwise.BLOCK_NUMBERS
    assert ours[-1][1] < pairs[-1]  # checks that all that lives at once takes less than one number for every pair
    assert ours[-1][1] < 2.2 * ours[-2][1] < 2.2**2 * ours[-3][1]


def operator_arguments(per_head: bool, residual: bool, masked: bool) -> dict:
    """Keyword arguments of `blockwise_forward`, all that can have gradients asking for them."""
    heads = 2 if per_head else 1

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    return {
        "u": draw(2, 2, 5, 4),
        "w": draw(2, 2, 7, 4),
        "value": draw(2, 2, 7, 3),
        "weight2": draw(heads, 3, 4),
        "bias2": draw(heads, 3),
        "weight3": draw(heads, 1, 3),
        "query": draw(2, 2, 5, 6) if residual else None,
        "key": draw(2, 2, 7, 6) if residual else None,
        "attn_mask": draw(2, 1, 5, 7) if masked else None,
        "dropout_seed": torch.tensor([11]) if masked else None,
        "sinks": draw(2) if masked else None,
        "dropout_p": 0.25 if masked else 0.0,
        "is_causal": not masked,
        "softcap": 2.0 if residual else None,
    }


@pytest.mark.parametrize(
    "arguments",
    [operator_arguments(False, False, False), operator_arguments(True, True, True)],
    ids=["shared", "per head, residual, mask, dropout"],
)
def test_operators_are_registered_as_torch_wants_them(arguments: dict):
    torch.library.opcheck(blockwise.blockwise_forward, (), arguments)
    detached = {
        name: argument.detach() if isinstance(argument, torch.Tensor) else argument for name, argument in arguments.items()
    }
    backward = {
        "grad_output": torch.randn(2, 2, 5, 3, dtype=torch.float64),
        "output": torch.empty(0, dtype=torch.float64),
        "statistics": torch.empty(0, dtype=torch.float64),
        "mask_needs_grad": arguments["attn_mask"] is not None,
        **detached,
    }
    torch.library.opcheck(blockwise.blockwise_backward, (), backward)


def test_double_backward_raises():
    query, key, value = (torch.randn(1, 1, 3, 8, requires_grad=True) for _ in range(3))
    scorer = NeuralScorer(8)
    for backend in ("reference", "blockwise"):
        output = neural_attention(query, key, value, scorer, backend=backend)
        (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
        if backend == "reference":
            gradient.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="no autograd formula was registered"):
                gradient.sum().backward()
