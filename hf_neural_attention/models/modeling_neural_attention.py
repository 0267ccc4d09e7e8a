"""What the neural models of every family share: scorers on the layers that the config names, their initialisation, and
which cache `generate` prepares."""

import copy
from os import PathLike
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_neural_attention import STORED, resolve_sizes
from .neural_attention_cache import CACHE_ARGUMENT, NEURAL_CACHES, replace_cache
from .neural_attention_compact import CompactAttentionMixin, cannot_unfold, folded_modules, reason_against_folding
from .neural_attention_interface import attach_scorer, check_implementation
from .neural_attention_names import forget_names, origin_of
from .neural_attention_packing import PackedScorer
from .neural_attention_scorer import CompactScorer, NeuralScorer
from .neural_attention_zero3 import is_shared_out


# Lists arguments of `from_pretrained` that say where a config comes from
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# Lists arguments of `from_pretrained` that share a model among processes
SHARING_OPTIONS = ("device_mesh", "distributed_config", "tp_plan", "tp_size")

# Lists arguments of `from_pretrained` that its config must not take
MODEL_OPTIONS = ("dtype", "torch_dtype", "quantization_config", *SHARING_OPTIONS)


class ScoredAttentionMixin:
    """Comes before a stock class among the bases of one with scorers: it says which implementations of attention can run, and
    refuses the others before anything changes."""

    # Turns these off, since their masks are read by kernels that compute dot products
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_context_parallel = False

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Says False where anything is to be drawn, since for models outside `transformers.` the stock method skips modules
        # without direct parameters, and so the scaled initialisation of GPT-2's c_proj. Where all is loaded, that guards it
        # from `_init_weights` of other people's classes, which may write in place.
        loaded = all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters())
        is_own = isinstance(module, NeuralScorer | PackedScorer | CompactScorer | CompactAttentionMixin)
        super()._initialize_weights(module, is_custom_code=is_custom_code and loaded and not is_own)

    def _init_weights(self, module: nn.Module) -> None:
        # runs after the scorer's own layers, and so overrides what the stock rule (std 0.02) did to them
        if isinstance(module, NeuralScorer | PackedScorer):
            module.fill()
            return
        if isinstance(module, CompactScorer) and is_shared_out(module):
            module.draw_ahead()
            return
        super()._init_weights(module)
        if isinstance(module, CompactAttentionMixin):  # draws the scorer's weights as well
            module.fill()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        check_known_implementation(self, attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)


def check_known_implementation(model: Any, attn_implementation: str | None) -> None:
    """`check_implementation` of what Transformers knows; the rest is left to it, which lists what there is."""
    if attn_implementation in ALL_ATTENTION_FUNCTIONS or "/" in (attn_implementation or ""):
        check_implementation(attn_implementation, type(model).__name__)


