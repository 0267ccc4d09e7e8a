"""`patch`, `unpatch`, `patched` and `patch_status`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn

from ..diagnostics import Explanation, explain_layer
from ..introspection import compact_layers, is_born_neural, is_sharded, once, patched_modules, place_of
from ..models.configuration_neural_attention import HiddenDims, is_positive_int, is_shape
from ..models.neural_attention_interface import (
    NeuralConfigView,
    attach_scorer,
    check_implementation,
    detach_scorer,
)
from ..models.neural_attention_names import CHANGED, adapter_configs, forget_names, names_of, neural_parts
from ..models.neural_attention_scorer import NeuralScorer
from ..models.neural_attention_zero3 import is_apart, whole_shape
from .attention_arguments import unhonoured
from .errors import AlreadyPatchedError, PatchError, ProbeError, UnsupportedLayerError
from .layers import Layers, attention_modules, choose_layers, listed
from .pretrained import hook_model, unhook_model
from .probing import AttentionCall, probe
from .reports import PatchedLayer, PatchPlan, PatchStatus, status_of
from .sizes import ModelSize, size_of


ModelT = TypeVar("ModelT", bound=nn.Module)

# Names the attribute of a patched model for what `unpatch` gives back, as `names_of` has it
NAMES_BEFORE = "names_before_patch"


def patch(
    model: ModelT,
    layers: Layers = (0,),
    *,
    proj_dim: int | None = None,
    hidden_dims: HiddenDims = "auto",
    mode: str = "residual",
    per_head: bool = False,
    init: str = "mirrored",
    example_inputs: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> Any:
    """Gives attention layers of a Transformers model Neural Attention, in place, and keeps everything else of it.

    The layers get a scorer as a child module, of the dtype and on the device of the layer, whose parameters are trainable.
    Nothing is replaced, no class is touched, and no other model notices. `unpatch` takes it back. Everything is checked
    before anything is changed: after an error the model is what it was.

    The model can no longer be loaded again by its name, as some clients do (TRL, peft): `name_or_path` becomes one that fails
    with a sentence, until the model is saved whole and loaded from there.

    `save_pretrained` of the model, and of models inside it, then writes a checkpoint for `hf_neural_attention.from_pretrained`
    and the Auto classes; a larger model that holds it would save the patch without a word about it, so
    patch the outermost one. A stock class that loads such a checkpoint warns of the model type and drops the scorers.

    In mode `"residual"` the outputs stay as they were: to rounding under "sdpa", to the bit in float32 under "eager". But
    tokens that may attend to nothing (left padding) get zeros, where "eager" lets them attend to everything, as does "sdpa" in
    models with position biases (T5) or masks of numbers (Parakeet). No other token attends to these.

    Args:
        model (`nn.Module`): A model whose attention modules fetch their function from Transformers' `AttentionInterface`
            (most of them do), under `attn_implementation` "eager" or "sdpa". Compiled or with adapters of peft, as you like;
            patch before `DistributedDataParallel` or FSDP come around it. If DeepSpeed's `zero.Init` has shared
            its weights out, all processes must call this; the scorers of the first are taken.
        layers (`list[int]`, `"all"`, `list[str]`, or `(name, module) -> bool`): Indices count the self-attention layers of
            each stack by itself, in the order of the model, negative ones from the end: `[0]` is the first of the encoder
            and the first of the decoder. A stack is a list of attention modules whose names differ in numbers only. `"all"`
            takes all of them. Cross-attention, and attention outside any list of layers, is chosen by name or by a predicate
            over names and modules. Default: `[0]`.
        proj_dim, hidden_dims, init: as in `NeuralScorer`.
        mode (`str`): `"residual"` (the network's score is added to the dot product's and starts at zero: the model computes
            what it computed before, and learns from there), `"replace"` (the network alone: the paper's) or `"thin"` (no
            network: the dot product of `proj_dim` numbers). Default: `"residual"`.
        per_head (`bool`): A network for each query head, not one for all. Default: False.
        example_inputs (`dict`, *optional*): Arguments for the model's forward, for models that do not run on inputs made from
            their config. Encoder and decoder inputs should differ in length, and they should reach all layers that count.
        dry_run (`bool`): Return what would be done instead: a `PatchPlan`, to be printed. Default: False.

    Returns:
        The model itself, or a `PatchPlan`.

    Raises:
        TypeError: if `model` is no module.
        PatchError: (a ValueError) if the model cannot be patched, in one of these kinds: NoPatchableLayerError,
            UnsupportedLayerError (keys that an indexer selects, flash attention ...), AlreadyPatchedError, or ProbeError if
            `example_inputs` are needed.
        ValueError: if a setting is not what it may be.
    """
    check_model(model)
    check_settings(proj_dim, hidden_dims, per_head)
    calls, all_calls = see_layers(model, layers, example_inputs)
    scorers: dict[str, NeuralScorer] = {}
    with torch.random.fork_rng(devices=[], enabled=dry_run):
        for name, call in calls.items():
            _, num_heads, _, head_dim = call.query
            scorers[name] = NeuralScorer(head_dim, proj_dim, hidden_dims, mode, num_heads if per_head else None, init)
    if dry_run:
        return plan_of(model, scorers, all_calls)
    attach_scorers(model, scorers)
    return model


def inspect_layers(model: nn.Module, layers: Layers, example_inputs: Mapping[str, Any] | None) -> dict[str, AttentionCall]:
    """The layers that are chosen and a call of each, by name, in the order of the model.

    Raises:
        PatchError: if one of them, or the model, cannot be patched.
    """
    return see_layers(model, layers, example_inputs)[0]


def see_layers(
    model: nn.Module, layers: Layers, example_inputs: Mapping[str, Any] | None
) -> tuple[dict[str, AttentionCall], dict[nn.Module, list[AttentionCall]]]:
    """`inspect_layers`, and the calls of all attention modules."""
    found = attention_modules(model)
    check_implementations(found)
    calls, reasons = probe(model, found, example_inputs)
    names = choose_layers(layers, found, calls, reasons)
    check_layers({name: found[name] for name in names}, calls, reasons)
    return {name: calls[found[name]][0] for name in names}, calls


def attach_scorers(model: nn.Module, scorers: Mapping[str, NeuralScorer]) -> None:
    """Gives the named attention modules their scorers, in place, and lets the model save them. Cannot fail halfway."""
    for name, scorer in scorers.items():
        module: Any = model.get_submodule(name)
        scorer.to(*place_of(module, model)).train(module.training)
    for name, scorer in scorers.items():
        attach_scorer(model.get_submodule(name), scorer)
        for module in scorer.modules():  # lets `init_weights`, should it run again as of a part of a larger model, leave it
            module._is_hf_initialized = True
    hook_model(model)
    for part in neural_parts(model):
        vars(part)[NAMES_BEFORE] = names_of(part)
    forget_names(model)


def plan_of(model: nn.Module, scorers: Mapping[str, NeuralScorer], calls: dict[nn.Module, list[AttentionCall]]) -> PatchPlan:
    """What would be done."""
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in scorers}
    for name, scorer in scorers.items():
        scorer.to(*place_of(modules[name], model))
    backends = Explanation(explain_layer(name, as_if_patched(modules[name]), scorers[name], None) for name in scorers)
    status = PatchStatus(PatchedLayer.of(name, scorer) for name, scorer in scorers.items())
    stock = size_of(model, calls)
    added = stock.num_parameters + status.num_parameters, stock.num_bytes + status.num_bytes
    return PatchPlan(status, backends, stock, ModelSize(*added, stock.cache_bytes_per_token))


def unpatch(model: ModelT) -> ModelT:
    """Takes the scorers of `patch` off again: the model is, bit for bit, what it was without them. Returns the model.

    Raises:
        PatchError: if the model has none, is of a class with neural layers of its own, or is compact.
    """
    if is_born_neural(model):
        raise PatchError(
            f"{type(model).__name__} has its neural layers by its class and config, not by `patch`; they cannot be taken off. "
            "Load its checkpoint into the stock class for a model without them."
        )
    layers = patched_modules(model)
    named = [part for part in model.modules() if NAMES_BEFORE in vars(part)]
    if not layers and not named:  # takes what is left where all layers were taken off a part by itself
        raise PatchError(f"This {type(model).__name__} is not patched; there is nothing to take off.")
    check_whole(model, "unpatched")
    if not named:  # was loaded as a patched one, of which there is no stock one by that name
        forget_names(model)
    for module in once(layers).values():
        detach_scorer(module)
    unhook_model(model)
    if named:
        restore_names(model, named)
    return model


def restore_names(model: nn.Module, parts: list[Any]) -> None:
    """Gives parts of an unpatched model the names that they had before `patch`."""
    for part in parts:
        part.name_or_path, part.config.name_or_path = vars(part).pop(NAMES_BEFORE)
    for config in adapter_configs(model):
        config.base_model_name_or_path = (config.base_model_name_or_path or "").removesuffix(CHANGED) or None


@contextmanager
def patched(model: ModelT, layers: Layers = (0,), **settings: Any) -> Iterator[ModelT]:
    """Patches a model inside a `with` block and unpatches it at the end, also after an exception. Arguments as in `patch`."""
    patch(model, layers, **settings)
    try:
        yield model
    finally:
        if patched_modules(model):
            unpatch(model)


def patch_status(model: nn.Module) -> PatchStatus:
    """Which layers of a model are neural, and with which settings; empty (and false) if none is. A module that has several
    places is there once, by the first of its names."""
    return status_of(model)


def check_model(model: Any) -> None:
    """Raises an error if `model` is no model, or none that may be patched now."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`patch` takes a model, not a {type(model).__name__}.")
    if is_born_neural(model):
        raise AlreadyPatchedError(
            f"{type(model).__name__} has neural layers by its class. Choose them with `neural_layers` and its other config "
            "fields, or patch the stock model."
        )
    if names := compact_layers(model):
        raise AlreadyPatchedError(
            f"This {type(model).__name__} is patched already, in {listed(names)}, and compact: its stock queries and keys are "
            "gone. Load the stock checkpoint again, and patch that."
        )
    if names := list(patched_modules(model)):
        raise AlreadyPatchedError(
            f"This {type(model).__name__} is patched already, in {listed(names)}. `unpatch(model)` first, then patch it with "
            "all the layers that you want."
        )
    check_unsharded(model)


