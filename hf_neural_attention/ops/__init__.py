"""The fused kernels, and the ways to ask for a backend.

The operation itself is `hf_neural_attention.neural_attention`. Kernels know nothing of Transformers: of `models/` they import
the formula (`neural_attention_reference`), masks and what a backend is.
"""

from .choice import asked_backend, set_backend, use_backend
from .fused import FUSED_BACKENDS


__all__ = ["FUSED_BACKENDS", "asked_backend", "set_backend", "use_backend"]
