"""Which backend runs: the one asked for, or the fastest that can take the inputs.

Asked for by, first to last: the `backend` argument, `use_backend`, `set_backend`, `HF_NEURAL_ATTENTION_BACKEND`; else "auto".
"""

import functools
import importlib.util
import logging
import operator
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from ..models.neural_attention_backends import BACKENDS as PYTORCH_BACKENDS
from ..models.neural_attention_backends import only_plain_operators
from ..models.neural_attention_reference import ScorerWeights


logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "HF_NEURAL_ATTENTION_BACKEND"
AUTO = "auto"
# Those that torch can compute in; to it, 8 bits and fewer are floating point as well
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Inputs(NamedTuple):
    """What the choice of a backend depends on."""

    device_type: str  # as in `torch.device.type`
    dtype: torch.dtype  # of the query
    head_dim: int = 0  # the larger one of a query's and a value's size
    exporting: bool = False  # only plain operators may appear: `torch.export`, ONNX, `torch.jit.trace`, `torch.func`


def run_native(*args, **arguments) -> torch.Tensor:
    from .native import native_attention

    return native_attention(*args, **arguments)


def run_triton(*args, **arguments) -> torch.Tensor:
    from .triton import triton_attention

    return triton_attention(*args, **arguments)


def against_reference(inputs: Inputs) -> str | None:
    if inputs.dtype in DTYPES:
        return None
    return f"it computes in {', '.join(map(str, DTYPES))}, and the query is in {inputs.dtype}"


def against_blockwise(inputs: Inputs) -> str | None:
    return "an exported graph may only hold PyTorch's own operators" if inputs.exporting else against_reference(inputs)


def against_native(inputs: Inputs) -> str | None:
    from .native_build import BuildError, load_library

    if reason := against_blockwise(inputs):
        return reason
    if inputs.device_type != "cpu":
        return f"it runs on the CPU, and the tensors are on {inputs.device_type!r}"
    library = load_library(torch.promote_types(inputs.dtype, torch.float32))
    return str(library) if isinstance(library, BuildError) else None


def against_triton(inputs: Inputs) -> str | None:
    if reason := against_blockwise(inputs):
        return reason
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (`pip install triton`)"
    from .triton import unavailable_reason

    return unavailable_reason(inputs.device_type, inputs.dtype, inputs.head_dim)


class Backend(NamedTuple):
    """A way to compute the operation.

    Args:
        run: function(query, key, value, weights, *, attn_mask, dropout_p, dropout_seed, is_causal, residual_scale,
            keys_projected) -> output.
        reason_against: why it cannot take certain inputs here, or None.
        is_fused: computes scores, softmax and output in one pass.
    """

    run: Callable[..., torch.Tensor]
    reason_against: Callable[[Inputs], str | None]
    is_fused: bool


# The fastest first: "auto" takes the first that nothing speaks against
BACKENDS = {
    "native": Backend(run_native, against_native, is_fused=True),
    "triton": Backend(run_triton, against_triton, is_fused=True),
    "blockwise": Backend(PYTORCH_BACKENDS["blockwise"], against_blockwise, is_fused=False),
    "reference": Backend(PYTORCH_BACKENDS["reference"], against_reference, is_fused=False),
}

# None: not set
process_choice: str | None = None
context_choice: ContextVar[str | None] = ContextVar("hf_neural_attention_backend", default=None)


def check_name(name: str, source: str) -> str:
    """Raises a ValueError if `name`, which came from `source`, is no backend."""
    if name not in (AUTO, *BACKENDS):
        raise ValueError(f"{source} is {name!r}; it must be one of {', '.join(map(repr, (AUTO, *BACKENDS)))}.")
    return name


def set_backend(name: str | None) -> None:
    """Chooses the backend for the whole process, in all its threads.

    Exported graphs take the reference all the same. Code that `torch.compile` has compiled keeps the backend that it was
    compiled with.

    Args:
        name (`str`, *optional*): "auto", "native", "triton", "blockwise" or "reference". None takes the choice back.

    Raises:
        ValueError: if there is no backend of that name. Whether it can run is seen when it is called: an error, then, with
            the reason.
    """
    global process_choice
    process_choice = None if name is None else check_name(name, "`set_backend`'s `name`")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the backend inside a `with` block, in this thread (or task) alone; blocks nest.

    Exported graphs and compiled code: as with `set_backend`. A model with gradient checkpointing runs its forward again during
    backward, on a GPU in threads of autograd's: there, take `set_backend`.

    Raises:
        ValueError: if there is no backend of that name.
    """
    token = context_choice.set(check_name(name, "`use_backend`'s `name`"))
    try:
        yield
    finally:
        context_choice.reset(token)


class Asked(NamedTuple):
    """A wish for a backend, and where it comes from."""

    name: str
    source: str


def asked_backend(argument: str | None = None) -> Asked:
    """The backend that the argument, the context, the process or the environment asks for, "auto" if none does.

    Raises:
        ValueError: if there is no such backend.
    """
    if argument is not None:
        return Asked(check_name(argument, "`backend`"), "the argument `backend`")
    if in_context := context_choice.get():
        return Asked(in_context, "`use_backend`")
    if process_choice:
        return Asked(process_choice, "`set_backend`")
    source = f"the environment variable {ENVIRONMENT_VARIABLE}"
    return Asked(check_name(os.environ.get(ENVIRONMENT_VARIABLE) or AUTO, f"The{source[3:]}"), source)


class Choice(NamedTuple):
    """Which backend runs, and why the faster ones do not: reasons by name, in order of speed."""

    name: str
    reasons: dict[str, str]


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


def choose_backend(name: str | None, inputs: Inputs) -> Choice:
    """The backend asked for, or the fastest that can take the inputs; for an exported graph always the reference.

    Args:
        name: as in `neural_attention`; None asks the context, the process and the environment.

    Raises:
        ValueError: if there is no such backend, or it (with "auto": none) can take these inputs here.
    """
    name = asked_backend(name).name
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
        raise ValueError(f"Neural Attention cannot run: {reason}.")  # the reference's, who can do whatever can be done
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
def choose_name(name: str | None, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    # a constant to torch.compile, which could not trace a compiler's run
    return choose_backend(name, Inputs(device_type, dtype, head_dim)).name


def run_backend(
    name: str | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weights: ScorerWeights, **arguments
) -> torch.Tensor:
    """Runs the named backend, or the one that `choose_backend` finds for None and "auto".

    Raises:
        ValueError: if the tensors are not all on one device, or as `choose_backend` does.
    """
    check_devices(query, key=key, value=value, attn_mask=arguments["attn_mask"], **weights._asdict())
    if only_plain_operators():
        chosen = choose_backend(name, Inputs(query.device.type, query.dtype, exporting=True)).name
    else:
        # numbers also to torch.compile with dynamic shapes, which compiles anew for heads of other sizes
        head_dim = max(operator.index(query.shape[-1]), operator.index(value.shape[-1]))
        chosen = choose_name(name, query.device.type, query.dtype, head_dim)
    return BACKENDS[chosen].run(query, key, value, weights, **arguments)
