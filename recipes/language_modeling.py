"""Trains a GPT-2 (or another causal language model) with Neural Attention and one with the dot product, and compares them.

    python recipes/language_modeling.py recipes/configs/quickstart.yaml
    python recipes/language_modeling.py --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-v1 --output_dir DIR
    python recipes/language_modeling.py --model_type llama --config_overrides num_key_value_heads=2 --output_dir DIR
    accelerate launch recipes/language_modeling.py CONFIG

Flags after a configuration file override it. Running the same command again goes on where it stopped.
"""

from dataclasses import dataclass, field

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from tools.command_lines import at_least, parse_arguments
from training.argument_checks import check_starts, check_training
from training.arms import Arm
from training.checkpoints import is_neural, load_checkpoint_config
from training.data_checks import check_positions, check_tokens
from training.experiment import Experiment
from training.model_families import GPT2
from training.neural_arguments import NeuralArguments
from training.new_models import FIELDS_HINT, FamilyArguments, build_new, causal_sizes, check_new, check_one_source, new_config
from training.reporting import Task
from training.runner import carry_out
from training.text import TextArguments, load_text, load_tokenizer
from training.text_task import MEASURES, fit_to, prepare
from training.unsharded_models import whole


@dataclass
class ModelArguments(FamilyArguments):
    """The model to train: a GPT-2 checkpoint, or a new model of this size, GPT-2 unless another family is named."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A GPT-2 checkpoint (stock or neural) to start from; the sizes below are then its own."},
    )
    n_embd: int = field(default=256, metadata={"help": "Width."})
    n_layer: int = field(default=4, metadata={"help": "Layers."})
    n_head: int = field(default=4, metadata={"help": "Heads."})
    n_inner: int | None = field(default=None, metadata={"help": "Width of the feed-forward layers. Default: 4 n_embd."})
    n_positions: int | None = field(default=None, metadata={"help": "Longest sequence. Default: block_size."})
    dropout: float = field(
        default=0.1, metadata={"help": "Of embeddings, attention weights and residual branches, where the family has it."}
    )
    prompt: str | None = field(default=None, metadata={"help": "Start of the sample. Default: the first words of the test."})

    def __post_init__(self) -> None:
        """Raises a ValueError for sizes of nothing."""
        for name in ("n_embd", "n_layer", "n_head", "n_inner", "n_positions"):
            at_least(name, getattr(self, name), 1)


def config_of(model: ModelArguments, text: TextArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The config of a new model."""
    data = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "decoder_start_token_id": tokenizer.bos_token_id,
        "forced_eos_token_id": None,
    }
    sizes = causal_sizes(
        model.n_embd, model.n_layer, model.n_head, model.n_inner, model.n_positions or text.block_size, model.dropout
    )
    return new_config(model, GPT2, MODEL_FOR_CAUSAL_LM_MAPPING, sizes, data)


@whole
def build_model(
    arm: Arm,
    model: ModelArguments,
    neural: NeuralArguments,
    text: TextArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
) -> PreTrainedModel:
    """The model of an arm, newly initialised or from the checkpoint."""
    if model.model_name_or_path is not None:
        fields = neural.config_fields() if arm.is_neural else {}
        return GPT2[arm].model.from_pretrained(model.model_name_or_path, **fields)
    return build_new(arm, config_of(model, text, tokenizer), GPT2, MODEL_FOR_CAUSAL_LM_MAPPING, neural, seed)


def check_fit(model: ModelArguments, text: TextArguments, neural: NeuralArguments, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns how many positions the model has.

    Raises:
        SystemExit: if text, tokenizer and model do not fit together.
    """
    if model.model_name_or_path is not None:
        config = load_checkpoint_config(model.model_name_or_path, GPT2, neural)
        check_tokens(text, tokenizer, model.model_name_or_path, config.vocab_size)
    else:
        config = config_of(model, text, tokenizer)
        vocabulary = getattr(config.get_text_config(), "vocab_size", 0)
        if vocabulary < len(tokenizer):
            raise SystemExit(
                f"The new {config.model_type} has {vocabulary} embeddings, and the tokenizer {len(tokenizer)} tokens. Leave "
                "vocab_size out of --config_overrides, or make it as large."
            )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or text.block_size
    check_positions(text, positions, None if model.model_name_or_path or model.config_name else "--n_positions")
    return positions


ARGUMENTS = (ModelArguments, TextArguments, NeuralArguments, TrainingArguments)


def load_experiment(words: list[str] | None = None) -> tuple[Experiment, Task, NeuralArguments]:
    """Data, models and training as flags ask for them (default: those of `sys.argv`)."""
    model, text, neural, training = parse_arguments(*ARGUMENTS, words=words, description=__doc__)
    check_training(training, neural, MEASURES)
    check_one_source(model.model_name_or_path, model)
    check_starts(model.model_name_or_path, neural)
    splits = load_text(text)
    tokenizer = load_tokenizer(text, model.model_name_or_path, splits)
    tokenizer.model_max_length = check_fit(model, text, neural, tokenizer)

    def build(arm: Arm) -> PreTrainedModel:
        return build_model(arm, model, neural, text, tokenizer, training.seed)

    if model.model_name_or_path is None:
        some = check_new(build, config_of(model, text, tokenizer), neural)
    else:
        some = build(neural.arms[0])
    data = prepare(text, splits, tokenizer, model.prompt, training.seed)
    hint = FIELDS_HINT if model.model_name_or_path is None else ""
    fit_to(data, some, f"A model of type {some.config.model_type}", text.block_size, hint)
    data.task.checkpoint = model.model_name_or_path
    is_shared = not is_neural(model.model_name_or_path, GPT2)
    return data.experiment(build, training, neural, model, text, is_shared=is_shared), data.task, neural


def main() -> None:
    carry_out(*load_experiment())


if __name__ == "__main__":
    main()
