"""Patched models of any family, as Auto classes and clients load them: `PatchedLlamaForCausalLM` is a `LlamaForCausalLM` with
the scorers that its config records. `getattr` of this module makes the classes, one for each stock class."""

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .configuration_neural_patched import RECORD, PatchedConfig, PatchError, check_version, patched_config_class
from .modeling_neural_attention import SHARING_OPTIONS, ScoredAttentionMixin, content_of, is_from_hub, split_config
from .modeling_neural_gpt2 import CompactGPT2Attention
from .modeling_neural_vit import CompactViTAttention
from .neural_attention_initialization import needs_weights
from .neural_attention_interface import attach_scorer, neural_modules
from .neural_attention_packing import rebuild, watch_caches
from .neural_attention_scorer import NeuralScorer


# Maps attention modules to compact classes of their own; in modules of all others, layers inside them are replaced
COMPACT_CLASSES: dict[type, type] = {each.stock_class(): each for each in (CompactGPT2Attention, CompactViTAttention)}

PREFIX = "Patched"


def name_in(model: Any, name: str) -> str:
    """A layer's name in this model, where the patch was made for the same one with a head, or without."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = dict(model.named_modules())
    return next((each for each in (name, name.removeprefix(prefix), prefix + name) if each in modules), name)


def attach_record(model: nn.Module, record: Mapping[str, Any], where: str) -> None:
    """Gives a stock model the scorers and the compact layers of a record: new ones, or, where the model has no numbers yet,
    without any.

    Raises:
        PatchError: if the model lacks a layer, or a layer's settings do not fit it.
    """
    for recorded, settings in record["layers"].items():
        name = name_in(model, recorded)
        try:
            attention: Any = model.get_submodule(name)
        except AttributeError:
            raise PatchError(
                f"config.json of {where} has a patch for {recorded!r}, and {type(model).__name__} no such module."
            ) from None
        try:
            if settings.get("compact"):
                make_compact(model, name, attention, settings).folded_from = record.get("folded_from")
            else:
                attach_scorer(attention, NeuralScorer(**settings))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            kind = "compact layer" if settings.get("compact") else "scorer"
            raise PatchError(f"config.json of {where} has settings for {recorded!r} that make no {kind}: {error}") from None


def make_compact(model: nn.Module, name: str, attention: Any, settings: Mapping[str, Any]) -> Any:
    """Puts a compact layer in a stock one's place, and returns its scorer."""
    settings = {key: value for key, value in settings.items() if key != "compact"}
    own: Any = COMPACT_CLASSES.get(type(attention))
    if own is None:
        packed = rebuild(attention, settings)
        for part, made in packed[:2]:
            attention.set_submodule(part, made)
        attach_scorer(attention, packed.scorer)
        watch_caches(attention)
        return packed.scorer
    settings["per_head"] = settings.pop("num_heads") is not None
    made = own(attention.config, layer_idx=getattr(attention, "layer_idx", None), **settings)
    if needs_weights(made):  # is not about to be loaded
        made.take_stock(attention)
        made.reset_parameters()
    model.set_submodule(name, made)
    return made.scorer


class NotingPreTrainedModel(PreTrainedModel):
    """Comes after a stock class among the bases of a loader, and keeps what Transformers says of the loading: classes with a
    `from_pretrained` of their own expect a model from the one that they extend, and nothing beside it."""

    loading_info: dict[str, Any]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, cls.loading_info = loaded
        return model


