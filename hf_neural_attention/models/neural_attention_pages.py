"""Keys and values in the pages of continuous batching.

Transformers' `PagedAttentionCache` holds as many numbers of a key as of a value, `Hkv * head_dim` a token and layer, in the
dtype of the model. Neural layers store their keys whole there: the cache is allocated for all layers alike, so projected keys
would save no byte of it. Compact layers, whose keys have fewer numbers, pad them.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def update_pages(
    cache: Any, module: Any, key: torch.Tensor, value: torch.Tensor, arguments: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes new keys and values, and returns those of all tokens that the batch attends to, as they are given.

    Args:
        cache: a `PagedAttentionCache`, before Transformers 5.24.
        module: the attention module, which says which layer it is by `layer_idx`.
        key: `[1, heads, T, size]`, of any heads and size that fit in the place of a key.
        value: `[1, Hkv, T, Dv]`.
        arguments: what the attention function got beside; the cache takes its indices from it.

    Raises:
        ValueError: if a key has more numbers than a value.
    """
    num_heads, size = key.shape[1], key.shape[3]
    pages = key if (num_heads, size) == (value.shape[1], value.shape[3]) else as_value(key, value)
    pages, value = write_and_read(cache, module.layer_idx, pages, value, arguments)
    if pages.shape[1:] == (num_heads, pages.shape[2], size):
        return pages, value
    numbers = pages.transpose(1, 2).flatten(2)[..., : num_heads * size]
    return numbers.unflatten(2, (num_heads, size)).transpose(1, 2), value


def write_and_read(
    cache: Any, layer: int, key: torch.Tensor, value: torch.Tensor, arguments: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all tokens, `[1, Hkv, Tk, D]`, which old versions of the cache give as `[Tk, Hkv, D]`."""
    if finds_its_indices(type(cache).update):
        return cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=arguments)
    indices = {name: arguments[name] for name in ("read_index", "write_index")}
    key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, **indices)
    return key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0)


@functools.cache
def finds_its_indices(update: Callable[..., Any]) -> bool:
    """Whether a cache's method takes all arguments of an attention function, and finds its indices in these."""
    return "kwargs" in inspect.signature(update).parameters


def as_value(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The numbers of keys `[1, heads, T, size]` in the shape of values `[1, Hkv, T, Dv]`, with zeros behind them."""
    room, needed = value.shape[1] * value.shape[3], key.shape[1] * key.shape[3]
    if needed > room:
        raise ValueError(
            f"Continuous batching has room for {room} numbers of a key, as many as a value has, and the keys of this compact "
            f"layer have {needed} ({key.shape[1]} heads of {key.shape[3]}). Use `generate`."
        )
    numbers = nn.functional.pad(key.transpose(1, 2).flatten(2), (0, room - needed))
    return numbers.unflatten(2, (value.shape[1], value.shape[3])).transpose(1, 2)
