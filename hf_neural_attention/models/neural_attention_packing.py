"""The compact form inside attention modules of any family, whose forward stays as it is.

Such a forward views what its query and key layers make as heads of `head_dim` numbers each. The narrow layers that take their
places make `H * h1` numbers, and more up to the next multiple of `head_dim`, which nobody reads; so a few heads hold what all
heads have to say of a token. A `PackedScorer` takes them apart again, behind the cache.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import StaticLayer

from .neural_attention_compact import fold, place_like
from .neural_attention_initialization import draw_compact_weights, needs_weights
from .neural_attention_reference import in_float64
from .neural_attention_scorer import CompactScorer
from .neural_attention_zero3 import is_apart


class PackedScorer(CompactScorer):
    """A `CompactScorer` that gets the numbers of several heads in each of fewer heads.

    Args:
        hidden_dims, num_heads, init, mode: as of `CompactScorer`.
        num_query_heads (`int`): `H`.
        num_key_heads (`int`): Heads with a `w` of their own: `H` with weights per head, `Hkv` without.
        stock_head_dim (`int`): Numbers in a head, as the stock forward counts them.
        query_layer, key_layer (`str`): Names, inside the attention module, of the layers that make them.
    """

    def __init__(
        self,
        hidden_dims: tuple[int, int] | list[int],
        num_heads: int | None = None,
        init: str = "mirrored",
        mode: str = "replace",
        *,
        num_query_heads: int,
        num_key_heads: int,
        stock_head_dim: int,
        query_layer: str,
        key_layer: str,
    ):
        super().__init__(hidden_dims, num_heads, init, mode)
        self.num_query_heads, self.num_key_heads, self.stock_head_dim = num_query_heads, num_key_heads, stock_head_dim
        self.query_layer, self.key_layer = query_layer, key_layer

    def packed_heads(self, num_heads: int) -> int:
        """Heads of `stock_head_dim` numbers that hold `h1` numbers of so many heads."""
        return -(-num_heads * self.hidden_dims[0] // self.stock_head_dim)

    def unpack(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`u` `[B, H, Tq, h1]` and `w` `[B, H or Hkv, Tk, h1]` of what the stock forward hands on, `[B, packed heads, T, D]`.

        Raises:
            ValueError: if these are not the packed heads, since a forward has split what it got by a number of its own.
        """
        unpacked = []
        for name, states, num_heads in (("query", query, self.num_query_heads), ("key", key, self.num_key_heads)):
            wanted = self.packed_heads(num_heads), self.stock_head_dim
            if (states.shape[1], states.shape[3]) != wanted:
                raise ValueError(
                    f"`{name}` has shape {tuple(states.shape)}; a compact layer hands on {wanted[0]} heads of {wanted[1]} "
                    f"numbers, which hold {self.hidden_dims[0]} numbers for each of {num_heads} heads."
                )
            flat = states.transpose(1, 2).flatten(2)[..., : num_heads * self.hidden_dims[0]]
            unpacked.append(flat.unflatten(2, (num_heads, self.hidden_dims[0])).transpose(1, 2))
        return unpacked[0], unpacked[1]

    def forward(self, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*self.unpack(query, key), *args, **kwargs)


class Source(NamedTuple):
    """Where an attention module's queries, or keys, come from."""

    layer: str  # name of the `nn.Linear` inside the module that makes them
    factor: float  # by which the module multiplies what that makes


class PackedLayer(NamedTuple):
    """What is put in an attention module's place of query layer, key layer and scorer, by their names in it."""

    query: tuple[str, nn.Linear]
    key: tuple[str, nn.Linear]
    scorer: PackedScorer


def narrow_layer(old: nn.Linear, weight: torch.Tensor, bias: torch.Tensor, size: int) -> nn.Linear:
    """A linear layer like `old`, with these weights `[n, d_model]` and `[n]`, and, up to a multiple of `size`, the first rows
    once more, which nobody reads.

    It is a plain `nn.Linear`, so that adapters, quantisers and exporters take it as such. The rows that are not read get no
    gradients. They are not zero, since some of these divide by a row's norm or largest number (DoRA, float8).
    """
    made = empty_layer(old, len(weight), size)
    rows = torch.arange(made.out_features, device=weight.device) % len(weight)
    with torch.no_grad():
        made.weight.copy_(weight[rows])
        made.bias.copy_(bias[rows])
    made._is_hf_initialized = True  # type: ignore[assignment]
    return made.train(old.training)


