"""The native CPU backend: fused C++ kernels (native/*), forward and backward, as `torch.library` operators.

Scores, softmax and the product with the values are computed in blocks that stay in cache; nothing of size `Tq * Tk` is kept.
Arithmetic is in float32 (float64 for float64 inputs); float32, bfloat16 and float16 tensors are read as they lie.
"""

import ctypes
from typing import Any

import torch

from ..models.neural_attention_blockwise import without_autocast
from ..models.neural_attention_masking import dropout_threshold
from ..models.neural_attention_reference import ScorerWeights, expand_heads, first_layer_of_key, first_layer_of_query
from .native_build import BuildError, load_library


Int = ctypes.c_int64
Pointer = ctypes.c_void_p

ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.bool: 4}


class Tensor(ctypes.Structure):
    """`Tensor` of native/problem.h."""

    _fields_ = [("data", Pointer), ("strides", Int * 4), ("type", Int)]


class Problem(ctypes.Structure):
    """`Problem` of native/problem.h."""

    _fields_ = [
        *((name, Int) for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "value_dim")),
        *((name, Int) for name in ("hidden1", "hidden2")),
        *((name, Int) for name in ("weight_sets", "keys_projected", "is_causal", "residual", "num_threads")),
        *((name, Int) for name in ("drop_below", "has_dropout", "seed")),
        ("residual_scale", ctypes.c_double),
        *((name, Tensor) for name in ("query", "key", "value", "mask")),
        *((name, Pointer) for name in ("query_weight", "query_bias", "key_weight", "key_bias", "weight2", "bias2", "weight3")),
    ]  # fmt: skip


class ForwardResult(ctypes.Structure):
    """`ForwardResult` of native/forward.h."""

    _fields_ = [("output", Pointer), ("strides", Int * 3), ("softmax", Pointer)]


GRADIENTS = ("value", "u", "w", "weight2", "bias2", "weight3", "query", "key", "mask")


class BackwardResult(ctypes.Structure):
    """`BackwardResult` of native/backward.h."""

    _fields_ = [
        ("output", Tensor),
        ("grad_output", Tensor),
        ("softmax", Pointer),
        *((f"grad_{name}", Pointer) for name in GRADIENTS),
    ]


def describe(tensor: torch.Tensor | None) -> Tensor:
    if tensor is None:
        return Tensor()
    return Tensor(tensor.data_ptr(), (Int * 4)(*tensor.stride()), ELEMENT_TYPES[tensor.dtype])


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
        num_threads=torch.get_num_threads(),
        drop_below=dropout_threshold(dropout_p),
        has_dropout=dropout_seed is not None,
        seed=0 if dropout_seed is None else int(dropout_seed),
        residual_scale=residual_scale or 0.0,
        query=describe(query),
        key=describe(key),
        value=describe(value),
        mask=describe(mask),
    )
    names = ("query_weight", "query_bias", "key_weight", "key_bias", "weight2", "bias2", "weight3")
    for name, parameter in zip(names, parameters, strict=True):
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
    """Output `[B, H, Tq, Dv]`, and what the softmax of each row was, `[B, H, Tq, 2]`: pivot `m` and `1 / sum(2^(score - m))`,
    with scores in units of log2(e). Both in the weights' dtype (float32 or float64).

    `query`, `key` and `value` may have any floating dtype and strides. The weights are those of the first layer by token
    (`first_layer_of_query`, `first_layer_of_key`; None for projected keys) and of the layers by pair. `attn_mask` has four
    dimensions. The output lies in memory as `[B, Tq, H, Dv]`, which is what attention modules turn it into.
    """
    batch, heads, queries, _ = query.shape
    output = weight2.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    softmax = weight2.new_empty(batch, heads, queries, 2)
    if is_empty(query, value):
        return output.zero_(), softmax.zero_()
    library = library_for(weight2.dtype)
    problem, keep = describe_problem(
        query, key, value, query_weight, query_bias, key_weight, key_bias, weight2, bias2, weight3,
        attn_mask, dropout_seed, dropout_p, is_causal, residual_scale,
    )  # fmt: skip
    features = weight2.new_empty(library.feature_numbers(ctypes.byref(problem)))
    result = ForwardResult(output.data_ptr(), (Int * 3)(*output.stride()[:3]), softmax.data_ptr())
    library.forward(ctypes.byref(problem), Pointer(features.data_ptr()), ctypes.byref(result))
    del keep
    return output, softmax


@native_forward.register_fake
def _(query, key, value, query_weight, query_bias, key_weight, key_bias, weight2, bias2, weight3, *_):
    batch, heads, queries, _ = query.shape
    output = weight2.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    return output, weight2.new_empty(batch, heads, queries, 2)


