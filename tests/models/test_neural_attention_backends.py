"""The choice of a backend, and what torch.compile and torch.export make of it."""

import pytest
import torch
from torch import nn

from hf_neural_attention import neural_attention
from hf_neural_attention.models import neural_attention_backends
from hf_neural_attention.models.neural_attention_backends import choose_backend, run_backend
from hf_neural_attention.models.neural_attention_pytorch import PYTORCH_BACKENDS, Inputs
from hf_neural_attention.models.neural_attention_scorer import NeuralScorer
from tests.helpers.numerics import assert_equals_oracle, randomize, run_with_gradients


def draw(length: int = 12, **settings) -> tuple[dict[str, torch.Tensor], NeuralScorer]:
    scorer = NeuralScorer(16, proj_dim=4, **settings).double()
    randomize(scorer)
    return {name: torch.randn(2, 2, length, 16, dtype=torch.float64) for name in ("query", "key", "value")}, scorer


def test_auto_is_blockwise_where_the_package_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(neural_attention_backends, "BACKENDS", PYTORCH_BACKENDS)
    monkeypatch.setattr(neural_attention_backends, "asked_backend", None)
    tensors, scorer = draw()
    arguments = {"attn_mask": None, "dropout_p": 0.0, "dropout_seed": None, "is_causal": True}
    arguments |= {"residual_scale": None, "keys_projected": False}

    def run(backend: str | None) -> torch.Tensor:
        return run_backend(backend, *tensors.values(), scorer.weights(), **arguments)

    assert choose_backend(None, Inputs("cpu", torch.float64)) == ("blockwise", {})
    with pytest.raises(ValueError, match="`backend` is 'native'; it must be one of 'auto', 'blockwise', 'reference'"):
        run("native")
    for backend in (None, "auto"):
        assert torch.equal(run(backend), run("blockwise"))
    assert not torch.equal(run("reference"), run("blockwise"))


@pytest.mark.parametrize(
    ("backend", "compiler"),
    [
        ("reference", "aot_eager"),
        ("blockwise", "aot_eager"),
        pytest.param("blockwise", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager(backend: str, compiler: str):
    tensors, scorer = draw(mode="residual")
    tensors["attn_mask"] = torch.randn(12, 12, dtype=torch.float64)
    options = {"is_causal": True, "dropout_p": 0.2, "backend": backend}
    torch.compiler.reset()
    # keeps Inductor from drawing random numbers, and so the seed of dropout, by a generator of its own
    settings = {"fallback_random": True} if compiler == "inductor" else None
    compiled_attention = torch.compile(neural_attention, fullgraph=True, backend=compiler, options=settings)
    torch.manual_seed(3)
    eager = run_with_gradients(neural_attention, tensors, scorer, torch.float64, **options)
    torch.manual_seed(3)
    compiled = run_with_gradients(compiled_attention, tensors, scorer, torch.float64, **options)
    assert_equals_oracle(compiled, eager)


class Attention(nn.Module):
    def __init__(self, scorer: NeuralScorer):
        super().__init__()
        self.scorer = scorer

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return neural_attention(query, key, value, self.scorer, is_causal=True)


def test_export_has_plain_operators_only():
    tensors, scorer = draw()
    module = Attention(scorer)
    length = torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(module, tuple(tensors.values()), dynamic_shapes=({2: length},) * 3)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("aten" in name for name in called)
    assert not any("hf_neural_attention" in name for name in called)
    longer, _ = draw(length=30)
    torch.testing.assert_close(program.module()(*longer.values()), module(**longer))


def test_trace_has_plain_operators_only():
    tensors, scorer = draw()
    with pytest.warns((DeprecationWarning, torch.jit.TracerWarning)):
        traced = torch.jit.trace(Attention(scorer), tuple(tensors.values()), check_trace=False)
    assert "hf_neural_attention::" not in str(traced.inlined_graph)
    longer, _ = draw(length=30)
    torch.testing.assert_close(traced(**longer), Attention(scorer)(**longer))
