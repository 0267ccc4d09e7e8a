"""Whether images and a checkpoint fit together, for every recipe that starts from one."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from training.data_checks import check_sizes, fit_labels, load_classifier, load_processor
from training.images import ImageArguments, LabelledImages


NAMES = ["cat", "dog", "emu"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A ViT for images of 16 pixels of cats, dogs and emus, with a processor."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(image_size=16, patch_size=8, id2label=dict(enumerate(NAMES)), **SIZES)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def images_of(names: list[str]) -> LabelledImages:
    """Three of them, the number of each being that of its class among `NAMES`, where it has one."""
    features = Features({"image": Value("int64"), "label": ClassLabel(names=names)})
    numbers = [NAMES.index(name) if name in NAMES else index for index, name in enumerate(names)]
    data = Dataset.from_dict({"image": numbers, "label": range(len(names))}, features=features)
    return LabelledImages(DatasetDict(train=data, test=data), names)


def check(checkpoint: str, size: int, **processor: int) -> None:
    config, makes = AutoConfig.from_pretrained(checkpoint), load_processor(checkpoint)
    if processor:
        makes = ViTImageProcessorPil(size=processor)
    check_sizes(ImageArguments(image_size=size), "vit", config, ViTForImageClassification, makes)


def test_images_must_have_the_size_that_the_checkpoint_sees(checkpoint):
    check(checkpoint, 16)
    with pytest.raises(SystemExit, match=r"vit was made for images of 16 pixels and --image_size is 8\. Use its size"):
        check(checkpoint, 8)
    with pytest.raises(SystemExit, match="vit has an image processor that makes images of 8 pixels and --image_size is 16"):
        check(checkpoint, 16, height=8, width=8)
    with pytest.raises(SystemExit, match="makes images of 16 x 8 pixels and"):
        check(checkpoint, 16, height=16, width=8)


def test_a_model_that_takes_any_size_has_that_of_its_processor():
    config, processor = (
        Dinov2Config(image_size=32, patch_size=8, **SIZES),
        ViTImageProcessorPil(size={"height": 16, "width": 16}),
    )
    check_sizes(ImageArguments(image_size=16), "dino", config, Dinov2ForImageClassification, processor)
    with pytest.raises(SystemExit, match="makes images of 16 pixels and --image_size is 32"):
        check_sizes(ImageArguments(image_size=32), "dino", config, Dinov2ForImageClassification, processor)


def test_a_checkpoint_without_an_image_processor(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=f"The image processor of {tmp_path} cannot be loaded"):
        load_processor(str(tmp_path))


def test_classes_in_another_order_are_numbered_as_the_checkpoint_does(checkpoint, capsys):
    images = fit_labels(images_of(["emu", "cat", "dog"]), checkpoint, AutoConfig.from_pretrained(checkpoint), False)
    assert images.labels == NAMES and "another order, which is kept (cat, dog, emu, ...)" in capsys.readouterr().out
    for data in images.splits.values():
        assert data["label"][:] == data["image"][:] and data.features["label"].names == NAMES
    model = load_classifier(AutoModelForImageClassification.from_pretrained, checkpoint, images.labels, False)
    assert model.config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize("names", (["cat", "dog"], ["cat", "dog", "fox"]))
def test_other_classes_are_refused_or_get_a_new_classifier(checkpoint, names):
    images, config = images_of(names), AutoConfig.from_pretrained(checkpoint)
    with pytest.raises(
        SystemExit, match=rf"has 3 labels \(cat, dog, emu, ...\) and the data has {len(names)} .*: they do not fit"
    ):
        fit_labels(images, checkpoint, config, False)
    assert fit_labels(images, checkpoint, config, True) is images
    stock = ViTForImageClassification.from_pretrained(checkpoint).state_dict()
    model = load_classifier(AutoModelForImageClassification.from_pretrained, checkpoint, names, True)
    assert model.config.id2label == dict(enumerate(names)) and model.classifier.weight.shape == (len(names), 16)
    differing = {name for name, value in model.state_dict().items() if not torch.equal(value, stock[name])}
    assert "classifier.weight" in differing and differing <= {"classifier.weight", "classifier.bias"}
    assert 0.01 < model.classifier.weight.std() < 0.04  # as ViT's are drawn


def test_classes_without_names_are_taken_for_those_of_the_data(checkpoint):
    config, images = ViTConfig(num_labels=3), images_of(NAMES[::-1])
    assert fit_labels(images, checkpoint, config, False) is images
    kept = load_classifier(AutoModelForImageClassification.from_pretrained, checkpoint, NAMES, True)
    stock = ViTForImageClassification.from_pretrained(checkpoint)
    assert all(
        np.array_equal(one.detach(), two.detach()) for one, two in zip(kept.parameters(), stock.parameters(), strict=True)
    )
