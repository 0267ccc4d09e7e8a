"""The backends with kernels of their own, and what speaks against them here. Each is imported when it is needed first."""

import torch

from ..models.neural_attention_pytorch import Backend, Inputs, against_blockwise


def run_native(*args, **arguments) -> torch.Tensor:
    from .native import native_attention

    return native_attention(*args, **arguments)


def run_triton(*args, **arguments) -> torch.Tensor:
    from .triton import triton_attention

    return triton_attention(*args, **arguments)


def against_native(inputs: Inputs) -> str | None:
    from .native_build import BuildError, load_library

    if reason := against_blockwise(inputs):
        return reason
    if inputs.device_type != "cpu":
        return f"it runs on the CPU, and the tensors are on {inputs.device_type!r}"
    library = load_library(torch.promote_types(inputs.dtype, torch.float32))
    return str(library) if isinstance(library, BuildError) else None


def against_triton(inputs: Inputs) -> str | None:
    from .triton import unavailable_reason

    return unavailable_reason(inputs)


# Puts the faster first
FUSED_BACKENDS = {
    "native": Backend(run_native, against_native, is_fused=True),
    "triton": Backend(run_triton, against_triton, is_fused=True),
}