def empty_layer(old: nn.Linear, num_numbers: int, size: int) -> nn.Linear:
    width = -(-num_numbers // size) * size
    if is_apart(old.weight):  # is being made under `zero.Init`, which shares out what is made there by itself
        return nn.Linear(old.in_features, width, bias=True)
    made = nn.Linear(old.in_features, width, bias=True, device="meta")
    place_like(made, old)
    return made


def pack(attention: Any, query: Source, key: Source, num_heads: int) -> PackedLayer:
    """The packed layers that make an attention module with a scorer of mode `"replace"` or `"thin"` compute what it computes,
    up to rounding. The module stays as it is.

    Args:
        query, key: where its queries and keys come from.
        num_heads: of its queries.
    """
    scorer = attention.scorer
    size = scorer.head_dim
    old = {name: attention.get_submodule(name) for name in (query.layer, key.layer)}

    def scaled(source: Source) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = old[source.layer]
        return tuple(
            None if each is None else in_float64(each.detach()) * source.factor for each in (layer.weight, layer.bias)
        )  # type: ignore[return-value]

    folded = fold(scorer.weights(), scaled(query), scaled(key), num_heads)
    with torch.device("meta"):  # draws nothing
        packed = PackedScorer(
            scorer.hidden_dims,
            scorer.num_heads,
            scorer.init,
            scorer.mode,
            num_query_heads=num_heads,
            num_key_heads=folded.key_weight.shape[0],
            stock_head_dim=size,
            query_layer=query.layer,
            key_layer=key.layer,
        )
    place_like(packed.train(scorer.training), scorer)
    packed.fill(folded.of_pairs)
    for module in packed.modules():  # lets `init_weights`, should it run again, leave them
        module._is_hf_initialized = True  # type: ignore[assignment]

    def narrow(source: Source, weight: torch.Tensor, bias: torch.Tensor) -> tuple[str, nn.Linear]:
        # divides by what the module will multiply with
        made = weight.flatten(0, 1) / source.factor, bias.flatten() / source.factor
        return source.layer, narrow_layer(old[source.layer], *made, size)

    return PackedLayer(
        narrow(query, folded.query_weight, folded.query_bias), narrow(key, folded.key_weight, folded.key_bias), packed
    )


def rebuild(attention: Any, settings: Mapping[str, Any]) -> PackedLayer:
    """Packed layers for an attention module that has none: with new weights where the module has some, and without numbers
    where it has none, since they are to be loaded.

    New weights are those that a new compact layer of this package has (`draw_compact_weights`). Where the module multiplies
    its queries by a constant, scores spread by less.

    Args:
        settings: arguments of `PackedScorer`.

    Raises:
        AttributeError, TypeError, ValueError: if these do not fit this module.
    """
    scorer = PackedScorer(**settings)

    def empty(name: str, num_heads: int) -> tuple[str, nn.Linear]:
        return name, empty_layer(attention.get_submodule(name), num_heads * scorer.hidden_dims[0], scorer.stock_head_dim)

    if needs_weights(attention):
        return draw_packed(attention, scorer)
    return PackedLayer(
        empty(scorer.query_layer, scorer.num_query_heads), empty(scorer.key_layer, scorer.num_key_heads), scorer
    )


def draw_packed(attention: Any, scorer: PackedScorer) -> PackedLayer:
    """New weights of packed layers, the scorer's included."""
    query, key = (attention.get_submodule(name) for name in (scorer.query_layer, scorer.key_layer))
    form = scorer.hidden_dims, scorer.num_query_heads, scorer.num_heads is not None, scorer.mode
    drawn = draw_compact_weights(scorer.init, query.in_features, *form)
    of_key = drawn
    if key.in_features != query.in_features:  # sees states of another width, as cross-attention may
        of_key = draw_compact_weights(scorer.init, key.in_features, *form, of_pairs=drawn.of_pairs)
    scorer.fill(drawn.of_pairs)
    # takes the first query head's of each group that shares a key
    step = scorer.num_query_heads // scorer.num_key_heads
    size = scorer.stock_head_dim
    of_queries = narrow_layer(query, drawn.query_weight.flatten(0, 1), drawn.query_bias.flatten(), size)
    of_keys = narrow_layer(key, of_key.key_weight[::step].flatten(0, 1), of_key.key_bias[::step].flatten(), size)
    return PackedLayer((scorer.query_layer, of_queries), (scorer.key_layer, of_keys), scorer)


def watch_caches(attention: Any) -> None:
    """Lets an attention module with packed layers refuse caches that cannot hold its keys, before it touches one."""
    attention.register_forward_pre_hook(refuse_caches, with_kwargs=True)


def refuse_caches(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook that runs before the forward of an attention module with packed layers.

    Raises:
        ValueError: if it gets a cache of fixed size, whose layers have room for as many heads of values as of keys, or one
            with whole keys in it.
    """
    scorer, index = attention.scorer, getattr(attention, "layer_idx", None)
    if index is None:
        return
    num_heads = scorer.packed_heads(scorer.num_key_heads)
    packs = f"This {type(attention).__name__} is compact, and packs the keys of {scorer.num_key_heads} heads into {num_heads}"
    given = (*args, *kwargs.values())
    crosses = sum(isinstance(each, torch.Tensor) and each.ndim == 3 for each in given) > 1  # gets an encoder's states too
    for cache in given:
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.cross_attention_cache if crosses else cache.self_attention_cache
        layer = cache.layers[index] if isinstance(cache, Cache) and index < len(cache.layers) else None
        if isinstance(layer, StaticLayer) and num_heads != scorer.num_key_heads:
            raise ValueError(
                f"{packs}, but not the values. A {type(cache).__name__} has a fixed size, with room for as many heads "
                "of keys as of values. Use a DynamicCache, which `generate` makes without `cache_implementation`."
            )
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.ndim == 4 and (keys.shape[1], keys.shape[3]) != (num_heads, scorer.stock_head_dim):
            raise ValueError(
                f"{packs}. The {type(cache).__name__} has keys of {keys.shape[1]} heads. Whatever put them into it (prefix "
                "tuning, another model) made whole ones, as the dot product wants them."
            )


def put_in(parent: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Sets a descendant by its dotted name, and returns the one that was there."""
    old = parent.get_submodule(name)
    parent.set_submodule(name, module)
    return old
