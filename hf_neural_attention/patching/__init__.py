"""Neural Attention in any Transformers model that fetches its attention function from `AttentionInterface`."""

from .errors import AlreadyPatchedError, NoPatchableLayerError, PatchError, ProbeError, UnsupportedLayerError
from .patching import patch, patch_status, patched, unpatch
from .reports import PatchedLayer, PatchPlan, PatchStatus


__all__ = [
    "AlreadyPatchedError",
    "NoPatchableLayerError",
    "PatchError",
    "PatchPlan",
    "PatchStatus",
    "PatchedLayer",
    "ProbeError",
    "UnsupportedLayerError",
    "patch",
    "patch_status",
    "patched",
    "unpatch",
]
