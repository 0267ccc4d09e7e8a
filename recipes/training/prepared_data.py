"""What a recipe makes of its data, whatever the model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainingArguments

from training.arms import Arm
from training.experiment import Experiment
from training.neural_arguments import NeuralArguments
from training.reporting import Task
from training.run_folder import settings_of


@dataclass
class PreparedData:
    """Data, the figures that are taken on it, and how they are called. The fields are those of `Experiment`."""

    evaluate: Callable[[Trainer], dict[str, float]]
    show: Callable[[PreTrainedModel, Path | None], str]
    trainer_arguments: dict[str, Any]
    task: Task
    fingerprints: dict[str, str] = field(default_factory=dict)  # of the data, by a name of `run_folder.FINGERPRINTS`

    def experiment(
        self,
        build_model: Callable[[Arm], PreTrainedModel],
        training: TrainingArguments,
        neural: NeuralArguments,
        *others: Any,
        is_shared: bool = True,
    ) -> Experiment:
        """Models trained on it.

        Args:
            others: dataclasses of further arguments, recorded with the run.
            is_shared: see `Experiment`.

        Raises:
            SystemExit: if the only batch is one that is dropped, or labels are to be smoothed by a loss that does not.
        """
        if training.label_smoothing_factor and "compute_loss_func" in self.trainer_arguments:
            raise SystemExit(
                "--label_smoothing_factor: models of this family get the next token's loss from the recipe, which smooths no "
                "labels. Leave it out, or train GPT-2, whose own loss `Trainer` smooths."
            )
        examples, step = len(self.trainer_arguments["train_dataset"]), training.train_batch_size * training.world_size
        if training.dataloader_drop_last and examples < step:
            raise SystemExit(
                f"--dataloader_drop_last leaves nothing to train on: {examples} examples are less than a batch of {step}."
            )
        return Experiment(
            training=training,
            build_model=build_model,
            evaluate=self.evaluate,
            show=self.show,
            trainer_arguments=self.trainer_arguments,
            settings=settings_of(*others, neural, training) | self.fingerprints,
            scorer_settings=neural.scorer_settings(),
            score_spread=neural.score_spread,
            score_spread_layers=neural.score_spread_layers,
            watch_scores=neural.watch_scores,
            is_shared=is_shared,
        )
