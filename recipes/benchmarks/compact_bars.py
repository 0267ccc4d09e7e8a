"""The bars of the compact form: whole models in it beside stock on SDPA, and the operation alone at its shapes."""

from collections.abc import Iterator
from typing import Any

from benchmarks.bars import Bar, RatioBar, bar_of_row, measure_kernels
from benchmarks.cases import Case, Entry
from benchmarks.correctness import Checker
from benchmarks.instruction_bounds import least_seconds, products_per_second
from benchmarks.reporting import BARS_COLUMNS, Columns, milliseconds
from benchmarks.time_and_memory import Limits
from benchmarks.whole_models import COMPACT, GPT2_124M, STOCK, VIT_BASE, measure_decoding, measure_steps


# Maps proj_dim, shape -> phase -> bound of the ratio to SDPA
OPERATION = {
    (16, "16x2"): {"forward": 0.55, "both": 0.65},
    (2, "paper"): {"forward": 0.36, "both": 0.36},
}
WORDS = {"forward": "forward", "both": "forward + backward"}
GPT2_STEPS = {0.0: 0.80, 0.1: 0.45}  # dropout -> bound
DECODING = {1024: 0.88, 4096: 0.75}  # cached tokens -> bound
VIT_STEP = 0.86
PARAMETERS, CACHE_BYTES = 0.89, 0.52

COMPACT_COLUMNS: Columns = BARS_COLUMNS | {"least ms by count": milliseconds("least_seconds")}


def operation_bars(device: str) -> Iterator[list[RatioBar]]:
    """Groups of bars, each of which is timed by turns together."""
    fused = "native" if device == "cpu" else "triton"
    for phase, words in WORDS.items():
        group = []
        for (proj_dim, shape), bounds in OPERATION.items():
            case = Case(proj_dim=proj_dim, shape=shape, device=device, phase=phase)
            bar = Bar(f"operation alone, {words}, shape {shape}", proj_dim, bounds[phase], over="SDPA")
            group.append(RatioBar(bar, Entry(fused, case), Entry.of("sdpa", case)))
        yield group


def planned_compact_bars(device: str) -> Iterator[str]:
    """What would be measured, a line each."""
    for group in operation_bars(device):
        yield from (f"{item.bar.what}, d'={item.bar.proj_dim}" for item in group)
    yield from (f"{GPT2_124M.name}, training step, dropout {dropout}" for dropout in GPT2_STEPS)
    yield from (f"{GPT2_124M.name}, decode, {tokens:,} cached tokens" for tokens in DECODING)
    yield f"{VIT_BASE.name}, training step and forward"


def measure_compact_bars(device: str, checker: Checker, limits: Limits, step_limits: Limits) -> Iterator[dict[str, Any]]:
    """A row for each bar; of the operation on a CPU, also the least time by count (`benchmarks.instruction_bounds`)."""
    for group in operation_bars(device):
        rate = products_per_second() if device == "cpu" else None
        for row, item in zip(measure_kernels([group], checker, limits), group, strict=True):
            yield row if rate is None else row | {"least_seconds": least_seconds(item.entry.case, rate)}
    both = (STOCK, COMPACT)
    steps = measure_steps(
        GPT2_124M, device, step_limits, batch_size=1, dropouts=tuple(GPT2_STEPS), forward=False, attentions=both
    )
    for stock, row in pairs_of(steps):
        yield bar_of_row(
            Bar(f"{row['model']} compact, {row['step']}", 2, GPT2_STEPS[row["dropout"]], over="stock, SDPA"), row, stock
        )
    yield Bar(f"{GPT2_124M.name} compact, parameters", 2, PARAMETERS, over="stock").row(
        row["parameters"] / stock["parameters"]
    )
    for tokens, bound in DECODING.items():
        for stock, row in pairs_of(measure_decoding(tokens, list(both), ["DynamicCache"], device, step_limits)):
            yield bar_of_row(Bar(f"{row['model']} compact, {row['step']}", 2, bound, over="stock, SDPA"), row, stock)
    bytes_per_token = [each["bytes_per_token"] for each in (row, stock)]
    bar = Bar(f"{GPT2_124M.name} compact, bytes of a cached token", 2, CACHE_BYTES, over="stock")
    yield bar.row(bytes_per_token[0] / bytes_per_token[1])
    steps = measure_steps(
        VIT_BASE, device, step_limits, batch_size=4, dropouts=(0.0,), forward=True, attentions=both, num_labels=1000
    )
    for stock, row in pairs_of(steps):
        yield bar_of_row(
            Bar(f"{row['model']} compact, {row['step']}, shape 16x2", 16, VIT_STEP, over="stock, SDPA"), row, stock
        )


def pairs_of(rows: Iterator[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of the stock model, each with that of the compact one."""
    return zip(rows, rows, strict=True)
