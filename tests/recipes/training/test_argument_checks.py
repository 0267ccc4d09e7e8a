"""Arguments that a recipe cannot honour are refused before any data is loaded."""

from typing import Any

import pytest
import torch
from transformers import EvalPrediction, TrainingArguments

from image_classification import ModelArguments as ImageModelArguments
from language_modeling import ModelArguments as TextModelArguments
from patch_and_finetune import CheckpointArguments
from training import image_task, text_task
from training.argument_checks import check_halving, check_starts, check_training
from training.image_task import AccuracyOfBatches
from training.images import ImageArguments
from training.neural_arguments import NeuralArguments


def arguments(tmp_path: Any, **given: Any) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    (
        ({"prediction_loss_only": True}, "--prediction_loss_only: the recipe measures accuracy"),
        ({"eval_do_concat_batches": False}, "--eval_do_concat_batches False: accuracy is measured of all batches"),
        ({"metric_for_best_model": "f1"}, "--metric_for_best_model is f1; expected loss or accuracy"),
        ({"label_names": ["classes"]}, "--label_names classes: the recipes' examples"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size is 0; expected at least 1"),
        ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size is 0"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps is 0"),
        ({"save_only_model": True}, "--save_only_model: a run resumes from its last checkpoint by itself"),
        ({"learning_rate": float("nan")}, "--learning_rate is nan; expected at least 0"),
        ({"auto_find_batch_size": True}, "--auto_find_batch_size: where memory runs out it goes on with smaller batches"),
        ({"bf16_full_eval": True}, "--bf16_full_eval: figures are of the weights that were trained"),
        ({"fp16_full_eval": True}, "--fp16_full_eval: figures are"),
        ({"resume_from_checkpoint": "there"}, "--resume_from_checkpoint: a run resumes from its last checkpoint by itself"),
        ({"do_eval": True}, "--do_eval without --do_train: recipes train models"),
        ({"do_predict": True, "eval_strategy": "epoch"}, "--do_predict without --do_train: recipes train models"),
    ),
)
def test_arguments_of_training(tmp_path, given, message):
    with pytest.raises(SystemExit, match=message):
        check_training(arguments(tmp_path, **given), NeuralArguments(), image_task.MEASURES)


def test_those_that_are_honoured(tmp_path):
    given = arguments(tmp_path, batch_eval_metrics=True, metric_for_best_model="eval_accuracy")
    check_training(given, NeuralArguments(scorer_learning_rate=0.0), image_task.MEASURES)
    check_training(arguments(tmp_path, prediction_loss_only=True), NeuralArguments(), text_task.MEASURES)
    check_training(arguments(tmp_path, eval_strategy="epoch"), NeuralArguments(), text_task.MEASURES)  # sets do_eval itself
    check_training(arguments(tmp_path, do_train=True, do_eval=True), NeuralArguments(), text_task.MEASURES)
    with pytest.raises(SystemExit, match="--metric_for_best_model is eval_accuracy; expected loss"):
        check_training(given, NeuralArguments(), text_task.MEASURES)
    with pytest.raises(SystemExit, match=r"--scorer_learning_rate is -0\.1; expected at least 0"):
        check_training(arguments(tmp_path), NeuralArguments(scorer_learning_rate=-0.1), text_task.MEASURES)


def test_layers_of_no_spread(tmp_path):
    check_training(arguments(tmp_path), NeuralArguments(score_spread=1.0, score_spread_layers=[0]), text_task.MEASURES)
    with pytest.raises(SystemExit, match="--score_spread_layers says for which layers --score_spread is: give both"):
        check_training(arguments(tmp_path), NeuralArguments(score_spread_layers=[0]), text_task.MEASURES)


@pytest.mark.parametrize("given", ({"attention": "all"}, {"attention": "dot_started"}, {"score_spread": 1.0}), ids=str)
def test_scores_of_checkpoints_do_not_start(given: dict[str, Any]):
    check_starts(None, NeuralArguments(**given))
    check_starts("some/checkpoint", NeuralArguments())
    with pytest.raises(SystemExit, match="with --model_name_or_path: a checkpoint's scores have been trained"):
        check_starts("some/checkpoint", NeuralArguments(**given))


def test_a_schedule_that_follows_what_is_measured_cannot_be_halved(tmp_path):
    plateau = arguments(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    check_halving(plateau, None)
    check_halving(arguments(tmp_path), 3)
    with pytest.raises(
        SystemExit, match="--lr_scheduler_type reduce_lr_on_plateau sets the learning rate by what is measured"
    ):
        check_halving(plateau, 3)


@pytest.mark.parametrize(
    ("kind", "name"),
    (
        (ImageArguments, "image_size"),
        (ImageArguments, "max_train_samples"),
        (ImageArguments, "max_eval_samples"),
        (ImageModelArguments, "num_attention_heads"),
        (ImageModelArguments, "halve_learning_rate_after"),
        (TextModelArguments, "n_head"),
        (CheckpointArguments, "calibration_batches"),
    ),
)
def test_sizes_of_nothing(kind, name):
    needed = {"model_name_or_path": "a"} if kind is CheckpointArguments else {}
    with pytest.raises(ValueError, match=f"--{name} is 0; expected at least 1"):
        kind(**needed, **{name: 0})


def test_accuracy_is_the_same_batch_by_batch():
    logits, labels = torch.randn(10, 3), torch.randint(3, (10,))
    expected = {"accuracy": (logits.argmax(-1) == labels).double().mean().item()}
    whole = AccuracyOfBatches()
    assert whole(EvalPrediction(logits.numpy(), labels.numpy())) == pytest.approx(expected)
    in_parts = AccuracyOfBatches()
    for _ in range(2):  # two evaluations, of which the second must not see the first
        assert in_parts(EvalPrediction(logits[:7], labels[:7]), compute_result=False) == {}
        assert in_parts(EvalPrediction(logits[7:], labels[7:]), compute_result=True) == pytest.approx(expected)
