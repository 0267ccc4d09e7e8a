"""What a patch is, as JSON holds it, and how scorers are made from that: in `neural_patch.json`, and in the config.json of a
patched model that was saved whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from .. import __version__
from ..introspection import is_born_neural, once, patched_modules, unwrap
from ..models.configuration_neural_patched import FORMAT_VERSION
from ..models.neural_attention_names import origin_of
from ..models.neural_attention_packing import PackedScorer
from ..models.neural_attention_scorer import NeuralScorer, is_compact, is_quantised
from .errors import PatchError


# Name arguments of a compact scorer, and of one in a packed layer
COMPACT_SETTINGS = ("hidden_dims", "num_heads", "init")
PACKED_SETTINGS = ("num_query_heads", "num_key_heads", "stock_head_dim", "query_layer", "key_layer")


def record_of(model: nn.Module, base_revision: str | None = None) -> dict[str, Any]:
    """The base model, the settings of every patched layer, and the versions of the package and of this format.

    Raises:
        PatchError: if there is no patched layer.
    """
    base = unwrap(model)
    if is_born_neural(base):
        raise PatchError(
            f"{type(base).__name__} has its neural layers by its class and config, not by `patch`; `save_pretrained` saves it."
        )
    layers = once(patched_modules(base))
    if not layers:
        raise PatchError(f"This {type(base).__name__} is not patched; there is nothing to save.")
    folded_from = next(filter(None, (getattr(module.scorer, "folded_from", None) for module in layers.values())), None)
    config = getattr(base, "config", None)
    base_name = origin_of(base) or None
    return {
        "format_version": FORMAT_VERSION,
        "hf_neural_attention_version": __version__,
        "base_model": {
            "name_or_path": base_name,
            "revision": base_revision or cached_revision(base_name),
            "class": type(base).__name__.removeprefix("FSDP"),
            "model_type": getattr(config, "model_type", None),
        },
        "layers": {name: settings_of(module.scorer) for name, module in layers.items()},
        **({} if folded_from is None else {"folded_from": folded_from}),
    }


def is_repository(name: str | None) -> bool:
    """Whether this is the name of a model's repository on the Hub, and no folder. One of a single word (`gpt2`) is, if it is
    in the cache: it could be anything else."""
    if name is None or not could_be_repository(name):
        return False
    return "/" in name or isinstance(try_to_load_from_cache(name, CONFIG_NAME), str)


def could_be_repository(name: str | None) -> bool:
    """Whether a repository on the Hub may be called so, and no folder is."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return name is not None and not Path(name).exists()


def cached_revision(name: str | None) -> str | None:
    """The commit of a repository on the Hub that `main` is in the cache; None where that holds several commits, of which a
    model does not say which it was loaded from."""
    path = try_to_load_from_cache(name, CONFIG_NAME) if name is not None and is_repository(name) else None
    if not isinstance(path, str):
        return None
    commit = Path(path).parent
    return commit.name if len(list(commit.parent.iterdir())) == 1 else None


def settings_of(scorer: Any) -> dict[str, Any]:
    """Arguments of `NeuralScorer` that make one like this. Of a compact layer, those of its own kind of scorer, and
    `"compact": True`."""
    names: tuple[str, ...] = ("head_dim", "proj_dim", "hidden_dims", "mode", "num_heads", "init")
    if is_compact(scorer):
        names = COMPACT_SETTINGS + (PACKED_SETTINGS if isinstance(scorer, PackedScorer) else ())
    settings = {name: list(value) if isinstance(value := getattr(scorer, name), tuple) else value for name in names}
    if not is_compact(scorer):
        return settings
    # says the mode only where it is not what all compact layers of earlier records have
    return settings | ({"compact": True} if scorer.mode == "replace" else {"compact": True, "mode": scorer.mode})


def check_plain(name: str, scorer: Any) -> None:
    """Raises a PatchError if a scorer holds other weights than its own."""
    with torch.device("meta"):
        plain = NeuralScorer(**settings_of(scorer)).state_dict()
    weights = scorer.state_dict()
    quantised = {part for part, weight in weights.items() if is_quantised(weight)}
    if foreign := sorted(quantised | weights.keys() ^ plain.keys()):
        raise PatchError(
            f"The scorer of {name!r} holds what is no part of a patch ({', '.join(foreign[:3])}, ...): adapters, or quantised "
            "weights. Merge adapters first: `model = model.merge_and_unload()` in peft. Of a quantised model, "
            "`save_pretrained` saves all."
        )


def check_without_adapters(model: nn.Module) -> None:
    """Raises a PatchError if a model has adapters inside, whose names a checkpoint of the model would take for its own."""
    if adapted := [name for name, module in model.named_modules() if hasattr(module, "get_base_layer")]:
        raise PatchError(
            f"This {type(model).__name__} has adapters inside ({', '.join(adapted[:3])}, ...). Merge them first, by "
            "`model.merge_and_unload()` of the peft model around it, or save the adapters by `save_pretrained` of that."
        )


def scorers_of(record: Mapping[str, Any], where: str) -> dict[str, NeuralScorer]:
    """New scorers as a record describes them, by the name of their attention module; none for compact layers.

    Raises:
        PatchError: if a layer's settings are not those of a scorer.
    """
    made = {}
    for name, settings in record["layers"].items():
        if isinstance(settings, dict) and settings.get("compact"):
            continue
        try:
            made[name] = NeuralScorer(**settings)
        except (TypeError, ValueError) as error:
            raise PatchError(f"{where} has settings for {name!r} that make no scorer: {error}") from None
    return made


def transformers_class(record: Mapping[str, Any], where: str, advice: str) -> Any:
    """The class of the base model.

    Args:
        advice: what to do where this Transformers does not have it.

    Raises:
        PatchError: if this Transformers does not have it.
    """
    name = str(record["base_model"]["class"])
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    raise PatchError(
        f"{where} was made for a {name}, a class that Transformers {transformers.__version__} does not have. {advice}"
    )