def loading_class(base: Any, record: Mapping[str, Any], where: str) -> Any:
    """The class of a model whose instances are patched when they are made, so that all weights are loaded in one go."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        attach_record(self, record, where)

    # keeps the name, by which Transformers looks up what to rename in old checkpoints
    bases = (ScoredAttentionMixin, base, NotingPreTrainedModel)
    return type(base.__name__, bases, {"__init__": __init__, "__module__": base.__module__})


def load_patched(base: Any, record: Mapping[str, Any], where: str, config: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
    """A patched instance of a stock class, and what Transformers says of the loading.

    Raises:
        PatchError: if the checkpoint lacks weights of its neural layers, or is compact and shall be shared among processes.
    """
    sharing = [f"`{name}`" for name in SHARING_OPTIONS if kwargs.get(name) is not None]
    if sharing and any(settings.get("compact") for settings in record["layers"].values()):
        raise PatchError(
            f"{where} is compact, and {', '.join(sharing)} would share it among processes: its layers are packed otherwise "
            "than stock ones, for which Transformers' plans are. Load the checkpoint that was there before `compact`."
        )
    loader = loading_class(base, record, where)
    model = loader.from_pretrained(where, *args, config=config, **kwargs)
    info = loader.loading_info
    compact = tuple(f"{name_in(model, name)}." for name, settings in record["layers"].items() if settings.get("compact"))
    if missing := sorted(name for name in info["missing_keys"] if ".scorer." in name or name.startswith(compact)):
        raise PatchError(
            f"{where} lacks weights of its neural layers: {', '.join(missing[:5])}. The checkpoint is not complete."
        )
    if type(model) is loader:  # skips a model that FSDP has given a class of its own
        model.__class__ = base
    for module in neural_modules(model).values():
        module.scorer.freeze_idle()
    return model, info


def record_outputs(model: Any) -> None:
    """Enters what hidden states and attentions a model records, which `PreTrainedModel` does by the name of the class that an
    instance is made of, for the class that it has now."""
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(model)), model._can_record_outputs)


class PatchedModelMixin(ScoredAttentionMixin):
    """Comes before a stock class among the bases of a `Patched*` one."""

    stock_class: type[PreTrainedModel]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        record = getattr(config, RECORD, None)
        check_version(record, f"The config of this {type(self).__name__}")
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        attach_record(self, record, config.name_or_path or "this model")  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            PatchError: if the checkpoint has no patch, one of a later version, or not all weights of its neural layers.
        """
        with_info, where = kwargs.pop("output_loading_info", False), str(pretrained_model_name_or_path)
        if not isinstance(config, PreTrainedConfig):
            config, kwargs = split_config(content_of(where, kwargs), kwargs, PatchedConfig)
        record = getattr(config, RECORD, None)
        check_version(record, f"config.json of {where}")
        assert isinstance(record, dict)
        stock = stock_config(config, where)
        model, info = load_patched(cls.stock_class, record, where, stock, *args, **kwargs)
        model = cls.finish(model, record)
        if is_from_hub(cls) and hasattr(config, "auto_map"):  # keeps saying where its code is, which is saved with it
            model.config.auto_map = config.auto_map
        return (model, info) if with_info else model

    @classmethod
    def finish(cls, model: Any, record: dict[str, Any]) -> Any:
        """Makes a loaded model one of this class, which saves what it records."""
        if type(model) is cls.stock_class:  # skips a model that FSDP has given a class of its own
            model.__class__ = cls  # type: ignore[assignment]
            record_outputs(model)
        setattr(model.config, RECORD, record)
        stock_type = model.config.model_type
        model.config.__class__ = cls.config_class  # type: ignore[attr-defined]
        model.config.model_type = stock_type  # keeps what clients go by, while the model is in memory
        return model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        # keeps names as they are: the rules that restore old checkpoints' names would also take parts of a scorer for theirs
        kwargs.setdefault("save_original_format", False)
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


def stock_config(config: Any, where: str) -> Any:
    """A copy of a patched model's config as the stock one, with which the model works like any of its family."""
    stock = copy.deepcopy(config)
    stock.__class__ = CONFIG_MAPPING[config.model_type]
    for name in (RECORD, "auto_map", "model_type"):
        vars(stock).pop(name, None)
    stock.name_or_path = where
    return stock


@cache
def patched_model_class(stock: Any, mixin: type[PatchedModelMixin] = PatchedModelMixin) -> Any:
    """`PatchedLlamaForCausalLM` for `LlamaForCausalLM`."""
    fields = {
        "stock_class": stock,
        "config_class": patched_config_class(stock.config_class.model_type),
        "__module__": mixin.__module__,
    }
    return type(f"{PREFIX}{stock.__name__}", (mixin, stock), fields)


def __getattr__(name: str) -> Any:
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        made: Any = stock
        return patched_model_class(made)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
