"""Sees from where a model's attention modules have their queries and keys: by a run of the model on a few numbers.

Each linear layer inside an attention module hands on a tensor without a history. What the attention function gets then has a
history that ends there, and tells every step in between: reshaping may be among them, and one constant factor. Rotary
positions, norms, gates and whatever else depends on a position or on the numbers shows, at any length.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..introspection import left_as_it_was, moved, observed, place_of
from ..models.neural_attention_interface import neural_attention_forward
from ..models.neural_attention_packing import Source
from .example_inputs import possible_inputs
from .probing import attempt, in_words, quiet


# Lists steps of a history that put numbers elsewhere, and leave them what they are
RESHAPING = {
    f"{step}Backward0"
    for step in ("Alias", "Cat", "Clone", "Permute", "ReshapeAlias", "ToCopy", "Transpose", "UnsafeView", "View")
}
SCALING = {"MulBackward0", "DivBackward0"}

# Lists steps that take some of the numbers, as families do that make queries, keys and values in one layer
PARTS = ("Narrow", "Select", "Slice", "Split", "Unbind")


class Trace(NamedTuple):
    """Where an attention module's queries and keys come from."""

    query: Source
    key: Source
    num_heads: int  # of its queries


class Refusal(NamedTuple):
    """Why that is not known, or is not what a projection alone makes."""

    reason: str


# Holds a part of a model, and arguments for its forward
Run = tuple[nn.Module, Mapping[str, Any]]


def random_inputs(part: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """`possible_inputs`, with random numbers where these are zeros, and no cache."""
    generator = torch.Generator().manual_seed(0)
    for inputs in possible_inputs(part, device, dtype):
        made: dict[str, Any] = {
            name: torch.randn(tensor.shape, generator=generator).to(tensor) if tensor.is_floating_point() else tensor
            for name, tensor in inputs.items()
        }
        if "use_cache" in inspect.signature(part.forward).parameters:
            made["use_cache"] = False
        yield made


def run_until_reached(
    model: nn.Module,
    modules: Mapping[str, Any],
    reached: Callable[[Any], bool],
    example_inputs: Mapping[str, Any] | None,
    run_part: Callable[[nn.Module, Mapping[str, Any]], None] | None = None,
) -> tuple[list[Run], str]:
    """Runs a model, then those parts of it with modules that were not reached. Returns the runs that went well, and why others
    failed, in words."""
    device, dtype = place_of(model)
    runs: list[Run] = []
    failures: dict[str, str] = {}
    for name, part in model.named_modules():
        inside = [module for label, module in modules.items() if not name or label.startswith(f"{name}.")]
        if (not isinstance(part, PreTrainedModel) and name) or all(map(reached, inside)):
            continue
        if example_inputs is not None and not name:
            candidates = iter([moved(dict(example_inputs), device)])
        else:
            candidates = random_inputs(part, device, dtype) if isinstance(part, PreTrainedModel) else iter(())
        inputs = attempt(part, candidates, failures, run_part or run)
        if inputs is not None:
            runs.append((part, inputs))
        elif example_inputs is not None and not name:
            break
    return runs, " ".join(in_words(failures))


def run(part: nn.Module, inputs: Mapping[str, Any]) -> None:
    """With the same random numbers each time; the seeds are `left_as_it_was`'s, which leaves those of other devices alone."""
    torch.default_generator.manual_seed(0)
    for device in {parameter.device for parameter in part.parameters() if parameter.is_cuda}:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)
    with quiet():
        part(**inputs)


@contextmanager
def outputs_of(modules: Mapping[str, nn.Module], found: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    """Lets modules write down what they return: the first tensor of each call."""

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            found.setdefault(name, []).append(first.detach().clone())

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(note(name)).remove)
        yield


