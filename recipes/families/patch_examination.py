"""What becomes of a model that is patched: whether it stays what it was, changes, and comes back."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedModel

from hf_neural_attention.introspection import observed, use_eager
from hf_neural_attention.models.neural_attention_interface import mask_of_call
from hf_neural_attention.patching import NoPatchableLayerError, PatchError, ProbeError, patch, patch_status, patched, unpatch
from hf_neural_attention.patching.attention_arguments import stock_functions
from hf_neural_attention.patching.example_inputs import possible_inputs
from hf_neural_attention.patching.layers import attention_modules, stack_name
from hf_neural_attention.patching.probing import recording


# Tell, as keys of a record, where a model has such tokens, and such masks
ZEROS, BOOLEAN = "zeros_in_padding", "boolean_masks"


@torch.no_grad()
def draw(model: PreTrainedModel) -> PreTrainedModel:
    """Weights that keep numbers at about one: as some configs have them, attention would not show in the outputs."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.numel() and parameter.is_floating_point():
            parameter.normal_(std=(parameter.shape[0] / parameter.numel()) ** 0.5)
    return model


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Every number that a model returns; models that mask at random mask the same each time."""
    torch.manual_seed(0)
    leaves = tree_leaves(list(dict(model(**copy.deepcopy(inputs))).values()))
    return [leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def runnable_part(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The outermost part of a model that runs on generic inputs, and those inputs, with random numbers: equal tokens would get
    equal answers from any attention."""
    reason = "its inputs are not known here"
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        for inputs in possible_inputs(part, torch.device("cpu"), torch.float32):
            drawn = {name: torch.randn_like(x) if x.is_floating_point() else x for name, x in inputs.items()}
            try:
                if outputs_of(part, drawn):
                    return part, drawn
            except Exception as error:  # noqa: BLE001, catches whatever a model says to inputs that it was not made for
                reason = in_a_line(error)
    raise RuntimeError(f"no run on generic inputs: {reason}")


