"""Labels of images: classes made of what a column holds, and what is refused."""

from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Value

from tools.messages import say


HELD_OUT_SHARE = 0.1
SHOWN = 3  # examples in a message

Label = str | int | None  # of one image; None where there is none
KINDS = ("string", "large_string", "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))


def is_class_label(feature: Any) -> bool:
    return isinstance(feature, ClassLabel)


def can_be_class_label(feature: Any) -> bool:
    """Whether classes can be made of it: strings, integers, or what is true or false."""
    return isinstance(feature, Value) and feature.dtype in KINDS


def with_classes(splits: DatasetDict, name: str) -> tuple[DatasetDict, list[str]]:
    """The splits with a column `label` of numbers, and the names of these classes.

    Names are those of the training split's `ClassLabel`, or its own strings or integers, sorted. A split whose labels are all
    missing (a hidden test set has -1) is left aside, and that is said.

    Raises:
        SystemExit: if labels are missing, a held-out split has classes that the training split lacks, or there is one class.
    """
    labels = {split: labels_of(data, f"Split {split} of {name}") for split, data in splits.items()}
    feature = splits["train"].features.get("label")
    seen = {label for label in labels["train"] if label is not None}
    names = (
        list(feature.names) if isinstance(feature, ClassLabel) else sorted(seen, key=lambda label: (str(type(label)), label))
    )
    number_of = {str(label): number for number, label in enumerate(names)}
    if len(seen) < 2:
        classes = f"one class only ({', '.join(map(str, seen))})" if seen else "no labels"
        raise SystemExit(f"Split train of {name} has {classes}: there is nothing to tell apart.")
    ready = DatasetDict()
    for split, data in splits.items():
        where = f"Split {split} of {name}"
        if is_hidden(labels[split], seen):
            say(f"Note: {where} has no labels (all are -1 or missing): it is left aside, and cut from the training images.")
            continue
        check_labels(labels[split], seen, where)
        if data.features["label"] == ClassLabel(names=[str(label) for label in names]):
            ready[split] = data
            continue
        numbers = np.array([number_of[str(label)] for label in labels[split]], dtype=np.int64)
        ready[split] = with_numbers(data, numbers, [str(label) for label in names])
    return ready, [str(label) for label in names]


def labels_of(data: Dataset, where: str) -> list[Label]:
    """Name or number of each image's class.

    Raises:
        SystemExit: if a number has no name.
    """
    feature = data.features.get("label")
    if feature is None:
        return [None] * data.num_rows
    values = data.select_columns("label").with_format("arrow")[:]["label"].to_pylist()
    if not isinstance(feature, ClassLabel):
        return [None if value == "" else value for value in values]
    classes = len(feature.names)
    if beyond := [value for value in values if value is not None and value >= classes]:
        raise SystemExit(f"{where} has the label {beyond[0]}, and names for {classes} classes, 0 to {classes - 1}.")
    return [None if value is None or value < 0 else feature.names[value] for value in values]


def is_hidden(labels: Sequence[Label], seen: Set[Label]) -> bool:
    return bool(labels) and all(label is None or (label == -1 and -1 not in seen) for label in labels)


def check_labels(labels: Sequence[Label], seen: Set[Label], where: str) -> None:
    missing = [row for row, label in enumerate(labels) if label is None]
    if missing:
        rows = ", ".join(map(str, missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
        raise SystemExit(
            f"{where} lacks the labels of {len(missing):,} of {len(labels):,} images (rows {rows}; the first is 0). Label "
            "these images, or remove them."
        )
    known = {str(label) for label in seen}
    if unknown := Counter(str(label) for label in labels if str(label) not in known):
        classes = ", ".join(sorted(unknown)[:SHOWN]) + (", ..." if len(unknown) > SHOWN else "")
        raise SystemExit(
            f"{where} has {sum(unknown.values()):,} image(s) of {len(unknown)} class(es) of which split train has none "
            f"({classes}): a model cannot learn them. Add such images to split train, or remove these."
        )


def with_numbers(data: Dataset, numbers: np.ndarray, names: list[str]) -> Dataset:
    """With these numbers of classes in the place of its labels."""
    kept = data.remove_columns([column for column in data.column_names if column == "label"])
    return kept.add_column("label", numbers, feature=ClassLabel(names=names))


def in_order_of(splits: DatasetDict, names: list[str]) -> DatasetDict:
    """The splits with their classes numbered in another order."""
    new = {}
    for split, data in splits.items():
        place = np.array([names.index(name) for name in data.features["label"].names])
        new[split] = with_numbers(data, place[np.asarray(data.with_format("numpy")["label"])], names)
    return DatasetDict(new)


def hold_out(splits: DatasetDict, seed: int, name: str) -> DatasetDict:
    """Where there is no test or validation split, a tenth of the training images of each class, drawn by the seed, serves.

    Raises:
        SystemExit: if they are too few for that.
    """
    splits = DatasetDict(splits)
    for split in ("test", "validation"):
        if split in splits:
            continue
        train = splits["train"]
        try:
            parts = train.train_test_split(HELD_OUT_SHARE, seed=seed, stratify_by_column="label")
        except ValueError:  # comes from `datasets` if a class has one image, or there are fewer to be drawn than classes
            names = train.features["label"].names
            rarest, count = min(Counter(train["label"]).items(), key=lambda pair: pair[1])
            raise SystemExit(
                f"Split train of {name} has too few images for a tenth of each class to be split {split}: {train.num_rows} of "
                f"{len(set(train['label']))} classes, of {names[rarest]} {count}. Add images, or a split {split}."
            ) from None
        splits["train"], splits[split] = parts["train"], parts["test"]
    return splits
