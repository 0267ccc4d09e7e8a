"""Attention as one of several processes computes it: of some of the heads (tensor parallelism), which is right here, or of a
part of the sequence (context and sequence parallelism), which is refused.

Under tensor parallelism every process holds all weights of a scorer. Its heads' share of their gradients is summed over the
processes in the backward pass, so that all of them make the same step, as one process would. Dropout of attention weights
draws alike in all of them where their random numbers are alike: heads of different processes then lose the same pairs.
"""

from typing import Any

import torch
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .neural_attention_reference import ScorerWeights


def is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def mesh_of_heads(attention: Any, num_heads: int) -> Any:
    """The processes (a `DeviceMesh` of one dimension) that share a layer's heads, or None if each has them all.

    Args:
        attention: an attention module while it runs, when FSDP has gathered what it shards: what is a DTensor still is so for
            tensor parallelism.
        num_heads: of the queries in this process.

    Raises:
        ValueError: if this process has neither all heads nor as many as each of the others.
    """
    sharded = [parameter for parameter in attention.parameters() if hasattr(parameter, "device_mesh")]
    if not sharded:
        return None
    total = getattr(attention.config, "num_attention_heads", None)
    if total == num_heads:
        return None
    mesh: Any = sharded[0].device_mesh
    if mesh.ndim > 1:
        mesh = mesh["tp"]
    if total != num_heads * mesh.size():
        raise ValueError(
            f"A {type(attention).__name__} has {num_heads} heads here, one of {mesh.size()} processes of tensor "
            f"parallelism, and its config {total} in all. It works if each process has all heads, or as many as each other."
        )
    if hasattr(attention, "scorer") and not hasattr(attention.scorer, "q_proj"):
        raise ValueError(
            f"A compact {type(attention).__name__} cannot share its heads among processes: the layers that project for its "
            "scorer are packed otherwise than stock ones. Load the checkpoint that was there before `compact`."
        )
    return mesh


def gathered(tensor: torch.Tensor, mesh: Any, dim: int = 1) -> torch.Tensor:
    """What each process has of some heads, put together in each."""
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=mesh.get_group())
    return torch.cat(parts, dim)


def share_heads(attention: Any, num_heads: int) -> None:
    """Lets the scorer of a running attention module know the processes that share its heads, if there are any."""
    if is_distributed():
        tell_scorer(attention, mesh_of_heads(attention, num_heads))


def tell_scorer(attention: Any, mesh: Any) -> None:
    """Lets the scorer of an attention module know the processes that share its heads; None has it take all heads."""
    for part in attention.scorer.modules():  # reaches copies of it that peft may have put into a wrapper
        if hasattr(type(part), "mesh_of_heads"):
            part.mesh_of_heads = mesh


def weights_of_share(weights: ScorerWeights, mesh: Any) -> ScorerWeights:
    """What one process needs of weights that each holds whole: those of its heads, where each head has some of its own.
    Gradients become those of all processes, summed."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    def share(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if tensor.requires_grad:
            whole = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
            tensor = whole.to_local(grad_placements=[Partial()])
        return tensor.chunk(mesh.size())[mesh.get_local_rank()] if weights.per_head else tensor

    return ScorerWeights(*map(share, weights))  # type: ignore[arg-type]


@torch.compiler.assume_constant_result
def sharer_of_sequences() -> str:
    """What shares sequences among processes now, or an empty string."""
    # asks the functions that are put in place of stock ones then, since neither library says so otherwise
    attention = {
        "torch's `context_parallel`": functional.scaled_dot_product_attention,
        "DeepSpeed's Ulysses": ALL_ATTENTION_FUNCTIONS.get("sdpa"),
    }
    modules = {name: getattr(function, "__module__", None) or "" for name, function in attention.items()}
    return next((name for name, module in modules.items() if module.startswith(("torch.distributed", "deepspeed"))), "")


def check_whole_sequence() -> None:
    """Raises a ValueError if processes share a sequence, of which attention would see its own part alone."""
    if is_distributed() and (sharer := sharer_of_sequences()):
        raise ValueError(
            f"Neural Attention cannot share a sequence among processes, as {sharer} does (`cp_size` or `sp_size` in "
            "accelerate): a score network would see the keys of its own part alone. Spread batches (DDP, FSDP, DeepSpeed "
            "ZeRO), or heads (tensor parallelism)."
        )
