"""How a scorer gets into a Transformers model: attached to the stock attention module, which stays in place.

An attention module fetches its attention function by the name in `self.config._attn_implementation`. Attaching gives one
module a `NeuralScorer` as a child named `scorer`, and a view of its config in which that name is ours; the rest of the
model (its mask, its cache, its other layers) goes on with the real config. Nothing of the model is replaced.
"""

from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from .neural_attention_pages import update_pages
from .neural_attention_parallel import check_whole_sequence, share_heads
from .neural_attention_scorer import Scorer


logger = logging.get_logger(__name__)

ATTENTION_NAME = "neural_attention"
NO_WEIGHTS = 'A neural %s returns no attention weights under attn_implementation=%r: `output_attentions=True` needs "eager".'

# Stands for any stock attention module, since annotations of `nn.Module` leave no room for attributes like `config`
AttentionModule: TypeAlias = Any

# Lists the stock implementations whose masks `normalize_mask` understands; those of pages are what continuous batching sets
SUPPORTED_IMPLEMENTATIONS = ("eager", "sdpa", "paged|eager", "paged|sdpa")

# Lists arguments of attention functions that change the scores in ways that only a dot product can honour, or that would
# need another kernel. Silently dropping one would give wrong results.
UNSUPPORTED_ARGUMENTS = {
    "indices": "sparse attention to keys that an indexer has selected",
    "block_indices": "sparse attention to blocks of keys that an indexer has selected",
}


class NeuralConfigView:
    """A model's config as one attention module sees it: the same object but for the name of the attention function."""

    def __init__(self, base: PreTrainedConfig):
        object.__setattr__(self, "base", base)

    @property
    def _attn_implementation(self) -> str:
        return ATTENTION_NAME

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # avoids endless recursion while unpickling, when it is not there yet
            raise AttributeError(name)
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.base, name, value)

    def __reduce__(self):
        return NeuralConfigView, (self.base,)


def is_neural(module: nn.Module) -> bool:
    """Whether it is an attention module with a scorer."""
    return isinstance(getattr(module, "config", None), NeuralConfigView)


def implementation_of(module: Any) -> str:
    """The attention implementation that a module with a `NeuralConfigView` is to have: eager where its config says nothing, as
    modules without a model take it."""
    return module.config.base._attn_implementation or "eager"


def neural_modules(model: nn.Module) -> dict[str, Any]:
    """The attention modules of a model that have a scorer, by name."""
    return {name: module for name, module in model.named_modules() if is_neural(module)}


def attach_scorer(attention: AttentionModule, scorer: Scorer) -> None:
    """Makes a stock attention module neural, in place.

    Raises:
        ValueError: if it has a scorer already.
    """
    if hasattr(attention, "scorer"):
        raise ValueError(f"This {type(attention).__name__} has a scorer already; detach it first.")
    view = NeuralConfigView(attention.config)
    attention.scorer, attention.config = scorer, view


def detach_scorer(attention: AttentionModule) -> Scorer:
    """Undoes `attach_scorer` and returns the scorer.

    Raises:
        ValueError: if it has none.
    """
    if not hasattr(attention, "scorer"):
        raise ValueError(f"This {type(attention).__name__} has no scorer.")
    scorer = attention.scorer
    del attention.scorer
    attention.config = attention.config.base
    return scorer


def check_implementation(name: str | None, model_name: str) -> None:
    """Raises a ValueError with the reason if a model with neural layers cannot run under this attention implementation."""
    if name is None or name in SUPPORTED_IMPLEMENTATIONS:
        return
    if name == ATTENTION_NAME:
        reason = "it is what single layers run (`config.neural_layers` chooses them), not an implementation for a model"
    else:
        reason = "its masks come in a form that only its own kernel reads, and that kernel computes dot products"
    raise ValueError(
        f"{model_name} cannot use `attn_implementation={name!r}`: {reason}. Use one of "
        f"{', '.join(map(repr, SUPPORTED_IMPLEMENTATIONS))}: either runs the neural layers with Neural Attention and the "
        "other layers with the implementation named."
    )


def normalize_mask(
    implementation: str,
    attention_mask: torch.Tensor | None,
    num_queries: int,
    num_keys: int,
    is_causal: bool,
) -> tuple[torch.Tensor | None, bool, int]:
    """Turns what a stock attention function is handed into what `NeuralScorer` takes.

    No mask means three things to "sdpa" functions: causal (training, prefill), everything (decoding one token), and
    causal over the first `num_queries` keys (prefill of a cache longer than the input). To "eager" it means everything.
    Additive masks exclude with the lowest finite number, under which a fully masked row would attend uniformly; it becomes
    -inf, so that such rows (left padding) are zero under both implementations, with a position bias and without.

    Returns:
        The mask, whether attention is causal, and how many of the keys count.
    """
    if attention_mask is None:
        causal = implementation != "eager" and is_causal and num_queries > 1
        return None, causal, min(num_keys, num_queries) if causal else num_keys
    if attention_mask.dim() != 4:
        raise ValueError(
            f"Neural Attention got a mask of shape {tuple(attention_mask.shape)}; expected 4 dimensions "
            "[batch, 1 or heads, queries, keys]."
        )
    if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        raise ValueError(
            f"Neural Attention got a mask of dtype {attention_mask.dtype}; expected bool (True attends) or float (added)."
        )
    attention_mask = attention_mask[..., :num_keys]  # cuts it, since static caches may come with masks for more keys
    if attention_mask.dtype != torch.bool:
        lowest = torch.finfo(attention_mask.dtype).min
        attention_mask = attention_mask.masked_fill(attention_mask <= lowest, float("-inf"))
    return attention_mask, False, num_keys


