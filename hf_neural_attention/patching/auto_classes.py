"""Makes patched models of any family known to the Auto classes, one family when its first config is read.

The config.json of a patched model has one model type for all families. What is registered for it makes the config of the
family, `PatchedLlamaConfig`, and enters that wherever the stock config stands: for models, tokenizers and processors.
"""

from functools import cache
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    modeling_auto,
    processing_auto,
    tokenization_auto,
    video_processing_auto,
)

from ..models.configuration_neural_patched import PATCHED_TYPE, PatchedConfig
from ..models.modeling_neural_patched import PatchedModelMixin, patched_model_class, record_outputs, stock_config
from ..models.neural_attention_lookup import make_findable
from .pretrained import hook_model


MAPPINGS_OF_PROCESSORS = (
    tokenization_auto.TOKENIZER_MAPPING,
    image_processing_auto.IMAGE_PROCESSOR_MAPPING,
    feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING,
    processing_auto.PROCESSOR_MAPPING,
    video_processing_auto.VIDEO_PROCESSOR_MAPPING,
)


class LoadedMixin(PatchedModelMixin):
    """`PatchedModelMixin` where this package is: what the Auto classes make is what `from_pretrained` loads, a patched
    instance of the stock class."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        stock = stock_config(config, config.name_or_path)
        for module in self.modules():  # type: ignore[attr-defined]
            if getattr(module, "config", None) is config:
                module.config = stock
            elif getattr(getattr(module, "config", None), "base", None) is config:
                object.__setattr__(module.config, "base", stock)
        self.__class__ = self.stock_class  # type: ignore[assignment]
        record_outputs(self)
        hook_model(self)  # type: ignore[arg-type]

    @classmethod
    def finish(cls, model: Any, record: dict[str, Any]) -> Any:
        hook_model(model)
        return model


class RegisteringConfig(PatchedConfig):
    """`PatchedConfig` where this package is: a family whose config it makes is registered."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        made = super().from_dict(config_dict, **kwargs)
        family: Any = type(made[0] if isinstance(made, tuple) else made)
        register_family(family)
        return made


@cache
def register_family(config_class: Any) -> None:
    """Enters a patched family wherever its stock family stands, and its classes where clients look for those that a config
    names."""
    classes: dict[str, Any] = {}

    def patched(stock_class: Any) -> Any:
        made = patched_model_class(stock_class, LoadedMixin)
        return classes.setdefault(made.__name__, made)

    types = {parent: str(getattr(parent, "model_type", None)) for parent in config_class.__mro__}
    # takes the family itself, which others may have registered, not the one of Transformers that it may be made of
    stock = next(parent for parent, name in types.items() if name in CONFIG_MAPPING and CONFIG_MAPPING[name] is parent)
    for mapping in vars(modeling_auto).values():
        if isinstance(mapping, type(modeling_auto.MODEL_MAPPING)) and stock in mapping:
            found: Any = mapping[stock]
            made = tuple(map(patched, found)) if isinstance(found, tuple) else patched(found)
            mapping.register(config_class, made, exist_ok=True)
    for mapping in MAPPINGS_OF_PROCESSORS:
        if stock in mapping:
            mapping.register(config_class, mapping[stock], exist_ok=True)
    make_findable(classes)


def register_patched_models() -> None:
    """Registers the model type of patched models. Doing it again changes nothing."""
    AutoConfig.register(PATCHED_TYPE, RegisteringConfig, exist_ok=True)
