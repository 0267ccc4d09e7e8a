"""Neural Attention as a function of a scorer's weights: what `NeuralScorer.forward` calls, as torch's modules call
`torch.nn.functional`."""

import math
from typing import Any

import torch

from .neural_attention_backends import asks_for_reference, check_devices, run_backend
from .neural_attention_masking import draw_dropout_seed
from .neural_attention_reference import ScorerWeights, reference_attention
from .neural_attention_thin import thin_attention


def scorer_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: ScorerWeights,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    mode: str = "replace",
    backend: str | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    keys_projected: bool = False,
    queries_projected: bool = False,
    need_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The operation on plain weights. What is not described here is as in `hf_neural_attention.neural_attention`.

    Args:
        weights: of a scorer, shared by all heads or one set per head. Without a first layer, `query` and `key` are taken as
            projected.
        mode: `"replace"`, `"residual"` or `"thin"`, as of `NeuralScorer`. Weights without a network are of the last.
        need_weights: also return the attention weights, which only the reference holds; `backend` is then ignored.

    Returns:
        Output `[B, H, Tq, Dv]`, and the attention weights `[B, H, Tq, Tk]` after dropout, or None.
    """
    if not weights.has_first_layer:
        queries_projected = keys_projected = True
    check_arguments(query, key, value, weights, attn_mask, dropout_p, mode, keys_projected, queries_projected)
    check_score_options(query.shape[1], sinks, softcap)
    arguments: dict[str, Any] = {
        "attn_mask": None if attn_mask is None else attn_mask.view((1,) * (4 - attn_mask.dim()) + attn_mask.shape),
        "dropout_p": dropout_p,
        "dropout_seed": draw_dropout_seed(dropout_p, query.device),
        "is_causal": is_causal,
        "residual_scale": None,
        "keys_projected": keys_projected,
    }
    if queries_projected:  # says it only then, since code from the Hub may be newer than the installed package
        arguments["queries_projected"] = True
    if mode == "residual":
        arguments["residual_scale"] = 1.0 / math.sqrt(weights.head_dim) if scale is None else scale
        if softcap is not None:
            arguments["softcap"] = softcap
    if sinks is not None:
        arguments["sinks"] = sinks
    literal = need_weights
    if weights.is_thin and not literal:
        check_devices(query, key=key, value=value, attn_mask=attn_mask, sinks=sinks, **weights._asdict())
        literal = asks_for_reference(backend)
    if literal:
        output, attention = reference_attention(query, key, value, weights, **arguments)
        return output, attention if need_weights else None
    if weights.is_thin:
        del arguments["residual_scale"]
        return thin_attention(query, key, value, weights, **{"queries_projected": queries_projected, **arguments}), None
    output = run_backend(backend, query, key, value, weights, **arguments)
    if weights.bias3.requires_grad:  # gives it a gradient if peft or others thaw it, since DDP stops at one of None
        output = output + 0.0 * weights.bias3.sum().to(output.dtype)
    return output, None


def check_score_options(num_heads: int, sinks: torch.Tensor | None, softcap: float | None) -> None:
    """Raises a ValueError that names the argument, what it is and what was expected."""
    if sinks is not None and (tuple(sinks.shape) != (num_heads,) or not sinks.is_floating_point()):
        raise ValueError(
            f"`sinks` has shape {tuple(sinks.shape)} and dtype {sinks.dtype}; expected a logit per query head, [{num_heads}], "
            "of a floating-point dtype."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap` is {softcap}; expected a number above 0, or None for no cap.")


def check_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: ScorerWeights,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    mode: str,
    keys_projected: bool,
    queries_projected: bool = False,
) -> None:
    """Raises a ValueError that names the argument, what it is and what was expected."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}; expected 4 dimensions [batch, heads, length, size].")
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}` has dtype {tensor.dtype}; expected a floating-point dtype.")
    projected = {"queries_projected": queries_projected, "keys_projected": keys_projected}
    if any(projected.values()):
        said = " and ".join(f"`{name}`" for name, value in projected.items() if value)
        if mode == "residual":
            raise ValueError(f'{said} does not go with `mode="residual"`, whose dot product needs whole queries and keys.')
        wanted_heads = (weights.num_heads or value.shape[1]) if keys_projected else key.shape[1]
        if weights.any_tensor is None:  # takes as many numbers as there are, but the same of both
            sizes = query.shape[3], query.shape[3]
            wanted_heads = key.shape[1] if key.shape[1] == query.shape[1] else wanted_heads
        else:
            size = weights.hidden_dims[0]
            sizes = size if queries_projected else weights.head_dim, size if keys_projected else weights.head_dim
        if (query.shape[3], key.shape[1], key.shape[3]) != (sizes[0], wanted_heads, sizes[1]):
            raise ValueError(
                f"`query` and `key` have shapes {tuple(query.shape)} and {tuple(key.shape)}; with {said} this "
                f"scorer expects [B, H, Tq, {sizes[0]}] and [B, {wanted_heads}, Tk, {sizes[1]}]."
            )
    elif query.shape[-1] != weights.head_dim or key.shape[-1] != weights.head_dim:
        raise ValueError(
            f"`query` and `key` have sizes {query.shape[-1]} and {key.shape[-1]}; this scorer was made for head_dim "
            f"{weights.head_dim}."
        )
    same_heads = key.shape[1] == value.shape[1] or keys_projected
    if (key.shape[0], key.shape[2]) != (value.shape[0], value.shape[2]) or not same_heads or query.shape[0] != key.shape[0]:
        raise ValueError(
            f"`query` {tuple(query.shape)}, `key` {tuple(key.shape)} and `value` {tuple(value.shape)} do not fit: all need "
            "the same batch size, key and value also the same heads and length."
        )
    num_heads = query.shape[1]
    if value.shape[1] == 0 or num_heads % value.shape[1]:
        raise ValueError(f"`query` has {num_heads} heads, which is no multiple of the {value.shape[1]} key and value heads.")
    if weights.num_heads is not None and weights.num_heads != num_heads:
        raise ValueError(f"`query` has {num_heads} heads; this scorer has weights for {weights.num_heads}.")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"`dropout_p` is {dropout_p}; expected a probability from 0 to 1.")
    if attn_mask is None:
        return
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"`attn_mask` has dtype {attn_mask.dtype}; expected bool (True attends) or float (added).")
    full = (query.shape[0], num_heads, query.shape[2], key.shape[2])
    fits = attn_mask.dim() <= 4 and all(
        size in (1, wanted) for size, wanted in zip(reversed(attn_mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(f"`attn_mask` has shape {tuple(attn_mask.shape)}, which does not broadcast to {full}.")
