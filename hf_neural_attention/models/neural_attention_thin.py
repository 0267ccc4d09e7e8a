"""Mode `"thin"`: attention by the dot product of the few numbers that a scorer projects queries and keys to.

    q' = q_proj(q)    k' = k_proj(k)    s = q' . k' / sqrt(p)        p numbers each

What a network would read is all that this score knows, and nothing but the network is missing: the control that says what the
network itself is worth. It runs through PyTorch's `scaled_dot_product_attention`, which is fused on every device.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from .neural_attention_masking import causal_pairs
from .neural_attention_reference import ScorerWeights, expand_heads, key_features, query_features


def thin_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: ScorerWeights,
    *,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    keys_projected: bool,
    queries_projected: bool,
) -> torch.Tensor:
    """The operation in mode `"thin"` without dropout; arguments are checked and described by `neural_attention`.

    Returns:
        Output `[B, H, Tq, Dv]`, in the query's dtype (the value's, if queries come projected).
    """
    dtype = value.dtype if queries_projected else query.dtype
    num_heads = query.shape[1]
    if weights.per_head and not keys_projected:
        key = expand_heads(key, num_heads)
    computed = torch.promote_types(dtype, torch.float32)
    weights = weights.to(computed)
    u = query_features(query.to(computed), weights, queries_projected)
    w = expand_heads(key_features(key.to(computed), weights, keys_projected), num_heads)
    value = expand_heads(value.to(computed), num_heads)
    if attn_mask is None:
        output = scaled_dot_product_attention(u, w, value, is_causal=is_causal)
        return output.to(dtype)
    if is_causal:
        causal = causal_pairs(range(u.shape[2]), w.shape[2], u.device)
        is_bool = attn_mask.dtype == torch.bool
        attn_mask = attn_mask & causal if is_bool else attn_mask.masked_fill(~causal, float("-inf"))
    if attn_mask.dtype == torch.bool:
        empty = ~attn_mask.any(-1, keepdim=True)
        attn_mask = attn_mask | empty
    else:
        empty = (attn_mask == float("-inf")).all(-1, keepdim=True)
        attn_mask = attn_mask.to(computed).masked_fill(empty, 0.0)
    # lets queries with nothing to attend to see everything, and takes that out again: zeros, with zero gradients
    output = scaled_dot_product_attention(u, w, value, attn_mask=attn_mask)
    return output.masked_fill(empty, 0.0).to(dtype)
