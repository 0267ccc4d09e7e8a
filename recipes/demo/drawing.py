"""Figures and tables of the page."""

from typing import Any

import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from hf_neural_attention import analysis
from looking import Change, Look, Mistake, Prediction, grid_of


LABELLED = 60  # tokens, at most, that are named at a map's sides
WIDTH = 12.0  # inches of a figure
SMALL = 2.4  # inches, at most, of a head among all
TITLE = {"fontsize": 11}


def title_of(look: Look, layer: int, head: int) -> str:
    return (
        f"{look.opened.name}{' (patched)' if look.opened.unpatched else ''}\nlayer {layer}, head {head}: {look.scorers[layer]}"
    )


def draw_beside(look: Look, other: Look | None, layer: int, head: int) -> Figure:
    """A head's attention, and beside it that of the dot product of the same queries and keys, or of another model.

    Args:
        other: the other model's, of the same text or image; None for the dot product.

    Raises:
        Mistake: if the other model has no such layer and head, or other tokens.
    """
    first = look.maps[layer][head], title_of(look, layer, head)
    second = dot_product_of(look, layer, head) if other is None else of_other(look, other, layer, head)
    return over_image([look, other or look], [first, second]) if look.example.image else matrices(look, [first, second])


def dot_product_of(look: Look, layer: int, head: int) -> tuple[torch.Tensor | None, str]:
    if layer in look.dot_products:
        return look.dot_products[layer][head], f"the dot product of the same queries and keys\nlayer {layer}, head {head}"
    if look.scorers[layer] == "dot product":
        return None, "This layer scores by the dot product itself."
    return None, "This layer is compact: the queries and keys\nof a dot product are gone."


def of_other(look: Look, other: Look, layer: int, head: int) -> tuple[torch.Tensor, str]:
    if layer >= len(other.maps) or head >= other.maps[layer].shape[0]:
        raise Mistake(f"{other.opened.name} has no head {head} in a layer {layer}; choose others, or another model beside it.")
    weights = other.maps[layer][head]
    if weights.shape != look.maps[layer][head].shape or other.example.tokens != look.example.tokens:
        raise Mistake(f"{other.opened.name} cuts the input into other pieces, so the maps cannot be compared.")
    return weights, title_of(other, layer, head)


def weight_colours(highest: float) -> PowerNorm:
    """Colours by the root of a weight: the first query has but one key, whose weight of 1 would leave all others dark."""
    return PowerNorm(0.5, vmin=0.0, vmax=highest)


def matrices(look: Look, drawn: list[tuple[torch.Tensor | None, str]]) -> Figure:
    """Queries against keys, with the same colours in both."""
    tokens = look.example.tokens
    figure = Figure(figsize=(WIDTH, WIDTH / 2), layout="constrained")
    highest = max(float(weights.max()) for weights, _ in drawn if weights is not None)
    for axis, (weights, title) in zip(figure.subplots(1, 2), drawn, strict=True):
        if weights is None:
            say(axis, title)
            continue
        analysis.draw_attention(weights, tokens if len(tokens) <= LABELLED else None, axis)
        axis.images[0].set_norm(weight_colours(highest))
        axis.set_title(title, **TITLE)
    return figure


def over_image(looks: list[Look], drawn: list[tuple[torch.Tensor | None, str]]) -> Figure:
    """The picture, and what the class token attends to, over the picture as each model sees it: some see its middle alone."""
    figure = Figure(figsize=(WIDTH, WIDTH / 3 + 0.4), layout="constrained")
    picture, *others = figure.subplots(1, 3)
    picture.imshow(looks[0].example.shown)
    picture.set_axis_off()
    picture.set_title("the image", **TITLE)
    for axis, look, (weights, title) in zip(others, looks, drawn, strict=True):
        if weights is None:
            say(axis, title)
            continue
        image: Any = look.example.shown
        over = analysis.attention_over_image(weights, (image.height, image.width), grid=grid_of(look.opened, look.example))
        analysis.draw_attention_over_image(over, image, axis)
        axis.set_title(title, **TITLE)
    return figure


def say(axis: Any, text: str) -> None:
    axis.set_axis_off()
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, fontsize=12, color="0.35")


