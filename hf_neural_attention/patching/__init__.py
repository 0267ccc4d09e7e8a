"""Neural Attention in any Transformers model that fetches its attention function from `AttentionInterface`."""

from .calibration import CalibratedLayer, CalibrationReport, calibrate
from .errors import AlreadyPatchedError, NoPatchableLayerError, PatchError, ProbeError, UnsupportedLayerError
from .patching import patch, patch_status, patched, unpatch
from .pretrained import from_pretrained
from .reports import PatchedLayer, PatchPlan, PatchStatus
from .saving import load_patch, save_patch


__all__ = [
    "AlreadyPatchedError",
    "CalibratedLayer",
    "CalibrationReport",
    "NoPatchableLayerError",
    "PatchError",
    "PatchPlan",
    "PatchStatus",
    "PatchedLayer",
    "ProbeError",
    "UnsupportedLayerError",
    "calibrate",
    "from_pretrained",
    "load_patch",
    "patch",
    "patch_status",
    "patched",
    "save_patch",
    "unpatch",
]
