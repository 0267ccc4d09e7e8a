"""Files of data: which belong to which split, and what is said of those that cannot be read."""

from pathlib import Path

import pytest
from datasets import Dataset

from training.data_files import files_of_splits, read_files


ROWS = [f"row {index}" for index in range(4)]
SUFFIXES = (".txt", ".parquet")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("a\n")
    return folder


def names_of(files: dict) -> dict:
    return {split: [file.name for file in parts] for split, parts in files.items()}


@pytest.mark.parametrize("place", (".", "data", "a-config"))
def test_files_of_the_hub_in_parts_and_where_a_clone_of_it_has_them(tmp_path, place):
    parts = [f"train-0000{number}-of-00002.parquet" for number in range(2)]
    touch(tmp_path / place, *parts, "dev.parquet", "test-00000-of-00001-0a1b2c.parquet", "other.parquet", "README.md")
    found = files_of_splits(tmp_path, SUFFIXES, "a-config" if place == "a-config" else None)
    assert names_of(found) == {
        "train": parts,
        "validation": ["dev.parquet"],
        "test": ["test-00000-of-00001-0a1b2c.parquet"],
    }


def test_a_part_that_is_missing_is_said(tmp_path):
    touch(tmp_path, "train-00000-of-00003.txt", "train-00002-of-00003.txt")
    with pytest.raises(SystemExit, match=r"Split train in .* lacks 1 of its 3 files, number 1"):
        files_of_splits(tmp_path, SUFFIXES)


def test_formats_are_not_mixed(tmp_path):
    with pytest.raises(SystemExit, match=r"different formats: train\.txt, test\.parquet"):
        files_of_splits(touch(tmp_path, "train.txt", "test.parquet"), SUFFIXES)
    assert files_of_splits(tmp_path / "nowhere", SUFFIXES) == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    (
        ("a.txt", b"plain\ncaf\xe9 au lait\n", r"line 2 is not UTF-8 \(invalid continuation byte\)\. Convert it"),
        ("a.csv", b"text\nplain\ncaf\xe9\n", "line 3 is not UTF-8"),
        ("a.txt", "plain\n".encode("utf-16"), r"line 1 is not UTF-8"),
        ("a.json", b'{"text": "a"}\n{"text": "unfin', "JSON"),
        ("a.csv", b'text\na\n"b\n', "EOF inside string"),
        ("a.csv", b"text,n\nsome, text,1\n", r"the row that ends in line 2 has 3 cell\(s\), and the first 2\. Put texts"),
        ("a.csv", b"text,n\na,1\nb\n", r"line 3 has 1 cell\(s\), and the first 2"),
        ("a.csv", b"text,text\na,b\n", "several columns of the name text"),
        ("a.parquet", b"PAR1 and no more", "not a parquet file"),
    ),
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"^The file {tmp_path / name} cannot be read: .*{message}"):
        read_files({"train": [tmp_path / name]})


def test_of_many_files_the_one_that_is_bad_is_named(tmp_path):
    for name, text in {"good": "a\n", "bad": "caf\xe9\n", "better": "b\n"}.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="latin-1")
    with pytest.raises(SystemExit, match=r"^The file .*/bad\.txt cannot be read: line 1 is not UTF-8"):
        read_files({"train": [tmp_path / f"{name}.txt" for name in ("good", "bad", "better")]})


def test_files_without_anything_in_them(tmp_path):
    (tmp_path / "train.txt").write_text("")
    with pytest.raises(SystemExit, match=r"The file .*train\.txt is empty\."):
        read_files({"train": [tmp_path / "train.txt"]})
    (tmp_path / "train.csv").write_text("text\n")
    with pytest.raises(SystemExit, match=r"The file .*train\.csv cannot be read: it has no rows\."):
        read_files({"train": [tmp_path / "train.csv"]})


def test_splits_have_columns_of_their_own_and_the_parts_of_one_must_fit(tmp_path):
    Dataset.from_dict({"text": ROWS}).to_parquet(str(tmp_path / "a.parquet"))
    Dataset.from_dict({"body": ROWS, "n": [1] * 4}).to_parquet(str(tmp_path / "b.parquet"))
    one, two = tmp_path / "a.parquet", tmp_path / "b.parquet"
    splits = read_files({"train": [one], "test": [two]})
    assert splits["train"].column_names == ["text"] and splits["test"].column_names == ["body", "n"]
    with pytest.raises(SystemExit, match=r"The files a\.parquet, b\.parquet in .* do not fit together: .*body"):
        read_files({"train": [one, two]})


def test_words_of_a_table_that_stand_for_nothing_elsewhere_are_kept(tmp_path):
    (tmp_path / "train.csv").write_text("text,note\nNA,x\nnull,\n,y\nNone,z\n")
    assert read_files({"train": [tmp_path / "train.csv"]})["train"]["text"][:] == ["NA", "null", "", "None"]


def test_brackets_in_a_name_are_no_pattern(tmp_path: Path):
    (tmp_path / "file[1].txt").write_text("right\n")
    (tmp_path / "file1.txt").write_text("wrong\n")
    assert read_files({"train": [tmp_path / "file[1].txt"]})["train"]["text"][:] == ["right\n"]
