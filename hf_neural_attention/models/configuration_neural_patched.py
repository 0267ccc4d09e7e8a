"""Configs of patched models of any family: the stock config, and beside it the record of which layers have which scorers."""

from functools import cache
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .neural_attention_lookup import stand_in


# Says where config.json keeps the record
RECORD = "neural_attention_patch"

# Stands in config.json as the model type of all patched models, which Transformers shows where nobody has registered it
PATCHED_TYPE = "patched by hf_neural_attention (install it, and import hf_neural_attention before this is loaded)"


# Goes up when a reader of the last version would misunderstand a record
FORMAT_VERSION = 1


class PatchError(ValueError):
    """The model cannot be patched, unpatched or loaded as asked. The model is what it was."""


def check_version(record: Any, where: str) -> None:
    """Raises a PatchError if a record comes from a later version of this package, or is none."""
    record = record if isinstance(record, dict) else {}
    version = record.get("format_version")
    whole = all(isinstance(record.get(name), dict) and record[name] for name in ("layers", "base_model"))
    if not isinstance(version, int) or not whole:
        raise PatchError(f"{where} is no record of a patch: it lacks `format_version`, `layers` or `base_model`.")
    if version > FORMAT_VERSION:
        raise PatchError(
            f"{where} was written by hf_neural_attention {record.get('hf_neural_attention_version')} in format {version}; "
            f"this code reads formats up to {FORMAT_VERSION}. Install a newer hf_neural_attention."
        )


class PatchedConfigMixin:
    """Comes before a stock config among the bases of the config that patched models of its family are saved with.

    In memory its `model_type` is the stock one, by which clients look up what is right for the family.
    """

    model_type: str

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"model_type": self.model_type}  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        # is what gets into config.json
        return super().to_diff_dict() | {"model_type": PATCHED_TYPE}  # type: ignore[misc]


class PatchedConfig(PreTrainedConfig):
    """What `PATCHED_TYPE` is registered as: makes the config of the family that the record names."""

    model_type = PATCHED_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A `Patched*Config`, and the arguments that are left if `return_unused_kwargs` is set.

        Raises:
            PatchError: if the dict has no record, one of a later version, or of a family that this Transformers does not have.
        """
        record = config_dict.get(RECORD)
        check_version(record, f"`{RECORD}` in config.json of {kwargs.get('name_or_path') or 'a patched model'}")
        stock_type = record["base_model"].get("model_type")  # type: ignore[index]
        made = patched_config_class(stock_type).from_dict({**config_dict, "model_type": stock_type}, **kwargs)
        stand_in(made[0] if isinstance(made, tuple) else made)
        return made


@cache
def patched_config_class(stock_type: str) -> type[PreTrainedConfig]:
    """`PatchedLlamaConfig` for `"llama"`, which is a `LlamaConfig`.

    Raises:
        PatchError: if this Transformers has no such model type.
    """
    if stock_type not in CONFIG_MAPPING:
        raise PatchError(
            f"This model was patched as one of type {stock_type!r}, which Transformers {transformers.__version__} lacks. "
            "Load it with `hf_neural_attention.from_pretrained(..., model_class=...)`, and give that class."
        )
    stock = CONFIG_MAPPING[stock_type]
    fields = {"model_type": PATCHED_TYPE, "__module__": __name__}
    return type(f"Patched{stock.__name__}", (PatchedConfigMixin, stock), fields)
