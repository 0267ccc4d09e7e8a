"""A cache for `generate` that keeps of each key only what a scorer needs to know of it.

A scorer sees a key through one linear map to `hidden_dims[0]` numbers (2 at the paper's sizes, where a key has 64), so in
neural layers those are stored. The cache layers are Transformers' own, with another kind of keys in them: growing or of
fixed size, with or without a sliding window.
"""

import inspect
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, StaticCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .neural_attention_interface import AttentionModule, neural_modules
from .neural_attention_parallel import share_heads
from .neural_attention_scorer import is_compact


# Says under which name models and `generate` take a cache: `past_key_values` before Transformers 5.24, which renamed it
CACHE_ARGUMENT = (
    "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
)

# Maps what `generate(cache_implementation=...)` of our models takes to the stock implementation that it stands in for. Does
# not name "dynamic", the default, since assistants choke on it if it is named.
NEURAL_CACHES: dict[str, str | None] = {"neural": None, "neural_static": "static"}


class KeySource:
    """The attention module whose keys a layer stores. Copies of a cache share it: it is the model's, not the cache's."""

    def __init__(self, attention: AttentionModule):
        self.attention = attention

    @property
    def scorer(self) -> Any:
        scorer = getattr(self.attention, "scorer", None)
        if scorer is None:
            raise ValueError("This NeuralCache was made for a neural layer that has lost its scorer since; make a new cache.")
        return scorer

    def __deepcopy__(self, memo: dict) -> "KeySource":
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A NeuralCache cannot be pickled, as it refers to its model. `copy.deepcopy` keeps a copy of it in memory."
        )


