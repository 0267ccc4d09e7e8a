"""Sees what a model's attention modules ask of their attention function: by one run in which that function writes it down.

The run is one without numbers (`FakeTensorMode`) of a copy of the model without weights, so it costs neither memory nor
more than a moment at any size, and nothing of the model changes. Where a model's forward needs numbers (it branches on
them), the model itself runs once, on as little as it takes, and is left as it was.
"""

import copy
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from ..introspection import left_as_it_was, moved, observed, unwrap
from ..models.neural_attention_interface import implementation_of
from ..models.neural_attention_zero3 import gathered, whole_shape
from .attention_arguments import takes_what_is_known
from .example_inputs import attention_inputs, possible_inputs
from .module_names import is_cross_attention


class AttentionCall(NamedTuple):
    """What one call of an attention function got."""

    query: torch.Size  # [B, H, Tq, D]
    key: torch.Size  # [B, Hkv, Tk, D]
    value: torch.Size  # [B, Hkv, Tk, Dv]
    mask: Any  # its shape, None without a mask, the name of its class if it is no tensor
    sinks: torch.Size | None
    arguments: tuple[str, ...]  # names of all others that are not None

    @property
    def num_queries(self) -> int:
        return self.query[-2]

    @property
    def num_keys(self) -> int:
        return self.key[-2]


def observed_call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, arguments: dict) -> AttentionCall:
    shape = None if mask is None else getattr(mask, "shape", type(mask).__name__)
    given = {name: argument for name, argument in sorted(arguments.items()) if argument is not None}
    sinks = next((given[name].shape for name in ("s_aux", "sinks") if name in given), None)
    return AttentionCall(query.shape, key.shape, value.shape, shape, sinks, tuple(given))


@contextmanager
def recording(model: nn.Module, calls: Mapping[str, list[AttentionCall]]) -> Iterator[None]:
    """Lets the named attention modules write down their calls, and answers these with zeros."""
    lists = {model.get_submodule(name): found for name, found in calls.items()}

    def record(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None, **arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        lists[module].append(observed_call(query, key, value, attention_mask, arguments))
        batch = max(query.shape[0], key.shape[0])  # lets a single query be shared by all keys in the batch, or the other way
        _, num_heads, num_queries, _ = query.shape
        num_heads = getattr(getattr(module, "scorer", None), "num_query_heads", num_heads)  # exceeds what packed layers give
        # returns weights only where the implementation does, since models use them only there
        returns_weights = implementation_of(module) == "eager"
        weights = query.new_zeros(batch, num_heads, num_queries, key.shape[2]) if returns_weights else None
        return value.new_zeros(batch, num_queries, num_heads, value.shape[-1]), weights

    with observed(lists, record):
        yield


def probe(
    model: nn.Module, found: Mapping[str, Any], example_inputs: Mapping[str, Any] | None = None
) -> tuple[dict[nn.Module, list[AttentionCall]], str]:
    """Calls of each attention module (none if no run reached it), and why runs failed, in words.

    The model runs on `example_inputs`, if they are given, and where these do not reach all modules, on inputs made from its
    config; then those of its parts (an image encoder, say) that it did not reach run on such inputs, and at last
    self-attention modules by themselves.
    """
    calls: dict[nn.Module, list[AttentionCall]] = {module: [] for module in found.values()}
    model = unwrap(model)
    names = {name: calls[module] for name, module in model.named_modules() if module in calls}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        without_numbers = skeleton(model, mode)
    except Exception as error:  # noqa: BLE001, goes on after any error, since the model itself can run what cannot be copied
        failures = {type(model).__name__: describe(error)}
    else:
        with mode:
            shapes = tree_map_only(torch.Tensor, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype), example_inputs)
        try:
            failures = run_parts(without_numbers, names, mode, torch.device("cpu"), shapes)
        finally:
            empty_caches(model)
    # leaves out a model without weights anywhere, since it cannot run
    has_weights = any(hasattr(module, "_hf_hook") for module in model.modules()) or not all(
        parameter.is_meta for parameter in model.parameters()
    )
    if has_weights and failures and not all(calls.values()):
        with left_as_it_was(model) as device, gathered(model.parameters()):
            inputs = None if example_inputs is None else moved(dict(example_inputs), device)
            failures = run_parts(model, names, nullcontext(), device, inputs)
    said = in_words(failures)
    if type(model).__name__ not in failures:
        said.insert(0, "Its own run passed without them.")
    return calls, " ".join(said)


