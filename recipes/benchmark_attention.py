"""Times Neural Attention beside dot-product attention, and says whether what it times is right.

    python recipes/benchmark_attention.py                              # small: a minute
    python recipes/benchmark_attention.py --phase decode --proj_dim 2 16 --length 1024 4096
    python recipes/benchmark_attention.py --preset bars --output model_cards/benchmarks/bars

A provider is timed only if it matches the formula in float64 on the very inputs that are timed. What is compared is timed by
turns in one run, and ratios are taken turn by turn, so that noise of the machine hits both sides alike.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.attention_modules import LENGTHS, MODULES, measure_modules
from benchmarks.bars import kernel_bars, measure_bars
from benchmarks.cases import DOT_PRODUCTS, DTYPES, GPU_PROVIDERS, MASKS, PHASES, PROVIDERS, SCORERS, Case, Entry
from benchmarks.compact_bars import COMPACT_COLUMNS, measure_compact_bars, planned_compact_bars
from benchmarks.correctness import Checker
from benchmarks.reporting import BARS_COLUMNS, MODELS_COLUMNS, Row, sweep_columns, write_files
from benchmarks.time_and_memory import Limits, peak_bytes, time_entries
from benchmarks.whole_models import ATTENTIONS, CACHES, COMPACT, GPT2_124M, STOCK, VIT_BASE, measure_decoding, measure_steps
from tools.command_lines import make_folder_of
from tools.markdown import table_heading, table_row
from tools.provenance import command_line, environment
from tools.timing_by_turns import Spread, ratio_of


# Sets the axes of a call where the command line does not
SWEEPS: dict[str, dict[str, list]] = {
    "quick": {"length": [256, 1024], "phase": ["forward", "both"]},
    "shapes": {
        "phase": ["forward", "both"],
        "shape": [f"{first}x{second}" for first in (2, 4, 8, 16, 32) for second in (1, 2, 4, 8)],
    },
    "lengths": {"length": [256, 512, 1024, 2048, 4096, 8192, 16384], "phase": ["forward", "both"], "proj_dim": [2, 16]},
    "gpu": {
        "length": [4096],
        "phase": ["forward", "both"],
        "shape": ["2x1", "16x2", "16x8"],
        "dtype": ["bfloat16"],
        "batch_size": [4],
        "provider": ["sdpa", "flash", "flex", "triton"],
    },
}
LIMITS = {
    "quick": Limits(repeats=20, seconds=3),
    "lengths": Limits(repeats=20, seconds=3, fewest=3, call=1.5),
    "modules": Limits(repeats=20, seconds=6, fewest=3),
    "shapes": Limits(repeats=30, seconds=20),
    "bars": Limits(repeats=50, seconds=10),
    "compact": Limits(repeats=50, seconds=10),
    "models": Limits(repeats=15, seconds=150),
    "cache": Limits(repeats=40, seconds=30),
    "gpu": Limits(repeats=50, seconds=3),
    "gpu-models": Limits(repeats=20, fewest=3, seconds=5),
}
LIMITS_HELP = {
    "repeats": "Turns, at most.",
    "fewest": "Turns, at least.",
    "seconds": "After which no further turn begins, once there are that many.",
    "memory": "GiB that a provider may hold for its pairs.",
    "call": "Seconds of a call, by its time at a shorter length, beyond which only SDPA and fused kernels go on.",
}
CHOICES = {"phase": PHASES, "dtype": tuple(DTYPES), "mask": MASKS, "mode": ("replace", "residual"), "scorer": SCORERS}
AXES = [field for field in dataclasses.fields(Case) if field.name != "device"]
CACHED_TOKENS = (1024, 4096)
GPU_ATTENTIONS = (STOCK, 'neural_layers="all"', COMPACT)
SCORER_AXES = ("proj_dim", "shape", "mode", "scorer")  # axes that dot products do not see


def truth(word: str) -> bool:
    if word not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither yes nor no")
    return word == "yes"


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset",
        choices=LIMITS,
        default="quick",
        help="quick, shapes and lengths: calls of attention, whose axes are the flags below; bars: what the kernels must "
        "reach; compact: what the compact form must reach; models: training, forward and decode steps of GPT-2 124M and "
        "ViT-B; cache: decoding with each kind of cache; modules: the attention module of GPT-2 124M, stock, neural and "
        "compact, against the length, on the CPU; gpu and gpu-models: what `make gpu` measures.",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="Of torch and of the native kernel.")
    for name, meaning in LIMITS_HELP.items():
        parser.add_argument(f"--{name}", type=Limits.__annotations__[name], help=f"{meaning} Default: the preset's.")
    parser.add_argument("--output", help="Write NAME.md, .json and .csv, and NAME.png where there are several lengths.")
    parser.add_argument("--dry_run", action="store_true", help="List what would be measured.")
    axes = parser.add_argument_group("axes of a call of attention (presets quick, shapes and lengths)")
    axes.add_argument("--provider", nargs="+", choices=PROVIDERS, help="Default: all of the device.")
    for field in AXES:
        kind: Any = truth if field.type is bool else field.type
        default = "yes or no" if field.type is bool else f"{field.default} where the preset says nothing"
        axes.add_argument(f"--{field.name}", nargs="+", type=kind, choices=CHOICES.get(field.name), help=default)
    arguments = parser.parse_args(words)
    if arguments.preset == "modules" and arguments.device != "cpu":
        parser.error("--preset modules measures on the CPU; on a GPU, take gpu-models")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if arguments.preset not in SWEEPS:
        given = [name for name in ("provider", *(field.name for field in AXES)) if getattr(arguments, name) is not None]
        if given:
            parser.error(f"--preset {arguments.preset} has no axes to choose: leave out {', '.join(f'--{n}' for n in given)}")
    return arguments


def sweep_axes(arguments: argparse.Namespace) -> dict[str, list]:
    """Values of each field of `Case`, of which all combinations are measured."""
    preset = SWEEPS[arguments.preset]
    return {
        field.name: getattr(arguments, field.name) or preset.get(field.name) or [field.default]
        for field in sorted(AXES, key=lambda field: field.name in SCORER_AXES)
    }


def sweep_groups(arguments: argparse.Namespace) -> Iterator[list[Entry]]:
    """Entries that are timed together: all providers and scorers on the same queries, keys and values."""
    axes = sweep_axes(arguments)
    absent = {"reference"} if arguments.preset == "lengths" else set()
    absent |= {"triton", *GPU_PROVIDERS} if arguments.device == "cpu" else {"native"}
    if arguments.preset == "shapes":  # leaves out what costs seconds a call
        absent |= {"literal", "eager", "blockwise", "reference"}
    preset = SWEEPS[arguments.preset].get("provider")
    providers = arguments.provider or preset or [provider for provider in PROVIDERS if provider not in absent]
    for values in itertools.product(*(axes[name] for name in axes if name not in SCORER_AXES)):
        scorers = itertools.product(*(axes[name] for name in SCORER_AXES))
        try:
            cases = [Case(**dict(zip(axes, (*values, *scorer), strict=True)), device=arguments.device) for scorer in scorers]
        except ValueError as error:
            raise SystemExit(f"This cannot be measured: {error}") from None
        yield list(dict.fromkeys(Entry.of(provider, case) for provider in providers for case in cases))


def sweep(arguments: argparse.Namespace, checker: Checker, limits: Limits) -> Iterator[Row]:
    """A row for each entry: its time, its ratio to SDPA, its memory, or why it was not timed."""
    seconds: dict[Entry, tuple[int, float]] = {}  # pairs and time at the last length, whatever that was
    for entries in sweep_groups(arguments):
        place = {entry: Entry(entry.provider, dataclasses.replace(entry.case, length=0)) for entry in entries}
        slow = {}
        for entry in entries:
            pairs, time = seconds.get(place[entry], (1, 0.0))
            expected = time * entry.case.num_pairs / pairs
            if expected > limits.call and entry.provider not in ("sdpa", "native", "triton", *GPU_PROVIDERS):
                slow[entry] = f"a call would take about {expected:.0f} s"
        timings = time_entries([entry for entry in entries if entry not in slow], checker, limits)
        baseline = [time for entry, timing in timings.items() if entry.provider == "sdpa" for time in timing.times]
        for entry in entries:
            row: Row = {"provider": entry.provider, **dataclasses.asdict(entry.case)}
            if entry.provider in DOT_PRODUCTS:
                row |= dict.fromkeys(SCORER_AXES)
            if entry in slow or not timings[entry].times:
                yield row | {"note": slow.get(entry) or timings[entry].note}
                continue
            times = timings[entry].times
            seconds[place[entry]] = (entry.case.num_pairs, Spread.of(times).median)
            row |= Spread.of(times).fields("seconds")
            row |= ratio_of(times, baseline).fields("to_sdpa") if baseline else {}
            yield row | {"turns": len(times), "peak_bytes": peak_bytes(entry), "note": timings[entry].note}


def measure_models(device: str, limits: Limits) -> Iterator[Row]:
    yield from measure_steps(GPT2_124M, device, limits, batch_size=1, dropouts=(0.0, 0.1), forward=False)
    yield from measure_decoding(1000, list(ATTENTIONS), ["DynamicCache", "NeuralCache"], device, limits)
    yield from measure_steps(VIT_BASE, device, limits, batch_size=4, dropouts=(0.0,), forward=True, num_labels=1000)


def measure_caches(device: str, limits: Limits) -> Iterator[Row]:
    for cached_tokens in CACHED_TOKENS:
        yield from measure_decoding(cached_tokens, [STOCK, 'neural_layers="all"'], list(CACHES), device, limits)


def measure_gpu_models(device: str, limits: Limits) -> Iterator[Row]:
    yield from measure_steps(
        GPT2_124M, device, limits, batch_size=4, dropouts=(0.0, 0.1), forward=False, attentions=GPU_ATTENTIONS
    )
    yield from measure_decoding(1000, list(GPU_ATTENTIONS), ["DynamicCache"], device, limits)
    yield from measure_steps(
        VIT_BASE, device, limits, batch_size=32, dropouts=(0.0,), forward=True, attentions=GPU_ATTENTIONS, num_labels=1000
    )


def plan(arguments: argparse.Namespace) -> Iterator[str]:
    """What would be measured, a line each."""
    if arguments.preset in SWEEPS:
        for entries in sweep_groups(arguments):
            for entry in entries:
                case = dataclasses.asdict(entry.case)
                yield ", ".join([entry.provider, *(f"{name} {case[name]}" for name in sweep_axes(arguments))])
    elif arguments.preset == "bars":
        for group in kernel_bars(arguments.device):
            yield from (f"{item.bar.what}, d'={item.bar.proj_dim}" for item in group)
        yield from ("peak memory", "first uses", f"training steps of {GPT2_124M.name}")
    elif arguments.preset == "compact":
        yield from planned_compact_bars(arguments.device)
    elif arguments.preset == "modules":
        yield from (f"{name}, {length:,} tokens" for length in LENGTHS for name in MODULES)
    elif arguments.preset in ("models", "gpu-models"):
        attentions = GPU_ATTENTIONS if arguments.preset == "gpu-models" else tuple(ATTENTIONS)
        yield from (f"{family.name}, {attention}" for family in (GPT2_124M, VIT_BASE) for attention in attentions)
    else:
        yield from (f"{tokens:,} cached tokens, {cache}" for tokens in CACHED_TOKENS for cache in CACHES)


ON_INPUTS = "on the very inputs that are timed"
OF_MODELS = f"{ON_INPUTS}; training steps were compared without dropout, and decoding by the tokens that it leads to"
# Maps a preset to how its calls are compared
CHECKED = {"modules": "at few tokens", **dict.fromkeys(("bars", "compact", "models", "gpu-models", "cache"), OF_MODELS)}


def describe(arguments: argparse.Namespace, record: dict[str, Any]) -> str:
    """How it was measured, for the card."""
    where = record["environment"]
    gpu = f"on {where['gpu']}" if arguments.device != "cpu" else "not measured on a GPU"
    checked = CHECKED.get(arguments.preset, ON_INPUTS)
    parts = [
        f"Measured by `{record['command']}` on {where['cpu']}, {where['threads']} threads, {gpu}, with Python "
        f"{where['python']}, torch {where['torch']}, transformers {where['transformers']}.",
        "Medians and, in parentheses, quartiles. What is compared was timed by turns in one run, and ratios were taken turn "
        f"by turn. Nothing was timed that does not match the reference in float64, {checked}.",
    ]
    if arguments.preset in SWEEPS:
        axes = sweep_axes(arguments)
        same = ", ".join(f"{name} {values[0]}" for name, values in axes.items() if len(values) == 1)
        parts.append(f"The same everywhere: {same}. Extra memory is what a call needs beyond its inputs, at its peak.")
    return "\n\n".join(parts)


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    if arguments.dry_run:
        print("\n".join(plan(arguments)))
        return
    if arguments.output:
        make_folder_of("--output", arguments.output)
    torch.set_num_threads(arguments.threads)
    given = {name: value for name in Limits._fields if (value := getattr(arguments, name)) is not None}
    limits = LIMITS[arguments.preset]._replace(**given)
    axes: list[str] = []
    if arguments.preset in SWEEPS:
        axes = [name for name, values in sweep_axes(arguments).items() if len(values) > 1]
        measured, columns = sweep(arguments, Checker(), limits), sweep_columns(axes)
    elif arguments.preset in ("bars", "compact"):
        step_limits = LIMITS["models"]._replace(**given)
        measures_bars = {"bars": (measure_bars, BARS_COLUMNS), "compact": (measure_compact_bars, COMPACT_COLUMNS)}
        measure_them, columns = measures_bars[arguments.preset]
        measured = measure_them(arguments.device, Checker(), limits, step_limits)
    elif arguments.preset == "modules":
        axes = ["length", "phase"]
        measured, columns = measure_modules(limits), sweep_columns(axes)
    else:
        measures = {"models": measure_models, "gpu-models": measure_gpu_models, "cache": measure_caches}
        measured, columns = measures[arguments.preset](arguments.device, limits), MODELS_COLUMNS

    record: dict[str, Any] = {"command": command_line(), "environment": environment(), "preset": arguments.preset, "rows": []}
    lines = [describe(arguments, record), "", table_heading(list(columns))]
    print("\n".join(lines), flush=True)
    try:
        for row in measured:
            record["rows"].append(row)
            lines.append(table_row(show(row) for show in columns.values()))
            print(lines[-1], flush=True)
    finally:  # keeps what is there if something goes wrong after many minutes
        if arguments.output and record["rows"]:
            write_files(arguments.output, record, "\n".join([f"# Benchmark: {arguments.preset}", "", *lines, ""]), axes)


if __name__ == "__main__":
    main()
