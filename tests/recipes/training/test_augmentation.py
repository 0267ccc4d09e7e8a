"""Random variants of images: what they are, and what they follow from."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as PIL
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, DeiTImageProcessorPil, ViTImageProcessorPil, default_data_collator

from tests.helpers.pictures import random_pictures
from training.augmentation import (
    AUGMENTATIONS,
    AugmentedImages,
    CountEpochs,
    augment,
    random_resized_crop,
    shift_hue,
)
from training.image_task import without_cropping
from training.images import ImageArguments, load_images
from training.pixel_values import with_pixels


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_augmentation_gives_squares_that_vary_with_the_seed(kind):
    image = random_pictures(1, side=40)[0]
    generators = random.Random(0), random.Random(0)
    variants, again = ([np.asarray(augment(image, kind, 32, generator)) for _ in range(8)] for generator in generators)
    assert all(variant.shape == (32, 32, 3) for variant in variants)
    assert all(map(np.array_equal, variants, again))
    assert len({variant.tobytes() for variant in variants}) == (1 if kind == "none" else 8)


def test_random_resized_crop_covers_the_areas_it_should(monkeypatch):
    boxes = []
    monkeypatch.setattr(PIL.Image, "resize", lambda self, size, resample, box=None: boxes.append(box) or self)
    image, generator = PIL.new("RGB", (100, 100)), random.Random(0)
    for _ in range(2000):
        random_resized_crop(image, 32, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3), generator=generator)
    widths, heights = np.array([(box[2] - box[0], box[3] - box[1]) for box in boxes if box]).T
    areas, ratios = widths * heights / 1e4, widths / heights
    assert 0.04 < areas.min() < 0.08 and 0.9 < areas.max() <= 1.0
    assert ratios.min() > 0.7 and ratios.max() < 1.43


def test_a_shifted_hue_turns_red_into_green_and_keeps_grey():
    red, grey = PIL.new("RGB", (2, 2), (255, 0, 0)), PIL.new("RGB", (2, 2), (90, 90, 90))
    turned = np.asarray(shift_hue(red, 1 / 3))[0, 0]
    assert turned[1] > 250 and turned[0] < 10 and turned[2] < 10
    assert np.array_equal(np.asarray(shift_hue(grey, 1 / 3)), np.asarray(grey))


def test_variants_follow_from_seed_epoch_and_place():
    data = load_images(ImageArguments(max_train_samples=18), seed=0).splits["train"]
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})

    def read(epoch: int, seed: int = 0, kind: str = "crop", **options) -> torch.Tensor:
        images = AugmentedImages(data, processor, kind, 16, seed)
        loader = DataLoader(images, batch_size=5, collate_fn=default_data_collator, **options)
        for each in range(epoch + 1):
            CountEpochs(images).on_epoch_begin(None, SimpleNamespace(epoch=each + 0.4), None)
            pixels = torch.cat([batch["pixel_values"] for batch in loader])
        return pixels

    first, second = read(0), read(1)
    assert first.shape == (len(data), 3, 16, 16) and not torch.equal(first, second)
    assert torch.equal(first, read(0)) and not torch.equal(first, read(0, seed=1))
    assert torch.equal(second, read(1, num_workers=2, persistent_workers=True))
    plain = with_pixels(data, processor, 16)[:]["pixel_values"]
    assert torch.equal(read(0, kind="none"), plain) and not torch.equal(first, plain)


def test_processors_that_enlarge_and_crop_leave_images_whole(tmp_path):
    """As DeiT's, whose middle of an enlarged image would have no border."""
    image = random_pictures(1, side=16)[0]
    stock = ViTImageProcessorPil(size={"height": 16, "width": 16}, resample=PIL.Resampling.BICUBIC)
    sizes = {"size": {"height": 24, "width": 24}, "crop_size": {"height": 16, "width": 16}}
    cropping = DeiTImageProcessorPil(**sizes, image_mean=stock.image_mean, image_std=stock.image_std)
    expected = stock(image, return_tensors="pt")["pixel_values"]
    assert not torch.equal(cropping(image, return_tensors="pt")["pixel_values"], expected)
    whole = without_cropping(cropping, 16)
    whole.save_pretrained(tmp_path)
    for processor in (whole, AutoImageProcessor.from_pretrained(tmp_path, backend="pil")):
        for size in (16, 20):
            shown = random_pictures(1, side=size)[0]
            pixels = [each(shown, return_tensors="pt")["pixel_values"] for each in (processor, stock)]
            assert torch.equal(*pixels) and type(processor) is DeiTImageProcessorPil
    assert without_cropping(stock, 16) is stock
