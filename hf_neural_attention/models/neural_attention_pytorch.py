"""What a backend is, and those that need nothing but PyTorch: `blockwise` and `reference`."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from .neural_attention_blockwise import blockwise_attention
from .neural_attention_reference import ScorerWeights, reference_attention


AUTO = "auto"  # asks for the fastest that can take the inputs

# Leaves out 8 bits and fewer, which torch calls floating point as well, but cannot compute in
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Inputs(NamedTuple):
    """What the choice of a backend depends on."""

    device_type: str  # as in `torch.device.type`
    dtype: torch.dtype  # of the query
    head_dim: int = 0  # the larger one of a query's and a value's size
    exporting: bool = False  # only plain operators may appear: `torch.export`, ONNX, `torch.jit.trace`, `torch.func`
    device_index: int | None = None  # as in `torch.device.index`; None: the current one


class Backend(NamedTuple):
    """A way to compute the operation.

    Args:
        run: function(query, key, value, weights, *, attn_mask, dropout_p, dropout_seed, is_causal, residual_scale,
            keys_projected, queries_projected=False, softcap=None, sinks=None) -> output. Code that came with a model from the
            Hub may be older than the installed package, whose backends it calls: further arguments need a default.
        reason_against: why it cannot take certain inputs here, or None.
        is_fused: computes scores, softmax and output in one pass.
    """

    run: Callable[..., torch.Tensor]
    reason_against: Callable[[Inputs], str | None]
    is_fused: bool


def check_name(name: str, source: str, backends: Iterable[str]) -> str:
    """Raises a ValueError if `name`, which came from `source`, is none of these backends."""
    if name not in (names := (AUTO, *backends)):
        raise ValueError(f"{source} is {name!r}; it must be one of {', '.join(map(repr, names))}.")
    return name


def only_plain_operators() -> bool:
    """Whether a graph is exported, or a transform runs (`transform_runs`): none of these knows what to do with operators that
    have a backward of their own. Forward-mode derivatives would come out as zero."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or transform_runs()


@torch.compiler.assume_constant_result  # asks while code is compiled too, which guards what is asked for by itself
def transform_runs() -> bool:
    """Whether a transform of `torch.func` runs (`jvp`, `grad`, `vmap`), or forward-mode derivatives are taken."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def run_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weights: ScorerWeights, **arguments
) -> torch.Tensor:
    return reference_attention(query, key, value, weights, **arguments)[0]


def against_reference(inputs: Inputs) -> str | None:
    if inputs.dtype in DTYPES:
        return None
    return f"it computes in {', '.join(map(str, DTYPES))}, and the query is in {inputs.dtype}"


def against_blockwise(inputs: Inputs) -> str | None:
    return "an exported graph may only hold PyTorch's own operators" if inputs.exporting else against_reference(inputs)


# Puts the faster first
PYTORCH_BACKENDS = {
    "blockwise": Backend(blockwise_attention, against_blockwise, is_fused=False),
    "reference": Backend(run_reference, against_reference, is_fused=False),
}
