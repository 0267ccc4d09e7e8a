"""Config fields that every model with neural layers has, and their checks."""

from dataclasses import dataclass
from typing import Any


# Of the neural fields and the scorers' weights. Raised when code of the last version would misread what is saved.
FORMAT_VERSION = 1

MODES = ("replace", "residual")
INITIALIZATIONS = ("mirrored", "paper")


def is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


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


@dataclass(repr=False)
class NeuralAttentionConfigMixin:
    """Fields of a config for its neural layers.

    Args:
        neural_layers (`list[int]` or `"all"`): Which layers use Neural Attention; negative indices count from the last.
            The others keep the dot product. Default: `[0]`, as in the paper.
        neural_proj_dim (`int`, *optional*): Size to which queries and keys are projected before they are scored. Default:
            `max(2, head_dim // 32)`.
        neural_hidden_dims (`list[int]`, *optional*): Sizes of the scorer's two hidden layers. Default:
            `(proj_dim, max(1, proj_dim // 2))`.
        neural_mode (`str`): `"replace"` (the network's score alone) or `"residual"` (added to the dot product, starting
            as exactly that). Default: `"replace"`.
        neural_per_head (`bool`): One scorer per head instead of one per layer. Default: False.
        neural_init (`str`): `"mirrored"` (never dead at birth) or `"paper"`. Default: `"mirrored"`.
        neural_format_version (`int`): Of these fields; a checkpoint of a later one is refused.

    Raises:
        ValueError: at construction, naming field, value and what is allowed.
    """

    # Any: the checks below say more than a failed annotation would
    neural_layers: Any = None
    neural_proj_dim: Any = None
    neural_hidden_dims: Any = None
    neural_mode: Any = "replace"
    neural_per_head: Any = False
    neural_init: Any = "mirrored"
    neural_format_version: Any = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        if self.neural_layers is None:
            self.neural_layers = [0]
        super().__post_init__(**kwargs)
        # the config.json of a stock checkpoint leaves its own model type on the instance
        self.__dict__.pop("model_type", None)
        self.check_neural_fields()

    def to_diff_dict(self) -> dict[str, Any]:
        # also where it is the default: a later version will have another
        return super().to_diff_dict() | {"neural_format_version": self.neural_format_version}

    def check_neural_fields(self) -> list[int]:
        """Checks every neural field and returns the indices of the neural layers. Models call it too, since fields can be
        set after construction."""
        version, proj_dim, hidden_dims = self.neural_format_version, self.neural_proj_dim, self.neural_hidden_dims
        if not is_positive_int(version) or version > FORMAT_VERSION:
            raise ValueError(
                f"`neural_format_version` is {version!r}; this code reads versions up to {FORMAT_VERSION}. If the checkpoint "
                "was saved by a newer hf_neural_attention, install that."
            )
        if proj_dim is not None and not is_positive_int(proj_dim):
            raise ValueError(f"`neural_proj_dim` is {proj_dim!r}; it must be None or an integer of at least 1.")
        if hidden_dims is not None and not (
            isinstance(hidden_dims, list | tuple) and len(hidden_dims) == 2 and all(map(is_positive_int, hidden_dims))
        ):
            raise ValueError(
                f"`neural_hidden_dims` is {hidden_dims!r}; it must be None or a list of two integers of at least 1."
            )
        for name, allowed in (("neural_mode", MODES), ("neural_init", INITIALIZATIONS), ("neural_per_head", (True, False))):
            value = getattr(self, name)
            if not any(value is option or (isinstance(value, str) and value == option) for option in allowed):
                raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")
        return resolve_layers(self.neural_layers, self.num_hidden_layers)
