"""Weights under DeepSpeed's ZeRO-3, where each process keeps a part of every parameter and the parameter itself is empty.

DeepSpeed brings a module's own parameters together while the module runs. A scorer reads those of the layers inside it, and so
asks for these (`bring_in`). Whatever draws or reads weights at other times does so in a `with gathered(...)` block.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn


def is_apart(tensor: torch.Tensor) -> bool:
    """Whether this is a parameter that processes share, and nothing of it is here now."""
    return tensor.numel() == 0 and getattr(tensor, "ds_numel", 0) > 0


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of a tensor when it is together."""
    return tensor.ds_shape if is_apart(tensor) else tensor.shape  # type: ignore[attr-defined]


def is_shared_out(module: nn.Module) -> bool:
    """Whether processes share a module's parameters, together now or not."""
    return any(hasattr(parameter, "ds_numel") for parameter in module.parameters())


def is_run_by_deepspeed(module: nn.Module) -> bool:
    """Whether a module belongs to a model that DeepSpeed's engine has taken over, with hooks that bring weights together."""
    return hasattr(module, "ds_id")


def is_hook_of_deepspeed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters together in a `with` block, to which all processes must come. What the first of them writes, all have
    afterwards."""
    apart = [parameter for parameter in parameters if is_apart(parameter)]
    if not apart:
        yield
        return
    with import_module("deepspeed").zero.GatheredParameters(apart, modifier_rank=0):
        yield


def bring_in(module: Any) -> None:
    """Lets a module that DeepSpeed runs have the parameters of modules inside it. They are taken apart again after it; from
    then on DeepSpeed brings them in by itself, in the backward pass too."""
    zero = import_module("deepspeed").zero
    for parameter in list(module.parameters()):
        if is_apart(parameter):
            zero.register_external_parameter(module, parameter)
            parameter.all_gather()


def check_together(layer: Any) -> None:
    """Raises a ValueError if a layer's weights are apart."""
    if is_apart(layer.weight):
        raise ValueError(
            "The weights of a scorer are shared out among processes (DeepSpeed ZeRO-3), and nothing brings them together: "
            "DeepSpeed does not run this model yet. It does from `deepspeed.initialize`, `accelerator.prepare` or "
            "`Trainer.train` on."
        )
