"""Images: where they come from, how they are augmented, and what is refused."""

import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PIL
from torch.utils.data import DataLoader
from transformers import ViTImageProcessorPil, default_data_collator

from image_data import (
    AUGMENTATIONS,
    AugmentedImages,
    CountEpochs,
    ImageArguments,
    augment,
    load_images,
    make_pixels,
    random_resized_crop,
    shift_hue,
    with_pixels,
)


def make_images(count, side=8):
    generator = np.random.default_rng(0)
    return [PIL.fromarray(generator.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def write_parquet(folder, names=("cat", "dog"), labels=("label",), **counts):
    folder.mkdir(exist_ok=True)
    features = Features(
        {"img": Image(), **{label: ClassLabel(names=list(names)) for label in labels}, "note": Value("string")}
    )
    for split, count in counts.items():
        columns = {label: [index % len(names) for index in range(count)] for label in labels}
        data = Dataset.from_dict({"img": make_images(count), **columns, "note": ["x"] * count}, features=features)
        data.to_parquet(str(folder / f"{split}.parquet"))
    return str(folder)


def test_the_embedded_digits():
    images = load_images(ImageArguments(), seed=0)
    assert images.labels == list("0123456789")
    counts = {split: data.num_rows for split, data in images.splits.items()}
    assert sum(counts.values()) == 1797 and counts["test"] == 360
    assert set(images.splits["validation"]["label"]) == set(range(10))
    assert images.splits["train"][0]["image"].size == (8, 8)


def test_parquet_files_get_standard_columns_and_a_validation_split_of_their_own(tmp_path):
    folder = write_parquet(tmp_path, train=40, test=6)
    images = load_images(ImageArguments(dataset_name=folder), seed=0)
    assert {split: data.num_rows for split, data in images.splits.items()} == {"train": 36, "validation": 4, "test": 6}
    assert images.splits["test"].column_names == ["image", "label"]
    again = load_images(ImageArguments(dataset_name=folder), seed=0)
    assert again.splits["validation"]["label"] == images.splits["validation"]["label"]


def test_parquet_files_in_parts_as_on_the_hub(tmp_path):
    write_parquet(tmp_path, **{"train-00000-of-00002": 20, "train-00001-of-00002": 20, "test-00000-of-00001": 6})
    images = load_images(ImageArguments(dataset_name=str(tmp_path)), seed=0)
    assert {split: data.num_rows for split, data in images.splits.items()} == {"train": 36, "validation": 4, "test": 6}


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"has no train\.parquet and no train/CLASS"):
        load_images(ImageArguments(dataset_name=str(tmp_path)), seed=0)


def test_a_folder_of_images(tmp_path):
    for index, image in enumerate(make_images(40)):
        part = tmp_path / ("train" if index < 30 else "test") / ("cat" if index % 2 else "dog")
        part.mkdir(parents=True, exist_ok=True)
        image.save(part / f"{index}.png")
    images = load_images(ImageArguments(dataset_name=str(tmp_path)), seed=0)
    assert images.labels == ["cat", "dog"]
    assert images.splits["train"].num_rows == 27 and images.splits["test"].num_rows == 10


def test_limits_draw_from_the_whole_split(tmp_path):
    folder = write_parquet(tmp_path, train=40, test=40)
    images = load_images(ImageArguments(dataset_name=folder, max_train_samples=10, max_eval_samples=8), seed=0)
    assert images.splits["train"].num_rows == 10 and images.splits["test"].num_rows == 8
    assert set(images.splits["test"]["label"]) == {0, 1}


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"is no folder\. Expected a folder with train\.parquet"):
        load_images(ImageArguments(dataset_name=str(tmp_path / "nowhere")), seed=0)
    two = write_parquet(tmp_path / "two", labels=("fine", "coarse"), train=20)
    with pytest.raises(
        SystemExit, match=r"2 columns of type ClassLabel \(fine, coarse\). Choose one with --label_column_name"
    ):
        load_images(ImageArguments(dataset_name=two), seed=0)
    assert load_images(ImageArguments(dataset_name=two, label_column_name="fine"), seed=0).labels == ["cat", "dog"]
    with pytest.raises(SystemExit, match="no column 'note' of type ClassLabel; it has: fine, coarse"):
        load_images(ImageArguments(dataset_name=two, label_column_name="note"), seed=0)
    untrained = write_parquet(tmp_path / "untrained", test=20)
    with pytest.raises(SystemExit, match="has no split train; it has test"):
        load_images(ImageArguments(dataset_name=untrained), seed=0)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_augmentation_gives_squares_that_vary_with_the_seed(kind):
    image = make_images(1, side=40)[0]
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


def test_pixels_are_what_the_model_takes(tmp_path):
    images = load_images(ImageArguments(dataset_name=write_parquet(tmp_path, train=20)), seed=0)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    batch = with_pixels(images.splits["train"], processor, 16)[:3]
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert -1.0 <= batch["pixel_values"].min() < batch["pixel_values"].max() <= 1.0
    assert batch["labels"] == images.splits["train"]["label"][:3]
    pickle.dumps(make_pixels)  # data loader workers that are spawned get it so


def test_variants_follow_from_seed_epoch_and_place(tmp_path):
    data = load_images(ImageArguments(dataset_name=write_parquet(tmp_path, train=20)), seed=0).splits["train"]
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
