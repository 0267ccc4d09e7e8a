"""Which weights make the queries and keys of an attention module, and how they are made larger.

Each layer inside an attention module hands on a tensor without a history. What the attention function gets then has a history
that ends there, and its derivatives say which outputs of which layers it is made of, of how many degrees.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..models.neural_attention_reference import in_float64


# Takes what a norm hands on for as large as its gains if it is so near, relative to it: where they are equal, as in new
# models, and where they are not
NEAR, NEAR_OF_TRAINED = 0.02, 0.25


@dataclass
class Source:
    """Outputs of a layer of which queries, or keys, are made."""

    name: str  # of the layer in its attention module
    layer: Any
    units: torch.Tensor  # [outputs], bool
    normalised: Any | None  # the norm whose output is the layer's input; itself, of a norm
    inputs: torch.Tensor = field(repr=False)

    def scale(self, factor: float) -> None:
        """Multiplies these outputs by a factor, for any input.

        Raises:
            ValueError: if they do not become what they should, as those of a layer that computes something else would.
        """
        before = self.output()
        bias = getattr(self.layer, "bias", None)
        with torch.no_grad():
            if isinstance(self.layer, Conv1D):
                self.layer.weight[:, self.units] *= factor
            elif offset := offset_of_gain(self.layer):
                self.layer.weight += (factor - 1) * (offset + self.layer.weight) * self.units
            else:
                self.layer.weight[self.units] *= factor
            if bias is not None:
                bias[self.units] *= factor
        after, size = self.output(), factor * before
        if not torch.allclose(after.float(), size.float(), rtol=0.05, atol=0.01 * size.abs().max().item()):
            raise ValueError(f"the outputs of its {self.name!r} do not grow as its weights do")

    def output(self) -> torch.Tensor:
        return self.layer.forward(self.inputs)[..., self.units]

    def size(self) -> float:
        """Root mean square of these outputs, their inputs being independent, as a norm hands them on."""
        if is_norm(self.layer):
            return rms(gain_of(self.layer)[self.units])
        weight = self.rows() * gain_of(self.normalised)
        return weight.square().sum(-1).mean().sqrt().item()

    def is_off_size(self) -> bool:
        """Whether the norm that this hangs on hands on states of another size than that of its gains: what it gets may be
        small beside the constant that it adds, or it may be no norm but for its name."""
        norm: Any = self.layer if is_norm(self.layer) else self.normalised
        states = self.layer.forward(self.inputs) if norm is self.layer else self.inputs
        sizes = states.float().square().mean(-1).sqrt()
        gains = gain_of(norm)
        near = NEAR if gains.min() == gains.max() else NEAR_OF_TRAINED
        return not abs(sizes.median().item() - rms(gains)) <= near * rms(gains)

    def rows(self) -> torch.Tensor:
        """`[units, inputs]`."""
        weight = self.layer.weight.detach()
        return (weight.T if isinstance(self.layer, Conv1D) else weight)[self.units]


def merged(sources: Iterable[Source]) -> list[Source]:
    """One source per layer, so that one that is called several times, or makes queries and keys, is made larger once."""
    found: dict[int, Source] = {}
    for source in sources:
        other = found.setdefault(id(source.layer), source)
        norm = source.normalised if source.normalised is other.normalised else None
        found[id(source.layer)] = replace(other, units=other.units | source.units, normalised=norm)
    return list(found.values())


def rms(tensor: torch.Tensor) -> float:
    return tensor.float().square().mean().sqrt().item()


def is_norm(module: Any) -> bool:
    """By its name and weights, since every family has a class of its own."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, nn.Parameter) and weight.dim() == 1


def offset_of_gain(module: Any) -> float:
    """1 for norms that multiply by `1 + weight` (Gemma's), else 0."""
    if not is_norm(module) or isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return 0.0
    weight, kept = module.weight, module.weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        answer = module.forward(torch.linspace(-1.0, 1.0, len(weight)).to(weight))
        weight.copy_(kept)
    if (bias := getattr(module, "bias", None)) is not None:
        answer = answer - bias
    return float(answer.abs().max() > 0)


def gain_of(module: Any) -> torch.Tensor:
    return offset_of_gain(module) + module.weight.detach()


def takes_part(layer: Any) -> bool:
    """Whether this is a layer whose outputs can be made larger."""
    weight = getattr(layer, "weight", None)
    plain = isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.dtype.itemsize > 1
    return plain and (isinstance(layer, nn.Linear | Conv1D) or is_norm(layer))


