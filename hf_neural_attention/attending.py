"""What attention functions return, computed outside of a model's own kernels, while its modules are observed."""

from typing import Any

import torch

from .introspection import Call, call_of
from .models.neural_attention_blockwise import without_autocast
from .models.neural_attention_interface import UNSUPPORTED_ARGUMENTS, implementation_of, neural_attention_forward
from .models.neural_attention_reference import expand_heads, key_features, reference_scores, softmax_or_zero


# Limits the numbers in the largest tensor of a step, [B, H, rows, Tk, h1]: 32 MiB in float32
NUMBERS_AT_ONCE = 2**23


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the attention function of an observed module, stock or neural, returns in evaluation mode: output `[B, Tq, H, Dv]`,
    and weights or None."""
    if hasattr(module, "scorer"):
        return neural_attention_forward(module, query, key, value, *args, **kwargs)
    return attend_by_dot_products(module, query, key, value, *args, **kwargs)


def attend_by_dot_products(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `attend` returns of a stock module; of a neural one, what the dot product would in its place."""
    for name, feature in UNSUPPORTED_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"Scores cannot be looked at under {feature} (`{name}`), which this model's attention asks for.")
    call = call_of(module, query, key, value, *args, **kwargs)
    values = expand_heads(value[:, :, : call.key.shape[2]], query.shape[1])
    outputs, maps, is_eager = [], [], implementation_of(module) == "eager"
    with without_autocast(query):
        for rows in blocks_of_rows(call):
            weights = softmax_or_zero(call.masked_rows(scores_of(None, call, rows), rows), call.sinks).to(value.dtype)
            outputs.append(weights @ values)
            if is_eager:
                maps.append(weights)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), torch.cat(maps, dim=2) if is_eager else None


def blocks_of_rows(call: Call, numbers_of_pair: int = 1) -> tuple[torch.Tensor, ...]:
    """Places of so many queries that what is computed of them at once stays small."""
    batch, heads, num_queries, _ = call.query.shape
    numbers = batch * heads * call.key.shape[2] * numbers_of_pair
    return torch.arange(num_queries, device=call.query.device).split(max(1, NUMBERS_AT_ONCE // max(1, numbers)))


def scores_of(scorer: Any, call: Call, rows: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
    """Scores `[B, H, rows, Tk]` of some queries of a call before any mask, in float32.

    Args:
        scorer: None for the dot product.
        keys: `key_features` of the call's keys, so as not to make them anew for other rows.
    """
    residual = scorer is None or scorer.mode == "residual"
    dot: Any = call.dot_products(rows) if residual else 0.0
    if scorer is None:
        return dot
    weights = scorer.weights().to(torch.float32)
    keys = key_features(call.key, weights) if keys is None else keys
    return reference_scores(call.query[:, :, rows], keys, weights, keys_projected=True) + dot
