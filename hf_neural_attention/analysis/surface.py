"""The score as a function of where query and key are: a surface for a network, a saddle for the dot product."""

import math
from typing import Any, NamedTuple

import torch

from ..models.neural_attention_reference import ScorerWeights, cap, reference_scores
from .layer_recording import QueriesAndKeys


STANDARD_DEVIATIONS = 3.0


class ScoreSurface(NamedTuple):
    """Scores over a grid of steps along a direction of query space and one of key space."""

    query_steps: torch.Tensor  # [steps]
    key_steps: torch.Tensor  # [steps]
    network: torch.Tensor  # [steps, steps], queries down, keys across; the network's score alone
    dot_product: torch.Tensor | None  # [steps, steps], that of the scaled dot product for the same pairs; None if compact


@torch.no_grad()
def score_surface(
    scorer: Any,
    query_direction: torch.Tensor | None = None,
    key_direction: torch.Tensor | None = None,
    *,
    query: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    head: int = 0,
    scaling: float | None = None,
    softcap: float | None = None,
    extent: float = 3.0,
    steps: int = 61,
) -> ScoreSurface:
    """A scorer's scores of `query + s * query_direction` against `key + t * key_direction`, s and t from -extent to extent.

    Args:
        scorer (`NeuralScorer` or `CompactScorer`): Of shared weights, or of weights per head, of which `head` is taken. A
            compact one takes the place of `head_dim` by `hidden_dims[0]`: its queries and keys are the parts of the first
            hidden layer, of which there is no dot product.
        query_direction, key_direction: `[head_dim]`, made of unit length. Default: the first row of the scorer's projection,
            along which it sees most of what it sees first; the first unit of the hidden layer for a compact one.
        query, key: `[head_dim]`, where the grid is centred. Default: zero.
        scaling: of the dot product beside it. Default: `1 / sqrt(head_dim)`.
        softcap: of that dot product, where the model has one (Gemma 2).
        extent: in lengths of the directions.
        steps: along each side.
    """
    weights = scorer.weights().to(torch.float32)
    if weights.per_head:
        weights = ScorerWeights(*(None if tensor is None else tensor[head] for tensor in weights))  # type: ignore[arg-type]
    somewhere = (*weights, query, key, query_direction, key_direction)  # a compact thin scorer has no weights
    origin = torch.zeros(scorer.head_dim, device=next((each.device for each in somewhere if each is not None), None))
    first_unit = torch.eye(scorer.head_dim, device=origin.device)[0]
    sees_first = [first_unit if weight is None else weight[0] for weight in (weights.q_weight, weights.k_weight)]
    along_query = sees_first[0] if query_direction is None else query_direction
    along_key = sees_first[1] if key_direction is None else key_direction
    line = torch.linspace(-extent, extent, steps, device=origin.device)
    centre_query, centre_key = (origin if each is None else each.float() for each in (query, key))
    queries = centre_query + line[:, None] * along_query / along_query.norm()
    keys = centre_key + line[:, None] * along_key / along_key.norm()
    network = reference_scores(queries[None, None], keys[None, None], weights)[0, 0]
    scaling = 1.0 / math.sqrt(scorer.head_dim) if scaling is None else scaling
    return ScoreSurface(line, line, network, cap(queries @ keys.T * scaling, softcap) if weights.has_first_layer else None)


@torch.no_grad()
def surface_around(scorer: Any, seen: QueriesAndKeys, head: int = 0, *, steps: int = 61) -> ScoreSurface:
    """A scorer's scores where a head's queries and keys are: around the mean query and the mean key, along the directions in
    which they spread most, three standard deviations of the wider spread to each side.

    Args:
        scorer: as for `score_surface`.
        seen: what `queries_and_keys` says of the scorer's layer.
        head: whose queries and keys; with weights per head, also whose weights.
        steps: along each side.

    Raises:
        ValueError: if there is no such head.
    """
    heads = seen.query.shape[1]
    if not 0 <= head < heads:
        raise ValueError(f"`head` is {head}; expected 0 to {heads - 1}.")
    query, along_query, query_spread = principal(seen.query[:, head])
    key, along_key, key_spread = principal(seen.key[:, head])
    return score_surface(
        scorer,
        along_query,
        along_key,
        query=query,
        key=key,
        head=head,
        scaling=seen.scaling,
        softcap=seen.softcap,
        extent=STANDARD_DEVIATIONS * max(query_spread, key_spread),
        steps=steps,
    )


def principal(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean of `[..., head_dim]`, the direction along which they spread most, and their standard deviation along it."""
    flat = vectors.flatten(0, -2)
    mean = flat.mean(0)
    _, sizes, directions = torch.linalg.svd(flat - mean, full_matrices=False)
    return mean, directions[0], float(sizes[0]) / len(flat) ** 0.5
