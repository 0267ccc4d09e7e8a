"""Whether scorers are alive: how many of their units are active, how far scores spread, how sharp attention is."""

import math
from typing import Any, NamedTuple

import torch
from torch.nn.functional import relu

from ..diagnostics import neural_layers
from ..models.neural_attention_reference import apply_linear, first_layer_of_query, key_features, softmax_or_zero
from ..patching.calibration import Call, capture
from ..patching.probing import left_as_it_was, unwrap
from ..patching.reports import table


class LayerHealth(NamedTuple):
    """How one scorer does on some inputs."""

    layer: str
    active_units: float  # share of the second hidden layer's units that are active for at least one pair
    active_pairs: float  # share of pairs for which such a unit is active, mean over units
    score_std: float  # of the network's scores within a row, mean over rows
    entropy: float  # of attention rows in nats, mean
    uniform_entropy: float  # the same, were attention uniform
    dead: bool  # no score differs from another of its row, and no gradient changes that


class ScorerHealth(tuple[LayerHealth, ...]):
    """One `LayerHealth` per neural layer. `str()` makes a table of it."""

    def __str__(self) -> str:
        rows = [(each.layer, *(f"{number:.3g}" for number in each[1:-1]), "dead" if each.dead else "") for each in self]
        return table([LayerHealth._fields, *rows])

    __repr__ = __str__


@torch.no_grad()
def scorer_health(model: Any, **inputs: Any) -> ScorerHealth:
    """Looks at every neural layer of a model while it runs on some inputs, which leaves it as it was.

    Args:
        model: with neural layers, by class or by `patch`.
        inputs: for its forward; a few examples of what it is trained on.

    Raises:
        ValueError: if the model has no neural layer.
    """
    base = unwrap(model)
    layers: dict[str, Any] = {name: module for name, module, _ in neural_layers(base)}
    if not layers:
        raise ValueError(f"This {type(base).__name__} has no neural layer.")
    with left_as_it_was(base) as device:
        inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        calls = {name: capture(base, name, module, [inputs])[0] for name, module in layers.items()}
        return ScorerHealth(health_of_layer(name, layers[name].scorer, call) for name, call in calls.items())


def health_of_layer(name: str, scorer: Any, call: Call) -> LayerHealth:
    weights = scorer.weights().to(torch.float32)
    rows = torch.arange(call.query.shape[2], device=call.query.device)
    u, w = apply_linear(call.query, *first_layer_of_query(weights)), key_features(call.key, weights)
    hidden = relu(u.unsqueeze(3) + w.unsqueeze(2))
    active = apply_linear(hidden, weights.weight2, weights.bias2)
    network = apply_linear(relu(active), weights.weight3, weights.bias3).squeeze(-1)
    scores = network
    if scorer.mode == "residual":
        scores = scores + call.query @ call.key.transpose(-1, -2) * call.scaling
    scores = call.masked_rows(scores, rows)
    seen = scores > float("-inf")
    probabilities = softmax_or_zero(scores)
    counted = seen.sum(-1) > 1  # rows with a choice
    units = (active > 0) & seen.unsqueeze(-1)
    mean = (network * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
    variance = ((network - mean).square() * seen).sum(-1) / seen.sum(-1).clamp_min(1)
    spread = variance[counted].sqrt()
    entropy = torch.special.entr(probabilities).sum(-1)[counted]
    return LayerHealth(
        name,
        units.flatten(0, -2).any(0).float().mean().item(),
        (units.flatten(0, -2).sum(0) / seen.sum()).mean().item(),
        spread.mean().item(),
        entropy.mean().item(),
        seen.sum(-1)[counted].float().log().mean().item() if counted.any() else math.nan,
        not bool(units.any()),
    )
