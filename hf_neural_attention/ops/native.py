"""The native CPU backend: fused C++ kernels (native/*), forward and backward, as `torch.library` operators.

Scores, softmax and the product with the values are computed in blocks that stay in cache; nothing of size `Tq * Tk` is kept.
Arithmetic is in float32 (float64 for float64 inputs); float32, bfloat16 and float16 tensors are read as they lie.
"""

import ctypes

import torch

from ..models.neural_attention_blockwise import without_autocast
from ..models.neural_attention_masking import dropout_threshold
from ..models.neural_attention_reference import ScorerWeights, first_layer_of_key, first_layer_of_query
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
)


# Microseconds of work. For less, waking a thread costs more than it gives
PAIRS_PER_THREAD = 4096


def num_threads_for(num_pairs: int) -> int:
    """As many as torch has, but fewer for little work."""
    return max(1, min(torch.get_num_threads(), num_pairs // PAIRS_PER_THREAD))


def library_for(dtype: torch.dtype) -> ctypes.CDLL:
    library = load_library(dtype)
    if isinstance(library, BuildError):
        raise RuntimeError(f"The native kernel of Neural Attention is not available: {library}.")
    return library


def describe_problem(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_weight: torch.Tensor,
    query_bias: torch.Tensor,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    weight3: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    residual_scale: float | None,
) -> tuple[Problem, list[torch.Tensor | None]]:
    """The arguments as the kernels take them, and the tensors that must outlive the call."""
    batch, heads, queries, head_dim = query.shape
    mask = None if attn_mask is None else attn_mask.expand(batch, heads, queries, key.shape[2])
    parameters = [
        None if tensor is None else tensor.contiguous()
        for tensor in (query_weight, query_bias, key_weight, key_bias, weight2, bias2, weight3)
    ]
    problem = Problem(
        batch=batch,
        heads=heads,
        kv_heads=value.shape[1],
        queries=queries,
        keys=key.shape[2],
        head_dim=head_dim,
        value_dim=value.shape[3],
        hidden1=weight2.shape[-1],
        hidden2=weight2.shape[-2],
        weight_sets=heads if weight2.dim() == 3 else 1,
        keys_projected=key_weight is None,
        is_causal=is_causal,
        residual=residual_scale is not None,
        num_threads=num_threads_for(batch * heads * queries * key.shape[2]),
        drop_below=dropout_threshold(dropout_p),
        has_dropout=dropout_seed is not None,
        seed=0 if dropout_seed is None else int(dropout_seed),
        residual_scale=residual_scale or 0.0,
        query=describe_tensor(query),
        key=describe_tensor(key),
        value=describe_tensor(value),
        mask=describe_tensor(mask),
    )
    for name, parameter in zip(PARAMETERS, parameters, strict=True):
        setattr(problem, name, None if parameter is None else parameter.data_ptr())
    return problem, [*parameters, mask]


def is_empty(query: torch.Tensor, value: torch.Tensor) -> bool:
    return query.numel() == 0 or value.numel() == 0


@torch.library.custom_op("hf_neural_attention::native_forward", mutates_args=(), device_types="cpu")
def native_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_weight: torch.Tensor,
    query_bias: torch.Tensor,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    weight3: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    residual_scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, Tq, Dv]` in the query's dtype; and what the softmax of each row was, `[B, H, Tq, 2]`, in the weights'
    dtype: pivot `m` and `1 / sum(2^(score - m))`, with scores in units of log2(e).

    `query`, `key` and `value` may have any floating dtype and strides. The weights, in float32 or float64, are those of the
    first layer by token (`first_layer_of_query`, `first_layer_of_key`; None for projected keys) and of the layers by pair.
    `attn_mask` has four dimensions. The output lies in memory as `[B, Tq, H, Dv]`, which is what attention modules turn it
    into.
    """
    output, softmax = allocate_outputs(query, value, weight2.dtype)
    if is_empty(query, value):
        return output.zero_(), softmax.zero_()
    library = library_for(weight2.dtype)
    problem, keep = describe_problem(
        query, key, value, query_weight, query_bias, key_weight, key_bias, weight2, bias2, weight3,
        attn_mask, dropout_seed, dropout_p, is_causal, residual_scale,
    )  # fmt: skip
    features = weight2.new_empty(library.working_memory(ctypes.byref(problem)))
    result = ForwardResult(describe_tensor(output), softmax.data_ptr())
    library.forward(ctypes.byref(problem), Pointer(features.data_ptr()), ctypes.byref(result))
    del keep
    return output, softmax


def allocate_outputs(
    query: torch.Tensor, value: torch.Tensor, softmax_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_empty(batch, heads, queries, 2, dtype=softmax_dtype)


@native_forward.register_fake
def _(query, key, value, query_weight, query_bias, key_weight, key_bias, weight2, *_):
    return allocate_outputs(query, value, weight2.dtype)


@torch.library.custom_op("hf_neural_attention::native_backward", mutates_args=(), device_types="cpu")
def native_backward(
    grad_output: torch.Tensor,
    output: torch.Tensor,
    softmax: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_weight: torch.Tensor,
    query_bias: torch.Tensor,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    weight3: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    residual_scale: float | None,
    mask_needs_grad: bool,
) -> list[torch.Tensor]:
    """Gradients of `TOKENS`, `PARAMETERS` and the mask, each of its input's shape and dtype; empty for inputs that are None.

    A caller that asks for the gradient of a mask pays for every pair.
    """
    tensors = (query, key, value, query_weight, query_bias, key_weight, key_bias, weight2, bias2, weight3, attn_mask)
    gradients = allocate_gradients(tensors, mask_needs_grad)
    if is_empty(query, value):
        return [gradient.zero_() for gradient in gradients]
    library = library_for(weight2.dtype)
    problem, keep = describe_problem(*tensors, dropout_seed, dropout_p, is_causal, residual_scale)
    result = BackwardResult(
        output=describe_tensor(output), grad_output=describe_tensor(grad_output), softmax=softmax.data_ptr()
    )
    for name, gradient in zip(TOKENS, gradients, strict=False):
        setattr(result, f"grad_{name}", describe_tensor(gradient))
    for name, gradient in zip(PARAMETERS, gradients[len(TOKENS) :], strict=False):
        setattr(result, f"grad_{name}", gradient.data_ptr() if gradient.numel() else None)
    of_pairs = None
    if mask_needs_grad:
        # the kernel never writes to the pairs that a mask leaves out
        of_pairs = weight2.new_zeros(*query.shape[:3], key.shape[2])
        result.grad_mask = of_pairs.data_ptr()
    library.backward(ctypes.byref(problem), ctypes.byref(result))
    del keep
    if of_pairs is not None and attn_mask is not None:
        gradients[-1].copy_(of_pairs.sum_to_size(attn_mask.shape))
    return gradients


def allocate_gradients(tensors: tuple[torch.Tensor | None, ...], mask_needs_grad: bool) -> list[torch.Tensor]:
    *inputs, attn_mask = tensors
    query = tensors[0]
    assert query is not None
    kept = [*inputs, attn_mask if mask_needs_grad else None]
    tokens = [query.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in kept[: len(TOKENS)]]
    # kernels write to the others as they lie in memory
    rest = kept[len(TOKENS) :]
    return tokens + [query.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in rest]


@native_backward.register_fake
def _(grad_output, output, softmax, query, key, value, query_weight, query_bias, key_weight, key_bias, weight2, bias2, weight3,
      attn_mask, dropout_seed, dropout_p, is_causal, residual_scale, mask_needs_grad):  # fmt: skip
    tensors = (query, key, value, query_weight, query_bias, key_weight, key_bias, weight2, bias2, weight3, attn_mask)
    return allocate_gradients(tensors, mask_needs_grad)


def setup_context(ctx, inputs, output):
    *tensors, ctx.dropout_p, ctx.is_causal, ctx.residual_scale = inputs
    ctx.mask_needs_grad = tensors[10] is not None and ctx.needs_input_grad[10]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def backward(ctx, grad_output, _):
    output, softmax, *tensors = ctx.saved_tensors
    gradients = native_backward(
        grad_output, output, softmax, *tensors, ctx.dropout_p, ctx.is_causal, ctx.residual_scale, ctx.mask_needs_grad
    )
    present = [*(tensor is not None for tensor in tensors[:10]), ctx.mask_needs_grad]
    return (*(gradient if here else None for gradient, here in zip(gradients, present, strict=True)), *[None] * 4)


native_forward.register_autograd(backward, setup_context=setup_context)


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
    keys_projected: bool = False,
) -> torch.Tensor:
    """Neural Attention in one fused pass on the CPU. Arguments are checked and described by `neural_attention`.

    Differentiable once.

    Returns:
        Output `[B, H, Tq, Dv]` in the query's dtype.

    Raises:
        RuntimeError: if the kernel cannot be compiled here.
    """
    with without_autocast(query):
        # what else there is (8 bits, say) is converted first
        key, value = (tensor if tensor.dtype in ELEMENT_TYPES else tensor.float() for tensor in (key, value))
        if attn_mask is not None and attn_mask.dtype not in ELEMENT_TYPES:
            attn_mask = attn_mask.float()
        weights = weights.to(torch.promote_types(query.dtype, torch.float32))
        output, _ = native_forward(
            *(query, key, value),
            *first_layer_of_query(weights),
            *((None, None) if keys_projected else first_layer_of_key(weights)),
            *(weights.weight2, weights.bias2, weights.weight3.squeeze(-2)),
            *(attn_mask, dropout_seed, dropout_p, is_causal, residual_scale),
        )
    return output
