"""Images to classify: where they come from, and which of their columns are images and labels."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DatasetsError
from PIL import Image as PIL

from tools.command_lines import at_least
from training.augmentation import AUGMENTATIONS
from training.data_files import ALIASES, SPLITS, cause_of, files_of_splits, in_one_line, kind_of, read_files
from training.hub_datasets import load_hub_dataset
from training.labels import can_be_class_label, hold_out, is_class_label, with_classes
from training.pixel_values import check_images


EMBEDDED = "embedded"


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
    label_column_name: str | None = field(
        default=None, metadata={"help": "Default: the only column of class labels, or else of strings or integers."}
    )
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

    def __post_init__(self) -> None:
        """Raises a ValueError for sizes of nothing."""
        for name in ("image_size", "max_train_samples", "max_eval_samples"):
            at_least(name, getattr(self, name), 1)


@dataclass
class LabelledImages:
    """Splits train, validation and test with columns `image` and `label`."""

    splits: DatasetDict
    labels: list[str]


def load_images(arguments: ImageArguments, seed: int) -> LabelledImages:
    """Loads the data set; where it has no validation split, a tenth of the training split, drawn by `seed`, serves.

    Raises:
        SystemExit: naming what was not found, or is not as it must be, and what was expected.
    """
    name = arguments.dataset_name
    splits = load_splits(arguments)
    splits = DatasetDict({split: standard_columns(splits[split], split, arguments) for split in SPLITS if split in splits})
    splits, labels = with_classes(splits, name)
    loaded = set(splits)
    splits = DatasetDict({split: data.add_column("row", np.arange(data.num_rows)) for split, data in splits.items()})
    splits = hold_out(splits, seed, name)
    limits = {"train": arguments.max_train_samples}
    for split, data in splits.items():
        limit = limits.get(split, arguments.max_eval_samples)
        if limit is not None and limit < data.num_rows:
            # draws them, since some data sets come sorted by class
            splits[split] = data.shuffle(seed=seed).select(range(limit))
        check_images(splits[split], f"Split {split if split in loaded else 'train'} of {name}")
        splits[split] = splits[split].remove_columns("row")
    return LabelledImages(splits, labels)


def load_splits(arguments: ImageArguments) -> DatasetDict:
    name = arguments.dataset_name
    if name == EMBEDDED:
        return embedded_digits()
    path = Path(name)
    if path.is_dir():
        files = files_of_splits(path, (".parquet",), arguments.dataset_config_name)
        splits = read_files(files) if files else read_image_folder(path)
    elif path.exists() or name.startswith((".", "/")) or path.suffix in (".parquet", ".zip"):
        raise SystemExit(f"{name} is no folder. Expected a folder with train.parquet, or with train/CLASS/*.png.")
    else:
        splits = load_hub_dataset(name, arguments.dataset_config_name)
    if "train" not in splits:
        raise SystemExit(f"{name} has no split train; it has {', '.join(splits)}.")
    return splits


def read_image_folder(folder: Path) -> DatasetDict:
    """Folders of the splits with a folder for each class (`train/CLASS/*.png`), or what else `imagefolder` knows."""
    found = {ALIASES.get(part.name, part.name): part for part in sorted(folder.iterdir()) if part.is_dir()}
    # reads them one by one, since one without classes, as of hidden labels, would take the others' classes with it
    parts: dict[str, Any] = {
        split: {"data_files": f"{escape(str(found[split]))}/**", "split": "train", **labels_of_one_class(split, found)}
        for split in SPLITS
        if split in found
    }
    try:
        if "train" in parts:
            return DatasetDict({split: load_dataset("imagefolder", **part) for split, part in parts.items()})
        return load_dataset("imagefolder", data_dir=str(folder))
    except (EmptyDatasetError, FileNotFoundError):
        raise SystemExit(f"The folder {folder} has no train.parquet and no train/CLASS/*.png.") from None
    except (DatasetsError, ValueError) as error:
        raise SystemExit(f"The folder {folder} cannot be read: {in_one_line(cause_of(error))}") from None


def labels_of_one_class(split: str, folders: dict[str, Path]) -> dict[str, bool]:
    """Asks for labels where there is nothing but one of the training classes, in which `imagefolder` sees none unasked."""
    inside = [path.name for path in folders[split].iterdir() if not path.name.startswith(".")]
    is_class = split != "train" and "train" in folders and len(inside) == 1 and (folders["train"] / inside[0]).is_dir()
    return {"drop_labels": False} if is_class else {}


def standard_columns(data: Dataset, split: str, arguments: ImageArguments) -> Dataset:
    """Its images and labels, as columns `image` and `label`; the latter may be missing in a split that is not for training."""
    where = f"Split {split} of {arguments.dataset_name}"
    image = the_column(
        data.features, (is_image, can_be_image), "images", arguments.image_column_name, "image_column_name", where
    )
    kinds, wanted = (is_class_label, can_be_class_label), arguments.label_column_name
    left = Features({name: feature for name, feature in data.features.items() if name != image})
    if split != "train" and not any(kind(feature) for kind in kinds for feature in left.values()):
        return data.select_columns([image]).rename_columns({image: "image"}).cast_column("image", Image())
    label = the_column(left, kinds, "class labels", wanted, "label_column_name", where)
    data = data.select_columns([image, label])
    data = data.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})
    return data.cast_column("image", Image())


def is_image(feature: Any) -> bool:
    return isinstance(feature, Image)


def can_be_image(feature: Any) -> bool:
    """Whether it holds files of images, as libraries other than `datasets` write them."""
    return feature in (Value("binary"), Value("large_binary")) or (
        isinstance(feature, dict) and feature.keys() == {"bytes", "path"}
    )


def the_column(
    features: Features, kinds: tuple[Callable[[Any], bool], ...], what: str, wanted: str | None, flag: str, where: str
) -> str:
    """The column that is wanted, or the only one of the first kind that there is one of.

    Raises:
        SystemExit: if there is none, or several.
    """
    columns = [[name for name, feature in features.items() if kind(feature)] for kind in kinds]
    if wanted is not None:
        if not any(wanted in names for names in columns):
            raise SystemExit(f"{where} has no column {wanted!r} of {what}; it has {described(features)}.")
        return wanted
    found = next(filter(None, columns), [])
    if not found:
        raise SystemExit(f"{where} has no column of {what}; it has {described(features)}.")
    if len(found) > 1:
        raise SystemExit(f"{where} has {len(found)} columns of {what} ({', '.join(found)}). Choose one with --{flag}.")
    return found[0]


def described(features: Features) -> str:
    """Columns with what they hold."""
    return ", ".join(f"{name} ({kind_of(feature)})" for name, feature in features.items()) or "no other columns"


def fingerprint(splits: DatasetDict) -> str:
    """Of all labels and images: of how many bytes each is stored in, and what its file is called where it has one."""
    found = hashlib.sha256()
    for split in sorted(splits):
        found.update(split.encode())
        for batch in splits[split].cast_column("image", Image(decode=False)).iter(1000):
            for image, label in zip(batch["image"], batch["label"], strict=True):
                path, content = image["path"] or "", image["bytes"]
                # has no size of what is inside an archive
                size = Path(path).stat().st_size if content is None and Path(path).is_file() else len(content or b"")
                name = path.partition("::")[0].rpartition("/")[2]
                found.update(f" {label} {size} {name}".encode())
    return found.hexdigest()[:16]


def embedded_digits() -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey values; every fifth for test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    is_test = np.arange(len(digits.images)) % 5 == 0
    splits = DatasetDict()
    for split, chosen in {"train": ~is_test, "test": is_test}.items():
        images = [PIL.fromarray((image * (255 / 16)).astype(np.uint8)) for image in digits.images[chosen]]
        splits[split] = Dataset.from_dict({"image": images, "label": digits.target[chosen].tolist()}, features=features)
    return splits
