"""Looks at models: unwraps them, finds their neural layers, sees what their attention is called with, and leaves them as they
were."""

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from accelerate.utils.other import is_compiled_module
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from .models.neural_attention_interface import (
    SUPPORTED_IMPLEMENTATIONS,
    NeuralConfigView,
    implementation_of,
    is_neural,
    mask_of_call,
    share_batch,
)
from .models.neural_attention_masking import mask_scores
from .models.neural_attention_parallel import gathered, is_distributed, mesh_of_heads, tell_scorer
from .models.neural_attention_reference import cap, expand_heads
from .models.neural_attention_scorer import is_compact
from .models.neural_attention_zero3 import is_run_by_deepspeed, whole_shape


# Gives by name the classes that count a model's parameters when put around it, since not every build of torch has them
SHARDING_CLASSES = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine", "FSDPModule")

# Matches modules that are put around a layer, and show in the names of modules but not in a state dict
WRAPPERS = r"(_checkpoint_wrapped_module|_fsdp_wrapped_module|_offload_wrapped_module|_orig_mod)\."


def unwrap(model: Any) -> nn.Module:
    """The Transformers model inside what torch.compile, peft and the distribution of training put around it, in any order."""
    while True:
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        if inner is model:
            return model
        model = inner


def pretrained_parts(model: nn.Module) -> list[Any]:
    """Every `PreTrainedModel` in a model, itself included: their settings may differ."""
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def use_eager(model: nn.Module) -> None:
    """Sets eager attention in every part: Transformers 5.18 passes over some whose config is of one class."""
    for part in pretrained_parts(model):
        part.set_attn_implementation("eager")


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile(module)` or `module.compile()` was called of a model, or the former of a part of it."""
    return model._compiled_call_impl is not None or any(map(is_compiled_module, model.modules()))


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's parameters have been taken over by several processes."""
    if is_run_by_deepspeed(module) or any(parent.__name__ in SHARDING_CLASSES for parent in type(module).__mro__):
        return True
    return any(hasattr(parameter, "device_mesh") for parameter in module.parameters(recurse=False))  # asks for DTensors


def count(tensors: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Numbers in tensors, and their bytes; of parameters that processes share, those of all together."""
    sizes = [(whole_shape(tensor).numel(), tensor.element_size(), numbers_of_element(tensor)) for tensor in tensors]
    return sum(number * held for number, _, held in sizes), sum(number * size for number, size, _ in sizes)


def numbers_of_element(tensor: Any) -> int:
    """How many numbers an element of a tensor holds: two in every byte of bitsandbytes' weights of four bits."""
    return 2 * tensor.element_size() if hasattr(tensor, "quant_type") and getattr(tensor, "bnb_quantized", False) else 1


def is_scorer(module: nn.Module) -> bool:
    """By what it can do: models from the Hub bring scorer classes of their own, and peft may wrap one."""
    return hasattr(module, "weights") and hasattr(module, "linear3")


def compact_layers(model: nn.Module) -> list[str]:
    """Names of the compact layers of a model."""
    return [name for name, _, scorer in neural_layers(model) if is_compact(scorer)]


def neural_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Name and module of every layer that has a scorer, and the scorer."""
    if is_scorer(model):
        yield "scorer", model, model
        return
    found: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        # skips what is wrapped, which has been found with its wrapper
        if is_scorer(module) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
            parent, _, child = name.rpartition(".")
            yield (parent if child == "scorer" and parent else name), model.get_submodule(parent), module


def patched_modules(model: nn.Module) -> dict[str, Any]:
    """Attention modules with a scorer that `patch` or their class put there, by the name that they have in a state dict."""
    return {re.sub(WRAPPERS, "", name): module for name, module, _ in neural_layers(model) if is_neural(module)}


def once(modules: dict[str, Any]) -> dict[str, Any]:
    """Each of some modules once, by the first of its names."""
    first = {module: name for name, module in reversed(modules.items())}
    return {name: module for name, module in modules.items() if first[module] == name}


def is_born_neural(model: nn.Module) -> bool:
    """Whether a model, or a part of it, is of a class with neural layers. Its config tells by its class, of which code from
    the Hub has a copy: a stock config keeps fields that it does not know, and may have those of a neural one."""
    configs = (getattr(module, "config", None) for module in model.modules())
    classes = {type(getattr(config, "base", config)) for config in configs}
    return any(parent.__name__ == "NeuralAttentionConfigMixin" for each in classes for parent in each.__mro__)


def hooks_of(module: nn.Module) -> list[Any]:
    """Accelerate's hooks around a module's forward."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def place_of(module: Any, model: nn.Module | None = None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that a module (or its model, if it has no parameters itself) computes with; accelerate's hooks know
    where offloaded weights go."""
    parameters = list(module.parameters()) or ([] if model is None else list(model.parameters()))
    device = parameters[0].device if parameters else torch.device("cpu")
    if device.type == "meta":
        places = [getattr(hook, "execution_device", None) for child in module.modules() for hook in hooks_of(child)]
        device = next((torch.device(place) for place in places if place is not None), device)
    # leaves out quantised weights, since nothing is computed in their dtypes
    dtypes = [parameter.dtype for parameter in parameters if parameter.is_floating_point() and parameter.dtype.itemsize > 1]
    return device, dtypes[0] if dtypes else torch.get_default_dtype()


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode and random numbers of its own for a model, whose device this gives."""
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if not parameter.is_meta}
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices if device.type == "cuda"]):
            model.eval()
            yield next(iter(devices), torch.device("cpu"))
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def looked_at(model: nn.Module) -> Iterator[None]:
    """A model whose attention functions can be looked at: parts set to kernels that want masks of a form of their own (flash,
    flex) run under "sdpa" meanwhile, or under "eager" where their class has no other."""
    with implementations_restored(model):
        for part in pretrained_parts(model):
            if part.config._attn_implementation not in (None, *SUPPORTED_IMPLEMENTATIONS):
                part.set_attn_implementation("sdpa" if part._supports_sdpa else "eager")
        yield


@contextmanager
def implementations_restored(model: nn.Module) -> Iterator[None]:
    """Every part gets back the attention implementation that it had."""
    before = [(part, part.config._attn_implementation) for part in pretrained_parts(model)]
    try:
        yield
    finally:
        for part, implementation in before:
            if part.config._attn_implementation != implementation:
                part.set_attn_implementation(implementation)


def moved(inputs: Any, device: torch.device) -> Any:
    """Inputs of a model, however nested, with their tensors on a device; of caches, which a forward adds to, copies."""
    inputs = tree_map_only(Cache, copied, inputs, is_leaf=lambda each: isinstance(each, Cache))
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)


def copied(cache: Cache) -> Cache:
    """A cache with tensors of its own, without a history, which `deepcopy` refuses to copy."""
    copies: dict[int, Any] = {}
    parts: list[Any] = [cache]
    while parts:
        for name, value in vars(parts.pop()).items():
            several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            for each in several:
                if isinstance(each, torch.Tensor):
                    copies[id(each)] = each.detach().clone()
                elif isinstance(each, torch.Stream):  # is shared, as of caches that are offloaded
                    copies[id(each)] = each
                elif isinstance(each, Cache) or name == "layers":
                    parts.append(each)
    return copy.deepcopy(cache, copies)


OBSERVER_NAME = "neural_attention_observer"

# Takes what an attention function takes, and returns what one returns: output [B, Tq, H, Dv], and weights or None
Observer = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class ObservedConfigView(NeuralConfigView):
    """A model's config as an attention module sees it whose calls go to an observer."""

    def __init__(self, base: Any, observe: Observer):
        super().__init__(base)
        object.__setattr__(self, "observe", observe)

    @property
    def _attn_implementation(self) -> str:
        return OBSERVER_NAME


def call_observer(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return module.config.observe(module, *args, **kwargs)


AttentionInterface.register(OBSERVER_NAME, call_observer)
AttentionMaskInterface.register(OBSERVER_NAME, sdpa_mask)


@contextmanager
def observed(modules: Iterable[Any], observe: Observer) -> Iterator[None]:
    """Lets the calls of these attention modules, stock or neural, go to `observe(module, query, key, value, ...)`, which takes
    the place of their attention function. The rest of the model notices nothing."""
    configs = [(module, module.config) for module in modules]
    try:
        for module, config in configs:
            # takes away the view of a neural layer, of whose class code from the Hub has a copy
            is_view = isinstance(config, NeuralConfigView) or (hasattr(module, "scorer") and "base" in vars(config))
            module.config = ObservedConfigView(config.base if is_view else config, observe)
        yield
    finally:
        for module, config in configs:
            module.config = config


class Call(NamedTuple):
    """What one attention function was called with; `D` is `h1` in a compact layer, whose scorer gets projected ones."""

    query: torch.Tensor  # [B, H, Tq, D]
    key: torch.Tensor  # [B, H, Tk, D]
    mask: torch.Tensor | None  # bool or float, broadcasts to [B, H, Tq, Tk]
    is_causal: bool
    scaling: float
    softcap: float | None = None  # of dot products
    sinks: torch.Tensor | None = None  # [H]: logits of a key without value

    def dot_products(self, rows: torch.Tensor) -> torch.Tensor:
        """Scores `[B, H, rows, Tk]` of stock attention before any mask, of some queries."""
        return cap(self.query[:, :, rows] @ self.key.transpose(-1, -2) * self.scaling, self.softcap)

    def masked_rows(self, scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Scores `[B, H, rows, Tk]` of some queries, with -inf for what they may not see."""
        causal = torch.arange(scores.shape[-1], device=rows.device) <= rows[:, None] if self.is_causal else None
        mask = self.mask if self.mask is None or self.mask.shape[-2] == 1 else self.mask[..., rows, :]
        return mask_scores(scores, mask, causal)

    def without_padding(self, tokens: torch.Tensor | None = None) -> "Call":
        """The same call in which queries of padding come last and may see nothing, on whichever side they were.

        Args:
            tokens: `[B, Tq]`, True (or 1) for queries that are no padding. Default: what the mask says of self-attention, that
                is, positions that some query may see as a key.
        """
        batch, _, num_queries, _ = self.query.shape
        if tokens is None:
            if self.mask is None or num_queries != self.mask.shape[-1]:
                return self
            visible = self.mask if self.mask.dtype == torch.bool else self.mask > float("-inf")
            tokens = visible.flatten(1, 2).any(1)
        tokens = tokens.to(self.query.device, torch.bool).expand(batch, num_queries)
        if tokens.all():
            return self
        order = (~tokens).to(torch.int8).argsort(dim=-1, stable=True)[:, None, :, None]
        count = int(tokens.sum(-1).max())  # leaves out what is padding in all examples
        order, kept = order[:, :, :count], tokens[:, None, :, None].take_along_dim(order, 2)[:, :, :count]
        mask = torch.ones((), dtype=torch.bool, device=kept.device) if self.mask is None else self.mask
        mask = mask.expand(batch, *(mask.shape[1:2] or (1,)), num_queries, self.key.shape[2]).take_along_dim(order, 2)
        mask = mask & kept if mask.dtype == torch.bool else mask.masked_fill(~kept, float("-inf"))
        return self._replace(query=self.query.take_along_dim(order, 2), mask=mask)


def call_of(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **kwargs: Any,
) -> Call:
    """What the attention function of a module was called with, in float32, all heads with their keys. Takes what an attention
    function takes, of which it leaves out what says nothing of scores.

    Raises:
        ValueError: if sinks are not `[H]`.
    """
    scorer: Any = getattr(module, "scorer", None)
    if hasattr(scorer, "unpack"):  # takes heads apart that share one in a packed layer
        query, key = scorer.unpack(query, key)
    query, key, _ = share_batch(query, key, value)
    mask, causal, num_keys = mask_of_call(
        module, implementation_of(module), query, key, attention_mask, is_causal, position_bias
    )
    scaling = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    key = expand_heads(key[:, :, :num_keys], query.shape[1])
    sinks = sinks if s_aux is None else s_aux
    if sinks is not None and tuple(sinks.shape) != (query.shape[1],):
        raise ValueError(f"sinks of shape {tuple(sinks.shape)} are not a logit per head: these scores cannot be looked at")
    return Call(query.float(), key.float(), mask, causal, scaling, softcap, None if sinks is None else sinks.float())


def of_all_heads(module: Any, call: Call) -> Call:
    """The call of a running module with the heads of all processes that share them (tensor parallelism), in each of these; its
    scorer has the weights of all heads then, until attention runs."""
    here = call.query.shape[1]
    mesh = mesh_of_heads(module, here) if is_distributed() else None
    if mesh is None:
        return call
    if hasattr(module, "scorer"):
        tell_scorer(module, None)
    mask, sinks = call.mask, call.sinks
    return call._replace(
        query=gathered(call.query, mesh),
        key=gathered(call.key, mesh),
        mask=gathered(mask, mesh) if mask is not None and mask.shape[1] == here else mask,
        sinks=None if sinks is None else gathered(sinks, mesh, 0),
    )
