"""Says which backend runs, and why no faster one does: `explain`."""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .introspection import hooks_of, is_compiled, neural_layers, place_of
from .models.neural_attention_backends import AUTO, BACKENDS, check_devices, choose_backend
from .models.neural_attention_functional import check_arguments, check_score_options
from .models.neural_attention_pytorch import Inputs
from .models.neural_attention_scorer import check_parts, is_quantised
from .ops.choice import Asked, asked_backend
from .ops.native_build import ONE_THREAD, has_one_thread


LAYERS = ("q_proj", "k_proj", "linear1", "linear2", "linear3")


class LayerBackend(NamedTuple):
    """What one neural layer, or one call of the operation, runs on."""

    layer: str  # qualified name of the module that holds the scorer; "inputs" for a call
    backend: str | None  # None: it raises, with `reason`
    is_fused: bool
    reason: str | None  # why it is not a fused backend
    notes: tuple[str, ...]  # whatever else about the layer is not as plain as it could be


class Explanation(tuple[LayerBackend, ...]):
    """One `LayerBackend` per neural layer. `str()` makes a table of it."""

    def __str__(self) -> str:
        remarks: dict[str, int] = {}  # text -> number of the footnote
        rows = [("layer", "backend", "fused", "")]
        for layer in self:
            texts = ((layer.reason,) if layer.reason else ()) + layer.notes
            numbers = [remarks.setdefault(text, len(remarks) + 1) for text in texts]
            marks = "".join(f"[{number}]" for number in numbers)
            rows.append((layer.layer, layer.backend or "error", "yes" if layer.is_fused else "no", marks))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *([""] if remarks else []), *(f"[{number}] {text}" for text, number in remarks.items())])

    __repr__ = __str__


def explain(
    model_or_query: nn.Module | torch.Tensor,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    scorer: Any = None,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    backend: str | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    keys_projected: bool = False,
    queries_projected: bool = False,
) -> Explanation:
    """Says for each neural layer which backend runs and, if it is not a fused one, why not. Runs none of them.

    Whether the native kernel can be had is found out by compiling it, if that was never done here.

    Args:
        model_or_query (`nn.Module` or `torch.Tensor`): A model with neural layers, however wrapped, or the query of a call of
            `neural_attention`, whose other arguments then follow.
        backend (`str`, *optional*): As in `neural_attention`. For a model: as if inside `use_backend(backend)`.

    Returns:
        `Explanation`: a tuple of `LayerBackend`, one per neural layer in the order of the model (one for a call). Printing it
        shows a table.

    Raises:
        TypeError: if the first argument is neither a module nor a tensor, or the arguments of a call are incomplete.
        ValueError: if the model has no neural layer, the arguments of a call do not fit, or there is no such backend.
    """
    if isinstance(model_or_query, nn.Module):
        of_a_call = (key, value, scorer, attn_mask, scale, sinks, softcap)
        flags = (dropout_p, is_causal, keys_projected, queries_projected)
        if any(argument is not None for argument in of_a_call) or any(flags):
            raise TypeError("`explain` takes a model alone, or the arguments of `neural_attention`; it got a model and more.")
        layers = [explain_layer(name, parent, found, backend) for name, parent, found in neural_layers(model_or_query)]
        if not layers:
            raise ValueError(
                f"This {type(model_or_query).__name__} has no neural layer: none of its modules has a `NeuralScorer`."
            )
        if is_compiled(model_or_query):
            note = "torch.compile: what is compiled already keeps the backend that it was compiled with"
            layers = [layer._replace(notes=(*layer.notes, note)) for layer in layers]
        return Explanation(layers)
    if not isinstance(model_or_query, torch.Tensor):
        raise TypeError(f"`model_or_query` is a {type(model_or_query).__name__}; expected a model or a query tensor.")
    if key is None or value is None or scorer is None:
        raise TypeError("`explain` needs `key`, `value` and `scorer` beside a query, as `neural_attention` does.")
    check_parts(scorer, model_or_query, key)
    weights = scorer.weights()
    projected = (keys_projected, queries_projected) if weights.has_first_layer else (True, True)
    check_arguments(model_or_query, key, value, weights, attn_mask, dropout_p, scorer.mode, *projected)
    check_score_options(model_or_query.shape[1], sinks, softcap)
    check_devices(model_or_query, key=key, value=value, attn_mask=attn_mask, sinks=sinks)
    head_dim = max(model_or_query.shape[-1], value.shape[-1])
    device = model_or_query.device
    inputs = Inputs(device.type, model_or_query.dtype, head_dim, device_index=device.index)
    return Explanation([explain_choice("inputs", scorer, inputs, backend, dropout_p)])


