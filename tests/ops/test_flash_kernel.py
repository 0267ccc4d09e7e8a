"""The dot product's kernels that ours are counted beside do what they are there for."""

import importlib.util
import os

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention


pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: `make test-triton`"),
]


@pytest.mark.parametrize("tokens", [32, 70])
def test_it_is_attention(tokens: int):
    from benchmarks import flash_kernel

    heads, size, block = 2, 16, 32
    query, key, value = (torch.randn(heads, tokens, size, requires_grad=True) for _ in range(3))
    expected = scaled_dot_product_attention(query, key, value, is_causal=True)
    grad_output = torch.randn_like(expected)
    expected.backward(grad_output)

    grid = (heads * -(-tokens // block),)
    rest = (size**-0.5, tokens, size, block, block)
    inputs = [tensor.detach() for tensor in (query, key, value)]
    output, statistics = torch.empty_like(inputs[0]), torch.empty(heads, tokens)
    flash_kernel.flash_fwd_kernel[grid](*inputs, output, statistics, *rest)
    torch.testing.assert_close(output, expected.detach())

    given = (*inputs, grad_output, statistics, (output * grad_output).sum(-1))
    grad_query, grad_key, grad_value = (torch.empty_like(output) for _ in range(3))
    flash_kernel.flash_bwd_query_kernel[grid](*given, grad_query, *rest)
    flash_kernel.flash_bwd_key_kernel[grid](*given, grad_key, grad_value, *rest)
    for ours, tensor in zip((grad_query, grad_key, grad_value), (query, key, value), strict=True):
        torch.testing.assert_close(ours, tensor.grad)
