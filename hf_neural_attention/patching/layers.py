"""Finds a model's attention layers, and chooses among them."""

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import nn

from ..introspection import Call
from ..models.neural_attention_compact import CompactAttentionMixin
from .attention_arguments import fetching_forward
from .errors import NoPatchableLayerError, PatchError, ProbeError
from .module_names import is_cross_attention, says_self_attention, stack_name
from .probing import AttentionCall


Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Layers: TypeAlias = str | Iterable[int] | Iterable[str] | Predicate


def fetches_its_attention(module: nn.Module) -> bool:
    """Whether a module asks Transformers' `AttentionInterface` for the function that its config names."""
    return isinstance(module, CompactAttentionMixin) or fetching_forward(module) is not None


def attention_modules(model: nn.Module) -> dict[str, Any]:
    """All attention modules that can be given another attention function, by name, in the order of the model.

    Raises:
        NoPatchableLayerError: if there is none, naming what looks like attention all the same.
    """
    found = {name: module for name, module in model.named_modules() if fetches_its_attention(module)}
    if found:
        return found
    similar = sorted({type(module).__name__ for module in model.modules() if "attention" in type(module).__name__.lower()})
    looks = f"{', '.join(similar)} compute it themselves" if similar else "none of its modules looks like attention"
    raise NoPatchableLayerError(
        f"The attention of this {type(model).__name__} cannot be reached: no module of it fetches its function from "
        f"Transformers' `AttentionInterface` ({looks}). Patching, `start_scores` and analysis work for models whose attention "
        "modules do (`ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, ...)`)."
    )


def choose_layers(
    layers: Layers,
    found: Mapping[str, nn.Module],
    calls: Mapping[nn.Module, list[AttentionCall]],
    reasons: str,
    inputs_name: str = "example_inputs",
) -> list[str]:
    """Names of the modules that `layers` chooses, in the order of the model.

    Args:
        layers: as in `patch`.
        found: from `attention_modules`.
        calls: from `probe`.
        reasons: why the probe did not reach all modules.
        inputs_name: the argument by which the caller can be given inputs that do.

    Raises:
        NoPatchableLayerError: if nothing is chosen.
        PatchError: if `layers` is neither of what is allowed, or names what is not there.
        ProbeError: if it takes a layer's call to see whether it is meant.
    """
    layers = layers.tolist() if hasattr(layers, "tolist") else layers  # of an array
    if callable(layers):
        if names := [name for name, module in found.items() if layers(name, module)]:
            return names
        raise NoPatchableLayerError(f"The predicate `layers` is true for none of the attention modules: {listed(found)}.")
    wanted = None if layers == "all" else check_list(layers)
    if wanted is not None and isinstance(wanted[0], str):
        if missing := [name for name in wanted if name not in found]:
            raise PatchError(f"`layers` names {listed(missing)}; the attention modules of this model are {listed(found)}.")
        return [name for name in found if name in wanted]
    stacks = self_attention_stacks(found, calls, reasons, inputs_name)
    chosen = {name for stack, names in stacks.items() for name in choose_in_stack(wanted, stack, names, stacks)}
    return [name for name in found if name in chosen]


def check_list(layers: Any) -> list[Any]:
    """The indices or names in `layers`.

    Raises:
        NoPatchableLayerError: if there are none.
        PatchError: if it is anything else, or names a layer twice.
    """
    values = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [None]
    if not all(isinstance(value, str) for value in values) and not all(map(is_index, values)):
        raise PatchError(
            f'`layers` is {layers!r}; it must be "all", a list of indices, a list of names of attention modules, or a '
            "predicate `(name, module) -> bool`."
        )
    if not values:
        raise NoPatchableLayerError("`layers` is empty; it chooses no layer.")
    if len(set(values)) < len(values):
        raise PatchError(f"`layers` is {layers!r}, which names a layer twice.")
    return values


