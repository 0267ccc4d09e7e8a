"""Which backend is asked for.

Asked for by, first to last: the `backend` argument, `use_backend`, `set_backend`, `HF_NEURAL_ATTENTION_BACKEND`; else "auto".
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from ..models.neural_attention_pytorch import AUTO, PYTORCH_BACKENDS, check_name
from .fused import FUSED_BACKENDS


ENVIRONMENT_VARIABLE = "HF_NEURAL_ATTENTION_BACKEND"
NAMES = (*FUSED_BACKENDS, *PYTORCH_BACKENDS)

# Is None while not set
process_choice: str | None = None
context_choice: ContextVar[str | None] = ContextVar("hf_neural_attention_backend", default=None)


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
    process_choice = None if name is None else check_name(name, "`set_backend`'s `name`", NAMES)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the backend inside a `with` block, in this thread (or task) alone; blocks nest.

    Exported graphs and compiled code: as with `set_backend`. A model with gradient checkpointing runs its forward again during
    backward, on a GPU in threads of autograd's: there, take `set_backend`.

    Raises:
        ValueError: if there is no backend of that name.
    """
    token = context_choice.set(check_name(name, "`use_backend`'s `name`", NAMES))
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
        return Asked(check_name(argument, "`backend`", NAMES), "the argument `backend`")
    if in_context := context_choice.get():
        return Asked(in_context, "`use_backend`")
    if process_choice:
        return Asked(process_choice, "`set_backend`")
    source = f"the environment variable {ENVIRONMENT_VARIABLE}"
    return Asked(check_name(os.environ.get(ENVIRONMENT_VARIABLE) or AUTO, f"The{source[3:]}", NAMES), source)
