"""Attention weights of every layer and head, neural or not, and those of the dot product in a scorer's place."""

from typing import Any

import torch

from ..attending import scores_of
from ..introspection import Call, implementations_restored, is_sharded, left_as_it_was, moved, unwrap, use_eager
from ..models.neural_attention_blockwise import without_autocast
from ..models.neural_attention_parallel import gathered, is_distributed, mesh_of_heads
from ..models.neural_attention_reference import softmax_or_zero
from ..models.neural_attention_scorer import is_compact
from ..patching.errors import NoPatchableLayerError
from ..patching.layers import attention_modules
from .layer_recording import watch


@torch.no_grad()
def attention_maps(model: Any, **inputs: Any) -> tuple[torch.Tensor, ...]:
    """Attention weights of all layers of a Transformers model for some inputs.

    The model runs once in evaluation mode under "eager" attention, which holds the weights, and is left as it was.

    Args:
        model (`PreTrainedModel`): One with a single stack of layers; by itself, compiled, or wrapped for training in parallel.
        inputs: for its forward.

    Returns:
        Per layer `[batch, heads, queries, keys]`, rows that sum to one. In neural layers, a query that may see
        nothing has a row of zeros; where there are attention sinks, rows sum to less than one.

    Raises:
        ValueError: if the model gives no attention weights.
    """
    base: Any = unwrap(model)
    with left_as_it_was(base) as device, implementations_restored(base):
        use_eager(base)
        # asks for names where a config asks for none
        names = {} if getattr(base.config, "return_dict", True) else {"return_dict": True}
        run = model if is_sharded(model) else base  # FSDP has weights together inside its own forward alone
        outputs = run(**moved(inputs, device), output_attentions=True, **names)
    found = outputs.get("attentions")
    if not found or any(weights is None for weights in found):
        raise ValueError(f"This {type(base).__name__} gives no attention weights of one stack of layers (`attentions`).")
    mesh = mesh_of_maps(base, found[0].shape[1])
    return tuple(found) if mesh is None else tuple(gathered(weights, mesh) for weights in found)


def mesh_of_maps(model: Any, num_heads: int) -> Any:
    """The processes that share the heads of a model's maps (tensor parallelism), or None if each has them all."""
    if not is_distributed():
        return None
    try:
        modules = list(attention_modules(model).values())
    except NoPatchableLayerError:
        return None
    config = model.config.get_text_config(decoder=True)
    # passes over parts of other kinds, whose heads may be others in number
    own = [module for module in modules if getattr(module.config, "base", module.config) is config] or modules
    return next((mesh for module in own if (mesh := mesh_of_heads(module, num_heads)) is not None), None)


def dot_product_maps(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    """What the dot product would attend to in the place of each neural layer's scorer: of the same queries and keys, under the
    same mask.

    The layers before it stay neural. The model runs once in evaluation mode and is left as it was.

    Args:
        model: with neural layers, by class or by `patch`.
        inputs: for its forward.

    Returns:
        By the layer's name `[batch, heads, queries, keys]` in float32, of each layer that the inputs reach. Compact layers are
        left out, since they have no queries and keys.

    Raises:
        ValueError: if the model has no neural layer, or the inputs reach none.
    """
    found = watch(model, inputs, dot_product_weights, padded=True)
    return {name: weights for name, weights in found.items() if weights is not None}


def dot_product_weights(scorer: Any, call: Call) -> torch.Tensor | None:
    if is_compact(scorer):
        return None
    rows = torch.arange(call.query.shape[2], device=call.query.device)
    with without_autocast(call.query):
        return softmax_or_zero(call.masked_rows(scores_of(None, call, rows), rows), call.sinks)


def patch_grid(config: Any, pixel_values: torch.Tensor) -> tuple[int, int] | None:
    """Rows and columns of the patches that a model cuts `pixel_values` `[..., height, width]` into; None if its config has no
    `patch_size`."""
    size = getattr(config, "patch_size", None)
    if not isinstance(size, int | tuple | list):
        return None
    rows, columns = (size, size) if isinstance(size, int) else size
    return pixel_values.shape[-2] // rows, pixel_values.shape[-1] // columns


def attention_over_image(
    weights: torch.Tensor, image_size: tuple[int, int], query: int = 0, grid: tuple[int, int] | None = None
) -> torch.Tensor:
    """Where in a picture one query of a ViT looks: its weights on the patches, as large as the picture.

    Args:
        weights: `[heads, tokens, tokens]` or `[tokens, tokens]`, of one image, special tokens coming first.
        image_size: height and width in pixels.
        query: index of the token that looks; 0 is the class token.
        grid: rows and columns of patches (`patch_grid`); tokens before the last `rows * columns` are special ones, of which
            DeiT has two. Default: one class token and a square.

    Returns:
        `[heads, height, width]` or `[height, width]`: each patch's weight on all its pixels.

    Raises:
        ValueError: if the patches make no square, or are fewer than the grid has.
    """
    tokens = weights.shape[-1]
    if grid is None:
        side = round((tokens - 1) ** 0.5)
        if side * side != tokens - 1:
            raise ValueError(f"{tokens - 1} patches make no square; expected one class token and a square of patches.")
        grid = side, side
    rows, columns = grid
    if not 0 < rows * columns <= tokens:
        raise ValueError(f"There are {tokens} tokens, of which {rows} x {columns} cannot be patches.")
    patches = weights[..., query, tokens - rows * columns :].unflatten(-1, (rows, columns)).float()
    large = torch.nn.functional.interpolate(patches.reshape(-1, 1, rows, columns), size=image_size, mode="nearest")
    return large.reshape(*patches.shape[:-2], *image_size)
