"""The operation in fused Triton kernels: an online softmax in forward, everything computed again in backward.

Nothing of size `Tq * Tk` is kept, but for the gradient of a float mask. This file imports Triton when the first kernel starts.
Kernels: `triton_forward.py` and `triton_backward.py`, of the pieces in `triton_kernels.py` and `triton_gradients.py`; how they
are cut: `triton_blocks.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch

from ..models.neural_attention_blockwise import without_autocast
from ..models.neural_attention_masking import dropout_threshold
from ..models.neural_attention_operators import Tensors, define_operators, gradient_of_sinks
from ..models.neural_attention_pytorch import Inputs, against_blockwise
from ..models.neural_attention_reference import ScorerWeights, expand_heads, key_features, query_features, relative_sinks
from .triton_blocks import Blocks, choose_blocks, kernel_constants, uses_cores


MAX_HEAD_DIM = 256

# Gives the interpreter's imaginary device the shared memory of an H100, in bytes
INTERPRETER_SHARED_BYTES = 232448

# Limits the elements between neighbours in a mask, since kernels count pairs of a block in 32 bits
MAX_MASK_STRIDE = 1 << 23
# Limits the elements between a token's first feature and its last, for the same reason
MAX_ROW = (1 << 31) - 1


def unavailable_reason(inputs: Inputs) -> str | None:
    """Why Triton cannot run such inputs, or None if it can."""
    if reason := against_blockwise(inputs):
        return reason
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (`pip install triton`)"
    if inputs.head_dim > MAX_HEAD_DIM:
        return f"its heads have at most {MAX_HEAD_DIM} numbers, not {inputs.head_dim}"
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y"):
        return None
    if inputs.device_type != "cuda":  # lets AMD's devices pass too, which torch also calls "cuda"
        return f"it runs on GPUs, and the tensors are on {inputs.device_type!r} (TRITON_INTERPRET=1 is for its tests)"
    if inputs.dtype == torch.float64:
        return "it computes in float64 in its interpreter only"
    if not torch.cuda.is_available():
        return "this machine has no GPU, and the tensors are on an imaginary one"
    if torch.version.hip is None and torch.cuda.get_device_capability(inputs.device_index) < (8, 0):
        return f"it needs compute capability 8.0, which {torch.cuda.get_device_name(inputs.device_index)} has not"
    return None


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may use."""
    if device.type != "cuda":
        return INTERPRETER_SHARED_BYTES
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


@functools.cache
def warp_lanes(device: torch.device) -> int:
    """Threads of a warp, by which kernels are cut: 64 for all of AMD's GPUs, since those of 32 have no blocks of their own."""
    return 64 if device.type == "cuda" and torch.version.hip is not None else 32