def examine(model: PreTrainedModel, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """What becomes of one model: "works", "works with inputs", "refused", "no interface", or "fails".

    Args:
        inputs: arguments for its forward; if None, those of `runnable_part`.

    Raises:
        RuntimeError: if that cannot be found out.
    """
    record: dict[str, Any] = {"class": type(model).__name__}
    try:
        record |= {"attention_layers": len(attention_modules(model))}
    except NoPatchableLayerError as error:
        return {**record, "status": "no interface", "reason": reason_in_brackets(error)}
    draw(model.eval())
    part, ours = (model, inputs) if inputs is not None else runnable_part(model)
    before = outputs_of(part, ours)
    examples, why = None, ""
    try:
        try:
            patch(model, "all")
        except ProbeError as error:
            if inputs is None:
                raise
            examples, why = inputs, in_a_line(error)
            patch(model, "all", example_inputs=examples)
    except PatchError as error:
        return {**record, "status": "refused", "reason": in_a_line(error)}
    names = [layer.layer for layer in patch_status(model)]
    record |= {"patched_layers": len(names), "stacks": sorted({stack_name(name) for name in names})}
    residual = outputs_of(part, ours)
    unpatch(model)
    check_that_attention_shows(model, part, ours, names)
    with patched(model, "all", mode="replace", example_inputs=examples):
        replaced = outputs_of(part, ours)
    wrong, noted = differing(model, part, ours, names, residual, 1e-4)
    if all(map(torch.equal, replaced, before)):
        wrong.append("replace mode changes nothing")
    if any((old.isfinite() & ~new.isfinite()).any() for old, new in zip(before, replaced, strict=True)):
        wrong.append("replace mode makes numbers that are not finite")
    if not all(map(torch.equal, outputs_of(part, ours), before)):
        wrong.append("unpatching does not bring the outputs back")
    use_eager(model)
    with patched(model, "all", example_inputs=examples):
        residual = outputs_of(part, ours)
    # allows for rounding beside sinks, which stock functions bring in before, in or after the softmax, and in layers that
    # stay under sdpa since their config is a copy (CLIPSeg's decoder)
    layers: list[Any] = [model.get_submodule(name) for name in names]
    rounds = any(hasattr(layer, "sinks") or layer.config._attn_implementation != "eager" for layer in layers)
    bound = 1e-5 if rounds else 0.0
    wrong_when_eager, noted_when_eager = differing(model, part, ours, names, residual, bound)
    wrong += [f"eager: {problem}" for problem in wrong_when_eager]
    for what in sorted(noted | noted_when_eager):
        record[what] = ["as built"] * (what in noted) + ["eager"] * (what in noted_when_eager)
    if wrong:
        return {**record, "status": "fails", "reason": ", ".join(wrong)}
    return {**record, "status": "works with inputs", "reason": why} if why else {**record, "status": "works"}


def check_that_attention_shows(model: nn.Module, part: nn.Module, inputs: dict[str, Any], names: list[str]) -> None:
    """Raises a RuntimeError if the outputs of `part` do not depend on what attention gives."""
    expected = outputs_of(part, inputs)
    with recording(model, {name: [] for name in names}):  # makes their attention give zeros
        if max(map(relative, outputs_of(part, inputs), expected)) < 1e-5:
            raise RuntimeError("the outputs of its small random model do not depend on attention")


def differing(
    model: nn.Module,
    part: nn.Module,
    inputs: dict[str, Any],
    names: list[str],
    residual: list[torch.Tensor],
    tolerance: float,
) -> tuple[list[str], set[str]]:
    """What is wrong with the outputs of mode "residual", beside those of the stock model; and where stock attention had to be
    told of masks what scorers know (`masks_honoured`)."""
    if largest(residual, outputs_of(part, inputs)) <= tolerance:
        return [], set()
    with masks_honoured(model, names) as noted:
        difference = largest(residual, outputs_of(part, inputs))
    return ([f"residual mode changes the outputs (by {difference:.1e})"] if difference > tolerance else []), noted


@contextmanager
def masks_honoured(model: nn.Module, names: list[str]) -> Iterator[set[str]]:
    """Lets stock attention take masks as scorers do, and says what that was needed for.

    `ZEROS`: tokens that may attend to nothing get zeros. Else they get the mean of all values, where a mask is the lowest
    finite number. `BOOLEAN`: a boolean mask says which pairs count. Else eager attention adds it to the scores, as 0 and 1.
    """
    noted: set[str] = set()

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        implementation = module.config.base._attn_implementation
        own = next(iter(stock_functions(module)))
        if implementation == "eager" and mask is not None and mask.dtype == torch.bool:
            noted.add(BOOLEAN)
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        output, weights = AttentionInterface().get_interface(implementation, own)(module, query, key, value, mask, **arguments)
        causal, bias = arguments.get("is_causal"), arguments.get("position_bias")
        mask, *_ = mask_of_call(module, implementation, query, key, mask, causal, bias)
        if mask is None:
            return output, weights
        sees_nothing = ~(mask if mask.dtype == torch.bool else mask > float("-inf")).any(-1, keepdim=True)
        if sees_nothing.any():
            noted.add(ZEROS)
        weights = weights if weights is None else weights.masked_fill(sees_nothing, 0.0)
        return output.masked_fill(sees_nothing.transpose(1, 2), 0.0), weights

    with observed([model.get_submodule(name) for name in names], attend):
        yield noted


def largest(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(relative(a, b) for a, b in zip(actual, expected, strict=True))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest number; infinities and NaN that both have do not count."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = (actual - expected).masked_fill(same, 0.0).nan_to_num(float("inf"))
    finite = expected[expected.isfinite()]
    return difference.abs().max().item() / max(1e-6, finite.abs().max().item()) if finite.numel() else 0.0


def in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if library := re.search(r"requires the (\w+) library", text):
        return f"needs {library[1]}"
    return text if isinstance(error, PatchError) else text[:160]


def num_attention_layers(model: nn.Module) -> int:
    try:
        return len(attention_modules(model))
    except NoPatchableLayerError:
        return 0


def reason_in_brackets(error: Exception) -> str:
    found = re.search(r"`AttentionInterface` \((.*?)\)\.", str(error))
    return found[1] if found else str(error)
