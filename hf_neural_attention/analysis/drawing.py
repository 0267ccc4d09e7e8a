"""Pictures of what the other functions return. They need matplotlib (`pip install 'hf_neural_attention[analysis]'`)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..scores import LayerScores, ScoreStatistics
from .health import LayerHealth, ScorerHealth
from .surface import ScoreSurface


def new_axes(axes: Any, count: int = 1, size: tuple[float, float] = (4.5, 4.0)) -> list[Any]:
    """The axes that are given, or as many of a new figure.

    Raises:
        ValueError: if they are not as many as are needed.
    """
    if axes is not None:
        axes = axes.flat if hasattr(axes, "flat") else axes  # of an array, as matplotlib makes it
        given = list(axes) if isinstance(axes, Iterable) else [axes]
        if len(given) != count:
            raise ValueError(f"`axes` has {len(given)}; this picture needs {count}.")
        return given
    from matplotlib import pyplot as plt

    _, made = plt.subplots(1, count, figsize=(size[0] * count, size[1]), squeeze=False, layout="constrained")
    return list(made[0])


def draw_attention(weights: torch.Tensor, tokens: Sequence[str] | None = None, axes: Any = None, title: str = "") -> Any:
    """One head's attention, `[queries, keys]`: queries down, keys across. Returns the axes."""
    (ax,) = new_axes(axes)
    image = ax.imshow(weights.detach().float().cpu().numpy(), vmin=0.0, cmap="viridis", aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="weight")
    ax.set(title=title, xlabel="key", ylabel="query")
    if tokens is not None:
        # shows dollar signs as they are, which else begin a formula
        ax.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7, parse_math=False)
        ax.set_yticks(range(weights.shape[0]), tokens[-weights.shape[0] :], fontsize=7, parse_math=False)
    return ax


def draw_attention_over_image(weights: torch.Tensor, image: Any, axes: Any = None, title: str = "") -> Any:
    """Weights `[height, width]` of `attention_over_image` over a picture (PIL, or array of `[height, width, 3]`)."""
    (ax,) = new_axes(axes)
    ax.imshow(image)
    ax.imshow(weights.detach().float().cpu().numpy(), cmap="inferno", alpha=0.6)
    ax.set_axis_off()
    ax.set_title(title)
    return ax


def draw_surface(surface: ScoreSurface, axes: Any = None, *, less_row_mean: bool = True) -> list[Any]:
    """The network's scores beside the dot product's, if there are such, each with its own colours. Returns all axes.

    Args:
        less_row_mean: draw what each score has beyond the mean of its query's, which is all that a softmax sees.
    """
    drawn = {"network": surface.network} | ({} if surface.dot_product is None else {"dot product": surface.dot_product})
    all_axes = new_axes(axes, len(drawn))
    extent = [
        float(surface.key_steps[0]),
        float(surface.key_steps[-1]),
        float(surface.query_steps[0]),
        float(surface.query_steps[-1]),
    ]
    for ax, (title, scores) in zip(all_axes, drawn.items(), strict=True):
        if less_row_mean:
            scores = scores - scores.mean(-1, keepdim=True)
        image = ax.imshow(scores.detach().cpu().numpy(), origin="lower", extent=extent, cmap="RdBu_r", aspect="auto")
        ax.figure.colorbar(image, ax=ax, label="score, less the mean of its row" if less_row_mean else "score")
        ax.set(title=title, xlabel="key, along its direction", ylabel="query, along its direction")
    return all_axes


def draw_health(health: ScorerHealth, axes: Any = None) -> list[Any]:
    """Spread of scores and entropy of attention, layer by layer. Returns both axes."""
    both = new_axes(axes, 2, size_for(len(health)))
    colors = ["tab:red" if layer.dead else "tab:blue" for layer in health]
    draw_spread(both[0], [layer.layer for layer in health], [layer.score_std for layer in health], colors)
    draw_entropy(both[1], health)
    return both


def draw_scores(statistics: ScoreStatistics, axes: Any = None) -> list[Any]:
    """Spread of scores, entropy of attention and saturation, layer by layer, whatever scores. Returns the three axes.

    Dot products are gray and scorers blue.
    """
    three = new_axes(axes, 3, size_for(len(statistics)))
    names = [layer.layer for layer in statistics]
    colors = ["tab:gray" if layer.scorer == "dot product" else "tab:blue" for layer in statistics]
    draw_spread(three[0], names, [layer.spread for layer in statistics], colors)
    draw_entropy(three[1], statistics, colors)
    three[2].barh(names, [100 * layer.saturated for layer in statistics], color=colors)
    three[2].set(title="saturated rows", xlabel="% with a weight over 0.99", xlim=(0.0, 100.0))
    first_on_top(three[2], len(names))
    for ax in three[1:]:
        ax.set_yticklabels([])
    return three


def size_for(layers: int) -> tuple[float, float]:
    """Inches of a panel in which the names of so many layers lie on no other."""
    return 4.5, max(4.0, 1.5 + 0.22 * layers)


def draw_spread(ax: Any, names: list[str], spreads: list[float], colors: list[str]) -> None:
    ax.barh(names, spreads, color=colors)
    ax.set(title="spread of scores", xlabel="standard deviation within a row")
    first_on_top(ax, len(names))


def draw_entropy(ax: Any, layers: Sequence[LayerHealth | LayerScores], colors: str | list[str] = "tab:blue") -> None:
    names = [layer.layer for layer in layers]
    ax.barh(names, [layer.entropy for layer in layers], color=colors, label="attention")
    ax.plot([layer.uniform_entropy for layer in layers], names, "k|", markersize=16, label="uniform attention")
    ax.set(title="entropy of attention", xlabel="nats")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    first_on_top(ax, len(names))


def first_on_top(ax: Any, count: int) -> None:
    ax.set_ylim(count - 0.5, -0.5)  # puts the first layer on top, also where axes share theirs
