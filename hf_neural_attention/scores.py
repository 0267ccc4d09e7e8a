"""What the scores of attention are like, layer by layer, whatever makes them: dot product or scorer."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .attending import attend, blocks_of_rows, scores_of
from .introspection import WRAPPERS, Call, call_of, left_as_it_was, looked_at, moved, observed, of_all_heads, place_of, unwrap
from .models.neural_attention_blockwise import without_autocast
from .models.neural_attention_reference import key_features, softmax_or_zero
from .patching.layers import attention_modules, tokens_of_queries
from .patching.reports import table


# Calls a row saturated where one key has more than this share of its weight
SATURATED = 0.99


class LayerScores(NamedTuple):
    """What one layer's scores are like on some inputs. Counted are rows (a query of one head and example) that may see two
    keys or more, and of these the keys that they may see."""

    layer: str
    scorer: str  # "dot product", or the mode of its scorer
    spread: float  # standard deviation of scores within rows, pooled: root of (squares around row means / degrees of freedom)
    entropy: float  # of attention rows in nats, mean
    uniform_entropy: float  # the same, were attention uniform
    saturated: float  # share of rows whose largest weight is over 0.99


class ScoreStatistics(tuple[LayerScores, ...]):
    """One `LayerScores` per layer, in the order of the model. `str()` makes a table of it."""

    def __str__(self) -> str:
        return table([LayerScores._fields, *((*each[:2], *(f"{x:.3g}" for x in each[2:])) for each in self)])

    __repr__ = __str__


def score_statistics(model: Any, **inputs: Any) -> ScoreStatistics:
    """Looks at the scores of the attention layers of a model, dot product or neural, while it runs on some inputs.

    Scores are those that the softmax gets, after the model's own scaling (`1 / sqrt(head_dim)` in most) and soft cap, without
    masks and biases of positions; entropy and saturation are of the attention weights themselves, with both. The model runs in
    evaluation mode, without dropout, and is left as it was.

    Args:
        model: whose attention modules fetch their function from Transformers' `AttentionInterface`, as `patch` needs it.
        inputs: for its forward; a few examples of what it is trained on.

    Returns:
        `ScoreStatistics`: of each layer that the forward reaches, cross-attention included; of one that calls its attention
        function several times (window by window, or as ALBERT's one layer, again and again), of all calls together. Pairs that
        a family masks with another number than the lowest of the dtype, as Swin does between its windows, count as seen.

    Raises:
        ValueError: if no attention module of the model can be looked at, the inputs reach none, or a layer asks for what
            chooses keys in another way (indexers).
    """
    base = unwrap(model)
    figures: dict[Any, RowFigures] = {}

    def look(module: Any, call: Call) -> LayerScores:
        return statistics_of_layer(module, call, figures.setdefault(module, RowFigures(call.sinks)))

    found = watch_layers(model, base, inputs, attention_modules(base), look, all_calls=True)
    return ScoreStatistics(statistics._replace(layer=name) for name, statistics in found.items())


@torch.no_grad()
def watch_layers(
    model: Any,
    base: nn.Module,
    inputs: Mapping[str, Any],
    modules: Mapping[str, Any],
    look: Callable[[Any, Call], Any],
    *,
    padded: bool = False,
    all_calls: bool = False,
) -> dict[str, Any]:
    """What `look(module, call)` makes of the first call of each of these attention modules, by name, in one forward of a model
    (`base`, and what is around it).

    Args:
        padded: whether `look` gets queries of padding as well, and all in their places.
        all_calls: whether it gets later calls as well; what it makes of the last one counts.

    Raises:
        ValueError: if the inputs reach none of them, or hold a `NeuralCache`, whose keys are projected already; or if the
            model has no numbers (on the meta device).
    """
    if any(parent.__name__ == "NeuralCache" for given in inputs.values() for parent in type(given).__mro__):
        raise ValueError(
            "A `NeuralCache` keeps no keys that could be looked at. Leave it out, or give one of Transformers' own caches."
        )
    if place_of(base)[0].type == "meta":
        raise ValueError(f"This {type(base).__name__} has weights without numbers (on the meta device).")
    seen: dict[Any, Any] = {}
    names = {module: name for name, module in modules.items()}

    def look_and_go_on(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if module not in seen or all_calls:
            call = of_all_heads(module, call_of(module, *args, **kwargs))
            if not padded:
                call = call.without_padding(tokens_of_queries(base, names[module], module, inputs, call))
            # looks here, where a sharded model has its weights together
            seen[module] = look(module, call)
        return attend(module, *args, **kwargs)

    with left_as_it_was(base) as device, looked_at(base), observed(modules.values(), look_and_go_on):
        model(**moved(dict(inputs), device))
    if not seen:
        raise ValueError(f"These inputs reach none of these layers of this {type(base).__name__}.")
    return {re.sub(WRAPPERS, "", name): seen[module] for name, module in modules.items() if module in seen}


def statistics_of_layer(module: Any, call: Call, figures: "RowFigures | None" = None) -> LayerScores:
    """Some queries at a time; together with those that are in `figures` already."""
    scorer: Any = getattr(module, "scorer", None)
    keys = None
    with without_autocast(call.query):
        if scorer is not None:
            keys = key_features(call.key, scorer.weights().to(torch.float32))
        figures = figures or RowFigures(call.sinks)
        for rows in blocks_of_rows(call, 1 if keys is None else keys.shape[-1]):
            scores = scores_of(scorer, call, rows, keys)
            figures.add(scores, call.masked_rows(scores, rows))
    return LayerScores("", "dot product" if scorer is None else scorer.mode, *figures.results())


class RowFigures:
    """Sums over the rows of attention that have a choice.

    Args:
        sinks: `[H]`, see `Call`; they take weight, and count neither as a key nor in the entropy.
    """

    def __init__(self, sinks: torch.Tensor | None = None) -> None:
        self.sinks = sinks
        self.squares = self.freedom = self.deviations = 0.0
        self.entropy = self.uniform = self.saturated = self.rows = 0.0

    def add(self, scores: torch.Tensor, masked: torch.Tensor) -> None:
        """
        Args:
            scores: `[B, H, rows, Tk]`, before the mask.
            masked: what the softmax gets, with -inf for keys that a row may not see.
        """
        seen = masked != float("-inf")  # counts what is no number, so that figures of it are none either
        number = seen.sum(-1)
        counted = number > 1
        mean = torch.where(seen, scores, 0.0).sum(-1) / number.clamp_min(1)
        squares = torch.where(seen, (scores - mean.unsqueeze(-1)).square(), 0.0).sum(-1)
        weights = softmax_or_zero(masked, self.sinks)
        self.squares += squares[counted].sum().item()
        self.freedom += (number - 1)[counted].sum().item()
        self.deviations += (squares / number.clamp_min(1)).sqrt()[counted].sum().item()
        self.entropy += torch.special.entr(weights).sum(-1)[counted].sum().item()
        self.uniform += number[counted].float().log().sum().item()
        largest = weights.amax(-1)[counted]
        self.saturated += torch.where(largest.isnan(), largest, (largest > SATURATED).to(largest)).sum().item()
        self.rows += counted.sum().item()

    def results(self) -> tuple[float, float, float, float]:
        """Spread, entropy, entropy were attention uniform, and share of saturated rows; NaN where no row has a choice, all but
        the third also where scores are no numbers."""
        if not self.rows:
            return (math.nan,) * 4
        spread = math.sqrt(self.squares / self.freedom)
        return spread, self.entropy / self.rows, self.uniform / self.rows, self.saturated / self.rows
