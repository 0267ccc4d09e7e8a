"""One model or two that differ in their attention alone: how each is built, and with which arguments it is trained."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_neural_attention import patch_status, start_scores
from hf_neural_attention.analysis import score_statistics, scorer_health
from hf_neural_attention.introspection import compact_layers
from hf_neural_attention.models.neural_attention_compact import CompactAttentionMixin
from hf_neural_attention.starting import ScoreStart
from tools.messages import say
from training.arms import Arm
from training.score_tracking import WatchScores
from training.scorer_trainer import ScorerTrainer


HEALTH_EXAMPLES = 4
# Bounds the time that scores take to start, where a step is of many machines
START_EXAMPLES = 64


@dataclass
class Experiment:
    """What the arms share.

    Args:
        build_model: makes the model of an arm, with its initial weights.
        evaluate: figures of the trained model, by name.
        show: returns some Markdown about what the model does; writes into the folder that it gets, or nothing for None.
        trainer_arguments: further arguments of `Trainer` (data sets, collator, processing class, metrics).
        settings: every argument of the command line, for `run.json`.
        scorer_settings: what `ScorerTrainer` takes beside `Trainer`'s arguments.
        score_spread: that the attention scores of every arm start with; None leaves them to the arm (`Arm.score_spread`).
        score_spread_layers: the layers of which that is true; None for all.
        score_starts: what that has changed in each arm's model.
        watch_scores: record the scores of every layer while training, each so many logs.
        is_shared: neural models take the weights that they share with the stock one from that; those of a neural checkpoint
            have their own.
    """

    training: TrainingArguments
    build_model: Callable[[Arm], PreTrainedModel]
    evaluate: Callable[[Trainer], dict[str, float]]
    show: Callable[[PreTrainedModel, Path | None], str]
    trainer_arguments: dict[str, Any]
    settings: dict[str, Any]
    scorer_settings: dict[str, Any] = field(default_factory=dict)
    score_spread: float | None = None
    score_spread_layers: list[int] | None = None
    score_starts: dict[Arm, ScoreStart] = field(default_factory=dict)
    watch_scores: int | None = None
    is_shared: bool = True

    @property
    def folder(self) -> Path:
        return Path(str(self.training.output_dir))

    def arguments_of(self, arm: Arm, **changes: Any) -> TrainingArguments:
        """The arm's own `TrainingArguments`: a folder of its own, all else equal but for the `changes`."""
        return dataclasses.replace(
            self.training,
            output_dir=str(self.folder / arm),
            push_to_hub=False,  # leaves it to `publish` at the end: with the card, and without checkpoints
            restore_callback_states_from_checkpoint=True,
            dataloader_pin_memory=self.training.dataloader_pin_memory and torch.accelerator.is_available(),
            **changes,
        )

    def initial_model(self, arm: Arm) -> PreTrainedModel:
        """The arm's model; a neural one takes all weights that it shares with the stock one from that (`is_shared`).

        Raises:
            ValueError: if scores are to start otherwise, and cannot.
        """
        model = self.build_model(arm)
        if arm.is_neural and self.is_shared:
            set_seed(self.training.seed)
            share_weights(model, self.build_model(Arm.DOT))
        spread = self.spread_of(arm)
        if spread is not None:
            training = self.training
            # counts those of all processes and of a whole step: where scores start does not hang on what shares the work
            step = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
            batch = self.first_batch("train_dataset", min(step, START_EXAMPLES))
            self.score_starts[arm] = start_scores(model, batch, spread, layers=self.score_spread_layers)
        return model

    def spread_of(self, arm: Arm) -> float | None:
        """That its attention scores are made to start with, if any."""
        return arm.score_spread if self.score_spread is None else self.score_spread

    def trainer(self, arm: Arm, model: PreTrainedModel, *callbacks: TrainerCallback, **changes: Any) -> ScorerTrainer:
        """The arm's trainer; `callbacks` come before those of the experiment, and `changes` are those of `arguments_of`."""
        given = self.trainer_arguments
        if self.watch_scores is not None:
            watching = WatchScores(self.first_batch("eval_dataset", HEALTH_EXAMPLES), self.watch_scores)
            callbacks = (*callbacks, watching)
        return ScorerTrainer(
            model=model,
            args=self.arguments_of(arm, **changes),
            **given | {"callbacks": [*callbacks, *given.get("callbacks", [])]},
            **self.scorer_settings,
        )

    def first_batch(self, dataset: str, size: int) -> dict[str, torch.Tensor]:
        """The first examples of one of the data sets, as the trainer would collate them."""
        data = self.trainer_arguments[dataset]
        return self.trainer_arguments["data_collator"]([data[index] for index in range(min(size, len(data)))])

    def health(self, trainer: Trainer) -> list[dict[str, Any]]:
        """Of each layer's scorers, on a few examples of the validation data. By all processes: parameters may be sharded."""
        model: Any = trainer.model
        if not any(layer.mode != "thin" for layer in patch_status(model)):
            return []
        batch = self.first_batch("eval_dataset", HEALTH_EXAMPLES)
        with trainer.accelerator.autocast():
            return [layer._asdict() for layer in scorer_health(model, **batch)]

    def scores(self, trainer: Trainer) -> list[dict[str, Any]]:
        """Spread, entropy and saturation of each attention layer's scores, on the same examples; by all processes as well."""
        batch = self.first_batch("eval_dataset", HEALTH_EXAMPLES)
        try:
            with trainer.accelerator.autocast():
                return [layer._asdict() for layer in score_statistics(trainer.model, **batch)]
        except ValueError as error:
            say(f"The scores of this model cannot be looked at: {error}")
            return []


def share_weights(model: PreTrainedModel, stock: PreTrainedModel) -> None:
    """Gives a neural model all weights that it shares with the stock one, whose modules it may take over.

    Raises:
        RuntimeError: if they share too little.
    """
    parts: list[str] = []  # of compact layers, which the stock model has not
    for name in compact_layers(model):
        module: Any = model.get_submodule(name)
        if isinstance(module, CompactAttentionMixin):
            module.take_stock(stock.get_submodule(name))
            parts.append(f"{name}.")
        else:  # keeps packed layers, which `compact` has folded of the same weights
            parts += [f"{name}.{layer}." for layer in (module.scorer.query_layer, module.scorer.key_layer)]
    own = tuple(parts)
    shared = {name: tensor for name, tensor in stock.state_dict().items() if not name.startswith(own)}
    missing, unexpected = model.load_state_dict(shared, strict=False)
    missing = [name for name in missing if ".scorer." not in name and not name.startswith(own)]
    if unexpected or missing:
        raise RuntimeError(f"The two models share too little: missing {missing}, unexpected {unexpected}.")
