"""Images: where they come from, what the model gets of them, and what is refused."""

import pickle

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL.Image import Resampling
from transformers import (
    AutoImageProcessor,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    default_data_collator,
)

from image_classification import ModelArguments as ImageModelArguments
from image_classification import make_processor
from tests.helpers.pictures import random_pictures
from training.augmentation import AugmentedImages
from training.image_task import AccuracyOfBatches, final_figures
from training.images import ImageArguments, fingerprint, load_images
from training.pixel_values import make_pixels, with_pixels
from training.scorer_trainer import ScorerTrainer


def write_parquet(folder, names=("cat", "dog"), labels=("label",), **counts):
    folder.mkdir(exist_ok=True)
    features = Features(
        {"img": Image(), **{label: ClassLabel(names=list(names)) for label in labels}, "note": Value("string")}
    )
    for split, count in counts.items():
        columns = {label: [index % len(names) for index in range(count)] for label in labels}
        data = Dataset.from_dict({"img": random_pictures(count), **columns, "note": ["x"] * count}, features=features)
        data.to_parquet(str(folder / f"{split}.parquet"))
    return str(folder)


def test_the_embedded_digits():
    images = load_images(ImageArguments(), seed=0)
    assert images.labels == list("0123456789")
    counts = {split: data.num_rows for split, data in images.splits.items()}
    assert sum(counts.values()) == 1797 and counts["test"] == 360
    assert set(images.splits["validation"]["label"]) == set(range(10))
    assert images.splits["train"][0]["image"].size == (8, 8)


def test_parquet_files_get_standard_columns_and_a_validation_split_of_their_own(tmp_path):
    folder = write_parquet(tmp_path, train=40, test=6)
    images = load_images(ImageArguments(dataset_name=folder), seed=0)
    assert {split: data.num_rows for split, data in images.splits.items()} == {"train": 36, "validation": 4, "test": 6}
    assert images.splits["test"].column_names == ["image", "label"]
    again = load_images(ImageArguments(dataset_name=folder), seed=0)
    assert again.splits["validation"]["label"] == images.splits["validation"]["label"]


def test_parquet_files_in_parts_as_on_the_hub(tmp_path):
    write_parquet(tmp_path, **{"train-00000-of-00002": 20, "train-00001-of-00002": 20, "test-00000-of-00001": 6})
    images = load_images(ImageArguments(dataset_name=str(tmp_path)), seed=0)
    assert {split: data.num_rows for split, data in images.splits.items()} == {"train": 36, "validation": 4, "test": 6}


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"has no train\.parquet and no train/CLASS"):
        load_images(ImageArguments(dataset_name=str(tmp_path)), seed=0)


def test_a_folder_of_images(tmp_path):
    for index, image in enumerate(random_pictures(40)):
        part = tmp_path / ("train" if index < 30 else "test") / ("cat" if index % 2 else "dog")
        part.mkdir(parents=True, exist_ok=True)
        image.save(part / f"{index}.png")
    images = load_images(ImageArguments(dataset_name=str(tmp_path)), seed=0)
    assert images.labels == ["cat", "dog"]
    assert images.splits["train"].num_rows == 27 and images.splits["test"].num_rows == 10


def test_a_held_out_folder_may_have_one_class(tmp_path):
    for index, image in enumerate(random_pictures(30)):
        part = tmp_path / ("train" if index < 20 else "test") / ("dog" if index < 20 and index % 2 else "cat")
        part.mkdir(parents=True, exist_ok=True)
        image.save(part / f"{index}.png")
    images = load_images(ImageArguments(dataset_name=str(tmp_path)), seed=0)
    assert images.labels == ["cat", "dog"] and images.splits["train"].num_rows == 18
    assert images.splits["test"]["label"] == [0] * 10
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "unknown")  # as hidden labels come
    assert load_images(ImageArguments(dataset_name=str(tmp_path)), seed=0).splits["test"].num_rows < 10


def test_limits_draw_from_the_whole_split(tmp_path):
    folder = write_parquet(tmp_path, train=40, test=40)
    images = load_images(ImageArguments(dataset_name=folder, max_train_samples=10, max_eval_samples=8), seed=0)
    assert images.splits["train"].num_rows == 10 and images.splits["test"].num_rows == 8
    assert set(images.splits["test"]["label"]) == {0, 1}


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"is no folder\. Expected a folder with train\.parquet"):
        load_images(ImageArguments(dataset_name=str(tmp_path / "nowhere")), seed=0)
    two = write_parquet(tmp_path / "two", labels=("fine", "coarse"), train=20)
    with pytest.raises(SystemExit, match=r"2 columns of class labels \(fine, coarse\). Choose one with --label_column_name"):
        load_images(ImageArguments(dataset_name=two), seed=0)
    assert load_images(ImageArguments(dataset_name=two, label_column_name="fine"), seed=0).labels == ["cat", "dog"]
    with pytest.raises(
        SystemExit, match=r"no column 'none' of class labels; it has fine \(ClassLabel\), coarse \(ClassLabel\), note"
    ):
        load_images(ImageArguments(dataset_name=two, label_column_name="none"), seed=0)
    with pytest.raises(SystemExit, match=r"one class only \(x\)"):
        load_images(ImageArguments(dataset_name=two, label_column_name="note"), seed=0)
    untrained = write_parquet(tmp_path / "untrained", test=20)
    with pytest.raises(SystemExit, match="has no split train; it has test"):
        load_images(ImageArguments(dataset_name=untrained), seed=0)


