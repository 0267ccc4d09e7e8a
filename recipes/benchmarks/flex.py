"""The network as a `score_mod` of torch's FlexAttention, which compiles a kernel of it: what one gets without kernels of ours.

The operation hands a `score_mod` the score, and where the pair is. `u` and `w` come as tensors that it captures and indexes by
batch, head and token; gradients of captured tensors are sums that FlexAttention makes with atomic additions.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hf_neural_attention.models.neural_attention_reference import ScorerWeights, key_features, query_features


MOST_SHAPES = 1024  # of a benchmark's, each forward alone and with gradients
LEAST_SIZE = 16  # of a query and key that FlexAttention multiplies, if only by zero


def network_score_mod(u: torch.Tensor, w: torch.Tensor, weights: ScorerWeights, adds: bool) -> Callable[..., torch.Tensor]:
    """The network of a pair. `u` `[B, H, Tq, h1]`, `w` `[B, H, Tk, h1]`; `adds`: to the score of the queries and keys."""
    second, first = weights.weight2.shape
    weight3 = weights.weight3.flatten()

    def score_mod(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        # indexes by tensors alone, since views of captured tensors cannot be taken inside
        places = [torch.full_like(head, place) for place in range(max(first, second))]
        hidden = [torch.relu(u[batch, head, query, place] + w[batch, head, key, place]) for place in places[:first]]
        total = score if adds else torch.zeros_like(score)
        for row in places[:second]:
            opened = weights.bias2[row]
            for column, value in zip(places, hidden, strict=False):
                opened = opened + weights.weight2[row, column] * value
            total = total + weight3[row] * torch.relu(opened)
        return total

    return score_mod


def later_key(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key <= query


@functools.cache
def causal_blocks(queries: int, keys: int, device: torch.device) -> Any:
    return create_block_mask(later_key, None, None, queries, keys, device=device)


@functools.cache
def compiled_flex_attention() -> Callable[..., torch.Tensor]:
    # Compiles one for each shape, and fails where torch would go on without a kernel, whose time is another thing's
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MOST_SHAPES
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def attend_by_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: ScorerWeights,
    is_causal: bool,
    residual_scale: float | None,
    keys_projected: bool = False,
) -> torch.Tensor:
    """Neural Attention with shared weights and as many key heads as query heads. On CPUs it is not compiled, for tests."""
    weights = weights.to(torch.float32)
    u, w = query_features(query, weights), key_features(key, weights, keys_projected)
    if residual_scale is None:
        query, key = (side.new_zeros(*side.shape[:3], LEAST_SIZE) for side in (query, key))
    run: Any = flex_attention if query.device.type == "cpu" else compiled_flex_attention()
    return run(
        query,
        key,
        value,
        score_mod=network_score_mod(u, w, weights, residual_scale is not None),
        block_mask=causal_blocks(query.shape[2], key.shape[2], query.device) if is_causal else None,
        scale=residual_scale,
    )
