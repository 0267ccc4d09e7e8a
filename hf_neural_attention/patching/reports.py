"""What a patch is, or would be, layer by layer: plain data, and tables of it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from ..diagnostics import Explanation


class PatchedLayer(NamedTuple):
    """One neural layer. `_asdict()` gives plain data that JSON can hold."""

    layer: str  # qualified name of the attention module
    head_dim: int
    proj_dim: int
    hidden_dims: tuple[int, int]
    mode: str
    per_head: bool
    init: str
    num_parameters: int
    num_bytes: int

    @classmethod
    def of(cls, layer: str, scorer: Any) -> "PatchedLayer":
        parameters = list(scorer.parameters())
        return cls(
            layer,
            scorer.head_dim,
            scorer.proj_dim,
            tuple(scorer.hidden_dims),
            scorer.mode,
            scorer.num_heads is not None,
            scorer.init,
            sum(parameter.numel() for parameter in parameters),
            sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        )


class PatchStatus(tuple[PatchedLayer, ...]):
    """One `PatchedLayer` per neural layer, in the order of the model; empty if there is none. `str()` makes a table of it."""

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self)

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self)

    def __str__(self) -> str:
        if not self:
            return "no neural layer"
        total = ("total", *[""] * (len(PatchedLayer._fields) - 3), self.num_parameters, self.num_bytes)
        return table([PatchedLayer._fields, *self, total])

    __repr__ = __str__


class PatchPlan(NamedTuple):
    """What `patch` would do. `str()` makes tables of it."""

    layers: PatchStatus
    model_parameters: int  # that the model has now
    backends: Explanation  # what each layer would run on, as `explain` says it

    def __str__(self) -> str:
        share = self.layers.num_parameters / max(1, self.model_parameters)
        return (
            f"{len(self.layers)} attention layer{'s' if len(self.layers) > 1 else ''} would become neural, with "
            f"{self.layers.num_parameters:,} new parameters ({self.layers.num_bytes:,} bytes; {share:.2%} of the model's "
            f"{self.model_parameters:,}):\n\n{self.layers}\n\n{self.backends}"
        )

    def __repr__(self) -> str:
        return str(self)


def table(rows: Iterable[Iterable[Any]]) -> str:
    """The rows, in columns as wide as they need."""
    cells = [[f"{cell:,}" if type(cell) is int else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
