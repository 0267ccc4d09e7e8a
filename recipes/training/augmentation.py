"""Random variants of images to train on.

By Pillow, since kornia, the well-kept library that needs no torchvision for it, is made for batches: image by image, each with
a generator of its own, it takes many times as long.
"""

import random
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PIL
from PIL import ImageEnhance, ImageOps
from transformers import BaseImageProcessor, TrainerCallback

from hf_neural_attention.analysis import to_rgb


AUGMENTATIONS = ("none", "crop", "paper")
BICUBIC = PIL.Resampling.BICUBIC


class AugmentedImages(torch.utils.data.Dataset[dict[str, Any]]):
    """Random variants of images, with `pixel_values` and `labels`.

    A variant follows from the seed, the epoch and the image's place: a resumed run sees what an uninterrupted one sees, and so
    do several processes or workers. A generator that is restored from a checkpoint would not do, since accelerate's loader is
    a batch ahead.
    """

    def __init__(self, data: Dataset, processor: BaseImageProcessor, augmentation: str, size: int, seed: int):
        self.data = data
        self.processor = processor
        self.augmentation = augmentation
        self.size = size
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shares it with workers that outlive an epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = random.Random(f"{self.seed} {int(self.epoch)} {index}")
        example = self.data[index]
        resample = resampling_of(self.processor)
        image = augment(to_rgb(example["image"]), self.augmentation, self.size, generator, resample)
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": example["label"]}


class CountEpochs(TrainerCallback):
    """Tells images which epoch they are read in. Accelerate's loader tells a data set in some cases only."""

    def __init__(self, images: AugmentedImages):
        self.images = images

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.images.epoch.fill_(int(state.epoch or 0))


def augment(image: PIL.Image, kind: str, size: int, generator: random.Random, resample: int = BICUBIC) -> PIL.Image:
    """A random variant of an RGB image, `size` pixels square.

    Args:
        resample: Pillow's number of how the whole image is made so large; a random part of it is always resized bilinearly.
    """
    if kind == "paper":
        image = random_resized_crop(image, size, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3), generator=generator)
        image = flip(image, generator)
        image = colour_jitter(image, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, generator=generator)
        return image.rotate(generator.uniform(-10, 10))
    image = resize(image, size, resample)
    if kind == "crop":
        margin = size // 8
        left, top = generator.randint(0, 2 * margin), generator.randint(0, 2 * margin)
        image = flip(ImageOps.expand(image, margin).crop((left, top, left + size, top + size)), generator)
    return image


def resampling_of(processor: BaseImageProcessor) -> int:
    """How an image processor makes images larger or smaller, by Pillow's number: models shall see images as it will."""
    found = getattr(processor, "resample", None)
    return BICUBIC if found is None else int(found)


def resize(image: PIL.Image, size: int, resample: int = BICUBIC) -> PIL.Image:
    return image.resize((size, size), resample) if image.size != (size, size) else image


def flip(image: PIL.Image, generator: random.Random) -> PIL.Image:
    return ImageOps.mirror(image) if generator.random() < 0.5 else image


def random_resized_crop(
    image: PIL.Image, size: int, scale: tuple[float, float], ratio: tuple[float, float], generator: random.Random
) -> PIL.Image:
    """A part of the image with a share of its area drawn from `scale` and a ratio of sides from `ratio` (log-uniform),
    resized to `size`; ten attempts, then the whole (Szegedy et al. 2015, as torchvision has it)."""
    width, height = image.size
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        sides = np.exp(generator.uniform(np.log(ratio[0]), np.log(ratio[1])))
        crop_width, crop_height = round(np.sqrt(area * sides)), round(np.sqrt(area / sides))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = generator.randint(0, width - crop_width), generator.randint(0, height - crop_height)
            box = (left, top, left + crop_width, top + crop_height)
            return image.resize((size, size), PIL.Resampling.BILINEAR, box=box)
    return image.resize((size, size), PIL.Resampling.BILINEAR)


def colour_jitter(
    image: PIL.Image, brightness: float, contrast: float, saturation: float, hue: float, generator: random.Random
) -> PIL.Image:
    """Brightness, contrast and saturation by factors within 1 +- the given, hue shifted by up to `hue` of the circle."""
    changes = [
        lambda picture: ImageEnhance.Brightness(picture).enhance(generator.uniform(1 - brightness, 1 + brightness)),
        lambda picture: ImageEnhance.Contrast(picture).enhance(generator.uniform(1 - contrast, 1 + contrast)),
        lambda picture: ImageEnhance.Color(picture).enhance(generator.uniform(1 - saturation, 1 + saturation)),
        lambda picture: shift_hue(picture, generator.uniform(-hue, hue)),
    ]
    generator.shuffle(changes)
    for change in changes:
        image = change(image)
    return image


def shift_hue(image: PIL.Image, share: float) -> PIL.Image:
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point(lambda level: (level + round(share * 255)) % 256)
    return PIL.merge("HSV", (hue, saturation, value)).convert("RGB")
