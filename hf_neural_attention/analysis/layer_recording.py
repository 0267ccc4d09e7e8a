"""One forward of a model in which every neural layer is looked at on its way."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..introspection import Call, neural_layers, unwrap
from ..scores import watch_layers


def watch(
    model: Any,
    inputs: Mapping[str, Any],
    look: Callable[[Any, Call], Any],
    *,
    padded: bool = False,
    networks_alone: bool = False,
    all_calls: bool = False,
) -> dict[str, Any]:
    """What `look` makes of each neural layer's scorer and its call (the first, if there are several), by name.

    The model runs in evaluation mode and is left as it was.

    Args:
        padded: whether `look` gets queries of padding as well, and all in their places.
        networks_alone: leave out scorers without a network, those of mode `"thin"`.
        all_calls: whether `look` gets later calls as well; what it makes of the last one counts.

    Raises:
        ValueError: if the model has no such layer, or the inputs reach none.
    """
    base = unwrap(model)
    layers: dict[str, Any] = {
        name: module for name, module, scorer in neural_layers(base) if not networks_alone or scorer.mode != "thin"
    }
    if not layers:
        raise ValueError(f"This {type(base).__name__} has no neural layer{' with a network' if networks_alone else ''}.")

    def look_at(module: Any, call: Call) -> Any:
        return look(module.scorer, call)

    return watch_layers(model, base, inputs, layers, look_at, padded=padded, all_calls=all_calls)


class QueriesAndKeys(NamedTuple):
    """What a neural layer's scorer sees of some inputs, and the factor of the dot product in its place.

    In a compact layer these are the parts of queries and keys in the first hidden layer: `h1` numbers in place of `head_dim`.
    """

    query: torch.Tensor  # [batch, heads, queries, head_dim], float32
    key: torch.Tensor  # [batch, heads, keys, head_dim], float32; of as many heads
    scaling: float
    softcap: float | None = None  # of the dot product


def seen_of(call: Call) -> QueriesAndKeys:
    return QueriesAndKeys(call.query, call.key, call.scaling, call.softcap)


def queries_and_keys(model: Any, **inputs: Any) -> dict[str, QueriesAndKeys]:
    """What every neural layer's scorer sees of some inputs, padding included, by the layer's name.

    Args:
        model: with neural layers, by class or by `patch`; left as it was.
        inputs: for its forward.

    Raises:
        ValueError: if the model has no neural layer, or the inputs reach none.
    """
    return watch(model, inputs, lambda scorer, call: seen_of(call), padded=True)
