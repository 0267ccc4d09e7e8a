"""The operation in fused Triton kernels: an online softmax in forward, everything computed again in backward.

Nothing of size `Tq * Tk` is kept, but for the gradient of a float mask. This file imports Triton when the first kernel starts.
Kernels: `triton_forward.py` and `triton_backward.py`, of the pieces in `triton_kernels.py` and `triton_gradients.py`; how they
are cut: `triton_blocks.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch

from ..models.neural_attention_blockwise import without_autocast
from ..models.neural_attention_masking import dropout_threshold
from ..models.neural_attention_reference import ScorerWeights, apply_linear, expand_heads, first_layer_of_query, key_features
from .triton_blocks import Blocks, choose_blocks, kernel_constants


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256

# Shared memory of the interpreter's imaginary device, in bytes: that of an H100
INTERPRETER_SHARED_BYTES = 232448

# Between neighbours in a mask: kernels count pairs of a block in 32 bits
MAX_MASK_STRIDE = 1 << 23


def unavailable_reason(device_type: str, dtype: torch.dtype, head_dim: int = 0) -> str | None:
    """Why Triton cannot run such inputs, or None if it can.

    Args:
        device_type: as in `torch.device.type`.
        dtype: of the query.
        head_dim: the larger one of a query's and a value's size.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (`pip install triton`)"
    if dtype not in DTYPES:
        return f"it computes in {', '.join(str(known) for known in DTYPES)}, and the query is in {dtype}"
    if head_dim > MAX_HEAD_DIM:
        return f"its heads have at most {MAX_HEAD_DIM} numbers, not {head_dim}"
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y"):
        return None
    if device_type != "cuda":  # which is also what torch calls AMD's devices
        return f"it runs on GPUs, and the tensors are on {device_type!r} (TRITON_INTERPRET=1 is for its tests)"
    if dtype == torch.float64:
        return "it computes in float64 in its interpreter only"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"it needs compute capability 8.0, which {torch.cuda.get_device_name()} has not"
    return None


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may use."""
    if device.type != "cuda":
        return INTERPRETER_SHARED_BYTES
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def strides(tensor: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


class Problem:
    """What the three kernels have in common: their inputs, sizes and constants."""

    def __init__(
        self,
        u: torch.Tensor,
        w: torch.Tensor,
        value: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        weight3: torch.Tensor,
        query: torch.Tensor | None,
        key: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        dropout_seed: torch.Tensor | None,
        dropout_p: float,
        is_causal: bool,
    ):
        self.batch, self.heads, self.queries, first = u.shape
        self.kv_heads, self.keys, self.value_dim = value.shape[1:]
        self.head_dim = 0 if query is None else query.shape[-1]
        self.hidden = first, weight2.shape[-2]
        self.itemsize = value.element_size()
        self.device = u.device
        mask = kind = None
        if attn_mask is not None:
            mask = attn_mask.expand(self.batch, self.heads, self.queries, self.keys)
            kind = "bool" if mask.dtype == torch.bool else "float"
            mask = mask.view(torch.uint8) if kind == "bool" else mask
            if max(mask.stride()[2:]) > MAX_MASK_STRIDE:
                mask = mask.contiguous()
        self.inputs = {
            "p_u": u,
            "p_w": w,
            "p_v": value,
            "p_weight2": weight2.contiguous(),
            "p_bias2": bias2.contiguous(),
            "p_weight3": weight3.contiguous(),
            "p_q": query,
            "p_k": key,
            "p_mask": mask,
            "p_seed": dropout_seed,
        }
        self.sizes = {
            **{f"s_{name}": strides(self.inputs[f"p_{name}"]) for name in ("u", "w", "v", "q", "k", "mask")},
            "num_bh": self.batch * self.heads,
            "num_heads": self.heads,
            "groups": self.heads // self.kv_heads,
            "threshold": dropout_threshold(dropout_p),
            "T_q": self.queries,
            "T_k": self.keys,
        }
        self.flags = {
            "PER_HEAD": weight2.shape[0] > 1,
            "IS_CAUSAL": is_causal,
            "MASK": {None: 0, "bool": 1, "float": 2}[kind],
            "WIDEN": value.dtype == torch.bfloat16 and value.device.type != "cuda",
        }

    def blocks(self, kernel: str) -> Blocks:
        return choose_blocks(kernel, self.head_dim, self.value_dim, self.hidden, self.itemsize, shared_bytes(self.device))

    def launch(self, kernel: str, function: Any, blocks: Blocks, num_programs: int, **arguments: Any) -> None:
        constants = kernel_constants(kernel, blocks, self.head_dim, self.value_dim, self.hidden, **self.flags)
        with torch.cuda.device_of(self.inputs["p_u"]):
            function[(num_programs,)](
                **self.inputs, **self.sizes, **arguments, **constants, num_warps=blocks.warps, num_stages=blocks.stages
            )


@torch.library.custom_op("hf_neural_attention::triton_forward", mutates_args=())
def triton_forward(
    u: torch.Tensor,
    w: torch.Tensor,
    value: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    weight3: torch.Tensor,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, Tq, Dv]` in the value's dtype, and `[2, B, H, Tq]`, what backward must know of each softmax.

    That is the largest score of each row and the sum of `exp(score - largest)`; one number for both, their logarithm, would
    lose the sum beside a mask of the lowest float32 number. `u`, the weights `[1 or H, ...]` and `w` are in float32 (float64
    for float64 values), value, query (scaled) and key in one dtype; `w`, value and key have `Hkv` heads; `attn_mask` has four
    dimensions.
    """
    problem = Problem(u, w, value, weight2, bias2, weight3, query, key, attn_mask, dropout_seed, dropout_p, is_causal)
    output = value.new_empty(*u.shape[:3], value.shape[-1])
    statistics = u.new_empty(2, *u.shape[:3])
    if problem.keys == 0:
        return output.zero_(), statistics.zero_()
    if output.numel() == 0:
        return output, statistics
    from .triton_forward import neural_attention_fwd_kernel

    blocks = problem.blocks("forward")
    num_programs = problem.batch * problem.heads * -(-problem.queries // blocks.queries)
    problem.launch("forward", neural_attention_fwd_kernel, blocks, num_programs, p_o=output, p_stats=statistics)
    return output, statistics


@triton_forward.register_fake
def _(u, w, value, weight2, bias2, weight3, query, key, attn_mask, dropout_seed, dropout_p, is_causal):
    return value.new_empty(*u.shape[:3], value.shape[-1]), u.new_empty(2, *u.shape[:3])


@torch.library.custom_op("hf_neural_attention::triton_backward", mutates_args=())
def triton_backward(
    grad_output: torch.Tensor,
    output: torch.Tensor,
    statistics: torch.Tensor,
    u: torch.Tensor,
    w: torch.Tensor,
    value: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    weight3: torch.Tensor,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    mask_needs_grad: bool,
) -> list[torch.Tensor]:
    """Gradients of u, w, value, weight2, bias2, weight3, query, key and attn_mask; empty tensors for those not asked."""
    gradients = allocate_gradients(u, w, value, weight2, bias2, weight3, query, key, attn_mask, mask_needs_grad)
    grad_u, grad_w, grad_value, grad_weight2, grad_bias2, grad_weight3, grad_query, grad_key, grad_mask = gradients
    problem = Problem(u, w, value, weight2, bias2, weight3, query, key, attn_mask, dropout_seed, dropout_p, is_causal)
    if problem.keys == 0 or output.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    from .triton_backward import neural_attention_bwd_key_kernel, neural_attention_bwd_query_kernel

    blocks = problem.blocks("query")
    num_blocks = -(-problem.queries // blocks.queries)
    first, second = problem.hidden
    sums = u.new_empty(problem.batch, problem.heads, num_blocks, second, first + 1)
    # a caller that asks for the gradient of a mask pays for every pair; blocks that causality skips stay zero
    full_mask = u.new_zeros(problem.batch, problem.heads, problem.queries, problem.keys) if mask_needs_grad else None
    rows = {"p_stats": statistics, "p_do": grad_output, "p_delta": torch.empty_like(statistics[0])}
    common = {**rows, "s_do": grad_output.stride()}
    problem.launch(
        "query",
        neural_attention_bwd_query_kernel,
        blocks,
        problem.batch * problem.heads * num_blocks,
        **common,
        p_o=output,
        p_du=grad_u,
        p_dq=None if query is None else grad_query,
        p_dmask=full_mask,
        p_dweights=sums,
    )
    blocks = problem.blocks("key")
    problem.launch(
        "key",
        neural_attention_bwd_key_kernel,
        blocks,
        problem.batch * problem.kv_heads * -(-problem.keys // blocks.keys),
        **common,
        p_dw=grad_w,
        p_dv=grad_value,
        p_dk=None if key is None else grad_key,
    )
    total = sums.sum(dim=(0, 2))
    if weight2.shape[0] == 1:
        total = total.sum(dim=0, keepdim=True)
    # sums over pairs of open * ds * [hidden1, 1]: the layers' weights are the same for all pairs and come in here
    open_hidden1, opened = total[..., :first], total[..., first]
    torch.mul(weight3.mT, open_hidden1, out=grad_weight2)
    torch.mul(weight3.squeeze(-2), opened, out=grad_bias2)
    grad_weight3.copy_(((weight2 * open_hidden1).sum(dim=-1) + bias2 * opened).unsqueeze(-2))
    if full_mask is not None and attn_mask is not None:
        grad_mask.copy_(full_mask.sum_to_size(attn_mask.shape))
    return gradients


@triton_backward.register_fake
def _(
    grad_output,
    output,
    statistics,
    u,
    w,
    value,
    weight2,
    bias2,
    weight3,
    query,
    key,
    attn_mask,
    dropout_seed,
    dropout_p,
    is_causal,
    mask_needs_grad,
):
    return allocate_gradients(u, w, value, weight2, bias2, weight3, query, key, attn_mask, mask_needs_grad)


def allocate_gradients(u, w, value, weight2, bias2, weight3, query, key, attn_mask, mask_needs_grad):
    wanted = [u, w, value, weight2, bias2, weight3, query, key, attn_mask if mask_needs_grad else None]
    return [u.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in wanted]


def setup_context(ctx, inputs, output):
    *tensors, ctx.dropout_p, ctx.is_causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def backward(ctx, grad_output, _):
    output, statistics, *tensors = ctx.saved_tensors
    mask_needs_grad = tensors[8] is not None and ctx.needs_input_grad[8]
    gradients = triton_backward(grad_output, output, statistics, *tensors, ctx.dropout_p, ctx.is_causal, mask_needs_grad)
    present = [tensor is not None for tensor in tensors[:8]] + [mask_needs_grad]
    return (*(gradient if asked else None for gradient, asked in zip(gradients, present, strict=True)), None, None, None)


triton_forward.register_autograd(backward, setup_context=setup_context)


def triton_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: ScorerWeights,
    *,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    is_causal: bool = False,
    residual_scale: float | None = None,
    keys_projected: bool = False,
) -> torch.Tensor:
    """Neural Attention in Triton. Arguments are checked and described by `neural_attention`.

    The network, the softmax and all sums are in float32 (float64 for float64 queries); products with values, and of queries
    and keys in residual mode, take numbers of the query's dtype. Differentiable once.

    Returns:
        Output `[B, H, Tq, Dv]` in the query's dtype.

    Raises:
        ValueError: if Triton cannot run these inputs; `unavailable_reason` says why.
    """
    reason = unavailable_reason(query.device.type, query.dtype, max(query.shape[-1], value.shape[-1]))
    if reason is not None:
        raise ValueError(f"The backend 'triton' cannot run here: {reason}.")
    dtype = torch.promote_types(query.dtype, torch.float32)
    num_heads = query.shape[1]
    with without_autocast(query):
        weights = weights.to(dtype)
        u = apply_linear(query.to(dtype), *first_layer_of_query(weights))
        layers = [weights.weight2, weights.bias2, weights.weight3]
        if weights.per_head:
            # keys have features of their own for every query head, so values come with them
            key, value = expand_heads(key, num_heads), expand_heads(value, num_heads)
        else:
            layers = [layer.unsqueeze(0) for layer in layers]
        w = key.to(dtype) if keys_projected else key_features(key, weights)
        output, _ = triton_forward(
            u,
            w,
            value.to(query.dtype),
            *layers,
            None if residual_scale is None else query * residual_scale,
            None if residual_scale is None else key.to(query.dtype),
            attn_mask,
            dropout_seed,
            dropout_p,
            is_causal,
        )
    return output
