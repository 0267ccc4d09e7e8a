"""What the neural models of every family share: scorers on the layers that the config names, their initialisation, and
which cache `generate` prepares."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel, initialization

from .neural_attention_cache import NEURAL_CACHES, replace_cache
from .neural_attention_interface import AttentionModule, attach_scorer, check_implementation
from .neural_attention_scorer import NeuralScorer


class NeuralPreTrainedModelMixin:
    """Comes before the stock `*PreTrainedModel` among the bases of a family's `Neural*PreTrainedModel`."""

    # Turns these off, since their masks are read by kernels that compute dot products
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_context_parallel = False

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        check_implementation(attn_implementation, type(self).__name__)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        # runs after the scorer's own layers, and so overrides what the stock rule (std 0.02) did to them
        if isinstance(module, NeuralScorer):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Says False, since for models outside `transformers.` the stock method skips modules without direct parameters, and so
        # the scaled initialisation of GPT-2's c_proj. That guards code that writes parameters in place, which ours never does.
        super()._initialize_weights(module, is_custom_code=False)

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
        given: Any = model_kwargs.get("past_key_values")
        if wanted and given is not None:
            raise ValueError("`generate` got `past_key_values` and a `cache_implementation`; please use only one of the two.")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if wanted and model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"] = replace_cache(model_kwargs["past_key_values"], self)
        # asks for the method, not the class, since the cache may come from the installed package, and this file from the Hub
        given = getattr(given, "self_attention_cache", given)
        if hasattr(given, "check_model"):
            given.check_model(self)


def attach_scorers(model: PreTrainedModel, attentions: Iterable[AttentionModule]) -> None:
    """Gives a scorer to each of a model's self-attention modules (in the order of its layers) that its config names.

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
    attentions = list(attentions)
    for index in config.neural_layer_indices:
        attention = attentions[index]
        scorer = NeuralScorer(
            attention.head_dim,
            proj_dim=config.neural_proj_dim,
            hidden_dims=config.neural_hidden_dims,
            mode=config.neural_mode,
            num_heads=config.num_attention_heads if config.neural_per_head else None,
            init=config.neural_init,
        )
        attach_scorer(attention, scorer)


class NeuralHeadMixin:
    """First base of a model with a head: builds the stock one and puts the neural base model in the stock one's place."""

    base_model_class: type[PreTrainedModel]
    base_model_arguments: dict = {}

    def __init__(self, config):
        # spends no time on the weights of the base model that the stock constructor hard-codes, since it is replaced below
        with initialization.no_init_weights():
            super().__init__(config)
        setattr(self, self.base_model_prefix, self.base_model_class(config, **self.base_model_arguments))
        self.post_init()
