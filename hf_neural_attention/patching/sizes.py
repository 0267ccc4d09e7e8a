"""How much a model holds: parameters, bytes, and what a cache keeps of each token."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from ..introspection import count, is_born_neural, unwrap
from ..registration import FAMILIES
from .errors import NoPatchableLayerError
from .layers import attention_modules
from .module_names import is_cross_attention
from .probing import AttentionCall, probe


class ModelSize(NamedTuple):
    """What a model holds."""

    num_parameters: int
    num_bytes: int  # of parameters and buffers, as `get_memory_footprint` counts them
    cache_bytes_per_token: int | None  # of keys and values in a stock cache; 0 for models without one, None if not known

    @property
    def cells(self) -> tuple[Any, ...]:
        cache = {None: "unknown", 0: "no cache"}.get(self.cache_bytes_per_token, self.cache_bytes_per_token)
        return self.num_parameters, self.num_bytes, cache


SIZE_TITLES = ("parameters", "bytes", "cache bytes per token")

Calls = Mapping[nn.Module, list[AttentionCall]]


def size_of(model: nn.Module, calls: Calls | None = None, example_inputs: Mapping[str, Any] | None = None) -> ModelSize:
    """What a model holds now.

    Args:
        calls: from `probe`, if it has been run already.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return ModelSize(count(model.parameters())[0], count(tensors)[1], cache_bytes(model, calls, example_inputs))


def cache_bytes(model: nn.Module, calls: Calls | None, example_inputs: Mapping[str, Any] | None) -> int | None:
    """Bytes that a stock cache keeps of each token that the model itself has read or written, in all layers together."""
    base: Any = unwrap(model)
    decoder = base.get_decoder() if getattr(getattr(base, "config", None), "is_encoder_decoder", False) else base
    config: Any = getattr(decoder, "config", None)
    if hasattr(config, "get_text_config"):  # finds the language model of several parts
        config = config.get_text_config(decoder=True)
    if not hasattr(config, "use_cache"):
        return 0
    if hasattr(config, "kv_lora_rank"):  # keeps what keys and values are made of, which attention does not get
        return None
    try:
        found = attention_modules(base)
    except NoPatchableLayerError:
        return None
    inside = set(decoder.modules())
    caching = [module for name, module in found.items() if module in inside and caches(name, module)]
    if caching and calls is None:
        calls, _ = probe(base, found, example_inputs)
    if decoder is not base and not caching:
        return None
    seen = [next(iter((calls or {}).get(module, [])), None) for module in caching]
    if None in seen:
        return None
    heads = getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and any(call.key[1] > heads for call in seen if call is not None):
        return None  # are repeated behind the cache
    numbers = sum(shape[1] * shape[3] for call in seen if call is not None for shape in (call.key, call.value))
    return numbers * getattr(base, "dtype", torch.get_default_dtype()).itemsize


def caches(name: str, module: Any) -> bool:
    """Whether an attention module puts keys of the tokens themselves into a cache, and no encoder's."""
    numbered = isinstance(getattr(module, "layer_idx", None), int)
    reads_others = getattr(module, "is_kv_shared_layer", False)  # as of Gemma 3n, where some layers use another one's keys
    return numbered and not reads_others and getattr(module, "is_causal", True) and not is_cross_attention(name, module)


def stock_twin(model: Any) -> nn.Module:
    """The stock model that a neural one takes the place of, without numbers (on the meta device).

    Raises:
        Exception: whatever its class raises, if it takes more than a config.
    """
    base: Any = unwrap(model)
    stock_class, config = type(base), base.config
    if is_born_neural(base):
        stock_class = getattr(transformers, type(base).__name__.removeprefix("Neural"))
        fields = {name: value for name, value in config.to_dict().items() if not name.startswith("neural_")}
        config = stock_class.config_class.from_dict(fields | {"model_type": FAMILIES[config.model_type]})
    with torch.device("meta"):
        made = stock_class(config)
    for name, _ in list(made.named_children()):
        if getattr(base, name, made) is None:  # was made without, as a base model without a pooling layer
            setattr(made, name, None)
    return made.to(getattr(base, "dtype", torch.float32))
