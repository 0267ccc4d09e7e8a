"""The backends that need nothing but PyTorch, and the choice between them."""

import torch

from .neural_attention_blockwise import blockwise_attention
from .neural_attention_reference import ScorerWeights, reference_attention


def reference_output(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weights: ScorerWeights, **arguments
) -> torch.Tensor:
    return reference_attention(query, key, value, weights, **arguments)[0]


# name -> function(query, key, value, weights, *, attn_mask, dropout_p, dropout_seed, is_causal, residual_scale,
# keys_projected) -> output
BACKENDS = {"reference": reference_output, "blockwise": blockwise_attention}


def only_plain_operators() -> bool:
    """Whether a graph is exported, or a transform of `torch.func` runs (`jvp`, `grad`, `vmap`): neither knows what to do with
    operators that have a backward of their own. Forward-mode derivatives would come out as zero."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def choose_backend() -> str:
    """What "auto" means: blockwise, except where only plain operators may appear."""
    return "reference" if only_plain_operators() else "blockwise"


def run_backend(
    name: str | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weights: ScorerWeights, **arguments
) -> torch.Tensor:
    """Runs the named backend, or the best one for None and "auto".

    Raises:
        ValueError: if there is no backend of that name.
    """
    if name is None or name == "auto" or (name in BACKENDS and only_plain_operators()):
        name = choose_backend()
    if name not in BACKENDS:
        raise ValueError(f"`backend` is {name!r}; it must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}.")
    return BACKENDS[name](query, key, value, weights, **arguments)
