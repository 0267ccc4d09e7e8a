"""Gives a checkpoint Neural Attention, fine-tunes it beside the stock one, and saves it.

    python recipes/patch_and_finetune.py --model_name_or_path openai-community/gpt2 --neural_layers all --output_dir DIR
    python recipes/patch_and_finetune.py recipes/configs/patch-gpt2-wikitext2.yaml
    python recipes/patch_and_finetune.py recipes/configs/patch-vit-cifar10.yaml

Any causal language model or image classifier whose attention goes through Transformers' attention interface. With
--neural_mode replace, the scorers are calibrated first. With --neural_compact True as well, the calibrated model is made
compact and fine-tuned in that form. Figures are taken of the checkpoint, after patching, after calibration and after
fine-tuning. Running the same command again goes on where it stopped. --help lists the data arguments for text, or for images
where --model_name_or_path is an image classifier.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import DataLoader
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from hf_neural_attention import calibrate, compact, load_patch, patch, patch_status, save_patch
from tools.command_lines import at_least, parse_arguments, value_of_flag
from tools.json_files import write_json
from tools.markdown import markdown_table
from tools.messages import say
from training import image_task, text_task
from training.argument_checks import check_starts, check_training
from training.arms import Arm
from training.data_checks import check_positions, check_sizes, check_tokens, fit_labels, load_classifier, load_processor
from training.experiment import Experiment
from training.images import ImageArguments, load_images
from training.neural_arguments import NeuralArguments
from training.new_models import family_note, patch_settings
from training.prepared_data import PreparedData
from training.reporting import Results, Task
from training.run_folder import STAGES, check_all_see, claim_folder
from training.runner import carry_out
from training.scorer_trainer import ScorerTrainer
from training.text import TextArguments, load_text, load_tokenizer
from training.unsharded_models import whole


CALIBRATED = "calibrated"

Build = Callable[[], PreTrainedModel]  # the stock model


@dataclass
class CheckpointArguments:
    """The model to patch, and how its scorers are fitted before any training."""

    model_name_or_path: str = field(metadata={"help": "A checkpoint on the Hub or in a folder."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Give an image classifier that was trained for other labels a new head."}
    )
    prompt: str | None = field(default=None, metadata={"help": "Start of the sample. Default: the first words of the test."})
    calibration_steps: int = field(
        default=300, metadata={"help": "Steps for each layer in mode replace, of `hf_neural_attention.calibrate`. 0: none."}
    )
    calibration_batches: int = field(default=8, metadata={"help": "Batches of training data that calibration sees."})

    def __post_init__(self) -> None:
        """Raises a ValueError for batches of nothing."""
        at_least("calibration_batches", self.calibration_batches, 1)


def text_data(checkpoint: CheckpointArguments, text: TextArguments, training: TrainingArguments) -> tuple[Build, PreparedData]:
    """A causal language model's."""
    splits = load_text(text)
    tokenizer = load_tokenizer(text, checkpoint.model_name_or_path, splits)
    config = AutoConfig.from_pretrained(checkpoint.model_name_or_path).get_text_config()
    check_tokens(text, tokenizer, checkpoint.model_name_or_path, config.vocab_size)
    check_positions(text, getattr(config, "max_position_embeddings", None) or text.block_size)
    data = text_task.prepare(text, splits, tokenizer, checkpoint.prompt, training.seed)

    @whole
    def build() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(checkpoint.model_name_or_path)

    text_task.fit_to(data, build(), checkpoint.model_name_or_path, text.block_size)
    return build, data


