"""Trains a ViT with Neural Attention and one with the dot product on the same images, and compares them.

    python recipes/image_classification.py --output_dir runs/digits --num_train_epochs 10
    python recipes/image_classification.py recipes/configs/cifar10-small.yaml
    accelerate launch recipes/image_classification.py CONFIG

Flags after a configuration file override it. Running the same command again goes on where it stopped.
"""

from dataclasses import dataclass, field
from functools import partial

from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessorPil,
)

from tools.command_lines import at_least, parse_arguments
from training.argument_checks import check_halving, check_training
from training.arms import Arm
from training.checkpoints import load_checkpoint_config
from training.experiment import Experiment
from training.fit import check_sizes, fit_labels, load_classifier, load_processor, names_of
from training.image_task import MEASURES, prepare
from training.images import ImageArguments, LabelledImages, load_images
from training.model_families import VIT
from training.neural_arguments import NeuralArguments
from training.reporting import Task
from training.runner import carry_out


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

    def __post_init__(self) -> None:
        """Raises a ValueError for sizes of nothing."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
        for name in (*names, "halve_learning_rate_after"):
            at_least(name, getattr(self, name), 1)


class HalveLearningRate(TrainerCallback):
    """Halves the learning rate of any schedule from a given epoch on, once."""

    def __init__(self, after_epoch: int):
        self.after_epoch = after_epoch

    def on_step_begin(self, args, state, control, lr_scheduler=None, optimizer=None, **kwargs):
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # looks inside accelerate's wrapper
        first_rates = [group["initial_lr"] for group in optimizer.param_groups]
        # compares rates that a checkpoint holds, so that a resumed run knows whether it was done
        if state.epoch >= self.after_epoch and schedule.base_lrs == first_rates:
            schedule.base_lrs = [rate / 2 for rate in first_rates]
            for group in optimizer.param_groups:
                group["lr"] /= 2


def build_model(
    arm: Arm, model: ModelArguments, neural: NeuralArguments, image: ImageArguments, labels: list[str]
) -> PreTrainedModel:
    """The model of an arm, newly initialised or from the checkpoint."""
    classes, fields = VIT[arm], neural.config_fields() if arm.is_neural else {}
    if model.model_name_or_path is not None:
        load = partial(classes.model.from_pretrained, **fields)
        return load_classifier(load, model.model_name_or_path, labels, model.ignore_mismatched_sizes)
    config = classes.config(
        image_size=image.image_size,
        patch_size=model.patch_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        intermediate_size=model.intermediate_size or 4 * model.hidden_size,
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.dropout,
        **names_of(labels),
        **fields,
    )
    return classes.model(config)


def fit(model: ModelArguments, image: ImageArguments, neural: NeuralArguments, images: LabelledImages) -> LabelledImages:
    """The images, their classes in the checkpoint's order.

    Raises:
        SystemExit: if images, labels and model do not fit together.
    """
    checkpoint = model.model_name_or_path
    if checkpoint is None:
        if image.image_size % model.patch_size:
            raise SystemExit(f"--image_size {image.image_size} is no multiple of --patch_size {model.patch_size}.")
        return images
    config = load_checkpoint_config(checkpoint, VIT, neural)
    check_sizes(image, checkpoint, config, VIT[Arm.DOT].model, make_processor(model, image))
    return fit_labels(images, checkpoint, config, model.ignore_mismatched_sizes)


def make_processor(model: ModelArguments, image: ImageArguments) -> BaseImageProcessor:
    """The checkpoint's image processor, or ViT's for `image_size`."""
    if model.model_name_or_path is not None:
        return load_processor(model.model_name_or_path)
    side = {"height": image.image_size, "width": image.image_size}
    return ViTImageProcessorPil(size=side)


ARGUMENTS = (ModelArguments, ImageArguments, NeuralArguments, TrainingArguments)


def load_experiment(words: list[str] | None = None) -> tuple[Experiment, Task, NeuralArguments]:
    """Data, models and training as flags ask for them (default: those of `sys.argv`)."""
    model, image, neural, training = parse_arguments(*ARGUMENTS, words=words, description=__doc__)
    check_training(training, neural, MEASURES)
    check_halving(training, model.halve_learning_rate_after)
    halving = model.halve_learning_rate_after
    callbacks: list[TrainerCallback] = [HalveLearningRate(halving)] if halving else []
    images = fit(model, image, neural, load_images(image, training.seed))
    data = prepare(image, images, make_processor(model, image), training, callbacks)

    def build(arm: Arm) -> PreTrainedModel:
        return build_model(arm, model, neural, image, images.labels)

    return data.experiment(build, training, neural, model, image), data.task, neural


def main() -> None:
    carry_out(*load_experiment())


if __name__ == "__main__":
    main()