def choose_in_stack(wanted: list[int] | None, stack: str, names: list[str], stacks: Iterable[str]) -> list[str]:
    """Names of the layers of a stack that these indices mean (all of them for None); the other stacks are for the error."""
    if wanted is None:
        return names
    for index in wanted:
        if not -len(names) <= index < len(names):
            raise PatchError(
                f"`layers` is {wanted}, but {index} is no layer of {stack!r}, which has {len(names)} (indices from "
                f"{-len(names)} to {len(names) - 1}). Each stack of layers is counted by itself; this model has "
                f"{listed(stacks)}. Choose the layers of a single one by their names or by a predicate "
                "`(name, module) -> bool`."
            )
    indices = [index % len(names) for index in wanted]
    if len(set(indices)) < len(indices):
        raise PatchError(f"`layers` is {wanted}, which names a layer of {stack!r} twice, as it has {len(names)}.")
    return [names[index] for index in indices]


def self_attention_stacks(
    found: Mapping[str, nn.Module], calls: Mapping[nn.Module, list[AttentionCall]], reasons: str, inputs_name: str
) -> dict[str, list[str]]:
    """Stacks of self-attention layers: names of their modules, by the name of the stack.

    A stack is a list of modules whose names differ in numbers only. It is one of cross-attention if its name or its modules
    say so. Else it is one of self-attention if its name says so, or if in a call of one of them the keys are as many as the
    queries: the probe's own inputs differ in length. Decoders that stand alone have cross-attention that nothing reaches.
    """
    stacks: dict[str, list[str]] = {}
    for name, module in found.items():
        if "*" in stack_name(name) and not is_cross_attention(name, module):
            stacks.setdefault(stack_name(name), []).append(name)
    unseen = [stack for stack, names in stacks.items() if not any(calls[found[name]] for name in names)]
    if unseen:
        raise ProbeError(
            f'What the layers of {listed(unseen)} do could not be seen, so indices and "all" cannot be told apart there: '
            f"{reasons} Give `{inputs_name}=` (a dict of what the model's forward takes) that reach them, or choose other "
            "layers by their names or by a predicate `(name, module) -> bool`."
        )
    kept = {
        stack: names
        for stack, names in stacks.items()
        if says_self_attention(stack)
        or any(call.num_queries == call.num_keys for name in names for call in calls[found[name]])
    }
    if not kept:
        raise NoPatchableLayerError(
            f"This model has no stack of self-attention layers, only {listed(found)}. Choose among them by their names or by "
            "a predicate `(name, module) -> bool`."
        )
    return kept


def tokens_of_queries(model: Any, name: str, module: nn.Module, inputs: Mapping[str, Any], call: Call) -> torch.Tensor | None:
    """Which queries of an attention layer are no padding, `[B or 1, Tq or 1]`, as `Call.without_padding` wants it. None leaves
    that to the mask, which says nothing of queries where keys are others. In cross-attention, it is what the inputs say of the
    decoder, or of the text that looks at images, if it is as long. With keys of a cache, or of virtual tokens, it is what
    they say of the last tokens."""
    batch, _, num_queries, _ = call.query.shape
    is_cross = is_cross_attention(name, module)
    # leaves out what attends to more than its own tokens without a cache, as resamplers of images
    if not is_cross and (call.key.shape[2] == num_queries or not isinstance(getattr(module, "layer_idx", None), int)):
        return None
    is_whole = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    has_encoder = is_whole and "encoder_hidden_states" not in inputs
    mask: Any = inputs.get("decoder_attention_mask" if has_encoder else "attention_mask")
    is_known = mask is not None and mask.dim() == 2
    if is_cross:
        return mask if is_known and mask.shape[1] == num_queries else torch.ones(1, 1)
    if is_whole and not getattr(module, "is_causal", True):
        return None
    return mask[:, -num_queries:] if is_known and len(mask) == batch and mask.shape[1] >= num_queries else None


def is_index(value: Any) -> bool:
    """Whether it is a whole number, of any type of these."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def listed(names: Iterable[str]) -> str:
    """The names in quotes, but a few of them if they are many."""
    names = [repr(name) for name in names]
    shown = names if len(names) <= 8 else [*names[:6], "...", names[-1]]
    return ", ".join(shown) + (f" ({len(names)} in all)" if len(names) > 8 else "")