def image_data(
    checkpoint: CheckpointArguments, image: ImageArguments, training: TrainingArguments
) -> tuple[Build, PreparedData]:
    """An image classifier's."""
    name, ignored = checkpoint.model_name_or_path, checkpoint.ignore_mismatched_sizes
    images = load_images(image, training.seed)
    config, processor = AutoConfig.from_pretrained(name), load_processor(name)
    classes: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]  # several for few models, which take the same sizes
    check_sizes(image, name, config, classes[0] if isinstance(classes, tuple) else classes, processor)
    images = fit_labels(images, name, config, ignored)
    data = image_task.prepare(image, images, processor, training, [])

    @whole
    def build() -> PreTrainedModel:
        return load_classifier(AutoModelForImageClassification.from_pretrained, name, images.labels, ignored)

    data.task.notes += f" {family_note(build())}"
    return build, data


def build_model(arm: Arm, build: Build, neural: NeuralArguments, folder: Path, seed: int) -> PreTrainedModel:
    """The model of an arm before fine-tuning."""
    set_seed(seed)  # draws the same new classifier, where there is one, before and after patching
    model = build()
    if not arm.is_neural:
        if layers := len(patch_status(model)):
            raise SystemExit(
                f"The checkpoint has Neural Attention in {layers} layer(s): it is no dot product to compare with. "
                "Take the stock checkpoint that it was made of, or go on training it with its own recipe."
            )
        return model
    if (folder / CALIBRATED / "neural_patch.json").exists():
        return load_patch(model, folder / CALIBRATED)
    set_seed(seed)
    return patch(model, **patch_settings(neural))


def measure_stages(experiment: Experiment, checkpoint: CheckpointArguments, stages: dict[str, Any]) -> None:
    """Figures of the checkpoint, of the patched model, and of the calibrated one, whose scorers are kept in a folder."""

    def measure(stage: str, model: Any) -> None:
        arguments = experiment.arguments_of(Arm.DOT if stage == "checkpoint" else Arm.NEURAL)
        # moves it, since with models that are sharded `Trainer` leaves that to their training
        trainer = ScorerTrainer(model=model.to(arguments.device), args=arguments, **experiment.trainer_arguments)
        if "compute_metrics" in experiment.trainer_arguments and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise SystemExit(
                "FSDP and DeepSpeed shard models, and images are classified before the training by a whole one: take several "
                "GPUs without them (recipes/accelerate_configs/several_gpus_ddp.yaml), or one."
            )
        stages[stage] = experiment.evaluate(trainer)
        say(f"{stage}: {stages[stage]}")
        if arguments.should_save:
            write_json(experiment.folder / STAGES, stages)

    if "checkpoint" not in stages:
        measure("checkpoint", experiment.build_model(Arm.DOT))
    model: Any = experiment.build_model(Arm.NEURAL)
    if "patched" not in stages:
        measure("patched", model)
    is_residual = any(layer.mode == "residual" for layer in patch_status(model))
    if is_residual or checkpoint.calibration_steps < 1 or "calibrated" in stages:
        return
    if "calibration" in stages:  # only measures, since the model has been loaded with the calibrated scorers
        return measure("calibrated", model)
    arguments = experiment.trainer_arguments
    loader = DataLoader(
        arguments["train_dataset"],
        batch_size=experiment.training.per_device_train_batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(experiment.training.seed),
        collate_fn=arguments["data_collator"],
    )
    layers = calibrate(
        model.to(experiment.training.device),
        loader,
        steps=checkpoint.calibration_steps,
        max_batches=checkpoint.calibration_batches,
        progress=not experiment.training.disable_tqdm,
    )
    say(f"\n{layers}\n")
    stages["calibration"] = [layer._asdict() for layer in layers]
    if experiment.training.should_save:
        save_patch(model, experiment.folder / CALIBRATED)
        write_json(experiment.folder / STAGES, stages)
    PartialState().wait_for_everyone()  # waits, since the others load what the first process has saved
    check_all_see(experiment.folder, f"calibrated: {(experiment.folder / CALIBRATED).is_dir()}")
    measure("calibrated", model)