def check_whole(model: nn.Module, what: str) -> None:
    """Raises a PatchError if a model has compact layers, of which there is nothing to make what is asked for."""
    if names := compact_layers(model):
        raise PatchError(
            f"This {type(model).__name__} cannot be {what}: {listed(names)} {'is' if len(names) == 1 else 'are'} compact, "
            "whose queries and keys, and the layers that made them, are gone. Load the checkpoint again that was there before "
            "`compact`."
        )


def check_unsharded(model: nn.Module, deed: str = "Patch (and calibrate)") -> None:
    """Raises a PatchError if a model is wrapped, or sharded among several processes: what `deed` says is done before."""
    for module in model.modules():
        if is_sharded(module) and (sharers := getattr(model, "tp_size", None) or 1) > 1:
            raise PatchError(
                f"This {type(model).__name__} is shared by {sharers} processes (tensor parallelism), each of which would see "
                f"some of its heads alone. {deed} it in one process, save it whole by `save_pretrained`, and load that with "
                "the same `distributed_config`."
            )
        if is_sharded(module):
            raise PatchError(
                f"{type(module).__name__} has taken over the parameters of this model, and would not know of what is done to "
                f"it. {deed} the model before it is wrapped or sharded."
            )


def check_weights_together(model: nn.Module, what: str) -> None:
    """Raises a PatchError if weights of a model are in parts now, each in another process."""
    if any(map(is_apart, model.parameters())):
        raise PatchError(
            f"This {type(model).__name__} cannot be {what}: its weights are shared out among processes (DeepSpeed ZeRO-3). "
            "Do so in one process, and save the model, to be loaded under ZeRO-3. Or load it before anything asks for ZeRO-3 "
            "(`TrainingArguments`, `HfDeepSpeedConfig`): DeepSpeed shares its weights out when training starts."
        )