def trace(
    model: nn.Module, modules: Mapping[str, Any], example_inputs: Mapping[str, Any] | None
) -> tuple[dict[str, Trace | Refusal], list[Run]]:
    """Where the queries and keys of neural attention modules come from, by name, and the runs that showed it. The model is
    left as it was."""
    made: dict[Any, dict[int, tuple[str, torch.Tensor]]] = {module: {} for module in modules.values()}
    found: dict[Any, list[Trace | Refusal]] = {module: [] for module in modules.values()}

    def start(module: Any, name: str) -> Callable[..., torch.Tensor]:
        def hook(layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            leaf = output.detach().requires_grad_()
            made[module][id(leaf)] = name, leaf
            return leaf

        return hook

    def look(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        query_source, key_source = (source_of(states, made[module], module) for states in (query, key))
        for name, source in (("queries", query_source), ("keys", key_source)):
            if isinstance(source, str):
                found[module].append(Refusal(f"its {name} {source}"))
                break
        else:
            found[module].append(Trace(query_source, key_source, query.shape[1]))  # type: ignore[arg-type]
        return neural_attention_forward(module, query, key, *args, **kwargs)

    def run_or_forget(part: nn.Module, inputs: Mapping[str, Any]) -> None:
        """A run that fails after attention shows nothing: its outputs could not be compared afterwards."""
        before = {module: len(calls) for module, calls in found.items()}
        try:
            run(part, inputs)
        except Exception:
            for module, number in before.items():
                del found[module][number:]
            raise

    with ExitStack() as stack:
        stack.enter_context(left_as_it_was(model))
        stack.enter_context(observed(modules.values(), look))
        stack.enter_context(torch.enable_grad())
        for module in modules.values():
            for name, layer in module.named_modules():
                if type(layer) is nn.Linear and not name.startswith("scorer."):
                    stack.callback(layer.register_forward_hook(start(module, name)).remove)
        runs, why = run_until_reached(model, modules, lambda module: bool(found[module]), example_inputs, run_or_forget)
    unseen = Refusal(f"no run of the model reached it. {why} Give `example_inputs=` that reach it".replace("  ", " "))
    return {name: agreed(found[module] or [unseen]) for name, module in modules.items()}, runs


def agreed(found: list[Trace | Refusal]) -> Trace | Refusal:
    """What all calls of a module have in common."""
    refusals = [each for each in found if isinstance(each, Refusal)]
    if refusals:
        return refusals[0]
    return found[0] if len(set(found)) == 1 else Refusal("its queries or keys come from another layer in each call")


def source_of(states: torch.Tensor, made: Mapping[int, tuple[str, torch.Tensor]], module: Any) -> Source | str:
    """The layer that made queries or keys `[B, H, T, D]`, or what is in its way, in words."""
    factor = 1.0
    node: Any = states.grad_fn
    while node is not None and not hasattr(node, "variable"):
        before = [function for function, _ in node.next_functions if function is not None]
        if node.name() in SCALING:
            constant = scalar_of(node)
            if constant is None or factor != 1.0:
                return f"are multiplied by what is no constant of the module ({node.name()})"
            if not any(isinstance(each, float) and each == constant for each in vars(module).values()):
                return f"are multiplied by {constant}, which is no constant of the module"
            factor = constant if node.name().startswith("Mul") else 1 / constant
        elif node.name().startswith(PARTS):
            return "are a part of what a larger layer makes, which the forward would split by the same sizes if it were less"
        elif node.name() not in RESHAPING:
            return (
                f"are not what a linear layer makes, but something that `{node.name().removesuffix('Backward0')}` has made of "
                "it: rotary positions, a norm, or the like"
            )
        if len(before) != 1:
            return "are put together of several parts: rotary positions on some of their numbers, or the like"
        node = before[0]
    name, output = made.get(id(getattr(node, "variable", None)), (None, None))
    if name is None or output is None:
        return "do not come from a plain `nn.Linear` inside the module"
    heads = output.detach().unflatten(-1, (-1, states.shape[-1])).transpose(-2, -3) * factor
    if heads.shape != states.shape or not torch.allclose(heads, states.detach(), rtol=1e-2, atol=0.0):
        return f"are not the heads, one after the other, that {name!r} makes"
    return Source(name, factor)


def scalar_of(node: Any) -> float | None:
    """The constant with which a step multiplies, or by which it divides."""
    other = getattr(node, "_saved_other", None)
    return other.item() if other is not None and other.dim() == 0 else None
