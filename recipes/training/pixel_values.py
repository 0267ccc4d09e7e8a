"""Pixels of images as a model takes them, and images that have none."""

import struct
from functools import partial
from typing import Any

from datasets import Dataset, Features, Image, Value
from PIL import Image as PIL
from transformers import BaseImageProcessor

from hf_neural_attention.analysis import to_rgb
from training.augmentation import resampling_of, resize
from training.data_files import in_one_line


SHOWN = 3  # examples in a message
FAULTS = Features({"fault": Value("string"), "image": Value("string")})
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, PIL.DecompressionBombError)  # raised by Pillow


def check_images(data: Dataset, where: str) -> None:
    """Decodes every image once, since one that cannot be read would end the training when its turn comes. `datasets` keeps
    the result for data that it has on disk, so that the next run need not do it again.

    Args:
        data: has a column `row`, the number of the image in what was loaded.
        where: what was loaded, in words.

    Raises:
        SystemExit: naming images that are missing or damaged, or that `to_rgb` refuses.
    """
    stored = data.cast_column("image", Image(decode=False))
    found = stored.map(find_fault, remove_columns=stored.column_names, features=FAULTS, desc=f"reading {where}")
    bad: dict[str, list[str]] = {}  # what is wrong -> images
    for row, fault in enumerate(found["fault"]):
        if fault is not None:
            bad.setdefault(fault, []).append(found[row]["image"])
    if bad:
        cases = [
            f"{', '.join(images[:SHOWN])}{', ...' if len(images) > SHOWN else ''} ({wrong})" for wrong, images in bad.items()
        ]
        more = "; and more" if len(cases) > SHOWN else ""
        raise SystemExit(
            f"{where} has {sum(map(len, bad.values())):,} image(s) that cannot be read: {'; '.join(cases[:SHOWN])}{more}. "
            "Rows are counted from 0. Mend these images, or remove them."
        )


def find_fault(example: dict[str, Any]) -> dict[str, str | None]:
    """What is wrong with the image of an example, if anything, and what to call it."""
    path = example["image"] and example["image"]["path"]
    return {"fault": what_is_wrong(example["image"]), "image": path or f"row {example['row']}"}


def what_is_wrong(stored: dict[str, Any] | None) -> str | None:
    """Why an image, as `datasets` stores it, cannot be read; None if it can."""
    if stored is None or not (stored["bytes"] or stored["path"]):
        return "there is no image"
    try:
        to_rgb(Image().decode_example(stored))
    except PIL.UnidentifiedImageError:
        return "it is no image of a known format"
    except UNREADABLE as error:
        return in_one_line(error).rstrip(".")
    return None


def with_pixels(data: Dataset, processor: BaseImageProcessor, size: int) -> Dataset:
    """The data set with `pixel_values` and `labels`, computed when an example is read."""
    return data.with_transform(partial(make_pixels, processor=processor, size=size))


def make_pixels(batch: dict[str, Any], processor: BaseImageProcessor, size: int) -> dict[str, Any]:
    images = [resize(to_rgb(image), size, resampling_of(processor)) for image in batch["image"]]
    return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}