def add_position_bias(attention_mask: torch.Tensor | None, position_bias: torch.Tensor) -> torch.Tensor:
    """A normalized mask (see `normalize_mask`) and additive biases `[batch or 1, heads, queries, keys]` as one float mask."""
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return position_bias.masked_fill(~attention_mask, float("-inf"))
    return position_bias + attention_mask


def share_batch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same, of one batch size: learned queries may come as a single example for all keys, as stock functions broadcast."""
    if query.shape[0] == key.shape[0]:
        return query, key, value
    batch = max(query.shape[0], key.shape[0])
    return tuple(tensor.expand(batch, -1, -1, -1) for tensor in (query, key, value))


def mask_of_call(
    module: AttentionModule,
    implementation: str,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
    position_bias: torch.Tensor | None,
) -> tuple[torch.Tensor | None, bool, int]:
    """`normalize_mask` of what an attention module hands to its attention function, biases included."""
    if implementation not in SUPPORTED_IMPLEMENTATIONS:  # refuses it here, since a stock model does not when it is set
        check_implementation(implementation, f"A model with a neural {type(module).__name__}")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    mask, causal, num_keys = normalize_mask(implementation, attention_mask, query.shape[2], key.shape[2], is_causal)
    if position_bias is not None:
        mask = add_position_bias(mask, position_bias[..., :num_keys])
    return mask, causal, num_keys


def neural_attention_forward(
    module: AttentionModule,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    cache: Any = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of neural layers, called by stock attention modules as they call any other.

    Args:
        query, key, value: `[B, H, Tq, D]`, `[B, Hkv, Tk, D]`, `[B, Hkv, Tk, Dv]`; keys of another size than the queries
            come projected from a `NeuralCache`. A batch of one, of queries or of keys, stands for all.
        attention_mask: as the model's own implementation gets it (see `normalize_mask`).
        position_bias: `[B or 1, H, Tq, Tk]`, added to the scores (T5).
        cache: of pages, which continuous batching hands to attention functions before Transformers 5.24; its mask tells the
            requests apart that share a batch.
        softcap: bounds the dot products of mode `"residual"`, not the network's scores.
        s_aux, sinks: `[H]`, two names for the same: the logit of a key without value (attention sinks).

    Returns:
        Output `[B, Tq, H, Dv]`, and the attention weights `[B, H, Tq, Tk]` if the model's implementation is "eager".

    Raises:
        ValueError: if the module has no scorer, the keys come from the NeuralCache of another model, an argument asks for what
            a score network cannot do, several processes share the sequence, or the model has been set to an implementation
            with masks of another kind, or to one of pages that it did not get.
    """
    # ignores the class of its config, since of several copies of this file, each from a model on the Hub, the last serves all
    if not hasattr(module, "scorer"):
        check_implementation(ATTENTION_NAME, type(module).__name__)
    for name, feature in UNSUPPORTED_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"Neural Attention cannot honour {feature} (`{name}`), which this model's attention asks for.")
    check_whole_sequence()
    share_heads(module, query.shape[1])
    implementation = implementation_of(module)
    if cache is not None:
        key, value = update_pages(cache, module, key, value, kwargs)
    elif implementation.startswith("paged") and "write_index" not in kwargs:  # finds the cache updated by modules from 5.24 on
        raise ValueError(
            f"`attn_implementation={implementation!r}` is for continuous batching (`generate_batch`), whose cache and mask "
            "this forward did not get. `model.set_attn_implementation` changes it."
        )
    source = getattr(key, "key_source", None)  # of a NeuralCache
    if source is not None and source.attention is not module:
        raise ValueError(
            f"This {type(module).__name__} got keys from a NeuralCache made for another model, which holds keys as that "
            "one's scorers see them. Make one with `NeuralCache(model)`."
        )
    query, key, value = share_batch(query, key, value)
    mask, causal, num_keys = mask_of_call(module, implementation, query, key, attention_mask, is_causal, position_bias)
    if num_keys < key.shape[2]:
        key, value = key[:, :, :num_keys], value[:, :, :num_keys]
    if implementation == "eager":
        if getattr(module, "reorder_and_upcast_attn", False):  # does what GPT-2 does by itself for a dot product
            query, key = query.float(), key.float()
    elif kwargs.get("output_attentions"):
        logger.warning_once(NO_WEIGHTS, type(module).__name__, implementation)
    output, weights = module.scorer(
        query,
        key,
        value,
        mask,
        dropout,
        causal,
        scaling,
        sinks=sinks if s_aux is None else s_aux,
        softcap=softcap,
        keys_projected=key.shape[-1] != query.shape[-1],
        need_weights=implementation == "eager",
    )
    weights = None if weights is None else weights.to(value.dtype)
    return output.to(value.dtype).transpose(1, 2).contiguous(), weights


AttentionInterface.register(ATTENTION_NAME, neural_attention_forward)
# Keeps the causal mask of a model set to this name as a whole, which it would lose before the error above. No neural layer
# uses the entry, since its mask follows the model's own implementation.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