def check_settings(proj_dim: Any, hidden_dims: Any, per_head: Any) -> None:
    """Raises a ValueError if a setting is not what it may be; `NeuralScorer` itself checks the others."""
    if proj_dim is not None and not is_positive_int(proj_dim):
        raise ValueError(f"`proj_dim` is {proj_dim!r}; it must be None or an integer of at least 1.")
    if not is_shape(hidden_dims):
        raise ValueError(f'`hidden_dims` is {hidden_dims!r}; it must be "auto", "paper" or two integers of at least 1.')
    if not isinstance(per_head, bool):
        raise ValueError(f"`per_head` is {per_head!r}; it must be True or False.")


def check_implementations(found: Mapping[str, Any]) -> None:
    """Raises an UnsupportedLayerError if an attention module runs under what neural layers cannot; nor could the probe."""
    by_implementation: dict[str | None, list[str]] = {}
    for name, module in found.items():
        by_implementation.setdefault(module.config._attn_implementation, []).append(name)
    for implementation, names in by_implementation.items():
        try:
            check_implementation(implementation, f"A model with attention in {listed(names)}")
        except ValueError as error:
            raise UnsupportedLayerError(f"{error} `model.set_attn_implementation` changes it.") from None


def check_layers(chosen: Mapping[str, Any], calls: Mapping[nn.Module, list[AttentionCall]], reasons: str) -> None:
    """Raises an error that says for each reason which of the chosen layers it speaks against.

    Raises:
        UnsupportedLayerError: if a layer asks for what a score network cannot do.
        ProbeError: if it could not be seen what a layer asks for.
    """
    against: dict[str, list[str]] = {}
    for name, module in chosen.items():
        for reason in reasons_against(module, calls[module]):
            against.setdefault(reason, []).append(name)
    if against:
        raise UnsupportedLayerError(
            "Neural Attention cannot honour what these layers ask for: "
            + "; ".join(f"{listed(names)}: {reason}" for reason, names in against.items())
            + ". Nothing was changed. Choose other layers, if there are any without."
        )
    if unseen := [name for name, module in chosen.items() if not calls[module]]:
        raise ProbeError(
            f"What {listed(unseen)} would ask of a score network could not be seen: no run of the model reached it. {reasons} "
            "Give `example_inputs=` (a dict of what the model's forward takes) that reach it, or choose other layers."
        )


