"""Images to classify: loading, labels, pixels."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from datasets.data_files import EmptyDatasetError
from PIL import Image as PIL
from transformers import BaseImageProcessor

from training.augmentation import AUGMENTATIONS, resize
from training.hub_datasets import load_hub_dataset


EMBEDDED = "embedded"
HELD_OUT_SHARE = 0.1


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
            # draws them, since some data sets come sorted by class
            splits[split] = data.shuffle(seed=seed).select(range(limit))
    return LabelledImages(splits, labels)


def load_splits(arguments: ImageArguments) -> DatasetDict:
    name = arguments.dataset_name
    if name == EMBEDDED:
        return embedded_digits()
    path = Path(name)
    if path.is_dir():
        files: dict[str, list[str]] = {}
        for file in sorted(path.glob("*.parquet")):  # takes train.parquet, or train-00000-of-00001.parquet as on the Hub
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


def with_pixels(data: Dataset, processor: BaseImageProcessor, size: int) -> Dataset:
    """The data set with `pixel_values` and `labels`, computed when an example is read."""
    return data.with_transform(partial(make_pixels, processor=processor, size=size))


def make_pixels(batch: dict[str, Any], processor: BaseImageProcessor, size: int) -> dict[str, Any]:
    images = [resize(image.convert("RGB"), size) for image in batch["image"]]
    return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}
