"""What can be wrong with a patch. Every one of them is raised before the model is changed."""

from ..models.configuration_neural_patched import PatchError


__all__ = ["AlreadyPatchedError", "NoPatchableLayerError", "PatchError", "ProbeError", "UnsupportedLayerError"]


class NoPatchableLayerError(PatchError):
    """The model has no attention layer that can be patched, or `layers` chooses none."""


class UnsupportedLayerError(PatchError):
    """A chosen layer asks of its attention what a score network cannot do."""


class AlreadyPatchedError(PatchError):
    """The model has neural layers already."""


class ProbeError(PatchError):
    """The model could not be run to see what its layers ask of their attention; `example_inputs` would help."""