def gradient_shapes(query, key, value, weight2, bias2, weight3, residual, mask_needs_grad) -> dict[str, Any]:
    """Shape of every gradient that the kernel gives, by the names of `GRADIENTS`; None for those not asked."""
    batch, heads, queries, _ = query.shape
    hidden1, keys = weight2.shape[-1], key.shape[2]
    feature_heads = heads if weight2.dim() == 3 else value.shape[1]
    return {
        "value": value.shape,
        "u": (batch, heads, queries, hidden1),
        "w": (batch, feature_heads, keys, hidden1),
        "weight2": weight2.shape,
        "bias2": bias2.shape,
        "weight3": weight3.shape,
        "query": query.shape if residual else None,
        "key": key.shape if residual else None,
        "mask": (batch, heads, queries, keys) if mask_needs_grad else None,
    }


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
    """Gradients by the names of `GRADIENTS`; empty tensors for those not asked.

    `u` and `w` are the tokens' parts of the first layer; `query` and `key` get the share of the dot product alone (residual
    mode); `mask` is that of every pair, `[B, H, Tq, Tk]`.
    """
    shapes = gradient_shapes(query, key, value, weight2, bias2, weight3, residual_scale is not None, mask_needs_grad)
    empty = is_empty(query, value)

    def allocate(name: str) -> torch.Tensor:
        # the kernel never writes to the pairs that a mask leaves out
        if empty or name == "mask":
            return weight2.new_zeros(0 if shapes[name] is None else shapes[name])
        return weight2.new_empty(0 if shapes[name] is None else shapes[name])

    gradients = {name: allocate(name) for name in GRADIENTS}
    if empty:
        return list(gradients.values())
    library = library_for(weight2.dtype)
    problem, keep = describe_problem(
        query, key, value, query_weight, query_bias, key_weight, key_bias, weight2, bias2, weight3,
        attn_mask, dropout_seed, dropout_p, is_causal, residual_scale,
    )  # fmt: skip
    result = BackwardResult(output=describe(output), grad_output=describe(grad_output), softmax=softmax.data_ptr())
    for name, shape in shapes.items():
        setattr(result, f"grad_{name}", None if shape is None else gradients[name].data_ptr())
    library.backward(ctypes.byref(problem), ctypes.byref(result))
    del keep
    return list(gradients.values())


@native_backward.register_fake
def _(grad_output, output, softmax, query, key, value, query_weight, query_bias, key_weight, key_bias, weight2, bias2, weight3,
      attn_mask, dropout_seed, dropout_p, is_causal, residual_scale, mask_needs_grad):  # fmt: skip
    shapes = gradient_shapes(query, key, value, weight2, bias2, weight3, residual_scale is not None, mask_needs_grad)
    return [weight2.new_empty(0 if shape is None else shape) for shape in shapes.values()]


def setup_context(ctx, inputs, output):
    *tensors, ctx.dropout_p, ctx.is_causal, ctx.residual_scale = inputs
    ctx.mask_needs_grad = tensors[10] is not None and ctx.needs_input_grad[10]
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def through_projection(
    grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of inputs, weight and bias of a first layer by token: `grad` `[B, H, T, h1]`, `inputs` `[B, H, T, D]`."""
    inputs = inputs.to(grad.dtype)
    if weight.dim() == 3:
        return grad @ weight, (grad.transpose(-1, -2) @ inputs).sum(dim=0), grad.sum(dim=(0, 2))
    flat = grad.flatten(0, 2)
    return grad @ weight, flat.T @ inputs.flatten(0, 2), flat.sum(dim=0)


def backward(ctx, grad_output, grad_softmax):
    if grad_output is None:
        return (None,) * 15
    query, key, value, query_weight, _, key_weight, *_, attn_mask, _ = ctx.saved_tensors[2:]
    gradients = dict(
        zip(
            GRADIENTS,
            native_backward(
                grad_output, *ctx.saved_tensors, ctx.dropout_p, ctx.is_causal, ctx.residual_scale, ctx.mask_needs_grad
            ),
            strict=True,
        )
    )
    grad_query, grad_query_weight, grad_query_bias = through_projection(gradients["u"], query, query_weight)
    if key_weight is None:
        grad_key, grad_key_weight, grad_key_bias = gradients["w"], None, None
    else:
        own_keys = expand_heads(key, query.shape[1]) if key_weight.dim() == 3 else key
        grad_key, grad_key_weight, grad_key_bias = through_projection(gradients["w"], own_keys, key_weight)
        if grad_key.shape != key.shape:  # a key and value head serves several query heads
            grad_key = grad_key.unflatten(1, (key.shape[1], -1)).sum(dim=2)
    if ctx.residual_scale is not None:
        grad_query, grad_key = grad_query + gradients["query"], grad_key + gradients["key"]
    grad_mask = gradients["mask"].sum_to_size(attn_mask.shape).to(attn_mask.dtype) if ctx.mask_needs_grad else None
    return (
        grad_query.to(query.dtype),
        grad_key.to(key.dtype),
        gradients["value"].to(value.dtype),
        grad_query_weight,
        grad_query_bias,
        grad_key_weight,
        grad_key_bias,
        gradients["weight2"],
        gradients["bias2"],
        gradients["weight3"],
        grad_mask,
        None,
        None,
        None,
        None,
    )


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
        weights = weights.to(torch.promote_types(query.dtype, torch.float32))
        query_weight, query_bias = first_layer_of_query(weights)
        key_weight, key_bias = (None, None) if keys_projected else first_layer_of_key(weights)
        output, _ = native_forward(
            query,
            key,
            value,
            query_weight,
            query_bias,
            key_weight,
            key_bias,
            weights.weight2,
            weights.bias2,
            weights.weight3.squeeze(-2),
            attn_mask,
            dropout_seed,
            dropout_p,
            is_causal,
            residual_scale,
        )
    return output.to(query.dtype)
