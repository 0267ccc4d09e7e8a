"""All backends that are here, and which of them runs: the one asked for, or the fastest that can take the inputs."""

import functools
import logging
import operator
from typing import NamedTuple

import torch

from .neural_attention_pytorch import AUTO, PYTORCH_BACKENDS, Inputs, check_name, only_plain_operators
from .neural_attention_reference import ScorerWeights


try:
    # takes fused kernels, and ways to ask for a backend from outside, from the installed package
    from hf_neural_attention.ops import FUSED_BACKENDS, asked_backend
except ImportError:
    FUSED_BACKENDS, asked_backend = {}, None  # type: ignore[assignment]


logger = logging.getLogger(__name__)

# Puts the fastest first, since "auto" takes the first that nothing speaks against
BACKENDS = FUSED_BACKENDS | PYTORCH_BACKENDS


class Choice(NamedTuple):
    """Which backend runs, and why the faster ones do not: reasons by name, in order of speed."""

    name: str
    reasons: dict[str, str]


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


def asked_name(name: str | None) -> str:
    """The backend that is asked for, by argument or, if the package is installed, from outside.

    Raises:
        ValueError: if there is no such backend.
    """
    if asked_backend is not None:
        return asked_backend(name).name
    return check_name(name or AUTO, "`backend`", BACKENDS)


def choose_backend(name: str | None, inputs: Inputs) -> Choice:
    """The backend asked for, or the fastest that can take the inputs; for an exported graph always the reference.

    Args:
        name: as in `neural_attention`; None asks the context, the process and the environment, if the package is installed.

    Raises:
        ValueError: if there is no such backend, or it (with "auto": none) can take these inputs here.
    """
    name = asked_name(name)
    reasons: dict[str, str] = {}
    if name != AUTO and not inputs.exporting:
        reason = BACKENDS[name].reason_against(inputs)
        if reason is not None:
            raise ValueError(f"The backend {name!r} cannot run here: {reason}.")
        return Choice(name, reasons)
    for candidate, backend in BACKENDS.items():
        reason = backend.reason_against(inputs)
        if reason is None:
            break
        reasons[candidate] = reason
    else:
        raise ValueError(f"Neural Attention cannot run: {reason}.")  # names the reference's, which can do whatever can be done
    if inputs.device_type == "cpu" and "native" in reasons and not inputs.exporting:
        warn_once(
            "Neural Attention's native CPU kernel is not available, the blockwise PyTorch backend runs instead (same results, "
            f"several times slower): {reasons['native']}."
        )
    return Choice(candidate, reasons)


def check_devices(query: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises a ValueError unless all tensors are on the query's device.

    A kernel cannot tell by itself: of a call with one tensor on the meta device, torch makes a call for shapes only, which
    returns memory as it finds it.
    """
    for name, tensor in others.items():
        if tensor is not None and tensor.device != query.device:
            name = f"`scorer`'s {name}" if name in ScorerWeights._fields else f"`{name}`"
            raise ValueError(f"{name} is on device {tensor.device}; expected that of `query`, {query.device}.")


@torch.compiler.assume_constant_result
def choose_name(name: str | None, device_type: str, dtype: torch.dtype, head_dim: int, device_index: int | None = None) -> str:
    # makes the name a constant to torch.compile, which could not trace a compiler's run
    return choose_backend(name, Inputs(device_type, dtype, head_dim, device_index=device_index)).name


@torch.compiler.assume_constant_result
def asks_for_reference(name: str | None) -> bool:
    """Whether the literal formula is asked for: by name, or, if the package is installed, from outside.

    Raises:
        ValueError: if there is no such backend.
    """
    return asked_name(name) == "reference"


def run_backend(
    name: str | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weights: ScorerWeights, **arguments
) -> torch.Tensor:
    """Runs the named backend, or the one that `choose_backend` finds for None and "auto".

    Raises:
        ValueError: if the tensors are not all on one device, or as `choose_backend` does.
    """
    others = {"attn_mask": arguments["attn_mask"], "sinks": arguments.get("sinks")}
    check_devices(query, key=key, value=value, **others, **weights._asdict())
    if only_plain_operators():
        chosen = choose_backend(name, Inputs(query.device.type, query.dtype, exporting=True)).name
    else:
        # makes sizes numbers also to torch.compile with dynamic shapes, which compiles anew for heads of other sizes
        head_dim = max(operator.index(query.shape[-1]), operator.index(value.shape[-1]))
        chosen = choose_name(name, query.device.type, query.dtype, head_dim, query.device.index)
    return BACKENDS[chosen].run(query, key, value, weights, **arguments)
