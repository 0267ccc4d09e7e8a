"""Which arguments of an attention function mean something to it. Models hand on whatever they were called with."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import AttentionInterface

from ..models.neural_attention_interface import UNSUPPORTED_ARGUMENTS


# Lists what every attention function takes
TENSORS = {"module", "query", "key", "value", "attention_mask"}

# Lists arguments of stock attention functions that `neural_attention_forward` honours, or that are part of the mask already
HONOURED_ARGUMENTS = {"dropout", "is_causal", "output_attentions", "position_bias", "s_aux", "scaling", "sinks"}
HONOURED_ARGUMENTS |= {"sliding_window", "softcap"}

# Lists those that stock models hand on and no stock attention function takes, for modules whose own function is not known
LEFTOVER_ARGUMENTS = {
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "deterministic",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}


def fetching_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of a module that asks Transformers' `AttentionInterface` for the function that its config names, if it is
    one of this kind."""
    for parent in type(module).__mro__:
        if "forward" in vars(parent):
            forward = inspect.unwrap(vars(parent)["forward"])
            names = names_in(forward)
            if {"get_interface", "_attn_implementation"} <= names:
                return forward
            if "super" not in names:
                return None
    return None


def names_in(function: Any) -> set[str]:
    """What a function's code refers to by name."""
    code = getattr(function, "__code__", None)
    return set(code.co_names) if code else set()


def unhonoured(module: nn.Module, arguments: set[str]) -> Iterator[str]:
    """What a score network cannot honour of the arguments of a module's attention function, in words. An argument that no
    stock function takes by name is left over from the call of the model, and changes nothing."""
    for name in sorted(arguments & UNSUPPORTED_ARGUMENTS.keys()):
        yield f"{UNSUPPORTED_ARGUMENTS[name]} (`{name}`)"
    own = stock_functions(module)
    taken = set().union(*map(taken_by, [*own, AttentionInterface()["sdpa"]])) if own else arguments - LEFTOVER_ARGUMENTS
    for name in sorted((arguments & taken) - UNSUPPORTED_ARGUMENTS.keys() - HONOURED_ARGUMENTS):
        yield f"an argument `{name}` of its attention function, of which it is not known here what it does"


def takes_what_is_known(module: nn.Module) -> bool:
    """Whether a module's own attention functions take by name nothing but what can be honoured, or is refused when it comes:
    then it does not matter who calls the module with what."""
    own = stock_functions(module)
    names = set().union(*(inspect.signature(function).parameters for function in own))
    tensors = {f"{name}_states" for name in TENSORS} | TENSORS | {"kwargs"}
    return bool(own) and names <= HONOURED_ARGUMENTS | UNSUPPORTED_ARGUMENTS.keys() | tensors


def stock_functions(module: nn.Module) -> list[Callable[..., Any]]:
    """The functions that compute attention in the code around a module: its own, for "eager"."""
    forward = fetching_forward(module)
    if forward is None:
        return []
    around = getattr(forward, "__globals__", {})
    return [around[name] for name in sorted(names_in(forward)) if takes_attention(around.get(name))]


def takes_attention(candidate: Any) -> bool:
    """Whether this is a function of a module, queries, keys, values and a mask."""
    if not inspect.isfunction(candidate):
        return False
    names = list(inspect.signature(candidate).parameters)
    return names[:1] == ["module"] and "attention_mask" in names[:5]


def taken_by(function: Callable[..., Any], seen: frozenset[Any] = frozenset()) -> set[str]:
    """Arguments that a function takes by name, or reads from its `**kwargs`, or may hand on in these to functions that take
    them."""
    code, taken = function.__code__, set(inspect.signature(function).parameters)
    if function in seen or not code.co_flags & inspect.CO_VARKEYWORDS:
        return taken
    read = {constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier()}
    around = (function.__globals__.get(name) for name in code.co_names)
    others = [other for other in around if inspect.isfunction(other) and other.__code__.co_flags & inspect.CO_VARKEYWORDS]
    return taken.union(read, *(taken_by(other, seen | {function}) for other in others))
