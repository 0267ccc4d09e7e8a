"""What a patch is, or would be, layer by layer: plain data, and tables of it."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..diagnostics import Explanation
from ..introspection import count, neural_layers
from ..models.neural_attention_scorer import is_compact
from .sizes import SIZE_TITLES, ModelSize


class PatchedLayer(NamedTuple):
    """One neural layer. `_asdict()` gives plain data that JSON can hold."""

    layer: str  # qualified name of the attention module
    head_dim: int  # size of the queries and keys that the scorer takes
    proj_dim: int | None  # None in the compact form, where it decides nothing
    hidden_dims: tuple[int, int]
    mode: str
    per_head: bool
    init: str
    compact: bool
    num_parameters: int  # of the scorer
    num_bytes: int

    @classmethod
    def of(cls, layer: str, scorer: Any) -> "PatchedLayer":
        return cls(
            layer,
            scorer.head_dim,
            getattr(scorer, "proj_dim", None),
            tuple(scorer.hidden_dims),
            scorer.mode,
            scorer.num_heads is not None,
            scorer.init,
            is_compact(scorer),
            *count(getattr(scorer, "original_module", scorer).parameters()),  # counts once what peft keeps copies of
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


def status_of(model: nn.Module) -> PatchStatus:
    """See `patch_status`."""
    first: dict[nn.Module, PatchedLayer] = {}
    for name, module, scorer in neural_layers(model):
        first.setdefault(module, PatchedLayer.of(name, scorer))
    return PatchStatus(first.values())


class PatchPlan(NamedTuple):
    """What `patch` would do. `str()` makes tables of it."""

    layers: PatchStatus
    backends: Explanation  # what each layer would run on, as `explain` says it
    stock: ModelSize  # what the model holds now
    patched: ModelSize  # and with the new layers, whose keys a stock cache keeps whole

    @property
    def model_parameters(self) -> int:
        """That the model has now."""
        return self.stock.num_parameters

    def __str__(self) -> str:
        share = self.layers.num_parameters / max(1, self.model_parameters)
        return (
            f"{len(self.layers)} attention layer{'s' if len(self.layers) > 1 else ''} would become neural, with "
            f"{self.layers.num_parameters:,} new parameters ({self.layers.num_bytes:,} bytes; {share:.2%} of the model's "
            f"{self.model_parameters:,}):\n\n{self.layers}\n\n"
            f"{sizes({'stock': self.stock, 'patched': self.patched})}\n\n{self.backends}"
        )

    def __repr__(self) -> str:
        return str(self)


NO_SMALLER = (
    "That is no smaller than the stock model. The compact form pays where `hidden_dims[0]` is well below the size of a head."
)


class CompactPlan(NamedTuple):
    """What `compact` would do. `str()` makes tables of it."""

    layers: PatchStatus  # as they would be
    stock: ModelSize  # of the model without its scorers
    whole: ModelSize  # of the model now
    compact: ModelSize  # of the model in the compact form
    backends: Explanation  # what each layer would run on, as `explain` says it

    def __str__(self) -> str:
        rows = sizes({"stock": self.stock, "now": self.whole, "compact": self.compact})
        number = sum(layer.compact for layer in self.layers)
        plural = "s" if number > 1 else ""
        remark = "" if self.compact.num_parameters < self.stock.num_parameters else f"\n\n{NO_SMALLER}"
        return f"{number} attention layer{plural} would be compact:\n\n{self.layers}\n\n{rows}{remark}\n\n{self.backends}"

    def __repr__(self) -> str:
        return str(self)


def sizes(models: Mapping[str, ModelSize]) -> str:
    """A table of them, by name."""
    return table([("model", *SIZE_TITLES), *((name, *size.cells) for name, size in models.items())])


def table(rows: Iterable[Iterable[Any]]) -> str:
    """The rows, in columns as wide as they need."""
    cells = [[f"{cell:,}" if type(cell) is int else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
