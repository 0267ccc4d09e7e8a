"""The native CPU backend: fused C++ kernels (native/*), forward and backward, as `torch.library` operators.

Scores, softmax and the product with the values are computed in blocks that stay in cache; nothing of size `Tq * Tk` is kept.
Arithmetic is in float32 (float64 for float64 inputs); float32, bfloat16 and float16 tensors are read as they lie.
"""

import ctypes
import math
from typing import NamedTuple

import torch

from ..models.neural_attention_blockwise import without_autocast
from ..models.neural_attention_masking import dropout_threshold
from ..models.neural_attention_operators import Tensors, define_operators, gradient_of_sinks
from ..models.neural_attention_reference import ScorerWeights, first_layer_of_key, first_layer_of_query, relative_sinks
from .native_build import BuildError, load_library
from .native_interface import (
    ELEMENT_TYPES,
    PARAMETERS,
    TOKENS,
    BackwardResult,
    ForwardResult,
    Pointer,
    Problem,
    describe_tensor,
    pack,
)


# Makes microseconds of work, since for less, waking a thread costs more than it gives
PAIRS_PER_THREAD = 4096

LOG2_E = math.log2(math.e)


class NativeArguments(NamedTuple):
    """What the kernels are called with: the list of the operators' arguments.

    All weights are in float32, or all in float64; the kernels compute in that. They have a leading dimension `H` where every
    query head has its own.
    """

    # have any floating dtype and strides
    query: torch.Tensor  # [B, H, Tq, D]; projected, [B, H, Tq, h1]
    key: torch.Tensor  # [B, Hkv, Tk, D]; projected, [B, Hkv or H, Tk, h1]
    value: torch.Tensor  # [B, Hkv, Tk, Dv]
    # make up the first layer by token: `first_layer_of_query` and `first_layer_of_key`
    query_weight: torch.Tensor | None  # [H, h1, D] or [h1, D]; None: queries are projected
    query_bias: torch.Tensor | None  # [H, h1] or [h1]
    key_weight: torch.Tensor | None  # None: keys are projected
    key_bias: torch.Tensor | None
    # make up the layers by pair
    weight2: torch.Tensor  # [H, h2, h1] or [h2, h1]
    bias2: torch.Tensor  # [H, h2] or [h2]
    weight3: torch.Tensor  # [H, h2] or [h2]
    attn_mask: torch.Tensor | None  # four dimensions that broadcast to [B, H, Tq, Tk]
    dropout_seed: torch.Tensor | None  # [1], int64
    dropout_p: float
    is_causal: bool
    residual_scale: float | None  # None: the scores are the network's alone
    sinks: torch.Tensor | None  # [H], in the weights' dtype
    softcap: float | None  # of the dot products in residual mode

    @property
    def is_empty(self) -> bool:
        return self.query.numel() == 0 or self.value.numel() == 0


