"""Arguments of training that a recipe cannot honour, or that end its run after hours."""

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from tools.command_lines import at_least
from training.arms import Arm
from training.neural_arguments import NeuralArguments


AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
}
ROUNDED = "figures are of the weights that were trained, which it rounds first; --bf16 and --fp16 hold for evaluation, too."
REFUSED = {
    "auto_find_batch_size": "where memory runs out it goes on with smaller batches, so models would not be trained alike.",
    "bf16_full_eval": ROUNDED,
    "fp16_full_eval": ROUNDED,
}
BY_WHAT_IS_MEASURED = ("reduce_lr_on_plateau", "greedy")  # schedules that have no rates of their own


def check_training(training: TrainingArguments, neural: NeuralArguments, measures: tuple[str, ...]) -> None:
    """Looks at them before any data is loaded.

    Args:
        measures: what an evaluation on the way measures, "loss" say.

    Raises:
        SystemExit: naming the argument, and what it may be.
    """
    try:
        for name, least in AT_LEAST.items():
            at_least(name, getattr(training, name), least)
        for name in ("scorer_learning_rate", "scorer_weight_decay", "score_spread"):
            at_least(name, getattr(neural, name), 0)
        at_least("watch_scores", neural.watch_scores, 1)
    except ValueError as error:
        raise SystemExit(f"{error}") from None
    check_processes(training)
    if training.resume_from_checkpoint:
        raise SystemExit("--resume_from_checkpoint: a run resumes from its last checkpoint by itself, for each arm.")
    asked = "do_predict" if training.do_predict else "do_eval"
    # passes over what evaluations on the way switch on
    is_asked = training.do_predict or (training.do_eval and training.eval_strategy == IntervalStrategy.NO)
    if is_asked and not training.do_train:
        raise SystemExit(
            f"--{asked} without --do_train: recipes train models, and evaluate them on validation and test data in the end. "
            "Leave it out, or take --do_train as well."
        )
    if training.label_names not in (None, ["labels"]):
        raise SystemExit(
            f"--label_names {' '.join(training.label_names)}: the recipes' examples have theirs in `labels` alone."
        )
    if training.save_only_model:
        raise SystemExit(
            "--save_only_model: a run resumes from its last checkpoint by itself, for which it needs the optimiser's state. "
            "Leave it out; --save_total_limit 1 keeps a single checkpoint."
        )
    for name, reason in REFUSED.items():
        if getattr(training, name):
            raise SystemExit(f"--{name}: {reason} Leave it out.")
    if neural.score_spread_layers is not None and neural.score_spread is None:
        raise SystemExit("--score_spread_layers says for which layers --score_spread is: give both, or neither.")
    if neural.score_spread == 0 and Arm.NEURAL in neural.arms and neural.layers() != []:
        raise SystemExit(
            "--score_spread 0 is attention without scores, a floor: networks would not stay there. Add --attention dot."
        )
    if neural.score_spread is not None and Arm.DOT_STARTED in neural.arms:
        raise SystemExit(
            f"--score_spread goes to every model, and --attention {neural.attention} has one whose scores start with a spread "
            "of one. Leave it out, or take --attention both."
        )
    best = training.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in measures:
        raise SystemExit(f"--metric_for_best_model is {best}; expected {' or '.join(measures)}, which evaluations measure.")
    if "accuracy" in measures:
        if training.prediction_loss_only:
            raise SystemExit(
                "--prediction_loss_only: the recipe measures accuracy, for which it needs predictions. Leave it out."
            )
        if not training.eval_do_concat_batches:
            raise SystemExit(
                "--eval_do_concat_batches False: accuracy is measured of all batches together. To keep no predictions, take "
                "--batch_eval_metrics True."
            )


def check_starts(checkpoint: str | None, neural: NeuralArguments) -> None:
    """Raises SystemExit if the scores of a checkpoint are to start anew, which would undo what it has learned."""
    asked = "--score_spread" if neural.score_spread is not None else f"--attention {neural.attention}"
    if checkpoint is not None and (neural.score_spread is not None or Arm.DOT_STARTED in neural.arms):
        raise SystemExit(
            f"{asked} with --model_name_or_path: a checkpoint's scores have been trained, and do not start. Take "
            "--attention both, neural or dot, without --score_spread."
        )


def check_processes(training: TrainingArguments) -> None:
    """Raises SystemExit if accelerate takes each of several processes for the only one. All of them would save and report."""
    started = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if training.world_size != started:
        raise SystemExit(
            f"{started} processes were started, and accelerate knows {training.world_size}: it finds no GPUs for DeepSpeed. "
            "On CPUs use `accelerate launch` with a configuration for DeepSpeed (not --deepspeed), and add --ddp_backend gloo."
        )


def check_halving(training: TrainingArguments, halve_learning_rate_after: int | None) -> None:
    """Raises SystemExit if the schedule has no rates that could be halved."""
    schedule = SchedulerType(training.lr_scheduler_type).value
    if halve_learning_rate_after is not None and schedule in BY_WHAT_IS_MEASURED:
        raise SystemExit(
            f"--lr_scheduler_type {schedule} sets the learning rate by what is measured, and --halve_learning_rate_after by "
            "the epoch. Choose one of them."
        )
