"""Trains a ViT with Neural Attention and one with the dot product on the same images, and compares them.

    python recipes/image_classification.py --output_dir runs/digits --num_train_epochs 10
    python recipes/image_classification.py recipes/configs/cifar10-small.yaml
    accelerate launch recipes/image_classification.py CONFIG

Flags after a configuration file override it. Running the same command again goes on where it stopped.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    default_data_collator,
)

from arguments import NeuralArguments, parse_arguments
from checkpoints import load_checkpoint_config
from experiment import Experiment
from hf_neural_attention import NeuralViTConfig, NeuralViTForImageClassification
from hf_neural_attention.metrics import Accuracy
from image_data import (
    EMBEDDED,
    AugmentedImages,
    CountEpochs,
    ImageArguments,
    LabelledImages,
    load_images,
    with_pixels,
)
from prepared import Prepared
from publishing import carry_out
from reporting import Task


TASK = "image classification"
PIPELINE_TAG = "image-classification"
GRID_ROWS, GRID_COLUMNS = 3, 8


@dataclass
class ModelArguments:
    """The ViT to train: a checkpoint, or a new one of this size."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A ViT checkpoint (stock or neural) to start from; the sizes below are then its own."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Give a checkpoint that was trained for other labels a new classifier."}
    )
    hidden_size: int = field(default=192, metadata={"help": "Width."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers."})
    num_attention_heads: int = field(default=3, metadata={"help": "Heads."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Feed-forward width. Default: 4 hidden_size."})
    patch_size: int = field(default=4, metadata={"help": "Side of a patch, in pixels."})
    dropout: float = field(default=0.0, metadata={"help": "Of attention weights and residual branches."})
    halve_learning_rate_after: int | None = field(
        default=None, metadata={"help": "Halve the learning rate once, after so many epochs, as the paper does after 3."}
    )


class HalveLearningRate(TrainerCallback):
    """Halves the learning rate of any schedule from a given epoch on, once."""

    def __init__(self, after_epoch: int):
        self.after_epoch = after_epoch

    def on_step_begin(self, args, state, control, lr_scheduler=None, optimizer=None, **kwargs):
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
        first_rates = [group["initial_lr"] for group in optimizer.param_groups]
        # a checkpoint holds both, so a resumed run knows whether it was done
        if state.epoch >= self.after_epoch and schedule.base_lrs == first_rates:
            schedule.base_lrs = [rate / 2 for rate in first_rates]
            for group in optimizer.param_groups:
                group["lr"] /= 2


def build_model(
    arm: str, model: ModelArguments, neural: NeuralArguments, image: ImageArguments, labels: list[str]
) -> PreTrainedModel:
    """The model of an arm, newly initialised or from the checkpoint."""
    fields = neural.config_fields() if arm == "neural" else {}
    model_class = NeuralViTForImageClassification if arm == "neural" else ViTForImageClassification
    fields |= {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    if model.model_name_or_path is not None:
        return model_class.from_pretrained(
            model.model_name_or_path, ignore_mismatched_sizes=model.ignore_mismatched_sizes, **fields
        )
    config_class = NeuralViTConfig if arm == "neural" else ViTConfig
    config = config_class(
        image_size=image.image_size,
        patch_size=model.patch_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        intermediate_size=model.intermediate_size or 4 * model.hidden_size,
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.dropout,
        **fields,
    )
    return model_class(config)


def check_fit(model: ModelArguments, image: ImageArguments, neural: NeuralArguments, labels: list[str]) -> None:
    """Raises SystemExit if images, labels and model do not fit together."""
    if model.model_name_or_path is None:
        if image.image_size % model.patch_size:
            raise SystemExit(f"--image_size {image.image_size} is no multiple of --patch_size {model.patch_size}.")
        return
    config = load_checkpoint_config(model.model_name_or_path, "vit", neural)
    if config.image_size != image.image_size:
        raise SystemExit(
            f"{model.model_name_or_path} was made for images of {config.image_size} pixels and --image_size is "
            f"{image.image_size}. Use its size: images are resized to it."
        )
    stored = list((config.id2label or {}).values())
    unnamed = len(stored) == len(labels) and all(name.startswith("LABEL_") for name in stored)
    if stored != labels and not unnamed and not model.ignore_mismatched_sizes:
        raise SystemExit(
            f"{model.model_name_or_path} has {len(stored)} labels ({', '.join(stored[:3])}, ...) and the data has "
            f"{len(labels)} ({', '.join(labels[:3])}, ...): they do not fit. To fine-tune it with a new classifier, add "
            "--ignore_mismatched_sizes."
        )


def make_processor(model: ModelArguments, image: ImageArguments) -> BaseImageProcessor:
    """The checkpoint's image processor, or ViT's for `image_size`."""
    if model.model_name_or_path is not None:
        return AutoImageProcessor.from_pretrained(model.model_name_or_path)
    side = {"height": image.image_size, "width": image.image_size}
    return ViTImageProcessorPil(size=side)


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    predictions = np.argmax(prediction.predictions, axis=-1)
    return Accuracy(keep_in_memory=True).compute(predictions=predictions, references=prediction.label_ids)


def final_figures(trainer: Trainer, datasets: dict[str, Dataset]) -> dict[str, float]:
    """Loss and accuracy of the trained model on each held-out split."""
    figures: dict[str, float] = {}
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
    # spread over the split, since some data sets come sorted by class
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
        axis.imshow(example["image"].convert("RGB"))
        title = images.labels[guess] if hit else f"{images.labels[guess]}\n(not {images.labels[example['label']]})"
        axis.set_title(title, fontsize=8, color="black" if hit else "tab:red")
    figure.savefig(folder / "predictions.png", dpi=120)
    print(f"Predictions: {right} of {count} right, see {folder / 'predictions.png'}")
    return summary


def how_to_load(folder: str) -> str:
    """Code for cards."""
    return (
        "from transformers import pipeline\n\n"
        f'classify = pipeline("image-classification", model="{folder}")\n'
        'print(classify("image.png"))'
    )


def describe_task(images: LabelledImages, image: ImageArguments) -> Task:
    """What cards and tables say beside the figures."""
    counts = ", ".join(f"{split} {data.num_rows:,}" for split, data in images.splits.items())

    name = "scikit-learn digits" if image.dataset_name == EMBEDDED else image.dataset_name
    return Task(
        name=TASK,
        pipeline_tag=PIPELINE_TAG,
        dataset=Path(name).name if Path(name).exists() else name,
        hub_dataset=None if image.dataset_name == EMBEDDED or Path(name).exists() else name,
        main_metric="test_accuracy",
        is_accuracy=True,
        metrics={
            f"{split}_{metric}": f"{split} {metric}" for split in ("validation", "test") for metric in ("accuracy", "loss")
        },
        loading=how_to_load,
        notes=(
            f"Images: {counts}; {len(images.labels)} classes. Augmentation `{image.augmentation}`. The last model is "
            "evaluated, none was chosen by its accuracy. ViT is pre-norm; the paper's own models are post-norm."
        ),
    )


def prepare(
    image: ImageArguments,
    images: LabelledImages,
    processor: BaseImageProcessor,
    training: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> Prepared:
    """Images with their pixels, and what is measured on the held-out splits."""
    training.remove_unused_columns = False  # pixel values are computed from columns that the model does not take
    seed = training.seed if training.data_seed is None else training.data_seed
    training_images = AugmentedImages(images.splits["train"], processor, image.augmentation, image.image_size, seed)
    held_out = {split: with_pixels(images.splits[split], processor, image.image_size) for split in ("validation", "test")}
    counts = ", ".join(f"{split} {data.num_rows:,}" for split, data in images.splits.items())
    print(f"Images: {counts}; labels {len(images.labels)}")
    return Prepared(
        evaluate=lambda trainer: final_figures(trainer, held_out),
        show=lambda model, folder: draw_predictions(model, folder, images, processor, image),
        trainer_arguments={
            "train_dataset": training_images,
            "eval_dataset": held_out["validation"],
            "data_collator": default_data_collator,
            "processing_class": processor,
            "compute_metrics": compute_accuracy,
            "callbacks": [CountEpochs(training_images), *callbacks],
        },
        task=describe_task(images, image),
    )


ARGUMENTS = (ModelArguments, ImageArguments, NeuralArguments, TrainingArguments)


def load_experiment(words: list[str] | None = None) -> tuple[Experiment, Task, NeuralArguments]:
    """Data, models and training as flags ask for them (default: those of `sys.argv`)."""
    model, image, neural, training = parse_arguments(*ARGUMENTS, words=words, description=__doc__)
    halving = model.halve_learning_rate_after
    callbacks: list[TrainerCallback] = [HalveLearningRate(halving)] if halving else []
    images = load_images(image, training.seed)
    check_fit(model, image, neural, images.labels)
    data = prepare(image, images, make_processor(model, image), training, callbacks)

    def build(arm: str) -> PreTrainedModel:
        return build_model(arm, model, neural, image, images.labels)

    return data.experiment(build, training, neural, model, image), data.task, neural


def main() -> None:
    carry_out(*load_experiment())


if __name__ == "__main__":
    main()
