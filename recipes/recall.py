"""Trains a small GPT-2 (or another causal model) with Neural Attention and one with the dot product on tasks of recall.

    python recipes/recall.py recipes/configs/recall.yaml
    python recipes/recall.py recipes/configs/recall.yaml --task nearest --neural_proj_dim 2 --output_dir DIR

A model reads pairs of keys and values, and is asked for values: of the same key, the nearest number, or the first greater one.
Unlike text of small models, these tasks cannot be done without attention. Flags after a configuration file override it.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel, TrainingArguments

from tools.command_lines import at_least, parse_arguments
from training.argument_checks import check_training
from training.arms import Arm
from training.causal_models import loss_of_the_next_token, predicts_the_next_token
from training.experiment import Experiment
from training.model_families import GPT2
from training.neural_arguments import NeuralArguments
from training.new_models import (
    FIELDS_HINT,
    FamilyArguments,
    build_new,
    causal_sizes,
    check_new,
    check_one_source,
    family_note,
    new_config,
)
from training.recall_task import MEASURES, RecallArguments, prepare
from training.reporting import Task
from training.runner import carry_out


@dataclass
class ModelArguments(FamilyArguments):
    """The new model to train, GPT-2 unless another family is named."""

    n_embd: int = field(default=64, metadata={"help": "Width."})
    n_layer: int = field(default=2, metadata={"help": "Layers."})
    n_head: int = field(default=1, metadata={"help": "Heads."})
    dropout: float = field(default=0.0, metadata={"help": "Of embeddings, attention weights and residual branches."})

    def __post_init__(self) -> None:
        """Raises a ValueError for sizes of nothing."""
        for name in ("n_embd", "n_layer", "n_head"):
            at_least(name, getattr(self, name), 1)


def config_of(model: ModelArguments, recall: RecallArguments) -> PreTrainedConfig:
    """The config of a new model."""
    sizes = causal_sizes(model.n_embd, model.n_layer, model.n_head, None, recall.sequence_length, model.dropout)
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_eos_token_id")
    data: dict[str, Any] = {"vocab_size": recall.vocab_size, **dict.fromkeys(special)}
    return new_config(model, GPT2, MODEL_FOR_CAUSAL_LM_MAPPING, sizes, data)


ARGUMENTS = (ModelArguments, RecallArguments, NeuralArguments, TrainingArguments)


def load_experiment(words: list[str] | None = None) -> tuple[Experiment, Task, NeuralArguments]:
    """Data, models and training as flags ask for them (default: those of `sys.argv`)."""
    model, recall, neural, training = parse_arguments(*ARGUMENTS, words=words, description=__doc__)
    check_training(training, neural, MEASURES)
    check_one_source(None, model)
    config = config_of(model, recall)

    def build(arm: Arm) -> PreTrainedModel:
        return build_new(arm, config_of(model, recall), GPT2, MODEL_FOR_CAUSAL_LM_MAPPING, neural, training.seed)

    stock = check_new(build, config, neural)
    data = prepare(recall, training.seed if training.data_seed is None else training.data_seed)
    data.task.notes += f" {family_note(stock)}"
    if not predicts_the_next_token(stock, f"A model of type {config.model_type}", recall.sequence_length, FIELDS_HINT):
        data.trainer_arguments["compute_loss_func"] = loss_of_the_next_token
    return data.experiment(build, training, neural, model, recall), data.task, neural


def main() -> None:
    carry_out(*load_experiment())


if __name__ == "__main__":
    main()