def draw_all(look: Look) -> Figure:
    """Every layer and head, small: a row per layer. For an image, what the class token attends to."""
    shape = (len(look.maps), look.heads)
    size = min(WIDTH / shape[1], SMALL)
    figure = Figure(figsize=(max(size * shape[1], WIDTH / 3), (size + 0.25) * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    for layer, row in enumerate(axes):
        for head, axis in enumerate(row):
            draw_small(look, layer, head, axis)
            axis.set_title(f"layer {layer}, head {head}", fontsize=9)
    return figure


def draw_small(look: Look, layer: int, head: int, axis: Any) -> None:
    """A head's attention without tokens and scale."""
    weights, image = look.maps[layer][head], look.example.shown
    if image is None:
        axis.imshow(weights.numpy(), norm=weight_colours(float(weights.max())), cmap="viridis", aspect="auto")
        axis.set_xticks([])
        axis.set_yticks([])
    else:
        over = analysis.attention_over_image(weights, (image.height, image.width), grid=grid_of(look.opened, look.example))
        analysis.draw_attention_over_image(over, image, axis)


def draw_surfaces(look: Look, layer: int, head: int) -> Figure:
    """The network's scores and the dot product's, where the head's queries and keys are."""
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    surface = look.surface(layer, head)
    if surface is None:
        say(figure.subplots(), "This layer scores by the dot product: there is no network to draw.")
        return figure
    axes = figure.subplots(1, 2)
    drawn = analysis.draw_surface(surface, axes[0] if surface.dot_product is None else axes)
    words = {"residual": "network, without the dot product that is added", "thin": "dot product of fewer numbers"}
    drawn[0].set_title(words.get(look.scorers[layer], "network"), **TITLE)
    if surface.dot_product is None:
        say(axes[1], "This layer is compact: the queries and keys\nof a dot product are gone.")
    else:
        drawn[1].set_title("dot product of the same queries and keys", **TITLE)
    figure.suptitle(f"layer {layer}, head {head}", fontsize=11)
    return figure


def draw_health(look: Look) -> Figure:
    """Spread, entropy and saturation of all layers' scores."""
    figure = Figure(figsize=(WIDTH, 3.6 + 0.25 * len(look.names)), layout="constrained")
    if look.scores is None:
        say(figure.subplots(), "The scores of this model cannot be looked at.")
        return figure
    analysis.draw_scores(look.scores, figure.subplots(1, 3))
    return figure


HEALTH_HEADER = ["layer", "scorers", "dead", "active units, %", "active pairs, %", "spread of scores", "entropy", "if uniform"]


def health_rows(look: Look) -> list[list[str]]:
    """Of each layer with a network."""
    return [
        [
            layer.layer,
            str(layer.scorers),
            str(layer.dead),
            f"{100 * layer.active_units:.0f}",
            f"{100 * layer.active_pairs:.0f}",
            f"{layer.score_std:.3g}",
            f"{layer.entropy:.3g}",
            f"{layer.uniform_entropy:.3g}",
        ]
        for layer in look.health or ()
    ]


def health_words(look: Look) -> str:
    if look.health is None:
        return "No layer of this model has a network: below is what its scores are like."
    dead = sum(layer.dead for layer in look.health)
    scorers = sum(layer.scorers for layer in look.health)
    if not dead:
        which = "The scorer is" if scorers == 1 else f"All {scorers} scorers are"
        return f"{which} alive: for this input, units of the last hidden layer are active."
    return f"**{dead} of {scorers} scorers seem dead**: for this input no unit is active, so all keys get the same score."


def draw_changes(before: Look, after: Look, change: Change, layer: int, head: int) -> Figure:
    """How much of each layer's attention is elsewhere, and one head before and after."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    bars, *axes = figure.subplots(1, 3)
    names = [str(index) for index in range(len(change.layers))]
    colors = ["tab:blue" if scorer != "dot product" else "tab:gray" for scorer in after.scorers]
    bars.barh(names, [100 * share for share in change.layers], color=colors)
    bars.set(title="attention that has moved", xlabel="% of a row's weight", ylabel="layer", ylim=(len(names) - 0.5, -0.5))
    bars.set_xlim(0.0, max(1.0, 105 * max(change.layers)))
    for axis, look, title in zip(axes, (before, after), ("before", "after"), strict=True):
        draw_small(look, layer, head, axis)
        axis.set_title(f"layer {layer}, head {head}, {title}", **TITLE)
    return figure


PREDICTION_HEADER = ["rank", "before", "%", "after", "%"]


def prediction_rows(before: list[Prediction], after: list[Prediction]) -> list[list[str]]:
    """The likeliest ones of both, by rank."""
    return [
        [str(rank), old.what, f"{100 * old.probability:.1f}", new.what, f"{100 * new.probability:.1f}"]
        for rank, (old, new) in enumerate(zip(before, after, strict=True), 1)
    ]


def change_words(change: Change, after: Look) -> str:
    """What a patch changed, in a few sentences."""
    if max(change.layers) < 1e-4 and set(after.scorers) <= {"residual", "dot product"}:
        sentences = ["**Nothing changes**: scorers of mode `residual` start at zero, and learn from there."]
    else:
        sentences = [f"**{100 * max(change.layers):.2g} %** of attention is elsewhere in the layer that changes most."]
    if change.output is not None:
        sentences.append(f"The predictions are {change.output:.3g} nats from those before (KL divergence, mean).")
    if change.perplexities is not None:
        old, new = change.perplexities
        sentences.append(f"The perplexity of the text is {new:.4g}; before, it was {old:.4g}.")
    return " ".join(sentences)
