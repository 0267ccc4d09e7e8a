"""Command lines of the recipes: flags, or one JSON or YAML file, which flags after it override."""

import json
import sys
from argparse import ArgumentParser
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


ARMS = {"neural": ("neural",), "dot": ("dot",), "both": ("dot", "neural")}


@dataclass
class NeuralArguments:
    """Which attention to train, and the `neural_*` fields of the config."""

    attention: str = field(
        default="both",
        metadata={
            "help": "neural, dot (the stock model), or both: one after the other from the same initial weights, with the same "
            "seed and data order, and compared at the end.",
            "choices": list(ARMS),
        },
    )
    neural_layers: list[str] | None = field(
        default=None, metadata={"help": "Layers with Neural Attention: indices, all, or none. Default: 0."}
    )
    neural_proj_dim: int | None = field(default=None, metadata={"help": "Default: max(2, head_dim // 32), the paper's."})
    neural_hidden_dims: list[int] | None = field(default=None, metadata={"help": "Two sizes. Default: the paper's."})
    neural_mode: str | None = field(
        default=None, metadata={"help": "replace (the paper's) or residual. Default: replace, or for patching residual."}
    )
    neural_per_head: bool | None = field(
        default=None, metadata={"help": "A scorer for each head instead of each layer. Default: False."}
    )
    neural_init: str | None = field(default=None, metadata={"help": "mirrored (default) or paper."})
    scorer_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the scorers' weights. Default: that of all others."}
    )
    scorer_weight_decay: float | None = field(
        default=None, metadata={"help": "Of the scorers' weights (not their biases). Default: that of all others."}
    )
    card: str | None = field(
        default=None,
        metadata={"help": "Also write the model card there, e.g. model_cards/models/NAME: NAME.md, NAME.json and NAME.png."},
    )
    card_note: str | None = field(
        default=None, metadata={"help": "A sentence for the card, for instance what else the machine was doing."}
    )

    def config_fields(self) -> dict[str, Any]:
        """The fields of a `Neural*Config` that are given; others keep the config's default, or the checkpoint's value."""
        fields = {
            "neural_layers": self.layers(),
            "neural_proj_dim": self.neural_proj_dim,
            "neural_hidden_dims": self.neural_hidden_dims,
            "neural_mode": self.neural_mode,
            "neural_per_head": self.neural_per_head,
            "neural_init": self.neural_init,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def scorer_settings(self) -> dict[str, float | None]:
        """What `ScorerTrainer` takes."""
        return {"scorer_learning_rate": self.scorer_learning_rate, "scorer_weight_decay": self.scorer_weight_decay}

    def layers(self) -> list[int] | str | None:
        words = self.neural_layers
        if words is None or words == ["none"]:
            return None if words is None else []
        if words == ["all"]:
            return "all"
        try:
            return [int(word) for word in words]
        except ValueError:
            raise SystemExit(f"--neural_layers is {words}; expected indices of layers, all, or none.") from None


def parse_arguments(*types: Any, words: list[str] | None = None, description: str | None = None) -> tuple[Any, ...]:
    """Parses `words` (default: `sys.argv`) into one instance of each dataclass.

    The first word may be a JSON or YAML file of `name: value`; what follows it are flags, which win.

    Raises:
        SystemExit: with what is wrong, if the file is missing or malformed, or an argument does not exist or is not valid.
    """
    parser = HfArgumentParser(list(types), description=description)
    try:
        return parser.parse_args_into_dataclasses(flags_of(words), look_for_args_file=False)
    except ValueError as error:  # also of `TrainingArguments`, whose values do not fit together
        raise SystemExit(f"{error} (--help lists all arguments)") from None


def unknown_words(types: tuple[Any, ...], words: list[str]) -> list[str]:
    """What `parse_arguments` would not know of these words. A value that is none exits at once, as there."""
    return HfArgumentParser(list(types)).parse_known_args(flags_of(words))[1]


def value_of_flag(name: str) -> str | None:
    """The value of one flag, for recipes whose other flags depend on it."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}")
    return getattr(parser.parse_known_args(flags_of(None))[0], name)


def flags_of(words: list[str] | None) -> list[str]:
    """`words`, or those of `sys.argv`, a configuration file replaced by its flags."""
    arguments = sys.argv[1:] if words is None else words
    if arguments and Path(arguments[0]).suffix in (".json", ".yaml", ".yml"):
        return flags_of_file(Path(arguments[0])) + arguments[1:]
    return arguments


def flags_of_file(path: Path) -> list[str]:
    try:
        text = path.read_text()
    except OSError as error:
        raise SystemExit(f"Cannot read the configuration {path}: {error.strerror}.") from None
    try:
        content = yaml.safe_load(text)  # JSON is YAML
    except yaml.YAMLError as error:
        raise SystemExit(f"The configuration {path} is not valid: {error}") from None
    if not isinstance(content, dict):
        raise SystemExit(f"The configuration {path} must hold `name: value` pairs; it holds a {type(content).__name__}.")
    return as_flags(content)


def as_flags(content: dict[str, Any]) -> list[str]:
    """The command line's words for `name: value` pairs."""
    flags: list[str] = []
    for name, value in content.items():
        if value is None:
            continue
        flags.append(f"--{name}")
        values = value if isinstance(value, list) else [value]
        values = values or ["none"]  # an empty list of layers
        flags += [json.dumps(item) if isinstance(item, dict) else str(item) for item in values]
    return flags
