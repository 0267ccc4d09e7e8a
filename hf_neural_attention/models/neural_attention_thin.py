"""Mode `"thin"`: attention by the dot product of the few numbers that a scorer projects queries and keys to.

    q' = q_proj(q)    k' = k_proj(k)    s = q' . k' / sqrt(p)        p numbers each

What a network would read is all that this score knows, and nothing but the network is missing: the control that says what the
network itself is worth. It runs through PyTorch's `scaled_dot_product_attention`, in sizes that its fused kernels take.
"""

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from .neural_attention_blockwise import without_autocast
from .neural_attention_masking import mask_scores
from .neural_attention_pytorch import transform_runs
from .neural_attention_reference import ScorerWeights, expand_heads, key_features, query_features, reference_attention


def thin_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: ScorerWeights,
    *,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    is_causal: bool,
    sinks: torch.Tensor | None = None,
    keys_projected: bool,
    queries_projected: bool,
) -> torch.Tensor:
    """The operation in mode `"thin"`; arguments are checked and described by `neural_attention`.

    Computes in float32 (float64 for float64 inputs), whatever the dtype of the inputs, and under autocast too, as the
    backends of networks do.

    Returns:
        Output `[B, H, Tq, Dv]`, in the query's dtype (the value's, if queries come projected).
    """
    dtype = value.dtype if queries_projected else query.dtype
    with without_autocast(query):
        num_heads = query.shape[1]
        computed = torch.promote_types(dtype, torch.float32)
        weights = weights.to(computed)
        query, key, value = query.to(computed), key.to(computed), value.to(computed)
        # drops what every backend drops for a seed, which torch's own attention would not; nor has that forward derivatives
        if dropout_seed is not None or transform_runs():
            output, _ = reference_attention(
                query,
                key,
                value,
                weights,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                dropout_seed=dropout_seed,
                is_causal=is_causal,
                sinks=sinks,
                keys_projected=keys_projected,
                queries_projected=queries_projected,
            )
            return output.to(dtype)
        if weights.per_head and not keys_projected:
            key = expand_heads(key, num_heads)
        u = query_features(query, weights, queries_projected)
        w = expand_heads(key_features(key, weights, keys_projected), num_heads)
        value = expand_heads(value, num_heads)
        if sinks is not None:
            return attend_with_sinks(u, w, value, sinks, attn_mask, is_causal).to(dtype)
        if attn_mask is None:
            output = fused_attention(u, w, value, is_causal=is_causal)
            return output.to(dtype)
        if is_causal:
            causal = lower_triangle(u, w)
            is_bool = attn_mask.dtype == torch.bool
            attn_mask = attn_mask & causal if is_bool else attn_mask.masked_fill(~causal, float("-inf"))
        if attn_mask.dtype == torch.bool:
            empty = ~attn_mask.any(-1, keepdim=True)
            attn_mask = attn_mask | empty
        else:
            attn_mask = attn_mask.to(computed)
            empty = (attn_mask == float("-inf")).all(-1, keepdim=True)
            attn_mask = attn_mask.masked_fill(empty, 0.0)
        # lets queries with nothing to attend to see everything, and takes that out again: zeros, with zero gradients
        output = fused_attention(u, w, value, attn_mask=attn_mask)
        return output.masked_fill(empty, 0.0).to(dtype)


def attend_with_sinks(
    u: torch.Tensor,
    w: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:
    """Attention with one more key per head, whose score is `sinks`, and whose value is zero.

    One more number, which is 1 in every query and the sink in that key, makes the score a dot product like all others.
    """
    scale = u.shape[-1] ** -0.5
    batch, _, num_queries, _ = u.shape
    # keeps a sink of -inf from leaving rows without keys with nothing
    sinks = sinks.to(u.dtype).clamp_min(torch.finfo(u.dtype).min * scale)
    of_sinks = (sinks / scale).view(1, -1, 1, 1).expand(batch, -1, 1, 1)
    u = pad(u, (0, 1), value=1.0)
    w = torch.cat((pad(w, (0, 1)), pad(of_sinks, (w.shape[-1], 0))), dim=2)
    value = pad(value, (0, 0, 0, 1))
    num_keys = w.shape[2] - 1
    causal = lower_triangle(u, w[:, :, :-1]) if is_causal else None
    mask = mask_scores(u.new_zeros(1, 1, num_queries, num_keys), attn_mask, causal)
    return fused_attention(u, w, value, attn_mask=pad(mask, (0, 1)), scale=scale)


def lower_triangle(u: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Which pairs are causal, `[Tq, Tk]`. Takes tensors, not numbers, so that an exported graph keeps its lengths dynamic."""
    return torch.ones(u.shape[2], w.shape[2], dtype=torch.bool, device=u.device).tril()


def fused_attention(
    u: torch.Tensor,
    w: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """`scaled_dot_product_attention`, with zeros that make queries, keys and values equally wide: PyTorch's fused kernels for
    CPUs take no others, and those for GPUs multiples of eight. Else all scores would be in memory, as they still are where a
    float mask wants its gradient."""
    size, of_values = u.shape[-1], value.shape[-1]
    wide = max(size, of_values) if u.device.type == "cpu" else -(-max(size, of_values) // 8) * 8
    scale = size**-0.5 if scale is None else scale
    u, w, value = (each if each.shape[-1] == wide else pad(each, (0, wide - each.shape[-1])) for each in (u, w, value))
    output = scaled_dot_product_attention(u, w, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    return output[..., :of_values]
