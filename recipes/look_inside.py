"""Pictures of what a trained model attends to and how its scorers score.

    python recipes/look_inside.py MODEL --text "Some text." --output DIR/NAME
    python recipes/look_inside.py MODEL --image PICTURE.png --output DIR/NAME

MODEL is a folder or a name on the Hub: a neural model of this package, or a patched one that was saved whole. Written are
NAME-attention.png (each layer's and head's attention; for an image that of the class token, over the picture),
NAME-surface.png (one head's scores in each neural layer against its queries and keys, beside the dot product's, which no
compact layer has), NAME-scores.png (spread, entropy and saturation of every layer's scores) and, where layers have a network,
NAME-health.png.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from huggingface_hub.errors import StrictDataclassError
from matplotlib.figure import Figure
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoTokenizer

from hf_neural_attention import analysis, from_pretrained
from hf_neural_attention.introspection import neural_layers
from tools.command_lines import make_folder_of
from training import paper_models  # noqa: F401, registers the recipes' own models
from training.data_files import in_one_line
from training.pixel_values import UNREADABLE


PICTURES = ("attention", "surface", "scores", "health")
SIDE = 512  # pixels, at most, of an image that attention is laid over
LABELLED = 60  # tokens, at most, that are named at a map's sides
MAP, ALL_MAPS = 10.0, 80.0  # inches that one map and a row of them may have


def draw_maps(maps: tuple[torch.Tensor, ...], tokens: list[str]) -> Figure:
    """Queries against keys: a row per layer, a column per head."""
    shape = (len(maps), maps[0].shape[1])
    size = min(max(2.5, 0.16 * len(tokens) + 1.2), MAP, ALL_MAPS / max(shape))
    names = tokens if len(tokens) <= LABELLED else None
    figure = Figure(figsize=(size * shape[1], size * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    for (layer, head), axis in np.ndenumerate(axes):
        analysis.draw_attention(maps[layer][0, head], names, axis, f"layer {layer}, head {head}")
    return figure


def draw_maps_over(maps: tuple[torch.Tensor, ...], image: PIL.Image.Image, grid: tuple[int, int] | None) -> Figure:
    """What the class token attends to: a row per head, a column per layer."""
    shape = (maps[0].shape[1], len(maps))
    figure = Figure(figsize=(1.8 * shape[1], 2.0 * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    for (head, layer), axis in np.ndenumerate(axes):
        over = analysis.attention_over_image(maps[layer][0, head], (image.height, image.width), grid=grid)
        analysis.draw_attention_over_image(over, image, axis, f"layer {layer}, head {head}")
    return figure


def draw_surfaces(model: Any, inputs: dict[str, torch.Tensor], head: int) -> Figure:
    """A column per neural layer: around the mean query and key, along the directions in which they spread most."""
    seen = analysis.queries_and_keys(model, **inputs)
    heads = min(layer.query.shape[1] for layer in seen.values())
    if not 0 <= head < heads:
        raise ValueError(f"--head is {head}; expected 0 to {heads - 1}, which all neural layers have.")
    surfaces = {name: analysis.surface_around(model.get_submodule(name).scorer, layer, head) for name, layer in seen.items()}
    rows = 1 if all(surface.dot_product is None for surface in surfaces.values()) else 2
    figure = Figure(figsize=(3.6 * len(seen), 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, len(seen), squeeze=False)
    for column, (name, surface) in zip(axes.T, surfaces.items(), strict=True):
        is_compact = surface.dot_product is None
        for axis in analysis.draw_surface(surface, column[0] if is_compact else column):
            axis.set_title(f"{name}, head {head}:\n{axis.get_title()}", fontsize=9)
        column[-1].set_visible(rows == 1 or not is_compact)
    return figure


def draw_scores(statistics: analysis.ScoreStatistics) -> Figure:
    figure = Figure(figsize=(12, 2.5 + 0.3 * len(statistics)), layout="constrained")
    analysis.draw_scores(statistics, figure.subplots(1, 3))
    return figure


def draw_health(health: analysis.ScorerHealth) -> Figure:
    figure = Figure(figsize=(9, 2.5 + 0.3 * len(health)), layout="constrained")
    analysis.draw_health(health, figure.subplots(1, 2, sharey=True))
    return figure


def tokens_of(ids: torch.Tensor, name: str, positions: int | None) -> list[str]:
    """Raises a ValueError if there are too few tokens to attend to, or too many for the model."""
    if not 1 < len(ids) <= (positions or len(ids)):
        raise ValueError(f"--text has {len(ids)} token(s); expected 2 to {positions or 'any number'}, which the model takes.")
    tokenizer = AutoTokenizer.from_pretrained(name)
    return [str(tokenizer.decode([token])).replace("\n", "\\n") for token in ids.tolist()]


def open_image(path: Path) -> PIL.Image.Image:
    """Raises a ValueError if it is none, or damaged, or of a mode that does not say what is white."""
    try:
        with PIL.Image.open(path) as image:
            return analysis.to_rgb(image)
    except UNREADABLE as error:
        raise ValueError(f"--image {path} cannot be read: {in_one_line(error)}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text")
    given.add_argument("--image", type=Path)
    parser.add_argument("--head", type=int, default=0, help="Whose scores are drawn as surfaces. Default: 0.")
    parser.add_argument("--output", type=Path, required=True, help="Beginning of the pictures' names.")
    arguments = parser.parse_args()
    make_folder_of("--output", arguments.output)
    tokens: list[str] = []
    grid: tuple[int, int] | None = None
    try:
        model: Any = from_pretrained(arguments.model).eval()
        if arguments.image is None:
            image, inputs = None, dict(AutoTokenizer.from_pretrained(arguments.model)(arguments.text, return_tensors="pt"))
            tokens = tokens_of(inputs["input_ids"][0], arguments.model, getattr(model.config, "max_position_embeddings", None))
        else:
            image = open_image(arguments.image)
            processor = AutoImageProcessor.from_pretrained(arguments.model, backend="pil")
            inputs = dict(processor(image, return_tensors="pt"))
            image = analysis.as_seen(image, inputs["pixel_values"][0], processor).copy()
            image.thumbnail((SIDE, SIDE))  # has a copy in each of the picture's panels
            grid = analysis.patch_grid(model.config, inputs["pixel_values"])
        maps = analysis.attention_maps(model, **inputs)
        pictures = {
            "attention": draw_maps(maps, tokens) if image is None else draw_maps_over(maps, image, grid),
            "surface": draw_surfaces(model, inputs, arguments.head),
            "scores": draw_scores(scores := analysis.score_statistics(model, **inputs)),
        }
        print(scores)
        # leaves out thin scorers, which are dot products: none can be dead
        if any(scorer.mode != "thin" for *_, scorer in neural_layers(model)):
            health = analysis.scorer_health(model, **inputs)
            print(health)
            pictures["health"] = draw_health(health)
    except (OSError, ValueError, RuntimeError, StrictDataclassError, SafetensorError) as error:
        raise SystemExit(in_one_line(error)) from None
    for name in PICTURES:
        path = arguments.output.with_name(f"{arguments.output.name}-{name}.png")
        if name not in pictures:
            path.unlink(missing_ok=True)  # is of a model that was looked at before
            continue
        pictures[name].savefig(path, dpi=100)
        print(path)


if __name__ == "__main__":
    main()
