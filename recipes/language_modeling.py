"""Trains a GPT-2 with Neural Attention and one with the dot product on the same text, and compares them.

    python recipes/language_modeling.py recipes/configs/quickstart.yaml
    python recipes/language_modeling.py --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-v1 --output_dir DIR
    accelerate launch recipes/language_modeling.py CONFIG

Flags after a configuration file override it. Running the same command again goes on where it stopped.
"""

from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from tools.command_lines import at_least, parse_arguments
from training.argument_checks import check_training
from training.arms import Arm
from training.checkpoints import load_checkpoint_config
from training.experiment import Experiment
from training.fit import check_positions, check_tokens
from training.model_families import GPT2
from training.neural_arguments import NeuralArguments
from training.reporting import Task
from training.runner import carry_out
from training.text import TextArguments, load_text, load_tokenizer
from training.text_task import MEASURES, prepare


@dataclass
class ModelArguments:
    """The GPT-2 to train: a checkpoint, or a new one of this size."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A GPT-2 checkpoint (stock or neural) to start from; the sizes below are then its own."},
    )
    n_embd: int = field(default=256, metadata={"help": "Width."})
    n_layer: int = field(default=4, metadata={"help": "Layers."})
    n_head: int = field(default=4, metadata={"help": "Heads."})
    n_inner: int | None = field(default=None, metadata={"help": "Width of the feed-forward layers. Default: 4 n_embd."})
    n_positions: int | None = field(default=None, metadata={"help": "Longest sequence. Default: block_size."})
    dropout: float = field(default=0.1, metadata={"help": "Of embeddings, attention weights and residual branches."})
    prompt: str | None = field(default=None, metadata={"help": "Start of the sample. Default: the first words of the test."})

    def __post_init__(self) -> None:
        """Raises a ValueError for sizes of nothing."""
        for name in ("n_embd", "n_layer", "n_head", "n_inner", "n_positions"):
            at_least(name, getattr(self, name), 1)


def build_model(
    arm: Arm, model: ModelArguments, neural: NeuralArguments, text: TextArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model of an arm, newly initialised or from the checkpoint."""
    classes, fields = GPT2[arm], neural.config_fields() if arm.is_neural else {}
    if model.model_name_or_path is not None:
        return classes.model.from_pretrained(model.model_name_or_path, **fields)
    config = classes.config(
        vocab_size=len(tokenizer),
        n_positions=model.n_positions or text.block_size,
        n_embd=model.n_embd,
        n_layer=model.n_layer,
        n_head=model.n_head,
        n_inner=model.n_inner,
        embd_pdrop=model.dropout,
        attn_pdrop=model.dropout,
        resid_pdrop=model.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )
    return classes.model(config)


def check_fit(model: ModelArguments, text: TextArguments, neural: NeuralArguments, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns how many positions the model has.

    Raises:
        SystemExit: if text, tokenizer and model do not fit together.
    """
    positions = model.n_positions or text.block_size
    if model.model_name_or_path is not None:
        config = load_checkpoint_config(model.model_name_or_path, GPT2, neural)
        positions = config.n_positions
        check_tokens(text, tokenizer, model.model_name_or_path, config.vocab_size)
    check_positions(text, positions)
    return positions


ARGUMENTS = (ModelArguments, TextArguments, NeuralArguments, TrainingArguments)


def load_experiment(words: list[str] | None = None) -> tuple[Experiment, Task, NeuralArguments]:
    """Data, models and training as flags ask for them (default: those of `sys.argv`)."""
    model, text, neural, training = parse_arguments(*ARGUMENTS, words=words, description=__doc__)
    check_training(training, neural, MEASURES)
    splits = load_text(text)
    tokenizer = load_tokenizer(text, model.model_name_or_path, splits)
    tokenizer.model_max_length = check_fit(model, text, neural, tokenizer)
    data = prepare(text, splits, tokenizer, model.prompt, training.seed)

    def build(arm: Arm) -> PreTrainedModel:
        return build_model(arm, model, neural, text, tokenizer)

    return data.experiment(build, training, neural, model, text), data.task, neural


def main() -> None:
    carry_out(*load_experiment())


if __name__ == "__main__":
    main()
