"""Images for the classification recipe: loading, labels, augmentation."""

import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from datasets.data_files import EmptyDatasetError
from PIL import Image as PIL
from PIL import ImageEnhance, ImageOps
from transformers import BaseImageProcessor, TrainerCallback

from hub_data import load_hub_dataset


EMBEDDED = "embedded"
HELD_OUT_SHARE = 0.1
AUGMENTATIONS = ("none", "crop", "paper")


@dataclass
class ImageArguments:
    """Which images, and how they are changed in training."""

    dataset_name: str = field(
        default=EMBEDDED,
        metadata={
            "help": "A data set on the Hub (uoft-cs/cifar10), a folder with train and test parquet files or an image folder "
            "(train/CLASS/*.png), or embedded: scikit-learn's 8x8 digits."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration on the Hub."})
    image_column_name: str | None = field(default=None, metadata={"help": "Default: the only column of images."})
    label_column_name: str | None = field(default=None, metadata={"help": "Default: the only column of class labels."})
    image_size: int = field(default=32, metadata={"help": "Side of the square that the model sees, in pixels."})
    augmentation: str = field(
        default="crop",
        metadata={
            "help": "none; crop (shift by up to an eighth, flip); paper (random resized crop from 0.05, flip, colour jitter, "
            "rotation by up to 10 degrees).",
            "choices": list(AUGMENTATIONS),
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many images only."})


@dataclass
class LabelledImages:
    """Splits train, validation and test with columns `image` and `label`."""

    splits: DatasetDict
    labels: list[str]


def load_images(arguments: ImageArguments, seed: int) -> LabelledImages:
    """Loads the data set; where it has no validation split, a tenth of the training split, drawn by `seed`, serves.

    Raises:
        SystemExit: naming what was not found, and what was expected.
    """
    splits = load_splits(arguments)
    features = splits["train"].features
    image = only_column(features, Image, arguments.image_column_name, "image_column_name", arguments)
    label = only_column(features, ClassLabel, arguments.label_column_name, "label_column_name", arguments)
    labels = features[label].names
    for split, data in splits.items():
        if data.features[label].names != labels:
            raise SystemExit(f"Split {split} of {arguments.dataset_name} has other labels than split train.")
        data = data.select_columns([image, label])
        splits[split] = data.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})
    if "test" not in splits:
        splits |= splits["train"].train_test_split(HELD_OUT_SHARE, seed=seed, stratify_by_column="label")
    if "validation" not in splits:
        parts = splits["train"].train_test_split(HELD_OUT_SHARE, seed=seed, stratify_by_column="label")
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    limits = {"train": arguments.max_train_samples}
    for split, data in splits.items():
        limit = limits.get(split, arguments.max_eval_samples)
        if limit is not None and limit < data.num_rows:
            # drawn, since some data sets come sorted by class
            splits[split] = data.shuffle(seed=seed).select(range(limit))
    return LabelledImages(splits, labels)


def load_splits(arguments: ImageArguments) -> DatasetDict:
    name = arguments.dataset_name
    if name == EMBEDDED:
        return embedded_digits()
    path = Path(name)
    if path.is_dir():
        files: dict[str, list[str]] = {}
        for file in sorted(path.glob("*.parquet")):  # train.parquet, or train-00000-of-00001.parquet as on the Hub
            files.setdefault(file.stem.split("-")[0], []).append(str(file))
        try:
            splits = load_dataset("parquet", data_files=files) if files else load_dataset("imagefolder", data_dir=name)
        except EmptyDatasetError:
            raise SystemExit(f"The folder {name} has no train.parquet and no train/CLASS/*.png.") from None
    elif path.exists() or name.startswith((".", "/")) or path.suffix:
        raise SystemExit(f"{name} is no folder. Expected a folder with train.parquet, or with train/CLASS/*.png.")
    else:
        splits = load_hub_dataset(name, arguments.dataset_config_name)
    if "train" not in splits:
        raise SystemExit(f"{name} has no split train; it has {', '.join(splits)}.")
    return splits


def only_column(features: Features, kind: type, wanted: str | None, flag: str, arguments: ImageArguments) -> str:
    columns = [name for name, feature in features.items() if isinstance(feature, kind)]
    if wanted is not None:
        if wanted not in columns:
            raise SystemExit(
                f"{arguments.dataset_name} has no column {wanted!r} of type {kind.__name__}; it has: "
                f"{', '.join(columns) or 'none'}."
            )
        return wanted
    if len(columns) != 1:
        raise SystemExit(
            f"{arguments.dataset_name} has {len(columns) or 'no'} columns of type {kind.__name__} "
            f"({', '.join(columns) or ', '.join(features)}). Choose one with --{flag}."
        )
    return columns[0]


def embedded_digits() -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey values; every fifth for test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [PIL.fromarray((image * (255 / 16)).astype(np.uint8)) for image in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    everything = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    test = range(0, len(images), 5)
    train = [index for index in range(len(images)) if index % 5]
    return DatasetDict(train=everything.select(train), test=everything.select(test))


def augment(image: PIL.Image, kind: str, size: int, generator: random.Random) -> PIL.Image:
    """A random variant of an RGB image, `size` pixels square."""
    if kind == "paper":
        image = random_resized_crop(image, size, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3), generator=generator)
        image = flip(image, generator)
        image = colour_jitter(image, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, generator=generator)
        return image.rotate(generator.uniform(-10, 10))
    image = resize(image, size)
    if kind == "crop":
        margin = size // 8
        left, top = generator.randint(0, 2 * margin), generator.randint(0, 2 * margin)
        image = flip(ImageOps.expand(image, margin).crop((left, top, left + size, top + size)), generator)
    return image


def resize(image: PIL.Image, size: int) -> PIL.Image:
    return image.resize((size, size), PIL.Resampling.BICUBIC) if image.size != (size, size) else image


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


def with_pixels(data: Dataset, processor: BaseImageProcessor, size: int) -> Dataset:
    """The data set with `pixel_values` and `labels`, computed when an example is read."""
    return data.with_transform(partial(make_pixels, processor=processor, size=size))


def make_pixels(batch: dict[str, Any], processor: BaseImageProcessor, size: int) -> dict[str, Any]:
    images = [resize(image.convert("RGB"), size) for image in batch["image"]]
    return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}


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
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # by workers that outlive an epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = random.Random(f"{self.seed} {int(self.epoch)} {index}")
        example = self.data[index]
        image = augment(example["image"].convert("RGB"), self.augmentation, self.size, generator)
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": example["label"]}


class CountEpochs(TrainerCallback):
    """Tells images which epoch they are read in. Accelerate's loader tells a data set in some cases only."""

    def __init__(self, images: AugmentedImages):
        self.images = images

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.images.epoch.fill_(int(state.epoch or 0))