def reasons_against(module: Any, calls: list[AttentionCall]) -> Iterator[str]:
    """Why a score network could not do what an attention module asks for, once per reason."""
    if hasattr(module, "scorer"):
        yield f"its {type(module).__name__} has an attribute `scorer` of its own, in whose place the network would go"
    arguments = {name for call in calls for name in call.arguments}
    yield from unhonoured(module, arguments)
    shapes = [(call.query, call.key, call.value) for call in calls]
    if any(len(tensor) != 4 for call in shapes for tensor in call):
        yield "queries, keys or values that are not [batch, heads, length, size]"
    elif any(query[-1] != key[-1] for query, key, _ in shapes) or len({(query[1], query[-1]) for query, _, _ in shapes}) > 1:
        yield f"heads whose number or size is not always the same (queries and keys {shapes[0][:2]}), so `head_dim` is unclear"
    elif any(attends_among_channels(module, call) for call in calls):
        yield "channels that attend to channels, with heads as long as there are tokens, so `head_dim` is none of the layer's"
    sinks = {call.sinks for call in calls if call.sinks not in (None, call.query[1:2])}
    if sinks:
        yield f"sinks that are not a logit per head ({', '.join(map(str, sinks))})"
    masks = {call.mask for call in calls if call.mask is not None}
    if any(not isinstance(mask, tuple) or len(mask) != 4 for mask in masks):
        yield f"masks that are not [batch, heads, queries, keys] ({', '.join(map(str, masks))})"


def attends_among_channels(module: nn.Module, call: AttentionCall) -> bool:
    """By the module's weights: those of its projections have the size of all heads, which here is that of the queries."""
    _, num_heads, num_queries, size = call.query
    sizes = {size for parameter in module.parameters() for size in whole_shape(parameter)}
    return num_heads * num_queries in sizes and not any(each % (num_heads * size) == 0 for each in sizes)


def as_if_patched(attention: Any) -> Any:
    """What `explain_layer` looks at in a patched module."""
    config = NeuralConfigView(attention.config)
    return SimpleNamespace(config=config, parameters=attention.parameters, modules=attention.modules)