class NeuralPreTrainedModelMixin(ScoredAttentionMixin):
    """Comes before the stock `*PreTrainedModel` among the bases of a family's `Neural*PreTrainedModel`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`. `neural_compact=True`, as an argument or in a config, folds a checkpoint that
        is not compact: it is loaded as it was saved, and then computes the same in the compact form (see
        `hf_neural_attention.compact`).

        Raises:
            ValueError: if the checkpoint cannot be folded, with the reason; or if it is compact and `neural_compact` is False.
        """
        if isinstance(kwargs.get("config"), str | PathLike):
            content = content_of(kwargs.pop("config"), kwargs)
            config, kwargs = split_config(content, kwargs, cls.config_class)
            kwargs["config"] = config
        name, has_config = pretrained_model_name_or_path, isinstance(kwargs.get("config"), PreTrainedConfig)
        wanted = getattr(kwargs["config"], "neural_compact", None) if has_config else kwargs.get("neural_compact")
        stored = stored_config(name, kwargs) if has_config or wanted is False else None
        is_compact = bool(stored and stored.get("neural_compact"))
        if wanted is False and is_compact:
            raise ValueError(cannot_unfold(name))
        # takes weights without a config.json as they are
        folds = wanted is True and not is_compact and stored != {}
        if folds and has_config:
            kwargs["config"] = copy.deepcopy(kwargs["config"])
            kwargs["config"].neural_compact = False
        elif folds:
            del kwargs["neural_compact"]
        loaded = super().from_pretrained(name, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        read = vars(model.config).pop(STORED, None)
        stored = read if stored is None else stored
        if not is_from_hub(cls):
            vars(model.config).pop("auto_map", None)  # names code that this model does not run, and that is not saved with it
        if folds and not model.config.neural_compact:
            fold_own_model(model)
        if (
            not stored
            or stored.get("model_type") != cls.config_class.model_type
            or (layers_of(cls.config_class.from_dict(dict(stored))) != layers_of(model.config))
        ):
            forget_names(model)  # keeps clients from loading another model by that name: the stock one, say
        return loaded

    compact_attention_class: type[CompactAttentionMixin]

    # Overrides two methods, as stock models with caches of their own do, since `generate` checks the name of a cache while it
    # puts its settings together, and makes the cache when it knows the length.

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args, **kwargs
    ) -> tuple[GenerationConfig, dict]:
        wanted = kwargs.get("cache_implementation") in NEURAL_CACHES
        if wanted:
            stock = NEURAL_CACHES[kwargs.pop("cache_implementation")]
            if stock is not None and generation_config is None:  # avoids arguments beside a whole config, which are deprecated
                kwargs["cache_implementation"] = stock
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        if wanted:
            prepared.cache_implementation = stock
        # sets it in any case, since an assistant gets a copy of the settings of the model that it assists
        prepared._neural_cache = wanted
        return prepared, model_kwargs

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs) -> Any:
        wanted = getattr(generation_config, "_neural_cache", False)
        given: Any = model_kwargs.get(CACHE_ARGUMENT)
        if wanted and given is not None:
            raise ValueError(
                f"`generate` got `{CACHE_ARGUMENT}` and a `cache_implementation`; please use only one of the two."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if wanted and model_kwargs.get(CACHE_ARGUMENT) is not None:
            model_kwargs[CACHE_ARGUMENT] = replace_cache(model_kwargs[CACHE_ARGUMENT], self)
        # asks for the method, not the class, since the cache may come from the installed package, and this file from the Hub
        given = getattr(given, "self_attention_cache", given)
        if hasattr(given, "check_model"):
            given.check_model(self)


def is_from_hub(model_class: type) -> bool:
    """Whether its code came with a checkpoint, and so is saved with its models."""
    return model_class.__module__.startswith("transformers_modules.")


def content_of(place: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a folder or repository, which the arguments of `from_pretrained` say how to reach.

    Raises:
        OSError: if there is none.
    """
    options = {name: arguments[name] for name in HUB_OPTIONS if name in arguments}
    return PreTrainedConfig.get_config_dict(place, **options)[0]


def split_config(content: dict[str, Any], arguments: dict[str, Any], config_class: Any) -> tuple[Any, dict[str, Any]]:
    """The config that `from_pretrained` is asked for by these arguments, and those that are for the model."""
    # keeps these from the config, which would take what is meant for the model
    for_model = {name: arguments[name] for name in (*HUB_OPTIONS, *MODEL_OPTIONS) if name in arguments}
    fields = {name: value for name, value in arguments.items() if name not in for_model}
    config, unused = config_class.from_dict(content, return_unused_kwargs=True, **fields)
    return config, for_model | unused


def stored_config(name: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The config.json beside a checkpoint's weights; empty if there is none.

    Args:
        name: of the checkpoint.
        arguments: of `from_pretrained`.
    """
    given: Any = arguments.get("config")
    if hasattr(given, STORED) and given.name_or_path == str(name):
        return getattr(given, STORED)
    if name is None or "gguf_file" in arguments:
        return {}
    try:
        return content_of(name, arguments)
    except OSError:
        return {}


def layers_of(config: Any) -> tuple:
    """Which layers a config makes neural, and how, but for what their weights start as."""
    head_dim = config.hidden_size // config.num_attention_heads
    sizes = resolve_sizes(head_dim, config.neural_proj_dim, config.neural_hidden_dims, config.neural_mode)
    return config.neural_layer_indices, *sizes, config.neural_mode, config.neural_per_head, config.neural_compact


def attach_scorers(model: Any, attentions: list[str]) -> None:
    """Makes those of a model's self-attention modules (their names, in the order of its layers) neural that its config names:
    with a scorer, or as compact attention.

    Raises:
        TypeError: if the config is that of a stock model.
        ValueError: if a neural field of the config is invalid.
    """
    config = model.config
    if not hasattr(config, "neural_layer_indices"):
        raise TypeError(
            f"{type(model).__name__} got a {type(config).__name__}, which says nothing of neural layers; expected a "
            f"Neural{type(config).__name__}: `Neural{type(config).__name__}(**config.to_diff_dict(), neural_layers=...)`."
        )
    if config.neural_compact and not hasattr(model, "compact_attention_class"):
        raise ValueError(
            f"`neural_compact` is True, and {type(model).__name__} has no compact attention: its queries and keys are more "
            "than a projection makes of them. Leave `neural_compact` out."
        )
    for index in config.neural_layer_indices:
        attention = model.get_submodule(attentions[index])
        if config.neural_compact:
            compact = model.compact_attention_class(
                config,
                layer_idx=index,
                hidden_dims=resolve_sizes(
                    attention.head_dim, config.neural_proj_dim, config.neural_hidden_dims, config.neural_mode
                )[1],
                per_head=config.neural_per_head,
                init=config.neural_init,
                mode=config.neural_mode,
            )
            model.set_submodule(attentions[index], compact)
            continue
        scorer = NeuralScorer(
            attention.head_dim,
            proj_dim=config.neural_proj_dim,
            hidden_dims=config.neural_hidden_dims,
            mode=config.neural_mode,
            num_heads=config.num_attention_heads if config.neural_per_head else None,
            init=config.neural_init,
        )
        attach_scorer(attention, scorer)
    if config.neural_compact:  # initialises what is new, as the stock constructor did the rest
        model.post_init()


def fold_own_model(model: Any) -> None:
    """Makes a model of this package compact, in place.

    Raises:
        ValueError: if it is compact, or cannot be, with the reason; the model is what it was.
    """
    if reason := reason_against_folding(model):
        raise ValueError(f"This {type(model).__name__} cannot be made compact: {reason}.")
    compact_class = model.compact_attention_class
    for name, compact in folded_modules(model, {compact_class.stock_class(): compact_class}).items():
        model.set_submodule(name, compact)
    mark_compact(model)


def mark_compact(model: Any) -> None:
    """Lets the config of a model that has just been folded say so."""
    model.config.neural_folded_from = origin_of(model) or type(model).__name__
    for module in model.modules():  # tells parts of a model too, which have the same config, or a copy of it
        if hasattr(getattr(module, "config", None), "neural_compact"):
            module.config.neural_compact = True


class NeuralHeadMixin:
    """First base of a model with a head: builds the stock one and puts the neural base model in the stock one's place."""

    base_model_class: type[PreTrainedModel]
    base_model_arguments: dict = {}

    def __init__(self, config):
        # keeps what the stock base model takes out of the config, which old checkpoints have
        checkpointing = getattr(config, "gradient_checkpointing", False)
        # spends no time on the weights of the base model that the stock constructor hard-codes, since it is replaced below
        with initialization.no_init_weights():
            super().__init__(config)
        if checkpointing:
            config.gradient_checkpointing = checkpointing
        setattr(self, self.base_model_prefix, self.base_model_class(config, **self.base_model_arguments))
        self.post_init()
