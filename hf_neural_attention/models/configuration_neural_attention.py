"""Config fields that every model with neural layers has, and their checks."""

import sys
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from huggingface_hub.dataclasses import validated_field

from .neural_attention_lookup import stand_in


# Counts formats of the neural fields and scorers' weights: goes up when code of the last version would misread what is saved
FORMAT_VERSION = 1

# Keeps in a config what the file held that it was read from, whatever arguments have changed. Is never written
STORED = "_neural_stored"

Mode: TypeAlias = Literal["replace", "residual", "thin"]
Shape: TypeAlias = Literal["auto", "paper"]
Initialization: TypeAlias = Literal["mirrored", "paper"]
HiddenDims: TypeAlias = tuple[int, int] | list[int] | Shape | None
MODES, INITIALIZATIONS, SHAPES = get_args(Mode), get_args(Initialization), get_args(Shape)

NARROW_FROM = 8  # numbers of a query, from which on "auto" takes two units in the second hidden layer


def is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_size(value: int | None) -> None:
    if value is not None and not is_positive_int(value):
        raise ValueError(f"It is {value!r}; it must be None or an integer of at least 1.")


def is_shape(value: Any) -> bool:
    """Whether this is one of a scorer's hidden layers. None is "paper": what checkpoints hold that were saved before there was
    another."""
    if isinstance(value, list | tuple):
        return len(value) == 2 and all(map(is_positive_int, value))
    return value is None or value in SHAPES


def check_shape(value: Any) -> None:
    if not is_shape(value):
        raise ValueError(f'It is {value!r}; it must be "auto", "paper" or a list of two integers of at least 1.')


def check_format_version(value: int) -> None:
    if not 1 <= value <= FORMAT_VERSION:
        raise ValueError(
            f"It is {value!r}; this code reads formats up to {FORMAT_VERSION}. If the checkpoint was saved by a newer "
            "hf_neural_attention, install that."
        )


def let_peft_adapt(model_type: str, stock_type: str) -> None:
    """Has peft adapt by default what it adapts in the stock family, from when it is imported on."""
    for name, table in list(vars(sys.modules.get("peft.utils", sys)).items()):
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and stock_type in table:
            table.setdefault(model_type, table[stock_type])


def resolve_layers(neural_layers: Any, num_layers: int) -> list[int]:
    """Sorted indices of the layers that `neural_layers` names ("all", or indices, of which negative ones count from the
    last layer) among `num_layers`.

    Raises:
        ValueError: naming the value and what is allowed.
    """
    allowed = f'"all" or a list of distinct indices from {-num_layers} to {num_layers - 1} (the model has {num_layers} layers)'
    if neural_layers == "all":
        return list(range(num_layers))
    if not isinstance(neural_layers, list | tuple) or any(
        not isinstance(index, int) or isinstance(index, bool) for index in neural_layers
    ):
        raise ValueError(f"`neural_layers` is {neural_layers!r}; it must be {allowed}.")
    for index in neural_layers:
        if not -num_layers <= index < num_layers:
            raise ValueError(f"`neural_layers` is {neural_layers!r}, of which {index} is no layer; it must be {allowed}.")
    resolved = sorted(index % num_layers for index in neural_layers)
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"`neural_layers` is {neural_layers!r}, which names a layer twice; it must be {allowed}.")
    return resolved


