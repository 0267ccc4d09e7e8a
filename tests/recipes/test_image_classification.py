"""The image recipe from the command line to a model that loads and classifies."""

import json

import pytest
import torch
from datasets import DatasetDict
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    TrainerControl,
    TrainerState,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    get_scheduler,
    pipeline,
)

import hf_neural_attention
from image_classification import HalveLearningRate, ModelArguments, build_model, fit
from tests.helpers.running import run_in
from training.arms import Arm
from training.images import ImageArguments, LabelledImages
from training.neural_arguments import NeuralArguments


TINY = (
    *("--image_size", 8, "--patch_size", 4, "--hidden_size", 16, "--num_hidden_layers", 2, "--num_attention_heads", 2),
    *("--max_train_samples", 64, "--max_eval_samples", 16, "--max_steps", 4, "--save_steps", 2, "--logging_steps", 1),
    *("--eval_strategy", "steps", "--eval_steps", 2, "--report_to", "none", "--per_device_train_batch_size", 16),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of both arms, and what it printed."""
    folder = tmp_path_factory.mktemp("image_classification")
    return folder / "run", run_in(folder, "image_classification.py", *TINY, "--output_dir", "run", "--card", "cards/model")


@pytest.mark.slow
def test_both_arms_end_as_models_with_cards_a_table_and_pictures(trained):
    folder, printed = trained
    assert "| test accuracy |" in printed and "Predictions: " in printed
    for arm in ("dot", "neural"):
        for file in ("model.safetensors", "preprocessor_config.json", "results.json", "README.md", "predictions.png"):
            assert (folder / arm / file).stat().st_size > 0, file
    record = json.loads((folder.parent / "cards/model.json").read_text())
    assert 0 <= record["results"]["neural"]["metrics"]["test_accuracy"] <= 1


@pytest.mark.slow
def test_the_trained_model_loads_and_classifies(trained):
    model = AutoModelForImageClassification.from_pretrained(trained[0] / "neural")
    assert type(model) is hf_neural_attention.NeuralViTForImageClassification
    guesses = pipeline("image-classification", model=str(trained[0] / "neural"))(Image.new("RGB", (20, 20)))
    assert guesses[0]["label"] in set("0123456789")


@pytest.mark.slow
def test_a_compact_arm_is_trained(tmp_path):
    compact = ("--neural_compact", "True", "--neural_layers", "all", "--neural_hidden_dims", 4, 2)
    run_in(tmp_path, "image_classification.py", *TINY, *compact, "--output_dir", "run", "--card", "card")
    assert "| bytes of a stock cache per token | no cache | no cache |  |" in (tmp_path / "card.md").read_text()
    dot, neural = (json.loads((tmp_path / f"run/{arm}/results.json").read_text()) for arm in ("dot", "neural"))
    assert neural["parameters"] < dot["parameters"]
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "run/neural").config.neural_compact


@pytest.fixture
def checkpoint(tmp_path):
    """A stock ViT for images of 8 pixels and the ten digits."""
    labels = dict(enumerate("0123456789"))
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, id2label=labels)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    return ModelArguments(model_name_or_path=str(tmp_path / "vit"))


def test_images_of_another_size_are_refused(checkpoint):
    images = LabelledImages(DatasetDict(), list("0123456789"))
    assert fit(checkpoint, ImageArguments(image_size=8), NeuralArguments(), images) is images
    with pytest.raises(SystemExit, match="made for images of 8 pixels and --image_size is 32"):
        fit(checkpoint, ImageArguments(image_size=32), NeuralArguments(), images)
    with pytest.raises(SystemExit, match="--image_size 10 is no multiple of --patch_size 4"):
        fit(ModelArguments(patch_size=4), ImageArguments(image_size=10), NeuralArguments(), images)


def test_labels_that_do_not_fit_are_refused(checkpoint):
    images = LabelledImages(DatasetDict(), ["cat", "dog"])
    with pytest.raises(SystemExit, match=r"has 10 labels \(0, 1, 2, ...\) and the data has 2 \(cat, dog, ...\)"):
        fit(checkpoint, ImageArguments(image_size=8), NeuralArguments(), images)
    checkpoint.ignore_mismatched_sizes = True
    assert fit(checkpoint, ImageArguments(image_size=8), NeuralArguments(), images) is images
    for arm in (Arm.DOT, Arm.NEURAL):
        model = build_model(arm, checkpoint, NeuralArguments(), ImageArguments(image_size=8), ["cat", "dog"])
        assert model.classifier.weight.shape == (2, 16) and model.config.id2label == {0: "cat", 1: "dog"}


def test_a_stock_checkpoint_becomes_a_neural_model_with_its_weights(checkpoint):
    neural = NeuralArguments(attention="neural", neural_layers=["all"])
    model = build_model(Arm.NEURAL, checkpoint, neural, ImageArguments(image_size=8), list("0123456789"))
    stock = ViTForImageClassification.from_pretrained(checkpoint.model_name_or_path).state_dict()
    assert type(model) is hf_neural_attention.NeuralViTForImageClassification
    assert all(torch.equal(model.state_dict()[name], value) for name, value in stock.items())


@pytest.mark.slow
def test_errors_reach_the_user_without_a_traceback(run_recipe):
    assert "is no folder" in run_recipe(
        "image_classification.py", *TINY, "--dataset_name", "./x", "--output_dir", "b", fails=True
    )


def test_the_learning_rate_is_halved_once_also_in_a_run_resumed_at_that_point():
    def make():
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
        return optimizer, get_scheduler("constant", optimizer)

    def step(optimizer, schedule, epoch):
        callback, state = HalveLearningRate(2), TrainerState(epoch=epoch)
        callback.on_step_begin(None, state, TrainerControl(), lr_scheduler=schedule, optimizer=optimizer)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        return rate

    optimizer, schedule = make()
    assert [step(optimizer, schedule, epoch) for epoch in (0.0, 1.0, 1.5)] == [0.4, 0.4, 0.4]
    for epochs, rates in (((2.0, 2.5, 3.0), [0.2, 0.2, 0.2]), ((3.5,), [0.2])):
        resumed, resumed_schedule = make()
        resumed.load_state_dict(optimizer.state_dict())
        resumed_schedule.load_state_dict(schedule.state_dict())
        optimizer, schedule = resumed, resumed_schedule
        assert [step(optimizer, schedule, epoch) for epoch in epochs] == rates
