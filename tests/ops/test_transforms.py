"""The operation under `torch.func`, and gradients that wrappers of models wait for."""

import pytest
import torch
from torch.autograd import forward_ad

from hf_neural_attention import NeuralScorer, neural_attention
from hf_neural_attention.models import neural_attention_backends
from tests.helpers.numerics import CPU_BACKENDS, assert_equals_oracle, literal_attention
from tests.helpers.operation_cases import Case


# ignores what torch warns of its own forward-mode formulas, which are scripts
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
every_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)


@every_backend
@pytest.mark.parametrize("case", [Case(is_causal=True), Case(mode="residual", kv_heads=1, per_head=True)], ids=str)
def test_transforms_of_torch_func(case: Case, backend: str):
    tensors, scorer = case.draw()
    inputs = tuple(tensors.values())
    tangents = tuple(map(torch.randn_like, inputs))

    def attend(query, key, value):
        return neural_attention(query, key, value, scorer, is_causal=case.is_causal, backend=backend)

    def literal(query, key, value):
        return literal_attention(query, key, value, scorer, is_causal=case.is_causal)

    for ours, exact in zip(torch.func.jvp(attend, inputs, tangents), torch.func.jvp(literal, inputs, tangents), strict=True):
        assert exact.abs().max() > 0
        assert_equals_oracle({"output": ours}, {"output": exact})
    gradients = [torch.func.grad(lambda *each, f=f: f(*each).sin().sum(), (0, 1, 2))(*inputs) for f in (attend, literal)]
    for ours, exact in zip(*gradients, strict=True):
        assert_equals_oracle({"query": ours}, {"query": exact})
    batch = [tensor[:, None] for tensor in inputs]
    assert_equals_oracle({"output": torch.func.vmap(attend)(*batch)[:, 0]}, {"output": attend(*inputs)})


@every_backend
@pytest.mark.parametrize("trainable", (False, True))
def test_forward_mode_in_compiled_code(trainable: bool, backend: str):
    """A frozen scorer's operators would leave the derivative out without a word."""
    tensors, scorer = Case().draw()
    scorer.requires_grad_(trainable)
    query, key, value = tensors.values()
    tangent = torch.randn_like(query)

    def derivative(query: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda each: neural_attention(each, key, value, scorer, backend=backend), (query,), (tangent,))[
            1
        ]

    expected = derivative(query, tangent)
    assert expected.abs().max() > 0
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(derivative, backend="eager")(query, tangent), expected)


@pytest.mark.parametrize("mode", ("thin", "replace"))
def test_forward_mode_of_every_mode(mode: str):
    scorer = NeuralScorer(8, 3, mode=mode).double()
    query, key, value = torch.randn(3, 2, 2, 5, 8, dtype=torch.float64)

    def attend(value: torch.Tensor) -> torch.Tensor:
        return neural_attention(query, key, value, scorer, is_causal=True)

    torch.testing.assert_close(torch.func.jvp(attend, (value,), (value,))[1], attend(value))


@every_backend
def test_forward_mode_outside_torch_func(backend: str):
    """Of a frozen scorer too, whose operators would leave the derivative out without a word."""
    tensors, scorer = Case().draw()
    query, key, value = tensors.values()
    tangent = torch.randn_like(value)
    for trainable in (False, True):
        scorer.requires_grad_(trainable)
        with forward_ad.dual_level():
            moved = neural_attention(query, key, forward_ad.make_dual(value, tangent), scorer, backend=backend)
            found = forward_ad.unpack_dual(moved).tangent
        # compares with the output of the tangent, in which attention is linear
        torch.testing.assert_close(found, neural_attention(query, key, tangent, scorer, backend=backend))


def test_models_own_backends_under_torch_func():
    tensors, scorer = Case().draw()
    query, key, value = tensors.values()
    arguments = {"attn_mask": None, "dropout_p": 0.0, "dropout_seed": None, "is_causal": False, "residual_scale": None}

    def attend(value, backend="blockwise"):
        weights = scorer.weights()
        return neural_attention_backends.run_backend(backend, query, key, value, weights, **arguments, keys_projected=False)

    for backend in ("blockwise", None):
        _, moved = torch.func.jvp(lambda each, name=backend: attend(each, name), (value,), (value,))
        torch.testing.assert_close(moved, attend(value))  # compares with the output, which is linear in the values
    with pytest.raises(ValueError, match="`backend` is 'fast'"):
        torch.func.vmap(lambda each: attend(each, "fast"))(value[None])


@every_backend
@pytest.mark.parametrize("per_head", [False, True])
def test_a_thawed_last_bias_gets_a_gradient_of_zero(per_head: bool, backend: str):
    # checks a bias that changes nothing, since peft makes it trainable, and DDP then waits for its gradient
    tensors, scorer = Case(per_head=per_head).draw()
    expected = neural_attention(**tensors, scorer=scorer, backend=backend)
    scorer.requires_grad_(True)
    output = neural_attention(**tensors, scorer=scorer, backend=backend)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    assert scorer.linear3.bias.grad.abs().max() < 1e-13 and scorer.linear3.weight.grad.any()
    assert neural_attention(**tensors, scorer=scorer.bfloat16().double(), backend=backend).dtype == torch.float64
