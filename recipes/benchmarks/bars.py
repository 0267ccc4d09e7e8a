"""The bars: what the fused kernels must reach, beside what they do."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.cases import Case, Entry
from benchmarks.correctness import Checker
from benchmarks.time_and_memory import Limits, measure_first_use, peak_bytes, time_entries
from benchmarks.whole_models import GPT2_124M, STOCK, measure_steps
from tools.timing_by_turns import Spread, ratio_of


PROJ_DIMS = (2, 16)
VIT = {"causal": False, "batch_size": 8, "heads": 8, "head_dim": 96, "length": 785}
SHORT = {"phase": "both", "batch_size": 16, "heads": 4, "length": 256}

# Says what a case is, how it differs from `Case()`, and the bounds of the ratio to SDPA at each of `PROJ_DIMS`
OVER_SDPA: list[tuple[str, dict[str, Any], tuple[float, float]]] = [
    ("forward", {}, (0.30, 0.65)),
    ("forward + backward", {"phase": "both"}, (0.45, 1.00)),
    ("forward, 4,096 tokens", {"length": 4096}, (0.35, 0.75)),
    ("forward, not causal, batch 8, 8 heads, head_dim 96, 785 tokens (the paper's ViT)", VIT, (0.50, 0.80)),
    ("forward + backward, batch 16, 4 heads, 256 tokens", SHORT, (0.30, 0.85)),
    ("residual mode, forward", {"mode": "residual"}, (1.00, 1.20)),
    ("decode, one token against 4,096 cached", {"phase": "decode", "length": 4096}, (0.80, 1.00)),
]
# Says what a case is, how it differs from the one that it is compared with on the same kernel, and the bound of the ratio
OVER_ITSELF: list[tuple[str, dict[str, Any], float]] = [
    ("padding mask over none", {"mask": "padding"}, 1.25),
    ("dropout 0.1 over none", {"dropout": 0.1}, 1.25),
    ("bf16 over fp32", {"dtype": "bfloat16"}, 1.05),
]
MODULE_SPEEDUPS = (20.0, 50.0)
MEMORY = Case(length=16384, phase="both")
FIRST_USES = (("first use, new cache", 10.0), ("first use in a later process", 0.1))
TRAINING_BOUNDS = {"neural_layers=[0]": 1.00, 'neural_layers="all"': 0.95}
TRAINING_DROPOUTS = (0.0, 0.1)


class Bar(NamedTuple):
    """A bound of a measured number, in words too: `over` says what a ratio is to."""

    what: str
    proj_dim: int | None
    bound: float
    unit: str = "x"
    over: str = ""
    at_least: bool = False

    def row(self, measured: Spread | float | None, **extra: Any) -> dict[str, Any]:
        """The bar with what was measured, which is None where nothing could be."""
        spread = measured if isinstance(measured, Spread) or measured is None else Spread.of([measured])
        reached = spread is not None and (spread.median >= self.bound if self.at_least else spread.median <= self.bound)
        return {**self._asdict(), **({} if spread is None else spread.fields("measured")), "reached": reached, **extra}


class RatioBar(NamedTuple):
    """A bar of the ratio of two entries' times."""

    bar: Bar
    entry: Entry
    over: Entry


def kernel_bars(device: str) -> Iterator[list[RatioBar]]:
    """Groups of bars, each of which is timed by turns together."""
    fused = "native" if device == "cpu" else "triton"
    for what, changes, bounds in OVER_SDPA:
        cases = [Case(proj_dim=size, device=device, **changes) for size in PROJ_DIMS]
        sdpa = Entry.of("sdpa", cases[0])
        yield [
            RatioBar(Bar(what, case.proj_dim, bound, over="SDPA"), Entry(fused, case), sdpa)
            for case, bound in zip(cases, bounds, strict=True)
        ]
    for phase, suffix in (("forward", "forward"), ("both", "forward + backward")):
        for size in PROJ_DIMS:
            plain = Case(proj_dim=size, device=device, phase=phase)
            yield [
                RatioBar(
                    Bar(f"{what}, {suffix}", size, bound, over="the same kernel"),
                    Entry(fused, replace(plain, **changes)),
                    Entry(fused, plain),
                )
                for what, changes, bound in OVER_ITSELF
            ]
    for size, speedup in zip(PROJ_DIMS, MODULE_SPEEDUPS, strict=True):
        case = Case(proj_dim=size, device=device, projections=True)
        bar = Bar("the authors' module, projections included, forward", size, speedup, over="our module", at_least=True)
        yield [RatioBar(bar, Entry("literal", case), Entry(fused, case))]


def measure_kernels(groups: Iterable[list[RatioBar]], checker: Checker, limits: Limits) -> Iterator[dict[str, Any]]:
    for group in groups:
        timings = time_entries([entry for item in group for entry in (item.entry, item.over)], checker, limits)
        for bar, entry, over in group:
            ours, theirs = timings[entry], timings[over]
            if ours.times and theirs.times:
                seconds = {"seconds": Spread.of(ours.times).median, "over_seconds": Spread.of(theirs.times).median}
                yield bar.row(ratio_of(ours.times, theirs.times), **seconds, turns=len(ours.times), note=ours.note)
            else:
                yield bar.row(None, note="; ".join(timing.note for timing in (ours, theirs) if not timing.times))


def measure_memory(device: str) -> Iterator[dict[str, Any]]:
    fused = "native" if device == "cpu" else "triton"
    for size in PROJ_DIMS:
        entry = Entry(fused, replace(MEMORY, proj_dim=size, device=device))
        bar = Bar(f"peak extra memory of forward + backward, {MEMORY.length:,} tokens", size, 1.0, unit="GiB")
        yield bar.row(peak_bytes(entry) / 2**30)


def measure_first_uses() -> Iterator[dict[str, Any]]:
    for (what, bound), use in zip(FIRST_USES, measure_first_use(), strict=True):
        yield Bar(what, 2, bound, unit="s").row(use.call, note=f"of which finding or compiling, and loading: {use.load:.3f} s")


def bar_of_row(bar: Bar, row: dict[str, Any], stock: dict[str, Any]) -> dict[str, Any]:
    """A bar beside a row of `benchmarks.whole_models`, and that of the stock model."""
    if "to_stock" not in row:
        return bar.row(None, note=row["note"])
    ratio = Spread(*(row[name] for name in ("to_stock_25%", "to_stock", "to_stock_75%")))
    seconds = {"seconds": row["seconds"], "over_seconds": stock["seconds"]}
    return bar.row(ratio, **seconds, turns=row["turns"], note=row["note"])


def measure_training(device: str, limits: Limits) -> Iterator[dict[str, Any]]:
    stock: dict[str, Any] = {}
    wanted = (STOCK, *TRAINING_BOUNDS)
    for row in measure_steps(
        GPT2_124M, device, limits, batch_size=1, dropouts=TRAINING_DROPOUTS, forward=False, attentions=wanted
    ):
        if row["attention"] == STOCK:
            stock = row
            continue
        bar = Bar(
            f"{row['model']}, {row['step']}, {row['attention']}", 2, TRAINING_BOUNDS[row["attention"]], over="stock, SDPA"
        )
        yield bar_of_row(bar, row, stock)


def measure_bars(device: str, checker: Checker, limits: Limits, step_limits: Limits) -> Iterator[dict[str, Any]]:
    """A row for each bar."""
    yield from measure_kernels(kernel_bars(device), checker, limits)
    yield from measure_memory(device)
    if device == "cpu":
        yield from measure_first_uses()
    yield from measure_training(device, step_limits)