def strides(tensor: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


def within_reach(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor whose features lie too far apart."""
    return tensor if tensor.stride(-1) * tensor.shape[-1] <= MAX_ROW else tensor.contiguous()


class TritonArguments(NamedTuple):
    """What the kernels are called with: the list of the operators' arguments.

    Tensors are in the query's dtype, but where it says float32: those are in what the kernels compute in, which is float64
    for float64 queries.
    """

    u: torch.Tensor  # [B, H, Tq, h1], float32
    w: torch.Tensor  # [B, Hkv, Tk, h1], float32
    value: torch.Tensor  # [B, Hkv, Tk, Dv]
    weight2: torch.Tensor  # [1 or H, h2, h1], float32
    bias2: torch.Tensor  # [1 or H, h2], float32
    weight3: torch.Tensor  # [1 or H, 1, h2], float32
    query: torch.Tensor | None  # [B, H, Tq, D], scaled; None: the scores are the network's alone
    key: torch.Tensor | None  # [B, Hkv, Tk, D]
    attn_mask: torch.Tensor | None  # four dimensions that broadcast to [B, H, Tq, Tk]; bool or float
    dropout_seed: torch.Tensor | None  # [1], int64
    dropout_p: float
    is_causal: bool
    sinks: torch.Tensor | None  # [H], float32
    softcap: float | None  # of the dot products


class Problem:
    """What the three kernels have in common: their inputs, sizes and constants."""

    def __init__(self, arguments: TritonArguments):
        value, query, weight2 = arguments.value, arguments.query, arguments.weight2
        self.batch, self.heads, self.queries, first = arguments.u.shape
        self.kv_heads, self.keys, self.value_dim = value.shape[1:]
        self.head_dim = 0 if query is None else query.shape[-1]
        self.hidden = first, weight2.shape[-2]
        self.itemsize = value.element_size()
        self.device = arguments.u.device
        mask = kind = None
        if arguments.attn_mask is not None:
            mask = arguments.attn_mask.expand(self.batch, self.heads, self.queries, self.keys)
            kind = "bool" if mask.dtype == torch.bool else "float"
            mask = mask.view(torch.uint8) if kind == "bool" else mask
            if max(mask.stride()[2:]) > MAX_MASK_STRIDE:
                mask = mask.contiguous()
        self.inputs = {
            "p_u": within_reach(arguments.u),
            "p_w": within_reach(arguments.w),
            "p_v": within_reach(value),
            "p_weight2": weight2.contiguous(),
            "p_bias2": arguments.bias2.contiguous(),
            "p_weight3": arguments.weight3.contiguous(),
            "p_q": None if query is None else within_reach(query),
            "p_k": None if arguments.key is None else within_reach(arguments.key),
            "p_mask": mask,
            "p_seed": arguments.dropout_seed,
        }
        self.sizes = {
            **{f"s_{name}": strides(self.inputs[f"p_{name}"]) for name in ("u", "w", "v", "q", "k", "mask")},
            "num_bh": self.batch * self.heads,
            "num_heads": self.heads,
            "groups": self.heads // self.kv_heads,
            "threshold": dropout_threshold(arguments.dropout_p),
            "T_q": self.queries,
            "T_k": self.keys,
            "softcap": arguments.softcap or 0.0,
        }
        self.flags = {
            "PER_HEAD": weight2.shape[0] > 1,
            "IS_CAUSAL": arguments.is_causal,
            "SOFTCAP": arguments.softcap is not None,
            "MASK": {None: 0, "bool": 1, "float": 2}[kind],  # numbers them as triton_kernels.py does
            "WIDEN": value.dtype == torch.bfloat16 and value.device.type != "cuda",
        }

    def blocks(self, kernel: str) -> Blocks:
        sizes = self.head_dim, self.value_dim, self.hidden, self.itemsize
        return choose_blocks(kernel, *sizes, shared_bytes(self.device), warp_lanes(self.device))

    def launch(self, kernel: str, function: Any, blocks: Blocks, num_programs: int, **arguments: Any) -> None:
        cores = uses_cores(self.hidden, self.itemsize, warp_lanes(self.device))
        constants = kernel_constants(kernel, blocks, self.head_dim, self.value_dim, self.hidden, cores, **self.flags)
        with torch.cuda.device_of(self.inputs["p_u"]):
            function[(num_programs,)](
                **self.inputs, **self.sizes, **arguments, **constants, num_warps=blocks.warps, num_stages=blocks.stages
            )


def allocate_outputs(arguments: TritonArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, Tq, Dv]` in the value's dtype, and `[2, B, H, Tq]`, what backward must know of each softmax.

    That is the largest score of each row and the sum of `exp(score - largest)`; one number for both, their logarithm, would
    lose the sum beside a mask of the lowest float32 number.
    """
    rows = arguments.u.shape[:3]
    return arguments.value.new_empty(*rows, arguments.value.shape[-1]), arguments.u.new_empty(2, *rows)


def run_forward(arguments: TritonArguments, output: torch.Tensor, statistics: torch.Tensor) -> None:
    problem = Problem(arguments)
    if problem.keys == 0 or output.numel() == 0:
        output.zero_()
        statistics.zero_()
        return
    from .triton_forward import neural_attention_fwd_kernel

    blocks = problem.blocks("forward")
    num_programs = problem.batch * problem.heads * -(-problem.queries // blocks.queries)
    outputs = {"p_o": output, "p_stats": statistics}
    problem.launch("forward", neural_attention_fwd_kernel, blocks, num_programs, p_sinks=arguments.sinks, **outputs)


def allocate_gradient(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(tensor.shape)


def run_backward(
    arguments: TritonArguments, grad_output: torch.Tensor, output: torch.Tensor, statistics: torch.Tensor, gradients: Tensors
) -> None:
    problem = Problem(arguments)
    if problem.keys == 0 or output.numel() == 0:
        for gradient in gradients.values():
            gradient.zero_()
        return
    from .triton_backward import neural_attention_bwd_key_kernel, neural_attention_bwd_query_kernel

    u, weight2, bias2, weight3 = arguments.u, arguments.weight2, arguments.bias2, arguments.weight3
    blocks = problem.blocks("query")
    num_blocks = -(-problem.queries // blocks.queries)
    first, second = problem.hidden
    sums = u.new_empty(problem.batch, problem.heads, num_blocks, second, first + 1)
    full_mask = None
    if "attn_mask" in gradients:
        # pays for every pair only if a caller asks for the gradient of a mask; blocks that causality skips stay zero
        full_mask = u.new_zeros(problem.batch, problem.heads, problem.queries, problem.keys)
    grad_output = within_reach(grad_output)
    common = {
        "p_stats": statistics,
        "p_do": grad_output,
        "p_delta": torch.empty_like(statistics[0]),
        "s_do": grad_output.stride(),
    }
    problem.launch(
        "query",
        neural_attention_bwd_query_kernel,
        blocks,
        problem.batch * problem.heads * num_blocks,
        **common,
        p_o=output,
        p_du=gradients["u"],
        p_dq=gradients.get("query"),
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
        p_dw=gradients["w"],
        p_dv=gradients["value"],
        p_dk=gradients.get("key"),
    )
    total = sums.sum(dim=(0, 2))
    if weight2.shape[0] == 1:
        total = total.sum(dim=0, keepdim=True)
    # multiplies sums over pairs of open * ds * [hidden1, 1] by the layers' weights, since these are the same for all pairs
    open_hidden1, opened = total[..., :first], total[..., first]
    torch.mul(weight3.mT, open_hidden1, out=gradients["weight2"])
    torch.mul(weight3.squeeze(-2), opened, out=gradients["bias2"])
    gradients["weight3"].copy_(((weight2 * open_hidden1).sum(dim=-1) + bias2 * opened).unsqueeze(-2))
    if arguments.sinks is not None:
        largest, total_weight = statistics
        weight = torch.exp(arguments.sinks[:, None] - largest - total_weight.log())
        # takes a sink for nothing in a row without keys, where it is too low to weigh anything by itself
        weight = weight.masked_fill(total_weight == 0, 0.0)
        gradients["sinks"].copy_(gradient_of_sinks(weight, grad_output, output))
    if full_mask is not None:
        gradients["attn_mask"].copy_(full_mask.sum_to_size(gradients["attn_mask"].shape))


triton_forward, triton_backward = define_operators(
    "triton",
    TritonArguments,
    allocate_outputs=allocate_outputs,
    run_forward=run_forward,
    allocate_gradient=allocate_gradient,
    run_backward=run_backward,
)


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
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    keys_projected: bool = False,
    queries_projected: bool = False,
) -> torch.Tensor:
    """Neural Attention in Triton. Arguments are checked and described by `neural_attention`.

    The softmax and all sums are in float32 (float64 for float64 queries), and so is the network, but where it is wide and
    the query of 16 bits, on NVIDIA's GPUs: then units and weights of its second layer are rounded to the query's dtype, and
    so, in two parts, are the gradients of scores in backward, of which float16 loses those below 6e-8 (`uses_cores`,
    ops/README.md). Products with values, and of queries and keys in residual mode, take numbers of the query's dtype;
    queries are scaled before, and rounded to it. Differentiable once.

    Returns:
        Output `[B, H, Tq, Dv]` in the query's dtype (the value's, if queries come projected).

    Raises:
        ValueError: if Triton cannot run these inputs; `unavailable_reason` says why.
    """
    device, head_dim = query.device, max(query.shape[-1], value.shape[-1])
    reason = unavailable_reason(Inputs(device.type, query.dtype, head_dim, device_index=device.index))
    if reason is not None:
        raise ValueError(f"The backend 'triton' cannot run here: {reason}.")
    dtype = torch.promote_types(query.dtype, torch.float32)
    num_heads = query.shape[1]
    with without_autocast(query):
        weights = weights.to(dtype)
        layers = [weights.weight2, weights.bias2, weights.weight3]
        if weights.per_head:
            # expands values too, since keys have features of their own for every query head, and values come with them
            key, value = expand_heads(key, num_heads), expand_heads(value, num_heads)
        else:
            layers = [layer.unsqueeze(0) for layer in layers]
        weight2, bias2, weight3 = layers
        arguments = TritonArguments(
            u=query_features(query, weights, queries_projected),
            w=key_features(key, weights, keys_projected),
            value=value if queries_projected else value.to(query.dtype),
            weight2=weight2,
            bias2=bias2,
            weight3=weight3,
            query=None if residual_scale is None else query * residual_scale,
            key=None if residual_scale is None else key.to(query.dtype),
            attn_mask=attn_mask,
            dropout_seed=dropout_seed,
            dropout_p=dropout_p,
            is_causal=is_causal,
            sinks=relative_sinks(sinks, weights),
            softcap=softcap,
        )
        output, _ = triton_forward(*arguments)
    return output
