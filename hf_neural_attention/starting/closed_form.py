"""The spread of a layer's scores where its inputs are normalised, in closed form, from its weights alone.

A norm hands on hidden states whose components have the size of its gains. Taken as normal and independent of each other, and
from token to token, they make queries and keys of known size, and scores whose variance within a row is known as well.
"""

import math
from typing import Any

import torch

from ..models.neural_attention_compact import CompactAttentionMixin
from ..models.neural_attention_initialization import relu_sum_spread
from ..models.neural_attention_reference import ScorerWeights, first_layer_of_key, first_layer_of_query, in_float64
from ..models.neural_attention_scorer import is_compact
from .sources import Source, gain_of


ASK = "give `inputs`, on which it is measured"


def spread_in_closed_form(
    module: Any, query: list[Source], key: list[Source], head_dim: int, scaling: float, factors: tuple[float, float]
) -> float | str:
    """The spread of a layer's scores, or in words why it has no closed form.

    Args:
        query, key: what makes its queries and its keys.
        head_dim: their size (`h1` in a compact layer).
        scaling: of the dot product.
        factors: how many times as large queries and keys are as the outputs that they are made of.
    """
    if len(query) != 1 or len(key) != 1:
        return f"more than one of its layers makes its queries or its keys; {ASK}"
    if any(source.normalised is None for source in (*query, *key)):
        return f"its input is not what a norm hands on; {ASK}"
    layers = [layer for source in (*query, *key) for layer in (source.layer, source.normalised)]
    if any(getattr(layer, "bias", None) is not None and layer.bias.any() for layer in layers):  # type: ignore[union-attr]
        return f"it has biases that are not zero; {ASK}"
    if any(source.is_off_size() for source in (*query, *key)):
        return f"what a norm before its scores hands on has not the size of its gains; {ASK}"
    scorer: Any = getattr(module, "scorer", None)
    sizes = [factor * source.size() for factor, (source,) in zip(factors, (query, key), strict=True)]
    if scorer is None or scorer.mode == "residual":
        return scaling * math.sqrt(head_dim) * sizes[0] * sizes[1]
    weights = scorer.weights().in_float64()
    if is_compact(scorer):
        if not isinstance(module, CompactAttentionMixin):
            return f"its layers are packed for the heads of a stock module; {ASK}"
        of_query, of_key = (covariances(source, module.num_attention_heads) for (source,) in (query, key))
    else:
        (of_query, _), (of_key, _) = first_layer_of_query(weights), first_layer_of_key(weights)
        of_query, of_key = (
            size**2 * layer @ layer.transpose(-1, -2) for size, layer in zip(sizes, (of_query, of_key), strict=True)
        )
    return spread_of_features(scorer.mode, weights, of_query, of_key)


def covariances(source: Source, num_heads: int) -> torch.Tensor:
    """Of the numbers that a compact layer makes for each head: `[H, h1, h1]`."""
    rows = in_float64(source.rows() * gain_of(source.normalised)).unflatten(0, (num_heads, -1))
    return rows @ rows.transpose(-1, -2)


def spread_of_features(mode: str, weights: ScorerWeights, of_query: torch.Tensor, of_key: torch.Tensor) -> float | str:
    """Of scores of normal `u` and `w` with these covariances, `[h1, h1]` or `[H, h1, h1]`."""
    if any(bias is not None and bias.any() for bias in weights[1:-2:2]) or (mode != "thin" and (weights.weight2 < 0).any()):
        return f'only scorers that start "mirrored" have a closed form; {ASK}'
    if mode == "thin":
        variances = (of_query @ of_key).diagonal(dim1=-2, dim2=-1).sum(-1) / of_query.shape[-1]
        return variances.mean().sqrt().item()
    coefficients = (weights.weight3 @ weights.weight2).squeeze(-2)
    heads = torch.broadcast_shapes(of_query.shape[:-2], of_key.shape[:-2], coefficients.shape[:-1])
    by_head = [
        relu_sum_spread(each, one, other) ** 2
        for each, one, other in zip(
            coefficients.expand(*heads, -1).reshape(-1, coefficients.shape[-1]),
            of_query.expand(*heads, -1, -1).reshape(-1, *of_query.shape[-2:]),
            of_key.expand(*heads, -1, -1).reshape(-1, *of_key.shape[-2:]),
            strict=True,
        )
    ]
    return math.sqrt(sum(by_head) / len(by_head))