def num_threads_for(num_pairs: int) -> int:
    """As many as torch has, but fewer for little work."""
    return max(1, min(torch.get_num_threads(), num_pairs // PAIRS_PER_THREAD))


def library_for(dtype: torch.dtype) -> ctypes.CDLL:
    library = load_library(dtype)
    if isinstance(library, BuildError):
        raise RuntimeError(f"The native kernel of Neural Attention is not available: {library}.")
    return library


def describe_problem(arguments: NativeArguments) -> tuple[bytes, list[torch.Tensor | None]]:
    """The arguments as the kernels take them, and the tensors that must outlive the call."""
    query, key, value, weight2 = arguments.query, arguments.key, arguments.value, arguments.weight2
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    mask = None if arguments.attn_mask is None else arguments.attn_mask.expand(batch, heads, queries, keys)
    given = {name: getattr(arguments, name) for name in PARAMETERS}
    given["sinks"] = arguments.sinks
    parameters = {name: tensor.contiguous() for name, tensor in given.items() if tensor is not None}
    problem = pack(
        Problem,
        batch=batch,
        heads=heads,
        kv_heads=value.shape[1],
        queries=queries,
        keys=keys,
        head_dim=size if arguments.query_weight is not None else key.shape[3],
        value_dim=value.shape[3],
        hidden1=weight2.shape[-1],
        hidden2=weight2.shape[-2],
        weight_sets=heads if weight2.dim() == 3 else 1,
        queries_projected=arguments.query_weight is None,
        keys_projected=arguments.key_weight is None,
        is_causal=arguments.is_causal,
        residual=arguments.residual_scale is not None,
        num_threads=num_threads_for(batch * heads * queries * keys),
        drop_below=dropout_threshold(arguments.dropout_p),
        has_dropout=arguments.dropout_seed is not None,
        seed=0 if arguments.dropout_seed is None else int(arguments.dropout_seed),
        residual_scale=arguments.residual_scale or 0.0,
        softcap=arguments.softcap or 0.0,
        query=describe_tensor(query),
        key=describe_tensor(key),
        value=describe_tensor(value),
        mask=describe_tensor(mask),
        **{name: parameter.data_ptr() for name, parameter in parameters.items()},
    )
    return problem, [mask, *parameters.values()]


def allocate_outputs(arguments: NativeArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, Tq, Dv]` in the query's dtype, or the value's if queries are projected; and what the softmax of each row
    was, `[B, H, Tq, 2]`, in the weights' dtype: pivot `m` and `1 / sum(2^(score - m))`, with scores in units of log2(e).

    The output lies in memory as `[B, Tq, H, Dv]`, which is what attention modules turn it into.
    """
    batch, heads, queries, _ = arguments.query.shape
    like = arguments.value if arguments.query_weight is None else arguments.query
    output = like.new_empty(batch, queries, heads, arguments.value.shape[-1]).transpose(1, 2)
    return output, arguments.weight2.new_empty(batch, heads, queries, 2)


def run_forward(arguments: NativeArguments, output: torch.Tensor, softmax: torch.Tensor) -> None:
    if arguments.is_empty:
        output.zero_()
        softmax.zero_()
        return
    library = library_for(arguments.weight2.dtype)
    problem, keep = describe_problem(arguments)
    features = arguments.weight2.new_empty(library.working_memory(problem))
    result = pack(ForwardResult, output=describe_tensor(output), softmax=softmax.data_ptr())
    library.forward(problem, Pointer(features.data_ptr()), result)
    del keep


def allocate_gradient(name: str, tensor: torch.Tensor) -> torch.Tensor:
    # makes those of parameters contiguous, since kernels write to them as they lie in memory
    return torch.empty_like(tensor) if name in TOKENS else tensor.new_empty(tensor.shape)


def run_backward(
    arguments: NativeArguments, grad_output: torch.Tensor, output: torch.Tensor, softmax: torch.Tensor, gradients: Tensors
) -> None:
    """A caller that asks for the gradient of a mask pays for every pair."""
    if arguments.is_empty:
        for gradient in gradients.values():
            gradient.zero_()
        return
    library = library_for(arguments.weight2.dtype)
    problem, keep = describe_problem(arguments)
    of_pairs = None
    if "attn_mask" in gradients:
        # starts from zeros, since the kernel never writes to the pairs that a mask leaves out
        of_pairs = arguments.weight2.new_zeros(*arguments.query.shape[:3], arguments.key.shape[2])
    result = pack(
        BackwardResult,
        output=describe_tensor(output),
        grad_output=describe_tensor(grad_output),
        softmax=softmax.data_ptr(),
        grad_mask=0 if of_pairs is None else of_pairs.data_ptr(),
        **{f"grad_{name}": describe_tensor(gradients[name]) for name in TOKENS},
        **{f"grad_{name}": gradients[name].data_ptr() for name in PARAMETERS if name in gradients},
    )
    failed = library.backward(problem, result)
    del keep
    if failed:
        raise RuntimeError(
            "The native kernel of Neural Attention cannot allocate memory for its backward pass: take a smaller batch or "
            "shorter sequences, or fewer threads (`torch.set_num_threads`)."
        )
    if arguments.sinks is not None:
        pivot, inverse = softmax.unbind(-1)
        weight = torch.exp2(arguments.sinks[:, None] * LOG2_E - pivot + inverse.log2())
        gradients["sinks"].copy_(gradient_of_sinks(weight, grad_output, output))
    if of_pairs is not None:
        gradients["attn_mask"].copy_(of_pairs.sum_to_size(gradients["attn_mask"].shape))


native_forward, native_backward = define_operators(
    "native",
    NativeArguments,
    allocate_outputs=allocate_outputs,
    run_forward=run_forward,
    allocate_gradient=allocate_gradient,
    run_backward=run_backward,
    device_types="cpu",
)


def native_attention(
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
    """Neural Attention in one fused pass on the CPU. Arguments are checked and described by `neural_attention`.

    Differentiable once.

    Returns:
        Output `[B, H, Tq, Dv]` in the query's dtype (the value's, if queries come projected).

    Raises:
        RuntimeError: if the kernel cannot be compiled here.
    """
    with without_autocast(query):
        # converts the dtypes that kernels do not read (8 bits, say)
        key, value = (tensor if tensor.dtype in ELEMENT_TYPES else tensor.float() for tensor in (key, value))
        if attn_mask is not None and attn_mask.dtype not in ELEMENT_TYPES:
            attn_mask = attn_mask.float()
        weights = weights.to(torch.promote_types(query.dtype, torch.float32))
        query_weight, query_bias = (None, None) if queries_projected else first_layer_of_query(weights)
        key_weight, key_bias = (None, None) if keys_projected else first_layer_of_key(weights)
        arguments = NativeArguments(
            query=query,
            key=key,
            value=value,
            query_weight=query_weight,
            query_bias=query_bias,
            key_weight=key_weight,
            key_bias=key_bias,
            weight2=weights.weight2,
            bias2=weights.bias2,
            weight3=weights.weight3.squeeze(-2),
            attn_mask=attn_mask,
            dropout_seed=dropout_seed,
            dropout_p=dropout_p,
            is_causal=is_causal,
            residual_scale=residual_scale,
            sinks=relative_sinks(sinks, weights),
            softcap=softcap,
        )
        output, _ = native_forward(*arguments)
    return output