def explain_layer(name: str, attention: nn.Module, scorer: Any, backend: str | None) -> LayerBackend:
    """Of one layer of a model: as `neural_attention_forward` runs it."""
    device, dtype = place_of(attention)
    # asks for the values' size as well, which compact scorers do not know
    head_dim = max(scorer.head_dim, getattr(attention, "head_dim", 0) or 0)
    inputs = Inputs(device.type, dtype, head_dim, device_index=device.index)
    # looks behind the view, since the model's own config says in which form weights and masks are wanted
    config = getattr(getattr(attention, "config", None), "base", None)
    is_eager = config is not None and (getattr(config, "_attn_implementation", None) or "eager") == "eager"
    if is_eager and not lacks_weights(scorer, inputs):
        asked_backend(backend)  # raises for an unknown name, which is an error under every implementation
        reason = (
            'attn_implementation="eager" returns the attention weights, which only the reference holds: '
            '`model.set_attn_implementation("sdpa")` makes the fused backends available'
        )
        return LayerBackend(name, "reference", False, reason, notes_on(scorer, inputs))
    return explain_choice(name, scorer, inputs, backend)


def explain_choice(name: str, scorer: Any, inputs: Inputs, backend: str | None, dropout_p: float = 0.0) -> LayerBackend:
    asked = asked_backend(backend)
    notes = notes_on(scorer, inputs)
    if lacks_weights(scorer, inputs):
        reason = f"the scorer's weights are on the meta device, without numbers, and the tokens on {inputs.device_type!r}"
        return LayerBackend(name, None, False, reason, notes)
    if scorer.mode == "thin":
        return explain_thin(name, asked, dropout_p, notes)
    # finds models from the Hub whose code was imported where this package was missing, and so brings copies of two backends
    if not backends_of(scorer).keys() >= BACKENDS.keys():
        reason = f"its code, {type(scorer).__module__}, does not use this package's backends but copies of two"
        return LayerBackend(name, "blockwise", False, reason, notes)
    try:
        choice = choose_backend(asked.name, inputs)
    except ValueError as error:
        reason = str(error) if asked.name == AUTO else f"{asked.source} asks for {asked.name!r}: {error}"
        return LayerBackend(name, None, False, reason, notes)
    if choice.name == "native" and has_one_thread(torch.promote_types(inputs.dtype, torch.float32)):
        notes = (*notes, ONE_THREAD)
    is_fused, why_not = BACKENDS[choice.name].is_fused, None
    if not is_fused and asked.name != AUTO:
        best = choose_backend(AUTO, inputs).name
        instead = "" if best == choice.name else f" ({AUTO!r} would take {best!r})"
        why_not = f"{asked.source} asks for {asked.name!r}{instead}"
    elif not is_fused:
        why_not = "; ".join(f"{candidate}: {why}" for candidate, why in choice.reasons.items())
    return LayerBackend(name, choice.name, is_fused, why_not, notes)


def explain_thin(name: str, asked: Asked, dropout_p: float, notes: tuple[str, ...]) -> LayerBackend:
    """Of a dot product of few numbers, which torch's own attention computes, whatever backend is chosen but one."""
    kind = 'mode="thin": a dot product, through SDPA, but with dropout through the reference, which keeps all scores in memory'
    if asked.name not in (AUTO, "reference"):
        kind = f"{kind}; {asked.source} asks for {asked.name!r}, of which it takes no notice"
    why = f"{asked.source} asks for {asked.name!r}" if asked.name == "reference" else None
    if dropout_p > 0:
        why = why or "with dropout the reference runs, which drops the pairs that every backend drops for a seed"
    return LayerBackend(name, "sdpa" if why is None else "reference", why is None, why, (*notes, kind))


