"""The task of classifying images, whatever the model: how images are trained on, measured, shown, and described on a card."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import (
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_neural_attention.analysis import to_rgb
from hf_neural_attention.metrics import Accuracy
from tools.messages import say
from training.augmentation import AugmentedImages, CountEpochs
from training.images import EMBEDDED, ImageArguments, LabelledImages, fingerprint
from training.pixel_values import with_pixels
from training.prepared_data import PreparedData
from training.reporting import ACCURACY_AND_LOSS, Task


TASK = "image classification"
PIPELINE_TAG = "image-classification"
GRID_ROWS, GRID_COLUMNS = 3, 8
MEASURES = ("loss", "accuracy")  # by an evaluation on the way


def prepare(
    image: ImageArguments,
    images: LabelledImages,
    processor: BaseImageProcessor,
    training: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> PreparedData:
    """Images with their pixels, and what is measured on the held-out splits."""
    processor = without_cropping(processor, image.image_size)
    training.remove_unused_columns = False  # keeps columns that the model does not take: pixel values come from them
    seed = training.seed if training.data_seed is None else training.data_seed
    training_images = AugmentedImages(images.splits["train"], processor, image.augmentation, image.image_size, seed)
    held_out = {split: with_pixels(images.splits[split], processor, image.image_size) for split in ("validation", "test")}
    counts = ", ".join(f"{split} {data.num_rows:,}" for split, data in images.splits.items())
    say(f"Images: {counts}; labels {len(images.labels)}")
    return PreparedData(
        evaluate=lambda trainer: final_figures(trainer, held_out),
        show=lambda model, folder: draw_predictions(model, folder, images, processor, image),
        trainer_arguments={
            "train_dataset": training_images,
            "eval_dataset": held_out["validation"],
            "data_collator": default_data_collator,
            "processing_class": processor,
            "compute_metrics": AccuracyOfBatches(),
            "callbacks": [CountEpochs(training_images), *callbacks],
        },
        task=describe_task(images, image, training),
        # leaves out digits that are stored anew in each run, whose bytes are Pillow's affair
        fingerprints={} if image.dataset_name == EMBEDDED else {"images": fingerprint(images.splits)},
    )


def without_cropping(processor: BaseImageProcessor, size: int) -> BaseImageProcessor:
    """A processor that gives images `size` pixels square, and cuts off no border, as one does that enlarges them and keeps the
    middle. It is saved with the model, so that images are seen later as they were in training."""
    if not getattr(processor, "do_center_crop", False):
        return processor
    whole = {"do_center_crop": False, "size": {"height": size, "width": size}}
    return type(processor).from_dict(processor.to_dict() | whole)


class AccuracyOfBatches:
    """Accuracy of a whole evaluation, or of its batches one after the other (`--batch_eval_metrics`)."""

    def __init__(self) -> None:
        self.metric = Accuracy(keep_in_memory=True)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        self.metric.add_batch(predictions=logits.argmax(-1).tolist(), references=labels.tolist())
        return self.metric.compute() if compute_result else {}


def final_figures(trainer: Trainer, datasets: dict[str, Dataset]) -> dict[str, float]:
    """Loss and accuracy of the trained model on each held-out split; the loss is that of the true labels."""
    figures: dict[str, float] = {}
    trainer.label_smoother = None  # or the loss of an evaluation would be that of smoothed ones
    for split in ("validation", "test"):
        scores = trainer.evaluate(datasets[split], metric_key_prefix=split)
        figures |= {f"{split}_{name}": scores[f"{split}_{name}"] for name in ("loss", "accuracy")}
    return figures


@torch.no_grad()
def draw_predictions(
    model: PreTrainedModel, folder: Path | None, images: LabelledImages, processor: BaseImageProcessor, image: ImageArguments
) -> str:
    """Draws test images with what the model takes them for (`predictions.png`) and returns a line of Markdown."""
    test = images.splits["test"]
    count = min(GRID_ROWS * GRID_COLUMNS, test.num_rows)
    # spreads them over the split, since some data sets come sorted by class
    chosen = test.select(np.linspace(0, test.num_rows - 1, count, dtype=int))
    pixels = with_pixels(chosen, processor, image.image_size)[:]["pixel_values"]
    guesses = model(pixel_values=pixels.to(model.device)).logits.argmax(-1).tolist()
    right = sum(guess == label for guess, label in zip(guesses, chosen["label"], strict=True))
    summary = f"Of {count} test images spread over the split, it names {right} correctly (`predictions.png` beside the model)."
    if folder is None:
        return summary
    figure = Figure(figsize=(1.5 * GRID_COLUMNS, 1.8 * GRID_ROWS), layout="constrained")
    axes = figure.subplots(GRID_ROWS, GRID_COLUMNS)
    for axis in axes.flat:
        axis.axis("off")
    for axis, example, guess in zip(axes.flat, chosen, guesses, strict=False):
        hit = guess == example["label"]
        axis.imshow(to_rgb(example["image"]))
        title = images.labels[guess] if hit else f"{images.labels[guess]}\n(not {images.labels[example['label']]})"
        axis.set_title(title, fontsize=8, color="black" if hit else "tab:red")
    figure.savefig(folder / "predictions.png", dpi=120)
    print(f"Predictions: {right} of {count} right, see {folder / 'predictions.png'}")
    return summary


def describe_task(images: LabelledImages, image: ImageArguments, training: TrainingArguments) -> Task:
    """What cards and tables say beside the figures."""
    chosen = "The last model is evaluated, none was chosen by its accuracy."
    if training.load_best_model_at_end:
        chosen = f"Of the checkpoints, the best on validation images is evaluated (`{training.metric_for_best_model}`)."
    counts = ", ".join(f"{split} {data.num_rows:,}" for split, data in images.splits.items())

    name = "scikit-learn digits" if image.dataset_name == EMBEDDED else image.dataset_name
    return Task(
        name=TASK,
        pipeline_tag=PIPELINE_TAG,
        dataset=Path(name).name if Path(name).exists() else name,
        hub_dataset=None if image.dataset_name == EMBEDDED or Path(name).exists() else name,
        main_metric="test_accuracy",
        is_accuracy=True,
        metrics=ACCURACY_AND_LOSS,
        loading=how_to_load,
        notes=(f"Images: {counts}; {len(images.labels)} classes. Augmentation `{image.augmentation}`. {chosen}"),
    )


def how_to_load(folder: str) -> str:
    """Code for cards."""
    return (
        "from transformers import pipeline\n\n"
        f'classify = pipeline("image-classification", model="{folder}")\n'
        'print(classify("image.png"))'
    )
