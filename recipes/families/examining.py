"""What becomes of a model that is patched: whether it stays what it was, changes, and comes back."""

import copy
import re
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from hf_neural_attention.patching import NoPatchableLayerError, PatchError, ProbeError, patch, patched, unpatch
from hf_neural_attention.patching.inputs import possible_inputs
from hf_neural_attention.patching.layers import attention_modules, stack_name
from hf_neural_attention.patching.probing import recording


@torch.no_grad()
def draw(model: PreTrainedModel) -> PreTrainedModel:
    """Weights that keep numbers at about one: as some configs have them, attention would not show in the outputs."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
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
    status, settings, plan = "works", {}, None
    try:
        plan = patch(model, "all", dry_run=True)
    except PatchError as error:
        if inputs is None or not isinstance(error, ProbeError):
            return {**record, "status": "refused", "reason": in_a_line(error)}
        status, settings = "works with inputs", {"example_inputs": inputs}
        reason = in_a_line(error)
    try:
        plan = plan or patch(model, "all", dry_run=True, **settings)
    except PatchError as error:
        return {**record, "status": "refused", "reason": in_a_line(error)}
    names = [layer.layer for layer in plan.layers]
    record |= {"patched_layers": len(names), "stacks": sorted({stack_name(name) for name in names})}
    if wrong := problems(model, part, ours, names, settings):
        return {**record, "status": "fails", "reason": wrong}
    return {**record, "status": status, **({} if status == "works" else {"reason": reason})}


def problems(model: PreTrainedModel, part: nn.Module, inputs: dict[str, Any], names: list[str], settings: dict) -> str:
    """What goes wrong when all self-attention layers of a model are patched, in words; "" if nothing does.

    Raises:
        RuntimeError: if the outputs of `part` do not depend on attention.
    """
    expected = outputs_of(part, inputs)
    with recording(model, {name: [] for name in names}):  # makes their attention give zeros
        if max(map(relative, outputs_of(part, inputs), expected)) < 1e-5:
            raise RuntimeError("the outputs of its small random model do not depend on attention")
    for implementation in ("as built", "eager"):
        if implementation == "eager":
            model.set_attn_implementation("eager")
        expected = outputs_of(part, inputs)
        with patched(model, "all", **settings):
            residual = outputs_of(part, inputs)
        patch(model, "all", mode="replace", **settings)
        replaced = outputs_of(part, inputs)
        unpatch(model)
        difference = max(relative(a, b) for a, b in zip(residual, expected, strict=True))
        found = {
            "residual mode changes the outputs": difference > (0.0 if implementation == "eager" else 1e-4),
            "replace mode changes nothing": all(map(torch.equal, replaced, expected)),
            "unpatching does not bring the outputs back": not all(map(torch.equal, outputs_of(part, inputs), expected)),
        }
        if wrong := [problem for problem, there in found.items() if there]:
            return f"{implementation}: {', '.join(wrong)} (by {difference:.1e})"
    return ""


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest number; equal infinities and NaN do not count."""
    difference = (actual - expected).masked_fill(actual == expected, 0.0).nan_to_num(0.0)
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