def resolve_sizes(
    head_dim: int, proj_dim: int | None, hidden_dims: HiddenDims, mode: str = "replace"
) -> tuple[int, tuple[int, int]]:
    """`proj_dim` and `hidden_dims` as numbers, by the rules that `NeuralScorer` names; in mode `"thin"` these are `(p, 0)`.

    Raises:
        ValueError: if `hidden_dims` is a word that names no rule, or there are hidden layers in mode `"thin"`.
    """
    proj_dim = max(2, head_dim // 32) if proj_dim is None else proj_dim
    if isinstance(hidden_dims, str) and hidden_dims not in SHAPES:
        raise ValueError(f"`hidden_dims` is {hidden_dims!r}; it must be {' or '.join(map(repr, SHAPES))}, or two sizes.")
    if hidden_dims is None or isinstance(hidden_dims, str):
        is_narrow = hidden_dims == "auto" and proj_dim >= NARROW_FROM
        second = 0 if mode == "thin" else 2 if is_narrow else max(1, proj_dim // 2)
        return proj_dim, (proj_dim, second)
    if mode == "thin" and tuple(hidden_dims) != (proj_dim, 0):
        raise ValueError(f'`hidden_dims` is {hidden_dims!r}, and mode "thin" has no hidden layers; leave it out.')
    first, second = hidden_dims
    return proj_dim, (first, second)


@dataclass(repr=False)
class NeuralAttentionConfigMixin:
    """Fields of a config for its neural layers.

    Args:
        neural_layers (`list[int]` or `"all"`): Which layers use Neural Attention; negative indices count from the last.
            The others keep the dot product. Default: `[0]`, as in the paper.
        neural_proj_dim (`int`, *optional*): Size to which queries and keys are projected before they are scored. Default:
            `max(2, head_dim // 32)`.
        neural_hidden_dims (`list[int]`, `"auto"` or `"paper"`): Sizes of the scorer's two hidden layers, or a rule for them:
            with `p = neural_proj_dim`, "paper" is `(p, max(1, p // 2))`, and "auto" is `(p, 2)` if `p` is 8 or more and the
            paper's else. None is "paper", as earlier checkpoints have it. Default: "auto".
        neural_mode (`str`): `"replace"` (the network's score alone) or `"residual"` (added to the dot product, starting
            as exactly that), or `"thin"` (no network: the dot product of the numbers that it would see, `neural_proj_dim`
            of them). Default: `"replace"`.
        neural_per_head (`bool`): One scorer per head instead of one per layer. Default: False.
        neural_compact (`bool`): Project hidden states straight to the scorer's first hidden layer, where queries and keys have
            no use of their own: fewer parameters, less time and a smaller cache for the same functions. Needs mode
            `"replace"` or `"thin"`. Default: False.
        neural_folded_from (`str`, *optional*): What a compact model was folded from, if it was: a name, or a class.
        neural_init (`str`): `"mirrored"` (never dead at birth) or `"paper"`. Default: `"mirrored"`.
        neural_format_version (`int`): Of these fields; a checkpoint of a later one is refused.

    Raises:
        StrictDataclassError: of `huggingface_hub`, as for any config of Transformers, when a field is given a value that it
            may not have, or layers are named that the model does not have.
    """

    neural_layers: list[int] | tuple[int, ...] | Literal["all"] | None = None
    neural_proj_dim: int | None = validated_field(check_size, default=None)
    neural_hidden_dims: list[int] | tuple[int, ...] | Shape | None = validated_field(check_shape, default="auto")
    neural_mode: Mode = "replace"
    neural_per_head: bool = False
    neural_compact: bool = False
    neural_folded_from: str | None = None
    neural_init: Initialization = "mirrored"
    neural_format_version: int = validated_field(check_format_version, default=FORMAT_VERSION)

    def __post_init__(self, **kwargs):
        if self.neural_layers is None:
            self.neural_layers = [0]
        super().__post_init__(**kwargs)
        # removes the model type that the config.json of a stock checkpoint leaves on the instance
        self.__dict__.pop("model_type", None)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        stored = dict(config_dict)
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        stand_in(config)
        setattr(config, STORED, stored)
        return made

    def validate_neural_layers(self) -> None:
        resolve_layers(self.neural_layers, self.num_hidden_layers)

    def validate_neural_compact(self) -> None:
        if self.neural_compact and self.neural_mode == "residual":
            raise ValueError(
                f"`neural_compact` is True and `neural_mode` is {self.neural_mode!r}, whose dot product needs whole queries "
                'and keys. Use `neural_mode="replace"`, or `neural_compact=False`.'
            )

    def validate_neural_mode(self) -> None:
        if self.neural_mode == "thin" and self.neural_hidden_dims not in (*SHAPES, None):
            raise ValueError(
                f'`neural_hidden_dims` is {self.neural_hidden_dims!r}; `neural_mode="thin"` has no hidden layers: leave it.'
            )

    @property
    def neural_layer_indices(self) -> list[int]:
        """Sorted indices of the neural layers, counted from the first. Raises a ValueError if the model lacks one of them: the
        number of layers, and the items of a list, can be changed after construction."""
        return resolve_layers(self.neural_layers, self.num_hidden_layers)

    def to_dict(self) -> dict[str, Any]:
        # tells peft here, since it asks for a model's config in this way before it looks up what to adapt in it
        let_peft_adapt(self.model_type, self.model_type.removeprefix("neural_"))
        return {name: value for name, value in super().to_dict().items() if name != STORED}

    def to_diff_dict(self) -> dict[str, Any]:
        # writes it even where it is the default, since a later version will have another
        return super().to_diff_dict() | {"neural_format_version": self.neural_format_version}