def test_pixels_are_what_the_model_takes(tmp_path):
    images = load_images(ImageArguments(dataset_name=write_parquet(tmp_path, train=20)), seed=0)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    batch = with_pixels(images.splits["train"], processor, 16)[:3]
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert -1.0 <= batch["pixel_values"].min() < batch["pixel_values"].max() <= 1.0
    assert batch["labels"] == images.splits["train"]["label"][:3]
    pickle.dumps(make_pixels)  # pickles it, as it travels to data loader workers that are spawned


def test_what_is_recorded_of_images_follows_from_them(tmp_path):
    folder = tmp_path / "pictures"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index, picture in enumerate(random_pictures(10)):
                picture.save(folder / split / name / f"{index}.png")

    def found(**arguments):
        return fingerprint(load_images(ImageArguments(dataset_name=str(folder), **arguments), seed=0).splits)

    first = found()
    assert found() == first != found(max_eval_samples=4)
    (folder / "test/cat/3.png").rename(folder / "test/dog/30.png")
    moved = found()
    random_pictures(1, side=20)[0].save(folder / "test/cat/4.png")
    assert len({first, moved, found()}) == 3
    features = Features({"image": Image(), "label": Value("int64")})
    inside = [{"bytes": None, "path": f"zip://cat/{index}.png::somewhere/train.zip"} for index in range(2)]
    one, other = (Dataset.from_dict({"image": [each], "label": [0]}, features=features) for each in inside)
    assert fingerprint(DatasetDict(train=one)) != fingerprint(DatasetDict(train=other))
    parquet = [
        write_parquet(tmp_path / name, names=names, train=60) for name, names in (("a", "cd"), ("b", "cd"), ("c", "cde"))
    ]
    figures = [fingerprint(load_images(ImageArguments(dataset_name=each), seed=0).splits) for each in parquet]
    assert figures[0] == figures[1] != figures[2]


@pytest.mark.parametrize(
    "given", ({"dataloader_drop_last": True}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True})
)
def test_figures_are_of_all_images_of_their_split(tmp_path, given):
    labelled = load_images(ImageArguments(max_train_samples=20), seed=0)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    test = labelled.splits["test"]
    data = {
        split: with_pixels(test.select(rows), processor, 8)
        for split, rows in (("validation", range(7)), ("test", range(7, 18)))
    }
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, num_labels=10)).eval()
    common = {
        "data_collator": default_data_collator,
        "compute_metrics": AccuracyOfBatches(),
        "eval_dataset": data["validation"],
    }
    figures = []
    for arguments in ({}, given):
        training = TrainingArguments(
            str(tmp_path),
            per_device_eval_batch_size=4,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            **arguments,
        )
        trainer = ScorerTrainer(model, training, **common)
        on_the_way = trainer.evaluate()["eval_loss"]
        figures.append({"on the way": on_the_way, **final_figures(trainer, data)})
        assert training.dataloader_drop_last == arguments.get("dataloader_drop_last", False)
    assert figures[0] == pytest.approx(figures[1]) and figures[0]["test_loss"] != figures[0]["validation_loss"]


def test_images_are_resized_in_training_as_they_will_be_later(tmp_path):
    """By the image processor that is saved with the model."""
    new = make_processor(ImageModelArguments(), ImageArguments(image_size=16))
    new.save_pretrained(tmp_path)
    pictures = random_pictures(3, side=11)
    data = Dataset.from_dict(
        {"image": pictures, "label": [0] * 3}, features=Features({"image": Image(), "label": Value("int64")})
    )
    other = ViTImageProcessorPil(size={"height": 16, "width": 16}, resample=Resampling.NEAREST)
    for trained_with, seen_with in ((new, AutoImageProcessor.from_pretrained(tmp_path, backend="pil")), (other, other)):
        later = seen_with(pictures, return_tensors="pt")["pixel_values"]
        assert torch.equal(with_pixels(data, trained_with, 16)[:]["pixel_values"], later)
        assert torch.equal(AugmentedImages(data, trained_with, "none", 16, seed=0)[1]["pixel_values"], later[1])


def test_the_final_loss_is_that_of_true_labels(tmp_path):
    labelled = load_images(ImageArguments(max_train_samples=20), seed=0)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    data = {split: with_pixels(labelled.splits["test"].select(range(8)), processor, 8) for split in ("validation", "test")}
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, num_labels=10)).eval()
    losses = []
    for smoothing in (0.0, 0.5):
        training = TrainingArguments(
            str(tmp_path), label_smoothing_factor=smoothing, remove_unused_columns=False, report_to="none", use_cpu=True
        )
        trainer = Trainer(model, training, data_collator=default_data_collator, compute_metrics=AccuracyOfBatches())
        losses.append(final_figures(trainer, data)["test_loss"])
    assert losses[0] == losses[1]
