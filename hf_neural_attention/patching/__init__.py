"""Neural Attention in any Transformers model that fetches its attention function from `AttentionInterface`."""

from .calibration import CalibratedLayer, CalibrationReport, calibrate
from .compacting import compact
from .errors import AlreadyPatchedError, NoPatchableLayerError, PatchError, ProbeError, UnsupportedLayerError
from .patching import patch, patch_status, patched, unpatch
from .pretrained import from_pretrained
from .reports import CompactPlan, PatchedLayer, PatchPlan, PatchStatus
from .saving import load_patch, save_patch
from .sizes import ModelSize


__all__ = [
    "AlreadyPatchedError",
    "CalibratedLayer",
    "CalibrationReport",
    "CompactPlan",
    "ModelSize",
    "NoPatchableLayerError",
    "PatchError",
    "PatchPlan",
    "PatchStatus",
    "PatchedLayer",
    "ProbeError",
    "UnsupportedLayerError",
    "calibrate",
    "compact",
    "from_pretrained",
    "load_patch",
    "patch",
    "patch_status",
    "patched",
    "save_patch",
    "unpatch",
]
