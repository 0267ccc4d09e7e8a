"""Arguments of every recipe that trains: which attention, the `neural_*` fields of a config, and where a card goes."""

from dataclasses import dataclass, field
from typing import Any

from training.arms import Arm


# Lists what a command line may ask for beside one arm
SEVERAL = {"both": (Arm.DOT, Arm.NEURAL), "all": tuple(Arm)}


@dataclass
class NeuralArguments:
    """Which attention to train, and the `neural_*` fields of the config."""

    attention: str = field(
        default="both",
        metadata={
            "help": "neural, dot (the stock model), dot_started (the stock model, whose queries and keys start so large that "
            "attention scores have a spread of one), both (dot and neural), or all: one after the other from the same initial "
            "weights, with the same seed and data order, and compared at the end.",
            "choices": [*(arm.value for arm in Arm), *SEVERAL],
        },
    )
    neural_layers: list[str] | None = field(
        default=None, metadata={"help": "Layers with Neural Attention: indices, all, or none. Default: 0."}
    )
    neural_proj_dim: int | None = field(default=None, metadata={"help": "Default: max(2, head_dim // 32), the paper's."})
    neural_hidden_dims: list[str] | None = field(
        default=None,
        metadata={
            "help": "Two sizes, or paper: p and p // 2, p being neural_proj_dim. Default: p and 2 where p is 8 or more, the "
            "paper's else."
        },
    )
    neural_mode: str | None = field(
        default=None, metadata={"help": "replace (the paper's), residual or thin. Default: replace, or for patching residual."}
    )
    neural_per_head: bool | None = field(
        default=None, metadata={"help": "A scorer for each head instead of each layer. Default: False."}
    )
    neural_compact: bool | None = field(
        default=None,
        metadata={"help": "Project hidden states straight to the scorers' first layer: the compact form. Default: False."},
    )
    neural_init: str | None = field(default=None, metadata={"help": "mirrored (default) or paper."})
    score_spread: float | None = field(
        default=None,
        metadata={
            "help": "Standard deviation within rows that attention scores start with, in every model that is trained, dot "
            "product or neural (`start_scores`, on the examples of one step, 64 at most). 0: attention without scores, "
            "uniform for ever (dot product only). Default: what the models' own initialisation gives."
        },
    )
    score_spread_layers: list[int] | None = field(
        default=None, metadata={"help": "Indices of the layers that --score_spread is for, from the first. Default: all."}
    )
    watch_scores: int | None = field(
        default=None,
        metadata={
            "help": "Record at each so many-th log, in `results.json`, the spread, entropy and saturation of every layer's "
            "scores and the norm of the gradient of its query and key weights, where these are no part of a larger layer (but "
            "for GPT-2's). Default: at start and end, without gradients."
        },
    )
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

    @property
    def arms(self) -> tuple[Arm, ...]:
        """In the order in which they are trained."""
        return SEVERAL.get(self.attention) or (Arm(self.attention),)

    def config_fields(self) -> dict[str, Any]:
        """The fields of a `Neural*Config` that are given; others keep the config's default, or the checkpoint's value."""
        fields = {
            "neural_layers": self.layers(),
            "neural_proj_dim": self.neural_proj_dim,
            "neural_hidden_dims": self.hidden_dims(),
            "neural_mode": self.neural_mode,
            "neural_per_head": self.neural_per_head,
            "neural_compact": self.neural_compact,
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

    def hidden_dims(self) -> list[int] | str | None:
        words = self.neural_hidden_dims
        if words is None:
            return None
        if words in (["auto"], ["paper"]):
            return words[0]
        if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):
            return [int(word) for word in words]
        raise SystemExit(f"--neural_hidden_dims is {words}; expected two sizes of at least 1, auto, or paper.")
