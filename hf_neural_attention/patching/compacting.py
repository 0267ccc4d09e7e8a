"""`compact`: neural layers without the queries and keys that their scorers do not need whole."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..diagnostics import explain
from ..introspection import (
    count,
    is_born_neural,
    is_compiled,
    is_sharded,
    left_as_it_was,
    neural_layers,
    once,
    patched_modules,
    unwrap,
)
from ..models.modeling_neural_attention import mark_compact
from ..models.modeling_neural_patched import COMPACT_CLASSES
from ..models.neural_attention_compact import folded_modules, reason_against_folding
from ..models.neural_attention_interface import SUPPORTED_IMPLEMENTATIONS, is_neural
from ..models.neural_attention_names import forget_names, origin_of
from ..models.neural_attention_packing import pack, put_in, watch_caches
from ..models.neural_attention_scorer import is_compact
from .errors import PatchError, UnsupportedLayerError
from .layers import attention_modules, listed
from .reports import CompactPlan, status_of
from .sizes import ModelSize, size_of
from .tracing import Refusal, Run, outputs_of, run, trace


ModelT = TypeVar("ModelT", bound=nn.Module)


class Swap(NamedTuple):
    """A module that takes another's place."""

    name: str
    new: nn.Module


def compact(model: ModelT, *, example_inputs: Mapping[str, Any] | None = None, dry_run: bool = False) -> Any:
    """Makes the neural layers of a model compact, in place: they compute the same with fewer parameters.

    Outputs stay as they were up to rounding: by the tests to 1e-5 of the largest one in float32, and 1e-12 in float64.

    A scorer sees a query and a key through linear maps to `h1 = hidden_dims[0]` numbers. In modes `"replace"` and `"thin"`,
    where nothing happens to queries and keys between their projection and the scorer, hidden states are projected to these
    numbers at once, and any cache keeps `h1` numbers of a key and head, not `head_dim`. Queries and keys are gone then: such a
    model is trained, saved and run like others, but not patched, unpatched or calibrated.

    It takes models of this package, GPT-2 and ViT that `patch` has changed, and patched models of other families whose
    queries and keys are what a linear layer inside the attention module makes, times a constant at most (BERT, BART, T5, CLIP
    ...; not those with rotary positions, or norms of queries and keys). Those other families run on a few random numbers
    before and after. Their two layers get rows that are not read up to a multiple of `head_dim`, since their forward counts
    heads of that size, and caches of fixed size do not take their keys, which come in fewer heads than the values.

    Everything is checked before anything is changed: after an error the model is what it was.

    Args:
        model (`nn.Module`): In memory, and not compiled, sharded, quantised, or with adapters or hooks around its neural
            attention. Make the optimiser afterwards.
        example_inputs (`dict`, *optional*): Arguments for the forward of a model of another family, if it does not run on
            inputs made from its config.
        dry_run (`bool`): Return what would be done instead: a `CompactPlan`, to be printed. Default: False.

    Returns:
        The model itself, or a `CompactPlan`.

    Raises:
        TypeError: if `model` is no module.
        PatchError: (a ValueError) if the model has no neural layer, is compact already, or cannot be, with the reason: mode
            `"residual"`, rotary positions, adapters ... UnsupportedLayerError where single layers are the reason.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`compact` takes a model, not a {type(model).__name__}.")
    if reason := reason_against(model):
        raise PatchError(f"This {type(model).__name__} cannot be made compact: {reason}. Nothing was changed.")
    base: Any = model
    own = is_born_neural(model)
    classes = {base.compact_attention_class.stock_class(): base.compact_attention_class} if own else COMPACT_CLASSES
    layers = patched_modules(model)
    # takes a module once that has several places
    others = {name: module for name, module in once(layers).items() if not takes(classes, module)}
    traces, runs = trace(model, others, example_inputs) if others else ({}, [])
    check_traces({name: found for name, found in traces.items() if isinstance(found, Refusal)})
    before = size_of(model, example_inputs=example_inputs) if dry_run else None
    with torch.no_grad():
        swaps = [Swap(name, made) for name, made in folded_modules(model, classes).items()]
        for name, found in traces.items():
            assert not isinstance(found, Refusal)
            packed = pack(others[name], found.query, found.key, found.num_heads)
            parts = (*packed[:2], ("scorer", packed.scorer))
            swaps += [Swap(f"{name}.{part}", made) for part, made in parts]
    folded_from = origin_of(model) or type(model).__name__
    for swap in swaps:
        if hasattr(scorer := getattr(swap.new, "scorer", swap.new), "hidden_dims"):
            scorer.folded_from = folded_from
    expected = outputs(model, runs)
    undo = make(model, swaps)
    try:
        check_outputs(model, runs, expected, list(others))
        if before is not None:
            return plan_of(model, before, layers, example_inputs, undo)
    except BaseException:
        undo()
        raise
    for module in others.values():
        watch_caches(module)
    if own:
        mark_compact(model)
    forget_names(model)
    return model


def reason_against(model: nn.Module) -> str | None:
    """Why a model cannot be made compact now, or None if no reason is known before it has run."""
    if any(map(is_sharded, model.modules())):
        return "its parameters have been taken over for training by several processes; make it compact before"
    if is_compiled(model):
        return "it is compiled; make it compact before"
    if unwrap(model) is not model:
        return f"it is inside a {type(model).__name__}; merge adapters (`merge_and_unload`), or unwrap it"
    if is_born_neural(model) and not hasattr(model, "compact_attention_class"):
        return "a part of it is of a class with neural layers; make that part compact by itself"
    if not patched_modules(model) and any(neural_layers(model)):
        return (
            "its neural layers are not of this package's code, but of code that came with a checkpoint, or were put there by "
            "hand; load the checkpoint with `hf_neural_attention.from_pretrained`"
        )
    if is_neural(model):
        return "it is an attention module by itself; make the model that holds it compact"
    implementations = {module.config.base._attn_implementation for module in patched_modules(model).values()}
    if unsupported := implementations - {*SUPPORTED_IMPLEMENTATIONS, None}:
        return f"it runs under {', '.join(map(repr, sorted(unsupported)))}; `model.set_attn_implementation` changes it"
    if reason := reason_against_folding(model):
        return reason
    for name, module in patched_modules(model).items():
        parts = module.named_modules() if type(module) in COMPACT_CLASSES else ()
        for part_name, part in parts:
            if hasattr(part, "weight") and not part_name.startswith("scorer.") and type(part) not in (nn.Linear, Conv1D):
                return f"'{name}.{part_name}' is a {type(part).__name__}, whose weights are not plain"
    return None


def takes(classes: Mapping[type, type], attention: Any) -> bool:
    """Whether there is a compact class for an attention module, or it is compact already."""
    return is_compact(attention.scorer) or (type(attention) in classes and not getattr(attention, "is_cross_attention", False))


def check_traces(refusals: Mapping[str, Refusal]) -> None:
    """Raises an UnsupportedLayerError that says for each reason which layers it speaks against."""
    against: dict[str, list[str]] = {}
    for name, refusal in refusals.items():
        against.setdefault(refusal.reason, []).append(name)
    if against:
        raise UnsupportedLayerError(
            "These layers cannot be made compact: "
            + "; ".join(f"{listed(names)}: {reason}" for reason, names in against.items())
            + ". Nothing was changed."
        )


def make(model: nn.Module, swaps: list[Swap]) -> Callable[[], None]:
    """Puts the new modules in their places, and returns what puts the old ones back."""
    old = [(swap.name, put_in(model, *swap)) for swap in swaps]

    def undo() -> None:
        for name, module in reversed(old):
            put_in(model, name, module)

    return undo


def outputs(model: nn.Module, runs: list[Run]) -> dict[str, list[torch.Tensor]]:
    """What all attention modules of a model return in some runs, by name."""
    found: dict[str, list[torch.Tensor]] = {}
    if runs:
        with left_as_it_was(model), torch.no_grad(), outputs_of(attention_modules(model), found):
            for part, inputs in runs:
                run(part, inputs)
    return found


def check_outputs(model: nn.Module, runs: list[Run], expected: Mapping[str, list[torch.Tensor]], names: list[str]) -> None:
    """Raises an UnsupportedLayerError if attention computes something else than before, beyond rounding."""
    try:
        actual = outputs(model, runs)
    except Exception as error:
        raise UnsupportedLayerError(
            f"The layers {listed(names)} cannot be made compact: their forward counts heads by itself, and takes no fewer "
            f"({type(error).__name__}: {error}). Nothing was changed."
        ) from error
    for name, tensors in expected.items():
        for before, after in zip(tensors, actual[name], strict=True):
            # allows half the digits, since layers before it were rounded as well; a wrong fold changes the first one
            bound = torch.finfo(before.dtype).eps ** 0.5 * before.abs().max().item()
            if before.shape != after.shape or not (after - before).abs().max().item() <= bound:
                raise UnsupportedLayerError(
                    f"The layers {listed(names)} cannot be made compact: what {name!r} returns would change beyond rounding, "
                    "so its queries and keys are used for more than scores. Nothing was changed."
                )


def plan_of(
    model: nn.Module,
    before: ModelSize,
    layers: dict[str, Any],
    example_inputs: Mapping[str, Any] | None,
    undo: Callable[[], None],
) -> CompactPlan:
    """What has been done, which this undoes."""
    after = size_of(model, example_inputs=example_inputs)
    status = status_of(model)
    backends = explain(model)
    undo()
    # counts the scorer of a module once that has several places
    numbers, size = count(parameter for module in once(layers).values() for parameter in module.scorer.parameters())
    stock = ModelSize(before.num_parameters - numbers, before.num_bytes - size, before.cache_bytes_per_token)
    return CompactPlan(status, stock, before, after, backends)
