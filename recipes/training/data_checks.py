"""Whether data and the model that is to be trained on them fit together."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image as PIL
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tools.messages import say
from training.images import ImageArguments, LabelledImages
from training.labels import in_order_of
from training.text import TextArguments


def check_tokens(text: TextArguments, tokenizer: PreTrainedTokenizerBase, checkpoint: str, embeddings: int) -> None:
    """Whether a checkpoint has an embedding for each token.

    Raises:
        SystemExit: if it has too few. If there are more, because the tokenizer is another, that is said.
    """
    if len(tokenizer) > embeddings:
        raise SystemExit(
            f"The tokenizer has {len(tokenizer)} tokens and {checkpoint} embeddings for {embeddings}: they do not belong "
            "together. Choose the checkpoint's own with --tokenizer_name."
        )
    if text.tokenizer_name is not None and len(tokenizer) < embeddings:
        say(
            f"Note: the tokenizer {text.tokenizer_name} has {len(tokenizer)} tokens and the checkpoint embeddings for "
            f"{embeddings}. If it is not the one that the checkpoint was trained with, training starts from noise."
        )


def check_positions(text: TextArguments, positions: int, flag: str | None = None) -> None:
    """Whether the model's sequences are as long as a block.

    Args:
        flag: that gives a new model more of them.

    Raises:
        SystemExit: if they are not.
    """
    if text.block_size > positions:
        more = "" if flag is None else f", or raise {flag}"
        raise SystemExit(
            f"--block_size {text.block_size} is more than the {positions} positions of the model. Lower it{more}."
        )


def load_processor(checkpoint: str) -> BaseImageProcessor:
    """Raises SystemExit if the checkpoint has no image processor."""
    try:
        return AutoImageProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise SystemExit(f"The image processor of {checkpoint} cannot be loaded: {error}") from None


def check_sizes(
    image: ImageArguments, checkpoint: str, config: PreTrainedConfig, model_class: Any, processor: BaseImageProcessor
) -> None:
    """Whether a checkpoint takes images of the size to which they are resized.

    Raises:
        SystemExit: if it was made for another size, or its image processor makes another.
    """
    picture = PIL.new("RGB", (image.image_size, image.image_size))
    sizes = {"has an image processor that makes": np.shape(processor(picture, return_tensors="np")["pixel_values"])[-2:]}
    # leaves out models whose positions are for any size, since they interpolate them unasked
    if "interpolate_pos_encoding" in inspect.signature(model_class.forward).parameters:
        size = getattr(config, "image_size", image.image_size)
        sizes = {"was made for": (size, size) if isinstance(size, int) else tuple(size)} | sizes
    for says, (height, width) in sizes.items():
        if (height, width) != (image.image_size, image.image_size):
            pixels = f"{height}" if height == width else f"{height} x {width}"
            raise SystemExit(
                f"{checkpoint} {says} images of {pixels} pixels and --image_size is {image.image_size}. Use its size: images "
                "are resized to it."
            )


def names_of(labels: list[str]) -> dict[str, dict]:
    """What a config has of the names of classes."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def stored_labels(config: PreTrainedConfig) -> list[str]:
    """Names of a checkpoint's classes by their numbers."""
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def are_unnamed(stored: list[str], labels: list[str]) -> bool:
    """Whether a checkpoint says of its classes no more than that they are as many."""
    return len(stored) == len(labels) and all(name.startswith("LABEL_") for name in stored)


def fit_labels(
    images: LabelledImages, checkpoint: str, config: PreTrainedConfig, ignore_mismatched_sizes: bool
) -> LabelledImages:
    """The images with their classes in the checkpoint's order, if it has the same ones.

    Raises:
        SystemExit: if it has others, unless it shall get a new classifier.
    """
    stored, labels = stored_labels(config), images.labels
    if stored == labels or are_unnamed(stored, labels):
        return images
    if sorted(stored) == sorted(labels):
        say(f"Note: {checkpoint} has the labels of the data in another order, which is kept ({', '.join(stored[:3])}, ...).")
        return LabelledImages(in_order_of(images.splits, stored), stored)
    if not ignore_mismatched_sizes:
        raise SystemExit(
            f"{checkpoint} has {len(stored)} labels ({', '.join(stored[:3])}, ...) and the data has {len(labels)} "
            f"({', '.join(labels[:3])}, ...): they do not fit. To fine-tune it with a new classifier, add "
            "--ignore_mismatched_sizes."
        )
    return images


@torch.no_grad()
def load_classifier(
    load: Callable[..., PreTrainedModel], checkpoint: str, labels: list[str], ignore_mismatched_sizes: bool
) -> PreTrainedModel:
    """The checkpoint as a classifier of these labels.

    Args:
        load: `from_pretrained` of a class or an Auto class.
        ignore_mismatched_sizes: Give it a new classifier if it has other labels, also if these are as many.
    """
    model = load(checkpoint, ignore_mismatched_sizes=ignore_mismatched_sizes, **names_of(labels))
    stored = stored_labels(AutoConfig.from_pretrained(checkpoint))
    others = len(stored) == len(labels) and stored != labels and not are_unnamed(stored, labels)
    if ignore_mismatched_sizes and others:
        # takes new weights from a wider classifier, since Transformers draws new ones where sizes differ
        wider = load(checkpoint, ignore_mismatched_sizes=True, num_labels=len(labels) + 1)
        for name, parameter in model.named_parameters():
            drawn = wider.get_parameter(name)
            if drawn.shape != parameter.shape:
                parameter.copy_(drawn[: len(parameter)])
    return model
