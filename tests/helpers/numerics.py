"""What the operation is measured against: the authors' formula written out a second time, and how close is close."""

import copy
import math
from collections.abc import Callable
from statistics import median

import torch
from torch import nn
from torch.nn.functional import linear, relu

from hf_neural_attention.models.neural_attention_backends import BACKENDS
from hf_neural_attention.models.neural_attention_pytorch import Inputs


# lists what can run here: without a C++ compiler the native kernel's tests drop out (tests/ops/test_native.py says so)
CPU_BACKENDS = [name for name in BACKENDS if BACKENDS[name].reason_against(Inputs("cpu", torch.float64)) is None]

Tensors = dict[str, torch.Tensor]
Attend = Callable[..., torch.Tensor]  # (query, key, value, scorer, attn_mask, **options) -> output


def literal_scores(query: torch.Tensor, key: torch.Tensor, scorer: nn.Module) -> torch.Tensor:
    """Scores of every pair as the authors' released code computes them, one head at a time, from the parameters' names."""
    parameters = dict(scorer.named_parameters())

    def layer(name: str, inputs: torch.Tensor, head: int) -> torch.Tensor:
        weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        return linear(inputs, weight, bias) if weight.dim() == 2 else linear(inputs, weight[head], bias[head])

    scores = []
    for head in range(query.shape[1]):
        q = layer("q_proj", query[:, head], head).unsqueeze(2).expand(-1, -1, key.shape[2], -1)
        k = layer("k_proj", key[:, head], head).unsqueeze(1).expand(-1, query.shape[2], -1, -1)
        hidden = relu(layer("linear1", torch.cat((q, k), dim=-1), head))
        hidden = relu(layer("linear2", hidden, head))
        scores.append(layer("linear3", hidden, head).squeeze(-1))
    return torch.stack(scores, dim=1)


def literal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scorer: nn.Module,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    multiplier: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The oracle: Neural Attention in whatever dtype it is given. `multiplier` is what dropout does to the weights."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = literal_scores(query, key, scorer)
    if scorer.mode == "residual":
        products = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        scores = scores + (products if softcap is None else softcap * torch.tanh(products / softcap))
    attends = torch.ones(scores.shape, dtype=torch.bool)
    if is_causal:
        attends = attends.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attends = attends & attn_mask
    elif attn_mask is not None:
        attends = attends & (attn_mask > float("-inf"))
        scores = scores + attn_mask.masked_fill(attn_mask == float("-inf"), 0)
    empty = ~attends.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~attends & ~empty, float("-inf"))
    if sinks is None:
        weights = scores.softmax(dim=-1).to(scores.dtype)
    else:  # divides by one exponential more
        total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sinks.view(1, -1, 1, 1).to(scores.dtype))
        weights = torch.exp(scores - total)
    weights = weights.masked_fill(empty, 0)
    if multiplier is not None:
        weights = weights * multiplier
    return weights @ value


@torch.no_grad()
def randomize(scorer: nn.Module) -> None:
    """Draws every parameter, so that biases count, both ReLUs cut, and scores spread by more than one."""
    for name, parameter in scorer.named_parameters():
        fan_in = parameter.shape[-1] if name.endswith("weight") else 1
        nn.init.normal_(parameter, std=(0.5 if name.endswith("bias") else 1.5) / math.sqrt(fan_in))
    scorer.linear2.bias.abs_()  # keeps a second hidden layer of a single unit from being dead
    scorer.linear3.weight.copy_(scorer.linear3.weight.abs().clamp_min(0.5) * scorer.linear3.weight.sign())


def run_with_gradients(
    attend: Attend, tensors: Tensors, scorer: nn.Module, dtype: torch.dtype, autocast: bool = False, **options
) -> Tensors:
    """Output, and the gradients of all floating-point inputs and trainable parameters, by name."""
    scorer = copy.deepcopy(scorer).to(dtype)
    inputs = {
        name: tensor.detach().to(dtype).requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.is_floating_point()}
    wanted |= {name: parameter for name, parameter in scorer.named_parameters() if parameter.requires_grad}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = attend(scorer=scorer, **inputs, **options)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradients = torch.autograd.grad(output, list(wanted.values()), direction.to(output.dtype))
    return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}


def assert_equals_oracle(ours: Tensors, exact: Tensors) -> None:
    """Float64 results that differ by rounding alone."""
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        assert ours[name].shape == expected.shape, name
        assert not ours[name].isnan().any(), f"{name} has NaN"
        error = (ours[name] - expected).abs().max().item() if expected.numel() else 0.0
        bound = 1e-11 * max(1.0, expected.abs().max().item()) if expected.numel() else 0.0
        assert error <= bound, f"{name}: differs by {error:.3g}, allowed {bound:.3g}"


def typical_errors(results: list[Tensors], exact: list[Tensors]) -> dict[str, float]:
    """Median over draws of the largest error, by name."""
    return {
        name: median((a[name].double() - b[name]).abs().max().item() for a, b in zip(results, exact, strict=True))
        for name in exact[0]
    }


def assert_no_worse_than_reference(
    ours: list[Tensors], same_dtype_reference: list[Tensors], exact: list[Tensors], dtype: torch.dtype
) -> None:
    """max|ours - exact| <= 2 max|reference in the same dtype - exact| + one rounding of the largest number.

    The rule of flash-attention's and flash-linear-attention's tests, here of the median over several draws: in a single
    one, a pair whose ReLU rounding has opened or closed on one side only moves the largest error by a factor of 100.
    """
    allowed = typical_errors(same_dtype_reference, exact)
    for name, error in typical_errors(ours, exact).items():
        bound = 2 * allowed[name] + torch.finfo(dtype).eps * median(draw[name].abs().max().item() for draw in exact)
        assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"
