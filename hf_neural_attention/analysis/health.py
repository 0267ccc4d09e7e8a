"""Whether scorers are alive: how many of their units are active, how far scores spread, how sharp attention is."""

import math
from typing import Any, NamedTuple

import torch
from torch.nn.functional import relu

from ..attending import NUMBERS_AT_ONCE
from ..introspection import Call
from ..models.neural_attention_blockwise import without_autocast
from ..models.neural_attention_reference import apply_linear, key_features, query_features
from ..patching.reports import table
from ..scores import RowFigures
from .layer_recording import watch


class LayerHealth(NamedTuple):
    """How one layer's scorer, or its scorers if each head has one, do on some inputs."""

    layer: str
    scorers: int  # one, or one per head
    dead: int  # of them: no unit of the second hidden layer is active for any pair of the inputs: equal scores, no gradient
    active_units: float  # share of units of the second hidden layer that are active for at least one pair
    active_pairs: float  # share of pairs for which such a unit is active, mean over units
    score_std: float  # of the network's scores within a row, mean over rows
    entropy: float  # of attention rows in nats, mean
    uniform_entropy: float  # the same, were attention uniform


class ScorerHealth(tuple[LayerHealth, ...]):
    """One `LayerHealth` per neural layer. `str()` makes a table of it."""

    def __str__(self) -> str:
        counts = [("dead" if each.scorers == 1 else f"{each.dead} dead") if each.dead else "" for each in self]
        rows = [(each.layer, *(f"{x:.3g}" for x in each[3:]), word) for each, word in zip(self, counts, strict=True)]
        return table([("layer", *LayerHealth._fields[3:], ""), *rows])

    __repr__ = __str__


def scorer_health(model: Any, **inputs: Any) -> ScorerHealth:
    """Looks at every neural layer of a model while it runs on some inputs, which leaves it as it was.

    Args:
        model: with neural layers, by class or by `patch`.
        inputs: for its forward; a few examples of what it is trained on. What their `attention_mask` calls padding does not
            count.

    Returns:
        `ScorerHealth`: of each layer that the forward reaches, all its calls together, in the order of the model.

    Raises:
        ValueError: if no neural layer of the model has a network (mode `"thin"` has none), or the inputs reach none.
    """
    sums: dict[Any, HealthSums] = {}

    def look(scorer: Any, call: Call) -> LayerHealth:
        return health_of_layer(scorer, call, sums.setdefault(scorer, HealthSums(call.sinks)))

    found = watch(model, inputs, look, networks_alone=True, all_calls=True)
    return ScorerHealth(health._replace(layer=name) for name, health in found.items())


class HealthSums:
    """Sums over the pairs of a layer's calls."""

    def __init__(self, sinks: torch.Tensor | None = None) -> None:
        self.active_pairs: Any = 0  # [H, h2]
        self.pairs = 0.0
        self.rows = RowFigures(sinks)


def health_of_layer(scorer: Any, call: Call, sums: HealthSums | None = None) -> LayerHealth:
    """Over all pairs, in float32 as the backends compute scores; together with those that are in `sums` already."""
    sums = sums or HealthSums(call.sinks)
    with without_autocast(call.query):
        add_pairs(sums, scorer, call)
    scorers = sums.active_pairs if scorer.num_heads else sums.active_pairs.sum(0, keepdim=True)
    alive, figures = scorers > 0, sums.rows
    deviations, entropy, uniform = (
        total / figures.rows if figures.rows else math.nan for total in (figures.deviations, figures.entropy, figures.uniform)
    )
    return LayerHealth(
        "",
        len(alive),
        int((~alive.any(-1)).sum()),
        alive.float().mean().item(),
        (sums.active_pairs.sum(0) / sums.pairs).mean().item(),
        deviations,
        entropy,
        uniform,
    )


def add_pairs(sums: HealthSums, scorer: Any, call: Call) -> None:
    """Some queries at a time."""
    weights = scorer.weights().to(torch.float32)
    keys = key_features(call.key, weights).unsqueeze(2)
    batch, heads, num_queries, _ = call.query.shape
    at_once = max(1, NUMBERS_AT_ONCE // (batch * heads * keys.shape[3] * keys.shape[4]))
    for rows in torch.arange(num_queries, device=call.query.device).split(at_once):
        query = call.query[:, :, rows]
        hidden = relu(query_features(query, weights).unsqueeze(3) + keys)
        active = apply_linear(hidden, weights.weight2, weights.bias2)
        network = apply_linear(relu(active), weights.weight3, weights.bias3).squeeze(-1)
        scores = network
        if scorer.mode == "residual":
            scores = scores + call.dot_products(rows)
        scores = call.masked_rows(scores, rows)
        seen = scores != float("-inf")
        sums.active_pairs = sums.active_pairs + ((active > 0) & seen.unsqueeze(-1)).sum((0, 2, 3))
        sums.rows.add(network, scores)
        sums.pairs += seen.sum().item()
