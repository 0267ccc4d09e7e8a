"""The operation as the paper writes it, pair by pair: the oracle that every other backend is tested against.

DiGiugno and Mahmood, "Neural Attention" (arXiv 2502.17206), section 3, and the authors' released code. It holds tensors
of size `Tq * Tk * proj_dim`, differentiates through autograd any number of times, and returns the attention weights, which
is why `attn_implementation="eager"` runs it.
"""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import linear, relu

from .neural_attention_masking import dropout_multiplier, mask_scores


class ScorerWeights(NamedTuple):
    """Weights of a scorer, laid out as `nn.Linear` keeps them (`[out, in]` and `[out]`).

    With `p = proj_dim`, `D = head_dim` and `h1, h2 = hidden_dims`. Weights of one set per head have a leading dimension
    `H` (query heads); shared weights have none. Those of a `CompactScorer` are None up to `bias1`: it gets queries and keys
    projected to the first hidden layer. In mode `"thin"`, which has no network, they are None from `weight1` on.
    """

    q_weight: torch.Tensor | None  # [p, D]
    q_bias: torch.Tensor | None  # [p]
    k_weight: torch.Tensor | None  # [p, D]
    k_bias: torch.Tensor | None  # [p]
    weight1: torch.Tensor | None  # [h1, 2p], its first p columns for the query
    bias1: torch.Tensor | None  # [h1]
    weight2: torch.Tensor  # [h2, h1]; None in mode "thin", which is asked for first
    bias2: torch.Tensor  # [h2]
    weight3: torch.Tensor  # [1, h2]
    bias3: torch.Tensor  # [1]

    @property
    def is_thin(self) -> bool:
        """Whether there is no network, so that scores are dot products of what it would see."""
        return self.weight2 is None

    @property
    def per_head(self) -> bool:
        matrix = self.q_weight if self.is_thin else self.weight2
        return matrix is not None and matrix.dim() == 3

    @property
    def has_first_layer(self) -> bool:
        return self.q_weight is not None

    @property
    def any_tensor(self) -> torch.Tensor | None:
        """One of them, for its dtype and device; None of a compact scorer of mode "thin", which has no weights."""
        return self.q_weight if self.is_thin else self.weight2

    @property
    def head_dim(self) -> int:
        """Size of the queries and keys that the first layer takes; `h1` where there is none."""
        return self.hidden_dims[0] if self.q_weight is None else self.q_weight.shape[-1]

    @property
    def hidden_dims(self) -> tuple[int, int]:
        if self.is_thin:
            assert self.q_weight is not None  # excludes a compact one, which goes by the size of what it gets
            return self.q_weight.shape[-2], 0
        return self.weight2.shape[-1], self.weight2.shape[-2]

    @property
    def num_heads(self) -> int | None:
        """Query heads with a set of weights each; None where all share one."""
        return self.any_tensor.shape[0] if self.per_head else None  # type: ignore[union-attr]

    def to(self, dtype: torch.dtype) -> "ScorerWeights":
        if all(tensor is None or tensor.dtype == dtype for tensor in self):
            return self
        return ScorerWeights(*(None if tensor is None else tensor.to(dtype) for tensor in self))  # type: ignore[arg-type]

    def in_float64(self) -> "ScorerWeights":
        return ScorerWeights(*(None if tensor is None else in_float64(tensor) for tensor in self))  # type: ignore[arg-type]

    def without_first_layer(self) -> "ScorerWeights":
        return ScorerWeights(None, None, None, None, None, None, *self[6:])


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU where the device has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def apply_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`inputs` `[B, H, ..., in]` -> `[B, H, ..., out]`, by one matrix `[out, in]` or one per head `[H, out, in]`."""
    if weight.dim() == 2:
        return linear(inputs, weight, bias)
    flat = inputs.flatten(2, -2) @ weight.transpose(-1, -2) + bias.unsqueeze(-2)
    return flat.unflatten(2, inputs.shape[2:-1])


def expand_heads(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`[B, Hkv, T, D]` -> `[B, H, T, D]`: key and value heads repeated for the query heads that share them."""
    repeats = num_heads // tensor.shape[1]
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=1)


