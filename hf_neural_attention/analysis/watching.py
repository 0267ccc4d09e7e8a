"""One forward of a model in which every neural layer is looked at on its way."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..diagnostics import neural_layers
from ..models.neural_attention_interface import neural_attention_forward
from ..patching.calibration import Call, call_of
from ..patching.probing import RecordingConfigView, left_as_it_was, unwrap


WATCH_NAME = "neural_attention_watch"


class Sightings(list[Any]):
    """What `look` made of a layer's call."""

    def __init__(self, look: Callable[[Any, Call], Any]):
        super().__init__()
        self.look = look


@torch.no_grad()
def watch(model: Any, inputs: Mapping[str, Any], look: Callable[[Any, Call], Any]) -> dict[str, Any]:
    """What `look` makes of each neural layer's scorer and its call (the first, if there are several), by name.

    The model runs in evaluation mode and is left as it was.

    Raises:
        ValueError: if the model has no neural layer, or the inputs reach none.
    """
    base = unwrap(model)
    layers: dict[str, Any] = {name: module for name, module, _ in neural_layers(base)}
    if not layers:
        raise ValueError(f"This {type(base).__name__} has no neural layer.")
    views = {name: module.config for name, module in layers.items()}
    found = {name: Sightings(look) for name in layers}
    with left_as_it_was(base) as device:
        inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), dict(inputs))
        try:
            for name, module in layers.items():
                module.config = RecordingConfigView(views[name].base, WATCH_NAME, found[name])
            model(**inputs)
        finally:
            for name, module in layers.items():
                module.config = views[name]
    if not any(found.values()):
        raise ValueError(f"These inputs reach no neural layer of this {type(base).__name__}.")
    return {name: each[0] for name, each in found.items() if each}


def watch_call(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of neural layers, which is looked at before it goes on."""
    sightings = module.config.calls
    if not sightings:
        # here, where a sharded model has its weights together
        sightings.append(sightings.look(module.scorer, call_of(module, query, key, *args, **kwargs)))
    return neural_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(WATCH_NAME, watch_call)
AttentionMaskInterface.register(WATCH_NAME, sdpa_mask)


class QueriesAndKeys(NamedTuple):
    """What a neural layer's scorer sees of some inputs, and the factor of the dot product in its place."""

    query: torch.Tensor  # [batch, heads, queries, head_dim], float32
    key: torch.Tensor  # [batch, heads, keys, head_dim], float32; of as many heads
    scaling: float


def queries_and_keys(model: Any, **inputs: Any) -> dict[str, QueriesAndKeys]:
    """What every neural layer's scorer sees of some inputs, by the layer's name.

    Args:
        model: with neural layers, by class or by `patch`; left as it was.
        inputs: for its forward.

    Raises:
        ValueError: if the model has no neural layer, or the inputs reach none.
    """
    return watch(model, inputs, lambda scorer, call: QueriesAndKeys(call.query, call.key, call.scaling))