class Sources:
    """Notes what attention modules make their queries and keys of, while a model runs inside `noted`."""

    def __init__(self, model: nn.Module, modules: dict[str, Any]):
        self.model, self.modules = model, modules
        # holds by attention module, while it has not been asked: name, layer, input without and with a history, output without
        self.made: dict[Any, list[tuple[str, Any, torch.Tensor, torch.Tensor, torch.Tensor]]] = {
            each: [] for each in modules.values()
        }
        self.of_norms: dict[int, tuple[torch.Tensor, Any]] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for parameter in trainable:  # lets histories begin at the outputs of layers alone
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_)
            for norm in filter(is_norm, self.model.modules()):
                stack.callback(norm.register_forward_hook(self.note_norm).remove)
            for module in self.made:
                for name, layer in module.named_modules():
                    if takes_part(layer) and not name.startswith("scorer."):
                        stack.callback(layer.register_forward_hook(self.note_layer(module, name)).remove)
            yield

    def sharer_of(self, sources: Iterable[Source]) -> str | None:
        """Another module of the model that has weights of some sources, in words."""
        mine = {id(source.layer): source.layer for source in sources}
        held = {id(parameter) for layer in mine.values() for parameter in layer.parameters(recurse=False)}
        for name, other in self.model.named_modules():
            if id(other) not in mine and any(id(parameter) in held for parameter in other.parameters(recurse=False)):
                return repr(name)
        return None

    def note_norm(self, norm: Any, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self.of_norms[id(output)] = output, norm

    def note_layer(self, module: Any, name: str) -> Any:
        def hook(layer: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            if module not in self.made:
                return None
            leaf = output.detach().requires_grad_()
            self.made[module].append((name, layer, args[0].detach(), args[0], leaf))
            return leaf.clone()  # may be changed in place, as by families that clip it

        return hook

    def of(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[list[Source], list[Source]] | str:
        """The sources of a module's queries and of its keys, each empty if they make values as well; or in words why they
        cannot be told. Asked once for each module, inside its attention function."""
        made = self.made.pop(module)
        leaves = [leaf for *_, leaf in made]
        used: list[list[torch.Tensor]] = []
        for states in (query, key, value):
            gradients, degree = derivatives(states, leaves)
            used.append([gradient.flatten(0, -2).abs().amax(0) > 0 for gradient in gradients])
            if states is value:
                continue
            if degree is None:
                return "its queries or keys are not made by layers of its own"
            if math.isnan(degree):
                return "its queries or keys are no numbers, or too large: look at its weights and at the inputs"
            if degree == 0.0:
                return "its queries or keys are zero, which no factor changes; its weights may be zero"
            if not abs(degree - 1.0) < 0.01:
                return (
                    "its queries or keys do not grow as the weights that make them (what is in between is neither a linear "
                    "layer nor a norm with gains of one dimension)"
                )
        of_query, of_key, of_value = used

        def sources(of_states: list[torch.Tensor]) -> list[Source]:
            if any((units & values).any() for units, values in zip(of_states, of_value, strict=True)):
                return []
            return merged(
                Source(name, layer, units, layer if is_norm(layer) else self.of_norms.get(id(given), (None, None))[1], inputs)
                for (name, layer, inputs, given, _), units in zip(made, of_states, strict=True)
                if units.any()
            )

        return sources(of_query), sources(of_key)


def derivatives(states: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[list[torch.Tensor], float | None]:
    """Of a random sum of some states by the outputs of layers, and of how many degrees the states are in them (Euler's
    theorem); None if they do not depend on them, 0 if they are zero, NaN if they are no finite numbers."""
    if not states.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves], None
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(states.shape, generator=generator).to(states)

    def gradients_along(direction: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(states, leaves, direction, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(leaf) if each is None else each for each, leaf in zip(found, leaves, strict=True)]

    # takes the degree along the states themselves, since a sum of squares bears the rounding of half precision
    total = in_float64(states.detach()).square().sum().item()
    if not 0 < total < math.inf:
        return gradients_along(direction), 0.0 if total == 0 else math.nan
    along = gradients_along(states.detach())
    pairs = zip(along, leaves, strict=True)
    reached = sum((in_float64(gradient) * in_float64(leaf.detach())).sum().item() for gradient, leaf in pairs)
    return gradients_along(direction), reached / total