def first_layer_of_query(weights: ScorerWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """`(A, a)` such that a query contributes `u = A q + a` to the scorer's first hidden layer, before its ReLU.

    linear1 acts on a concatenation, so it splits into a sum, `linear1([q'; k']) = u_i + w_j`; the down-projection is folded
    in, which leaves one product per token, head_dim -> h1.

    Returns:
        `[h1, D]` and `[h1]` (linear1's bias included), with a leading dimension H where the weights are per head.
    """
    assert weights.q_weight is not None and weights.q_bias is not None
    if weights.weight1 is None or weights.bias1 is None:  # mode "thin"
        return weights.q_weight, weights.q_bias
    weight = weights.weight1[..., : weights.q_weight.shape[-2]]
    return weight @ weights.q_weight, weights.bias1 + (weight @ weights.q_bias.unsqueeze(-1)).squeeze(-1)


def first_layer_of_key(weights: ScorerWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """`(C, c)` such that a key contributes `w = C k + c`; otherwise as `first_layer_of_query`."""
    assert weights.q_weight is not None and weights.k_weight is not None and weights.k_bias is not None
    if weights.weight1 is None:  # mode "thin"
        return weights.k_weight, weights.k_bias
    weight = weights.weight1[..., weights.q_weight.shape[-2] :]
    return weight @ weights.k_weight, (weight @ weights.k_bias.unsqueeze(-1)).squeeze(-1)


def query_features(query: torch.Tensor, weights: ScorerWeights, projected: bool = False) -> torch.Tensor:
    """`u` of all queries, all that a scorer needs to know of them: `[B, H, Tq, D]` -> `[B, H, Tq, h1]`, in the weights' dtype.
    `projected`: that is what `query` holds already."""
    if projected or not weights.has_first_layer:
        return query if weights.any_tensor is None else query.to(weights.any_tensor.dtype)
    weight, bias = first_layer_of_query(weights)
    return apply_linear(query.to(weight.dtype), weight, bias)


def key_features(key: torch.Tensor, weights: ScorerWeights, projected: bool = False) -> torch.Tensor:
    """`w` of all keys: `[B, Hkv, Tk, D]` -> `[B, Hkv, Tk, h1]`; otherwise as `query_features`.

    Weights per head give every query head features of its own: `key` must then have `H` heads.
    """
    if projected or not weights.has_first_layer:
        return key if weights.any_tensor is None else key.to(weights.any_tensor.dtype)
    weight, bias = first_layer_of_key(weights)
    return apply_linear(key.to(weight.dtype), weight, bias)


def reference_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: ScorerWeights,
    *,
    residual_scale: float | None = None,
    softcap: float | None = None,
    keys_projected: bool = False,
    queries_projected: bool = False,
) -> torch.Tensor:
    """Scores of all pairs before any mask: `[B, H, Tq, D]`, `[B, H, Tk, D]` -> `[B, H, Tq, Tk]`, in the query's dtype.

    Args:
        residual_scale: None scores by the network alone; a number adds `residual_scale * query @ key^T`.
        softcap: what is added is `softcap * tanh(residual_scale * query @ key^T / softcap)`.
        keys_projected: `key` is `key_features(key)`, `[B, H, Tk, h1]`.
        queries_projected: `query` is `query_features(query)`, `[B, H, Tq, h1]`.
    """
    weights = weights.to(query.dtype)
    if weights.is_thin:
        u, w = query_features(query, weights, queries_projected), key_features(key, weights, keys_projected)
        return u @ w.to(u.dtype).transpose(-1, -2) / math.sqrt(u.shape[-1])
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    if queries_projected or keys_projected or not weights.has_first_layer:
        u, w = query_features(query, weights, queries_projected), key_features(key, weights, keys_projected)
        hidden = relu(u.unsqueeze(3) + w.unsqueeze(2))
    else:
        assert weights.q_weight is not None and weights.q_bias is not None and weights.weight1 is not None
        assert weights.k_weight is not None and weights.k_bias is not None and weights.bias1 is not None
        q = apply_linear(query, weights.q_weight, weights.q_bias)
        k = apply_linear(key, weights.k_weight, weights.k_bias)
        pairs = torch.cat(
            (q.unsqueeze(3).expand(-1, -1, -1, num_keys, -1), k.unsqueeze(2).expand(-1, -1, num_queries, -1, -1)), dim=-1
        )
        hidden = relu(apply_linear(pairs, weights.weight1, weights.bias1))
    hidden = relu(apply_linear(hidden, weights.weight2, weights.bias2))
    scores = apply_linear(hidden, weights.weight3, weights.bias3).squeeze(-1)
    if residual_scale is not None:
        # scales after the product, as stock "eager" does, so that the two are equal to the bit while the network is zero
        scores = scores + cap(query @ key.transpose(-1, -2) * residual_scale, softcap)
    return scores


def cap(products: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Dot products, soft-capped as Gemma 2 does (arXiv 2408.00118, section 2.3): between `-softcap` and `softcap`."""
    return products if softcap is None else torch.tanh(products / softcap) * softcap


def relative_sinks(sinks: torch.Tensor | None, weights: ScorerWeights) -> torch.Tensor | None:
    """Sinks `[H]`, in the weights' dtype, beside scores that lack `bias3`: without sinks, the softmax would not see it."""
    return None if sinks is None else sinks.to(weights.bias3.dtype) - weights.bias3.flatten()


def softmax_or_zero(scores: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax over the last dimension; rows of -inf only become zeros, with zero gradients.

    Args:
        sinks: `[H]`, of scores `[B, H, Tq, Tk]`: the logit of one more key per head, whose weight is left out of the result.
    """
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return softmax_or_zero(torch.cat((scores, column), dim=-1))[..., :-1]
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)


def reference_attention(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Neural Attention, literally. Arguments are checked and described by `neural_attention`.

    Returns:
        Output `[B, H, Tq, Dv]`, in the query's dtype (the value's, if queries come projected), and attention weights
        `[B, H, Tq, Tk]` (after dropout), in the query's dtype.
    """
    dtype = value.dtype if queries_projected else query.dtype
    num_heads = query.shape[1]
    key, value = expand_heads(key, num_heads), expand_heads(value, num_heads)
    scores = reference_scores(
        query,
        key,
        weights,
        residual_scale=residual_scale,
        softcap=softcap,
        keys_projected=keys_projected,
        queries_projected=queries_projected,
    )
    # computes masks and the softmax in float32 at least, since a mask's lowest float32 number is -inf in half precision
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    batch, _, num_queries, num_keys = scores.shape
    # calls tril, not causal_pairs, so that an exported graph keeps its lengths dynamic
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores.device).tril() if is_causal else None
    probabilities = softmax_or_zero(mask_scores(scores, attn_mask, causal), sinks)
    if dropout_seed is not None:
        probabilities = probabilities * dropout_multiplier(
            dropout_seed,
            dropout_p,
            batch=range(batch),
            heads=range(num_heads),
            num_heads=num_heads,
            rows=range(num_queries),
            num_columns=num_keys,
            dtype=probabilities.dtype,  # since half precision would round the factor, which is the same for all weights
        )
    probabilities = probabilities.to(query.dtype)
    output = probabilities @ value.to(query.dtype)
    return output.to(dtype), probabilities  # undoes autocast, which gives the product a smaller dtype
