"""Names that are no path go to the Hub, and what goes wrong there is said plainly."""

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from datasets.exceptions import DatasetNotFoundError
from PIL import Image as PIL

from training import hub_datasets
from training.images import ImageArguments, load_images
from training.text import TextArguments, load_text


def serve(monkeypatch, splits):
    """Puts a data set in the Hub's place and notes what is asked for."""
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        if isinstance(splits, Exception):
            raise splits
        return splits

    monkeypatch.setattr(hub_datasets, "load_dataset", load_dataset)
    return asked


def test_text_by_name_and_configuration(monkeypatch):
    splits = DatasetDict(
        {split: Dataset.from_dict({"text": [f"{split} \n"] * 3}) for split in ("train", "validation", "test")}
    )
    asked = serve(monkeypatch, splits)
    arguments = TextArguments(dataset_name="Salesforce/wikitext", dataset_config_name="wikitext-2-v1")
    assert load_text(arguments)["validation"]["text"] == ["validation \n"] * 3
    assert asked == [("Salesforce/wikitext", "wikitext-2-v1")]


def test_images_by_name(monkeypatch):
    features = Features({"img": Image(), "label": ClassLabel(names=["cat", "dog"])})
    columns = {"img": [PIL.new("RGB", (8, 8))] * 20, "label": [0, 1] * 10}
    data = Dataset.from_dict(columns, features=features)
    asked = serve(monkeypatch, DatasetDict(train=data, test=data))
    assert load_images(ImageArguments(dataset_name="uoft-cs/cifar10"), seed=0).labels == ["cat", "dog"]
    assert asked == [("uoft-cs/cifar10", None)]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DatasetNotFoundError("No such data set."), "data/wikitext is no file or folder here, and cannot be had from the Hub"),
        (ConnectionError("No route."), r"No route\. Check the name; without a network, give --dataset_name a local folder"),
        (ValueError("Config name is missing."), r"Config name is missing\. Choose one with --dataset_config_name"),
    ],
)
def test_what_goes_wrong_is_said_plainly(monkeypatch, error, message):
    serve(monkeypatch, error)
    with pytest.raises(SystemExit, match=message):
        load_text(TextArguments(dataset_name="data/wikitext"))


def test_without_a_network_the_real_library_ends_there_too():
    with pytest.raises(SystemExit, match="give --dataset_name a local folder"):
        load_text(TextArguments(dataset_name="nobody/has-this-data-set"))


def test_splits_have_one_name_and_names_may_have_dots(monkeypatch):
    texts = Dataset.from_dict({"text": ["one", "two"]})
    asked = serve(monkeypatch, DatasetDict(train=texts, dev=texts, testing=texts))
    assert set(hub_datasets.load_hub_dataset("somebody/set", None)) == {"train", "validation", "test"}
    splits = load_text(TextArguments(dataset_name="somebody/set-1.0"))
    assert asked[-1] == ("somebody/set-1.0", None) and splits["validation"].num_rows == 2