def stages_table(stages: dict[str, Any], results: Results, task: Task) -> str:
    """Markdown: the main metric on validation and test data, stage by stage, for both models; and calibration by layer."""
    names = [task.main_metric.replace("test", "validation", 1), task.main_metric]
    stock, patched = (results.get(arm, {}).get("metrics") for arm in (Arm.DOT, Arm.NEURAL))
    rows = {
        "checkpoint": (stages["checkpoint"], stages["checkpoint"]),
        "patched": (None, stages.get("patched")),
        "calibrated": (None, stages.get("calibrated")),
        "fine-tuned": (stock, patched),
    }
    cells = [
        [stage, *(f"{figure[name]:.4g}" if figure else "" for name in names for figure in figures)]
        for stage, figures in rows.items()
        if any(figures)
    ]
    header = ["", *(f"{arm}, {name}" for name in ("validation", "test") for arm in ("stock", "patched"))]
    metric = task.metrics[task.main_metric].removeprefix("test ").capitalize()
    text = f"{metric}, stage by stage:\n\n{markdown_table(header, cells)}"
    if "calibration" in stages:
        names = ["kl_before", "kl_after", "kl_uniform"]
        layers = [[f"`{layer['layer']}`", *(f"{layer[name]:.3f}" for name in names)] for layer in stages["calibration"]]
        text += (
            "\n\nCalibration: KL divergence of the network's attention from the dot product's, in nats per attention row, on "
            "batches that were not fitted; last that of attention which is the same for all keys.\n\n"
            f"{markdown_table(['layer', 'before', 'after', 'uniform'], layers)}"
        )
    return text


def main() -> None:
    name = value_of_flag("model_name_or_path")
    try:
        config: Any = None if name is None else AutoConfig.from_pretrained(name)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise SystemExit(f"--model_name_or_path {name} is no stock checkpoint: {error}") from None
    is_image = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    checkpoint, arguments, neural, training = parse_arguments(
        CheckpointArguments,
        ImageArguments if is_image else TextArguments,
        NeuralArguments,
        TrainingArguments,
        description=__doc__,
    )
    check_training(training, neural, (image_task if is_image else text_task).MEASURES)
    check_starts(checkpoint.model_name_or_path, neural)
    build, data = (image_data if is_image else text_data)(checkpoint, arguments, training)
    folder = Path(training.output_dir)

    def build_arm(arm: Arm) -> PreTrainedModel:
        return build_model(arm, build, neural, folder, training.seed)

    def build_for_training(arm: Arm) -> PreTrainedModel:
        model = build_arm(arm)
        return compact(model) if arm.is_neural and neural.neural_compact else model

    experiment = data.experiment(build_arm, training, neural, checkpoint, arguments)
    if training.should_save:
        claim_folder(folder, experiment.settings)
    stages: dict[str, Any] = json.loads((folder / STAGES).read_text(encoding="utf-8")) if (folder / STAGES).exists() else {}
    if Arm.NEURAL in neural.arms:
        try:
            if neural.neural_compact:  # says what speaks against it before anything is fitted
                compact(patch(build(), **patch_settings(neural)), dry_run=True)
            measure_stages(experiment, checkpoint, stages)
        except ValueError as error:  # catches what `patch` refuses, for instance
            raise SystemExit(f"{name} cannot be patched: {error}") from None

    def describe(results: Results) -> None:
        made = ", and made compact" if neural.neural_compact else ""
        notes = f"Patched: `{patch_settings(neural)}`{made}. {data.task.notes}"
        if stages:
            table = stages_table(stages, results, data.task)
            notes = f"{table}\n\n{notes}"
            print(f"\n{table}")
        data.task.notes, data.task.checkpoint = notes, name
        if config.model_type not in ("gpt2", "vit"):
            data.task.neural_loading = lambda where: f'model = hf_neural_attention.from_pretrained("{where}")'

    carry_out(dataclasses.replace(experiment, build_model=build_for_training), data.task, neural, describe)


if __name__ == "__main__":
    main()
