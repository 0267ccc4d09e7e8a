"""Names of models that are nowhere on disk as they are in memory.

Clients load a model again by its name: TRL its reference model, peft the model under an adapter. Of a model that has got
neural layers since it was loaded, that would be another one. So it gets names that fail in words.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .neural_attention_interface import neural_modules


# Is a folder, since trainers write any other name into their model cards as that of a base model, which the Hub then refuses.
# Holds nothing but files that fail with a sentence.
UNSAVED = str(Path(__file__).parent / "in_memory_only__save_pretrained_it_and_load_that_folder")

# Follows the old name where it stands in the configs of adapters, which reach other machines
CHANGED = ", changed in memory by hf_neural_attention (save it whole by `save_pretrained`, and load it from that folder)"


def neural_parts(model: nn.Module) -> list[Any]:
    """A model, and models inside it, as far as they have neural layers."""
    return [part for part in model.modules() if isinstance(part, PreTrainedModel) and neural_modules(part)]


def adapter_configs(model: nn.Module) -> list[Any]:
    """Configs of peft's adapters around a model, or in it. They say by name which model they are for."""
    found = [getattr(module, "peft_config", None) for module in model.modules()]
    return [config for configs in found if isinstance(configs, dict) for config in configs.values()]


def forget_names(model: nn.Module) -> None:
    """Lets a model, and all in it that is neural, be in memory only. One without a name, built from a config, has nothing to
    forget."""
    for part in neural_parts(model):
        name, config_name = names_of(part)
        if name:
            part.name_or_path = name.removesuffix(CHANGED) + CHANGED
        if config_name:
            # has no folder in copies of this file that come with a model from the Hub
            part.config.name_or_path = UNSAVED if Path(UNSAVED).is_dir() else ""
    for config in adapter_configs(model):
        name = getattr(config, "base_model_name_or_path", None) or ""
        if name:
            config.base_model_name_or_path = name.removesuffix(CHANGED) + CHANGED


def names_of(part: Any) -> tuple[str, str]:
    """Name of a model by itself (peft reads that one), and by its config (trainers do)."""
    return getattr(part, "name_or_path", None) or "", getattr(getattr(part, "config", None), "name_or_path", None) or ""


def origin_of(model: Any) -> str:
    """The name that a model was loaded by, whatever has been changed since; empty if there is none."""
    name, config_name = names_of(model)
    return name.removesuffix(CHANGED) if config_name == UNSAVED or name.endswith(CHANGED) else config_name