class ProjectedKeys(CacheLayerMixin):
    """Comes before a stock class among the bases of a cache layer, and hands it projected keys.

    Keys are stored as `[B, Hkv, T, h1]` (`[B, H, T, h1]` with weights per head) in float32 at least, as
    `NeuralScorer.project_keys` returns them; values as the stock class does, `[B, Hkv, T, Dv]` in their own dtype.
    """

    v_head_dim: int  # of fixed size only

    def __init__(self, attention: AttentionModule, **kwargs):
        super().__init__(**kwargs)
        self.source = KeySource(attention)

    def project(self, key_states: torch.Tensor) -> torch.Tensor:
        scorer = self.source.scorer
        if key_states.shape[-1] != scorer.head_dim:
            raise ValueError(
                f"This NeuralCache got keys of size {key_states.shape[-1]}, but the layer that it was made for has keys of "
                f"size {scorer.head_dim}. A NeuralCache serves only the model that it was made for."
            )
        share_heads(self.source.attention, key_states.shape[1] * getattr(self.source.attention, "num_key_value_groups", 1))
        return scorer.project_keys(key_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys `[B, Hkv, T, D]`, projected, and values `[B, Hkv, T, Dv]`, and returns all of both, the keys
        projected."""
        keys, values = super().update(self.project(key_states), value_states, *args, **kwargs)  # type: ignore[safe-super]
        if not torch.compiler.is_compiling():
            vars(keys)["key_source"] = self.source  # lets a layer of another model notice
        return keys, values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # projects for `early_initialization`; `update` has done it, which the size tells: cached layers have `h1 < head_dim`
        if key_states.shape[-1] != self.source.scorer.hidden_dims[0]:
            key_states = self.project(key_states)
        # Allocates no values here, since the stock classes give them the dtype and heads of the keys, which are not theirs
        super().lazy_initialization(key_states, value_states[..., :0])  # type: ignore[safe-super]
        if isinstance(self, StaticLayer):
            batch, heads, _, self.v_head_dim = value_states.shape
            self.values = value_states.new_zeros(batch, heads, self.max_cache_len, self.v_head_dim)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.values)  # follows the stock class, since CUDA graphs need it
        else:
            self.values = value_states.new_empty(0)


class ProjectedKeyLayer(ProjectedKeys, DynamicLayer):
    """`DynamicLayer` with projected keys."""


class SlidingProjectedKeyLayer(ProjectedKeys, DynamicSlidingWindowLayer):
    """`DynamicSlidingWindowLayer` with projected keys."""


class StaticProjectedKeyLayer(ProjectedKeys, StaticLayer):
    """`StaticLayer` with projected keys."""


class StaticSlidingProjectedKeyLayer(ProjectedKeys, StaticSlidingWindowLayer):
    """`StaticSlidingWindowLayer` with projected keys."""


def project_layer(layer: Any, attention: AttentionModule) -> Any:
    """A layer like the stock one, which is still empty, with projected keys; the stock one itself if it is of another kind."""
    kind = type(layer)
    if kind is DynamicLayer:
        return ProjectedKeyLayer(attention)
    if kind is DynamicSlidingWindowLayer:
        return SlidingProjectedKeyLayer(attention, sliding_window=layer.sliding_window)
    if kind is StaticLayer:
        return StaticProjectedKeyLayer(attention, max_cache_len=layer.max_cache_len)
    if kind is StaticSlidingWindowLayer:
        # reads both from what this class calls its length, which is the smaller of window and length
        window = layer.max_cache_len
        # Asks for a longer one where the stock layer is longer than its window: from that Transformers 5.24 concludes whether
        # tokens can be taken back
        length = window if getattr(layer, "is_croppable", False) else window + 1
        return StaticSlidingProjectedKeyLayer(attention, max_cache_len=length, sliding_window=window)
    return layer


def neural_attentions(model: Any) -> dict[int, AttentionModule]:
    """The neural self-attention modules whose keys a cache of this model sees, by the index of their layer."""
    if model.config.is_encoder_decoder:
        model = model.get_decoder()
    found: dict[int, AttentionModule] = {}
    for module in model.modules():
        index, scorer = getattr(module, "layer_idx", None), getattr(module, "scorer", None)
        # asks what it can do, not its class, since every model from the Hub that brings its code has a class of its own
        if not isinstance(index, int) or not hasattr(scorer, "project_keys"):
            continue
        if not getattr(module, "is_causal", True):
            continue  # skips cross-attention, which has a cache of its own, and encoders
        if index in found:
            raise ValueError(f"Two neural attention modules of this {type(model).__name__} say that they are layer {index}.")
        found[index] = module
    return found


def saves_memory(attention: AttentionModule, dtype: torch.dtype) -> bool:
    """Whether a key of `dtype` takes fewer bytes projected. Never in mode "residual", whose dot product needs it whole, nor
    with latent attention (DeepSeek's), which caches the few numbers that keys are made of."""
    scorer = attention.scorer
    if scorer.mode == "residual" or hasattr(attention, "kv_lora_rank"):
        return False
    # counts a key once for each query head that shares it, since weights per head project it for each
    repeats = 1 if scorer.num_heads is None else getattr(attention, "num_key_value_groups", 1)
    projected = repeats * scorer.hidden_dims[0] * torch.promote_types(dtype, torch.float32).itemsize
    return projected < scorer.head_dim * dtype.itemsize


class NeuralCache(Cache):
    """A cache that stores, in the neural layers of a model, what their scorers need of the keys instead of the keys.

    Given to `generate`, or to the model's `forward`, as `cache`, which is named `past_key_values` before Transformers
    5.24; `generate` of the models of this package also makes one for `cache_implementation="neural"` or `"neural_static"`.
    It leads to the tokens that the stock caches lead to. A neural layer stores `hidden_dims[0]` float32 numbers per key
    and head, 32 times fewer than the key has at the paper's sizes, and does not project old keys anew for each token.
    Values are stored whole, and so are the keys of layers where projecting them saves nothing: layers with the dot
    product, of mode `"residual"`, or with wide scorers.

    The model of an encoder-decoder takes it as `EncoderDecoderCache(NeuralCache(model), DynamicCache(config=model.config))`.

    Args:
        model (`PreTrainedModel`): The model that the cache is for, which it refers to and does not copy. Another model must
            not use it: its neural layers refuse that, but for compiled ones, which cannot tell.
        max_cache_len (`int`, *optional*): Makes a cache of fixed size, for this many tokens, as `torch.compile` wants it.
            Default: None, a cache that grows.
        offloading (`bool`): Keep the cache on the CPU but for the layer at work, as `DynamicCache` and `StaticCache` do. It
            needs an accelerator. Default: False.

    Raises:
        TypeError: if `model` is no model.
        ValueError: if `max_cache_len` is below one, or projecting keys would save nothing in any layer, or the model is
            compact, where any cache holds projected keys.

    Example:

    ```python
    cache = NeuralCache(model)
    tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=20)  # `cache=cache` from Transformers 5.24 on
    cache.nbytes
    ```
    """

    def __new__(cls, model: nn.Module | None = None, max_cache_len: int | None = None, **kwargs: Any) -> Any:
        # keeps the class where a copy is made, which comes without arguments
        is_growing = model is not None and max_cache_len is None
        return super().__new__(GrowingNeuralCache if cls is NeuralCache and is_growing else cls)

    def __init__(self, model: nn.Module, max_cache_len: int | None = None, *, offloading: bool = False):
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise TypeError(
                f"NeuralCache needs the model that it is for and whose scorers it uses, not a {type(model).__name__}."
            )
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"`max_cache_len` is {max_cache_len}; it must be None or at least 1.")
        config: Any = model.config
        stock = DynamicCache(config=config) if max_cache_len is None else StaticCache(config, max_cache_len)
        layers = list(stock.layers)
        dtype = getattr(model, "dtype", torch.float32)
        # leaves keys whole where layers reuse those of another, since they would get them as that one's scorer sees them
        shares_keys = any(getattr(config.get_text_config(decoder=True), "kv_sharing_modes", None) or ())
        if not shares_keys:
            for index, attention in neural_attentions(model).items():
                if saves_memory(attention, dtype):
                    layers[index] = project_layer(layers[index], attention)
        saves_nothing = not any(isinstance(layer, ProjectedKeys) for layer in layers)
        if saves_nothing and any(is_compact(module.scorer) for module in neural_modules(model).values()):
            raise ValueError(
                f"NeuralCache is not for this {type(model).__name__}, which is compact: its layers hand every cache keys that "
                "are projected already, `hidden_dims[0]` numbers of a key and head. Use a DynamicCache or a StaticCache."
            )
        if shares_keys:
            raise ValueError(
                f"NeuralCache is not for this {type(model).__name__}: some of its layers reuse keys of others, and would get "
                "them as another scorer sees them. Use a DynamicCache or a StaticCache."
            )
        if saves_nothing:
            raise ValueError(
                f"NeuralCache would save nothing with this {type(model).__name__}: no layer has a scorer that needs less than "
                'the whole key (layers with the dot product, of mode "residual", or with scorers as wide as a key need all of '
                "it; latent attention caches no keys). Use a DynamicCache or a StaticCache."
            )
        Cache.__init__(
            self,
            layers=layers,
            offloading=offloading,
            offload_only_non_sliding=max_cache_len is not None,  # keeps the stock classes' defaults
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"This NeuralCache was made for a model of {len(self.layers)} layers; it was given to one with a layer "
                f"{layer_idx}."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held (in a cache of fixed size, of all it has room for)."""
        return cache_nbytes(self)

    def check_model(self, model: nn.Module) -> None:
        """Raises a ValueError if the cache was not made for this model."""
        attentions = neural_attentions(model)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, ProjectedKeys) and layer.source.attention is not attentions.get(index):
                raise ValueError(
                    f"This NeuralCache was made for another model than this {type(model).__name__}, and holds keys as that "
                    "one's scorers see them. Make one with `NeuralCache(model)`."
                )

    def crop(self, tokens_to_remove: int) -> None:
        self.check_can("crop")
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.check_can("batch_repeat_interleave")
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.check_can("batch_select_indices")
        super().batch_select_indices(indices)

    def check_can(self, method: str) -> None:
        """Before any layer is changed: stock layers of fixed size lack some methods."""
        if not all(hasattr(layer, method) for layer in self.layers):
            raise NotImplementedError(
                f"`{method}` is not there for caches of fixed size, with stock models neither. Use `NeuralCache(model)` "
                "without `max_cache_len`."
            )


class GrowingNeuralCache(NeuralCache, DynamicCache):
    """A `NeuralCache` without a fixed size. It is a `DynamicCache`, since caches of encoder-decoders ask for one before they
    take tokens back or repeat them."""


def cache_nbytes(cache: Cache) -> int:
    """Bytes of the keys and values that any cache of plain tensors holds, to compare one with another."""
    if isinstance(cache, EncoderDecoderCache):
        return cache_nbytes(cache.self_attention_cache) + cache_nbytes(cache.cross_attention_cache)
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def replace_cache(cache: Any, model: Any) -> Cache:
    """A NeuralCache in place of the empty stock cache that `generate` has prepared, initialized as far as that one is."""
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(replace_cache(cache.self_attention_cache, model), cache.cross_attention_cache)
    neural = NeuralCache(model, max_cache_len=cache.get_max_length() if isinstance(cache, StaticCache) else None)
    layers: list[Any] = neural.layers
    for layer, stock in zip(layers, cache.layers, strict=True):
        if stock.supports_early_init and stock.is_initialized:
            layer.lazy_initialization(stock.keys[:, :, :0], stock.values[:, :, :0])
    return neural