def layers_of(scorer: Any) -> dict[str, Any]:
    """The linear layers of a scorer; a compact one has no first layer, and one of mode "thin" no network."""
    return {name: layer for name in LAYERS if (layer := getattr(scorer, name, None)) is not None}


def backends_of(scorer: Any) -> dict[str, Any]:
    """The backends that a scorer's own code chooses among: that of a model from the Hub has a registry of its own."""
    name = type(scorer).__module__.replace("neural_attention_scorer", "neural_attention_backends")
    return getattr(sys.modules.get(name), "BACKENDS", BACKENDS)


def notes_on(scorer: Any, inputs: Inputs) -> tuple[str, ...]:
    """What about a scorer is wrapped, quantised, offloaded or not called, the layers' names in front."""
    layers: dict[str, list[str]] = {}
    for name, layer in layers_of(scorer).items():
        for note in notes_on_layer(layer, inputs):
            layers.setdefault(note, []).append(name)
    found = [f"scorer.{', '.join(names)}: {note}" for note, names in layers.items()]
    if inputs.device_type == "meta":
        found.append("on the meta device: shapes only, no numbers")
    if scorer.mode == "residual":
        found.append('mode="residual": the dot product is computed as well, and keys are cached whole')
    return tuple(found)


def notes_on_layer(layer: Any, inputs: Inputs) -> Iterator[str]:
    """Kept in step with `effective_weights`, which says what the operation gets of such a layer."""
    base = base_of(layer)
    honoured = "what the layer makes of the identity matrix is used as its weight"
    if base is not layer:
        state = ", merged" if getattr(layer, "merged", False) else ""
        state = ", disabled" if getattr(layer, "disable_adapters", False) else state
        yield f"under an adapter of peft{state}; {honoured}"
        if any(isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules()):
            yield "in training, the adapter's dropout drops an input of the layer for all tokens of a call at once"
    if not is_plain(base):
        yield f"quantised or wrapped ({type(base).__module__}.{type(base).__name__}); {honoured}"
        if getattr(base, "activation_qtype", None) is not None:
            yield (
                "with quantised activations, scaled for the identity matrix instead of tokens, its weights are inexact: leave "
                'scorers out (`exclude="*scorer*"`)'
            )
    elif is_quantised(base.weight):
        yield f"the weight is quantised ({type(base.weight).__name__}); the numbers that it stands for are used"
    elif type(base.weight) not in (nn.Parameter, torch.Tensor):
        yield f"the weight is a {type(base.weight).__name__}, which is used as it is and untried"
    elif base.weight.is_meta and hooks_of(base):
        yield "offloaded by accelerate; the weights are brought in for each call"
    if is_plain(layer) and layer._forward_pre_hooks:
        yield f"called for its forward pre-hooks, which pruning and norms of weights use; {honoured}"
    elif is_plain(layer) and layer._forward_hooks:
        yield "its forward hooks are not called, since the operation takes its weights and does not call it"


def base_of(layer: Any) -> Any:
    """The layer itself, without peft's adapters around it."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def lacks_weights(scorer: Any, inputs: Inputs) -> bool:
    """Whether a layer is on the meta device by itself: not with the tokens, and not since accelerate has offloaded it."""
    bases = [base_of(layer) for layer in layers_of(scorer).values()]
    lacking = [base for base in bases if getattr(base.weight, "is_meta", False)]  # is a method of layers that torch quantised
    return inputs.device_type != "meta" and not all(map(hooks_of, lacking))


def is_plain(layer: nn.Module) -> bool:
    """By name beside `nn.Linear`, since models from the Hub bring a class of their own."""
    return type(layer) is nn.Linear or type(layer).__name__ == "PerHeadLinear"
