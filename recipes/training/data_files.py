"""Files of data in a folder: which of them belong to which split, and reading them."""

import csv
import re
from glob import escape
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetsError


SPLITS = ("train", "validation", "test")
ALIASES = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation"}  # as `datasets` has them
ALIASES |= {"testing": "test", "eval": "test", "evaluation": "test"}
PART = re.compile(r"-(\d+)-of-(\d+)(-\w+)?$")  # of a split's file on the Hub, train-00000-of-00001.parquet

UNREADABLE = (DatasetsError, OSError, ValueError, TypeError, csv.Error)  # raised by `datasets` and what it reads with

Files = dict[str, list[Path]]


def files_of_splits(folder: Path, suffixes: tuple[str, ...], config: str | None = None) -> Files:
    """The files of each split in a folder: `train.*`, or in parts `train-00000-of-00002.*`, as on the Hub; `validation.*` (or
    `valid.*`, `val.*`, `dev.*`) and `test.*` likewise. Where it has none, those in its folder `data`, and before all those in
    the folder of the configuration.

    Raises:
        SystemExit: if a part is missing, or the files have different formats.
    """
    places = [*([folder / config] if config else []), folder, folder / "data"]
    files = next((found for place in places if (found := files_in(place, suffixes))), {})
    for split, parts in files.items():
        numbers = [match.groups() for file in parts if (match := PART.search(file.stem))]
        for total in {total for _, total, _ in numbers}:
            missing = set(range(int(total))) - {int(number) for number, of, _ in numbers if of == total}
            if missing:
                raise SystemExit(
                    f"Split {split} in {folder} lacks {len(missing)} of its {int(total)} files, number {min(missing)}."
                )
    if len({file.suffix for file in chain(*files.values())}) > 1:
        names = ", ".join(file.name for file in chain(*files.values()))
        raise SystemExit(f"The splits in {folder} have different formats: {names}.")
    return files


def files_in(folder: Path, suffixes: tuple[str, ...]) -> Files:
    found: Files = {}
    for file in sorted(folder.glob("*")):
        if file.suffix in suffixes and file.is_file():
            name = PART.sub("", file.stem)
            found.setdefault(ALIASES.get(name, name), []).append(file)
    return {split: found[split] for split in SPLITS if split in found}


def read_files(files: Files) -> DatasetDict:
    """The splits, each with the columns that its own files have.

    Raises:
        SystemExit: naming the file that cannot be read, and what is wrong with it.
    """
    return DatasetDict({split: read_split(parts) for split, parts in files.items()})


def read_split(files: list[Path]) -> Dataset:
    for file in files:
        if not file.stat().st_size:
            raise SystemExit(f"The file {file} is empty.")
    try:
        return read(files)
    except UNREADABLE as error:
        first = error
    for file in files:
        try:
            read([file])
        except UNREADABLE as error:
            raise SystemExit(f"The file {file} cannot be read: {what_is_wrong(file, error)}") from None
    names = ", ".join(file.name for file in files)
    raise SystemExit(f"The files {names} in {files[0].parent} do not fit together: {in_one_line(cause_of(first))}")


def read(files: list[Path]) -> Dataset:
    kind = files[0].suffix.lstrip(".")
    builder = {"txt": "text", "jsonl": "json"}.get(kind, kind)
    # keeps line breaks of text, and takes words like "NA" and "null" in a table for what they are
    options: dict[str, dict[str, Any]] = {"text": {"keep_linebreaks": True}, "csv": {"keep_default_na": False}}
    if builder == "csv":
        for file in files:
            check_csv(file)
    return load_dataset(builder, data_files=[escape(str(file)) for file in files], split="train", **options.get(builder, {}))


def check_csv(file: Path) -> None:
    """Raises a ValueError for what `pandas` reads without a word: columns of one name, rows with more or fewer cells."""
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines)
        names = next(rows, [])
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"it has several columns of the name {', '.join(sorted(twice))}.")
        for row in rows:
            if row and len(row) != len(names):
                raise ValueError(
                    f"the row that ends in line {rows.line_num} has {len(row)} cell(s), and the first {len(names)}. Put texts "
                    'that have commas in them into quotes (").'
                )


def what_is_wrong(file: Path, error: Exception) -> str:
    cause = cause_of(error)
    if isinstance(cause, UnicodeDecodeError) and (number := first_line_that_is_not_utf8(file)):
        return f"line {number} is not UTF-8 ({cause.reason}). Convert it, for instance with iconv."
    return "it has no rows." if "corresponds to no data" in str(cause) else in_one_line(cause)


def first_line_that_is_not_utf8(file: Path) -> int | None:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return None


def cause_of(error: BaseException) -> BaseException:
    """What was raised first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def kind_of(feature: Any) -> str:
    """What a column holds, in words."""
    if isinstance(feature, Value):
        return str(feature.dtype)
    words = {"List": "lists", "LargeList": "lists", "dict": "structures", "Json": "values of several kinds"}
    return words.get(type(feature).__name__, type(feature).__name__)
