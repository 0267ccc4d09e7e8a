"""Labels of images: what makes classes, and what is refused."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Value

from training.labels import hold_out, in_order_of, with_classes


CATS = ClassLabel(names=["cat", "dog", "emu"])
TRAIN = [0, 1, 2, 0, 1, 2]


def splits(kind=CATS, train=TRAIN, **others) -> DatasetDict:
    features = Features({"image": Value("int64"), "label": kind})
    parts = {"train": train, **others}
    columns = {split: {"image": range(len(labels)), "label": labels} for split, labels in parts.items()}
    return DatasetDict({split: Dataset.from_dict(each, features=features) for split, each in columns.items()})


def classes_of(data: Dataset) -> list[str]:
    return [data.features["label"].names[number] for number in data["label"]]


def test_class_labels_stay_what_they_are(capsys):
    given = splits(test=[2, 0])
    ready, names = with_classes(given, "data")
    assert names == CATS.names and ready["train"]["label"][:] == TRAIN and ready["test"]["label"][:] == [2, 0]
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "train", "test", "names"),
    (
        (Value("string"), ["emu", "cat", "emu"], ["cat"], ["cat", "emu"]),
        (Value("int64"), [10, 2, 10], [2], ["2", "10"]),
        (Value("int8"), [1, -1, 1], [-1, -1], ["-1", "1"]),
        (Value("bool"), [True, False, True], [False], ["False", "True"]),
    ),
)
def test_strings_and_integers_become_classes(kind, train, test, names):
    ready, found = with_classes(splits(kind, train, test=test), "data")
    assert found == names and ready["test"].features["label"] == ClassLabel(names=names)
    assert classes_of(ready["train"]) == list(map(str, train)) and classes_of(ready["test"]) == list(map(str, test))


def test_names_decide_where_splits_number_them_differently():
    given = splits(test=[0, 1])
    given["test"] = splits(ClassLabel(names=["dog", "cat"]), [0, 1, 1])["train"]
    ready, names = with_classes(given, "data")
    assert names == CATS.names and ready["test"]["label"][:] == [1, 0, 0]


@pytest.mark.parametrize(("kind", "hidden"), ((CATS, [-1, -1]), (CATS, [None, None]), (Value("int64"), [-1, -1])))
def test_a_hidden_test_set_is_left_aside(kind, hidden, capsys):
    ready, _ = with_classes(splits(kind, test=hidden), "data")
    assert set(ready) == {"train"} and "Split test of data has no labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    (
        (
            splits(train=[0, 1, -1, None]),
            r"Split train of data lacks the labels of 2 of 4 images \(rows 2, 3; the first is 0\)",
        ),
        (splits(Value("string"), ["a", "", "b"]), r"lacks the labels of 1 of 3 images \(rows 1;"),
        (splits(test=[0, -1]), "Split test of data lacks the labels of 1 of 2"),
        (splits(train=[0, 0, 0]), r"one class only \(cat\): there is nothing to tell apart"),
        (splits(train=[-1, -1]), "has no labels"),
        (splits(train=[0, 1], test=[0, 2, 2]), r"test of data has 2 image\(s\) of 1 class\(es\) .* train has none \(emu\)"),
        (splits(Value("string"), ["a", "b"], test=["c"]), r"split train has none \(c\)"),
    ),
)
def test_what_a_classifier_cannot_learn_is_refused(given, message):
    with pytest.raises(SystemExit, match=message):
        with_classes(given, "data")


def test_a_number_without_a_name_is_refused():
    table = pa.table({"image": [1, 2, 3], "label": [0, 1, 7]})
    info = DatasetInfo(features=Features({"image": Value("int64"), "label": CATS}))
    with pytest.raises(SystemExit, match="has the label 7, and names for 3 classes, 0 to 2"):
        with_classes(DatasetDict(train=Dataset(table, info=info)), "data")


def test_classes_in_another_order_keep_their_images():
    ordered = in_order_of(splits(test=[2, 0]), ["emu", "cat", "dog"])
    assert ordered["test"]["label"][:] == [0, 1] and classes_of(ordered["train"]) == [CATS.names[label] for label in TRAIN]


def test_a_tenth_of_each_class_is_held_out():
    held = hold_out(splits(train=TRAIN * 20), 0, "data")
    assert {split: data.num_rows for split, data in held.items()} == {"train": 97, "test": 12, "validation": 11}
    assert all(set(data["label"]) == {0, 1, 2} for data in held.values())


@pytest.mark.parametrize(
    ("labels", "message"),
    (
        ([0, 1] * 30 + [2], "split test: 61 of 3 classes, of emu 1. Add images, or a split test"),
        (TRAIN, "split test: 6 of 3 classes, of cat 2"),
        ([0, 1] * 10 + [2] * 2, "classes, of emu"),
    ),
)
def test_too_few_to_hold_any_out(labels, message):
    with pytest.raises(SystemExit, match=f"Split train of data has too few images .*{message}"):
        hold_out(splits(train=np.array(labels).tolist()), 0, "data")