def skeleton(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the model whose parameters and buffers have shapes and dtypes, but no memory."""
    memo: dict[int, Any] = {}
    with mode:
        for tensor in (*model.parameters(), *model.buffers()):
            empty = torch.empty(whole_shape(tensor), dtype=tensor.dtype)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    # leaves out accelerate's hooks, since they hold weights
    memo |= {id(module._hf_hook): None for module in model.modules() if hasattr(module, "_hf_hook")}
    copied = copy.deepcopy(model, memo).eval()
    for module in copied.modules():
        # removes hooks, which belong to the model's owner, not to a copy
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if hasattr(module, "_hf_hook"):
            del module._hf_hook
            vars(module)["forward"] = module._old_forward
        if isinstance(module, PreTrainedModel) and getattr(module.config, "_experts_implementation", None) is not None:
            module.set_experts_implementation("batched_mm")  # picks the only one that does not look at numbers
    return copied


def empty_caches(model: nn.Module) -> None:
    """Empties caches of functions in the code of a model, since a run without numbers has left tensors without numbers there,
    which all models of this code would get (DINOv3 keeps its patches' coordinates so)."""
    classes = {each for module in model.modules() for each in type(module).__mro__ if not each.__module__.startswith("torch.")}
    sources = {each.__module__ for each in classes}
    holders: list[Any] = [*classes, *(sys.modules[source] for source in sources if source in sys.modules)]
    for holder in holders:
        for value in list(vars(holder).values()):
            if not inspect.isfunction(value) or value.__module__ not in sources:
                continue
            for cell in value.__closure__ or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch says of inputs that do not fit, some of which are to be expected."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    disabled = logger.disabled
    try:
        logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled


def run_parts(
    model: nn.Module,
    calls: Mapping[str, list[AttentionCall]],
    context: AbstractContextManager,
    device: torch.device,
    example_inputs: Mapping[str, Any] | None,
) -> dict[str, str]:
    """Runs a model, then those parts of it with modules that were not reached, and returns why each failed."""
    failures: dict[str, str] = {}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    with recording(model, calls), context, torch.no_grad(), quiet():
        if example_inputs is not None and attempt(model, [example_inputs], failures) is None:
            return failures
        for name, part in model.named_modules():
            inside = [found for label, found in calls.items() if not name or label.startswith(f"{name}.")]
            if isinstance(part, PreTrainedModel) and not all(inside):
                attempt(part, possible_inputs(part, device, dtype), failures)
        for label, found in calls.items():
            module = model.get_submodule(label)
            if not found and not is_cross_attention(label, module) and takes_what_is_known(module):
                attempt(module, attention_inputs(module, device, dtype), {})
        if example_inputs is not None:  # leaves out what the model says to other inputs than those that it took
            failures.pop(type(model).__name__, None)
    return failures


def call_model(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    model(**inputs)


def attempt(
    model: nn.Module,
    candidates: Iterable[Mapping[str, Any]],
    failures: dict[str, str],
    run: Callable[[nn.Module, Mapping[str, Any]], None] = call_model,
) -> Mapping[str, Any] | None:
    """Runs a model on the first inputs that it takes, and returns these. If there are none, `failures` gets the reason
    that the first one had."""
    reason = "its inputs are not known here"
    for number, inputs in enumerate(candidates):
        try:
            run(model, inputs)
        except Exception as error:  # noqa: BLE001, catches whatever a model says to inputs that it was not made for
            reason = reason if number else describe(error)
        else:
            return inputs
    failures[type(model).__name__] = reason
    return None


def in_words(failures: Mapping[str, str]) -> list[str]:
    return [f"{name} said: {reason.rstrip('.')}." for name, reason in failures.items()]


def describe(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
