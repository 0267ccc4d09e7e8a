"""Trains a ViT (or another image classifier) with Neural Attention and one with the dot product, and compares them.

    python recipes/image_classification.py --output_dir runs/digits --num_train_epochs 10
    python recipes/image_classification.py recipes/configs/cifar10-small.yaml
    python recipes/image_classification.py --model_type deit --output_dir DIR
    accelerate launch recipes/image_classification.py CONFIG

Flags after a configuration file override it. Running the same command again goes on where it stopped.
"""

from dataclasses import dataclass, field
from functools import partial

from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessorPil,
)

from tools.command_lines import at_least, parse_arguments
from training.argument_checks import check_halving, check_starts, check_training
from training.arms import Arm
from training.augmentation import BICUBIC
from training.checkpoints import is_neural, load_checkpoint_config
from training.data_checks import check_sizes, fit_labels, load_classifier, load_processor, names_of
from training.experiment import Experiment
from training.image_task import MEASURES, prepare
from training.images import ImageArguments, LabelledImages, load_images
from training.model_families import VIT
from training.neural_arguments import NeuralArguments
from training.new_models import DROPOUT, FamilyArguments, Size, build_new, check_new, check_one_source, family_note, new_config
from training.reporting import Task
from training.runner import carry_out
from training.unsharded_models import whole


@dataclass
class ModelArguments(FamilyArguments):
    """The model to train: a ViT checkpoint, or a new model of this size, ViT unless another family is named."""

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
    dropout: float = field(
        default=0.0, metadata={"help": "Of attention weights and residual branches, where the family has it."}
    )
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


def sizes_of(model: ModelArguments) -> list[Size]:
    inner = model.intermediate_size
    return [
        Size("hidden_size", model.hidden_size, "hidden_size"),
        Size("num_hidden_layers", model.num_hidden_layers, "num_hidden_layers"),
        Size("num_attention_heads", model.num_attention_heads, "num_attention_heads"),
        Size("intermediate_size", inner or 4 * model.hidden_size, "intermediate_size", is_needed=inner is not None),
        Size("patch_size", model.patch_size, "patch_size"),
        Size("dropout", model.dropout, *DROPOUT, is_needed=False),
    ]


def config_of(model: ModelArguments, image: ImageArguments, labels: list[str]) -> PreTrainedConfig:
    """The config of a new model."""
    return new_config(
        model,
        VIT,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        sizes_of(model),
        {"image_size": image.image_size, **names_of(labels)},
        fixed=("image_size", "num_channels", "num_labels", "id2label", "label2id"),
    )


@whole
def build_model(
    arm: Arm, model: ModelArguments, neural: NeuralArguments, image: ImageArguments, labels: list[str], seed: int = 0
) -> PreTrainedModel:
    """The model of an arm, newly initialised or from the checkpoint."""
    if model.model_name_or_path is not None:
        fields = neural.config_fields() if arm.is_neural else {}
        load = partial(VIT[arm].model.from_pretrained, **fields)
        return load_classifier(load, model.model_name_or_path, labels, model.ignore_mismatched_sizes)
    return build_new(arm, config_of(model, image, labels), VIT, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, neural, seed)


def fit(model: ModelArguments, image: ImageArguments, neural: NeuralArguments, images: LabelledImages) -> LabelledImages:
    """The images, their classes in the checkpoint's order.

    Raises:
        SystemExit: if images, labels and model do not fit together.
    """
    checkpoint = model.model_name_or_path
    if checkpoint is None:
        patch_size = getattr(config_of(model, image, images.labels), "patch_size", None)
        if isinstance(patch_size, int) and image.image_size % patch_size:
            raise SystemExit(f"--image_size {image.image_size} is no multiple of --patch_size {patch_size}.")
        return images
    config = load_checkpoint_config(checkpoint, VIT, neural)
    check_sizes(image, checkpoint, config, VIT[Arm.DOT].model, make_processor(model, image))
    return fit_labels(images, checkpoint, config, model.ignore_mismatched_sizes)


def make_processor(model: ModelArguments, image: ImageArguments) -> BaseImageProcessor:
    """The checkpoint's image processor, or ViT's for `image_size`."""
    if model.model_name_or_path is not None:
        return load_processor(model.model_name_or_path)
    side = {"height": image.image_size, "width": image.image_size}
    return ViTImageProcessorPil(size=side, resample=BICUBIC)


ARGUMENTS = (ModelArguments, ImageArguments, NeuralArguments, TrainingArguments)


def load_experiment(words: list[str] | None = None) -> tuple[Experiment, Task, NeuralArguments]:
    """Data, models and training as flags ask for them (default: those of `sys.argv`)."""
    model, image, neural, training = parse_arguments(*ARGUMENTS, words=words, description=__doc__)
    check_training(training, neural, MEASURES)
    check_halving(training, model.halve_learning_rate_after)
    check_one_source(model.model_name_or_path, model)
    check_starts(model.model_name_or_path, neural)
    halving = model.halve_learning_rate_after
    callbacks: list[TrainerCallback] = [HalveLearningRate(halving)] if halving else []
    images = fit(model, image, neural, load_images(image, training.seed))

    def build(arm: Arm) -> PreTrainedModel:
        return build_model(arm, model, neural, image, images.labels, training.seed)

    if model.model_name_or_path is None:
        some = check_new(build, config_of(model, image, images.labels), neural)
    else:
        some = build(neural.arms[0])
    data = prepare(image, images, make_processor(model, image), training, callbacks)
    data.task.notes += f" {family_note(some)}"
    data.task.checkpoint = model.model_name_or_path
    is_shared = not is_neural(model.model_name_or_path, VIT)
    return data.experiment(build, training, neural, model, image, is_shared=is_shared), data.task, neural


def main() -> None:
    carry_out(*load_experiment())


if __name__ == "__main__":
    main()
