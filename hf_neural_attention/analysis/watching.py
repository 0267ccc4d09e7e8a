"""One forward of a model in which every neural layer is looked at on its way."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from ..introspection import Call, call_of, left_as_it_was, neural_layers, observed, unwrap
from ..models.neural_attention_interface import neural_attention_forward
from ..patching.layers import padding_of_queries


@torch.no_grad()
def watch(model: Any, inputs: Mapping[str, Any], look: Callable[[Any, Call], Any], *, padded: bool = False) -> dict[str, Any]:
    """What `look` makes of each neural layer's scorer and its call (the first, if there are several), by name.

    Args:
        padded: whether `look` gets queries of padding as well, and all in their places.

    The model runs in evaluation mode and is left as it was.

    Raises:
        ValueError: if the model has no neural layer, or the inputs reach none.
    """
    base = unwrap(model)
    layers: dict[str, Any] = {name: module for name, module, _ in neural_layers(base)}
    if not layers:
        raise ValueError(f"This {type(base).__name__} has no neural layer.")
    seen: dict[Any, Any] = {}
    names = {module: name for name, module in layers.items()}

    def look_and_go_on(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if module not in seen:
            call = call_of(module, *args, **kwargs)
            if not padded:
                call = call.without_padding(**padding_of_queries(names[module], module, inputs))
            # looks here, where a sharded model has its weights together
            seen[module] = look(module.scorer, call)
        return neural_attention_forward(module, *args, **kwargs)

    with left_as_it_was(base) as device, observed(layers.values(), look_and_go_on):
        model(**tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), dict(inputs)))
    if not seen:
        raise ValueError(f"These inputs reach no neural layer of this {type(base).__name__}.")
    return {name: seen[module] for name, module in layers.items() if module in seen}


class QueriesAndKeys(NamedTuple):
    """What a neural layer's scorer sees of some inputs, and the factor of the dot product in its place.

    In a compact layer these are the parts of queries and keys in the first hidden layer: `h1` numbers in place of `head_dim`.
    """

    query: torch.Tensor  # [batch, heads, queries, head_dim], float32
    key: torch.Tensor  # [batch, heads, keys, head_dim], float32; of as many heads
    scaling: float


def queries_and_keys(model: Any, **inputs: Any) -> dict[str, QueriesAndKeys]:
    """What every neural layer's scorer sees of some inputs, padding included, by the layer's name.

    Args:
        model: with neural layers, by class or by `patch`; left as it was.
        inputs: for its forward.

    Raises:
        ValueError: if the model has no neural layer, or the inputs reach none.
    """
    return watch(model, inputs, lambda scorer, call: QueriesAndKeys(call.query, call.key, call.scaling), padded=True)
