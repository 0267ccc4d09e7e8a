"""Tables, files and pictures of what `benchmark_attention.py` measured."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tools.json_files import write_json


Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]  # heading -> what a row shows under it

LABELS = {
    "literal": "authors' formula, literally",
    "eager": "dot product, eager",
    "sdpa": "dot product, SDPA",
    "flash": "dot product, SDPA's flash kernel",
    "flex": "FlexAttention",
    "native": "native",
    "triton": "Triton",
    "blockwise": "blockwise",
    "reference": "reference",
    "stock": "stock, SDPA",
    "neural 2x1": "neural, (2, 1)",
    "compact 2x1": "compact, (2, 1)",
    "compact 16x2": "compact, (16, 2)",
    "compact 16x8": "compact, (16, 8)",
}
COLORS = {
    "literal": "tab:red",
    "eager": "tab:brown",
    "sdpa": "black",
    "flash": "tab:gray",
    "flex": "tab:pink",
    "native": "tab:blue",
    "triton": "tab:green",
    "blockwise": "tab:orange",
    "reference": "tab:purple",
    "stock": "black",
    "neural 2x1": "tab:cyan",
    "compact 2x1": "tab:blue",
    "compact 16x2": "tab:green",
    "compact 16x8": "tab:orange",
}
PHASES = {"forward": "forward", "backward": "backward", "both": "forward + backward", "decode": "decode, one token"}
STYLES = ("-", "--", ":", "-.")


def short(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def spread(row: Row, name: str, scale: float = 1.0) -> str:
    """Median and quartiles."""
    if name not in row:
        return ""
    middle, low, high = (short(row[place] * scale) for place in (name, f"{name}_25%", f"{name}_75%"))
    return middle if low == high else f"{middle} ({low} to {high})"


def text(name: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(name) is None else str(row[name])


def milliseconds(name: str) -> Callable[[Row], str]:
    return lambda row: short(row[name] * 1000) if name in row else ""


def sweep_columns(axes: list[str]) -> Columns:
    """Args: axes: those that have several values."""
    return {
        "provider": lambda row: LABELS[row["provider"]],
        **{axis: text(axis) if axis != "phase" else lambda row: PHASES[row["phase"]] for axis in axes},
        "ms": lambda row: spread(row, "seconds", 1000),
        "x SDPA": lambda row: spread(row, "to_sdpa"),
        "extra MiB": lambda row: short(row["peak_bytes"] / 2**20) if "peak_bytes" in row else "",
        "matches the reference": lambda row: row["note"] if "seconds" in row else f"not timed: {row['note']}",
    }


BARS_COLUMNS: Columns = {
    "what": text("what"),
    "d'": text("proj_dim"),
    "must reach": lambda row: f"{'>=' if row['at_least'] else '<='} {row['bound']:.2f} {row['unit']} {row['over']}".strip(),
    "measured": lambda row: spread(row, "measured") or "not measured",
    "reached": lambda row: "yes" if row["reached"] else "**no**",
    "ms": milliseconds("seconds"),
    "compared with ms": milliseconds("over_seconds"),
    "checked on": text("note"),
}
MODELS_COLUMNS: Columns = {
    "model": text("model"),
    "step": text("step"),
    "attention": text("attention"),
    "cache": text("cache"),
    "cached bytes per token": lambda row: f"{row['bytes_per_token']:,.0f}" if "bytes_per_token" in row else "",
    "ms": lambda row: spread(row, "seconds", 1000) or "not timed",
    "x stock": lambda row: spread(row, "to_stock"),
    "same as the reference": text("note"),
}


def draw_lengths(rows: list[Row], axes: list[str], path: Path) -> None:
    """Time and extra memory against the length, on logarithmic axes: a column per phase, a line per provider and setting.

    Args: axes: those that have several values.
    """
    names = [axis for axis in axes if axis not in ("length", "phase")]
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        setting = ", ".join(f"{name} {row[name]}" for name in names if row[name] is not None)
        lines.setdefault((row["provider"], setting), []).append(row)
    settings = list(dict.fromkeys(setting for provider, setting in lines if provider not in ("eager", "sdpa")))
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    lengths = sorted({row["length"] for row in rows})

    size = (1.5 + 4.5 * len(phases), 8.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(2, len(phases), sharex=True, sharey="row", squeeze=False)
    for column, phase in enumerate(phases):
        for panel, name, scale in zip(panels[:, column], ("seconds", "peak_bytes"), (1000, 2**-20), strict=True):
            for (provider, setting), members in lines.items():
                points = [(row["length"], row[name] * scale) for row in members if row["phase"] == phase and name in row]
                style = STYLES[settings.index(setting) % len(STYLES)] if setting in settings else "-"
                label = f"{LABELS[provider]}, {setting}" if setting else LABELS[provider]
                across, up = zip(*points, strict=True) if points else ((), ())
                panel.plot(across, up, label=label, color=COLORS[provider], linestyle=style, marker=".")
            panel.set_xscale("log", base=2)
            if panel.lines and any(len(line.get_xdata()) for line in panel.lines):  # skips memory where it is not measured
                panel.set_yscale("log")
            panel.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
            panel.grid(alpha=0.3)
        panels[0, column].set_title(PHASES[phase])
        panels[1, column].set_xlabel("tokens")
    panels[0, 0].set_ylabel("milliseconds")
    panels[1, 0].set_ylabel("extra memory, MiB")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
    figure.savefig(path, dpi=120)


def write_files(output: str, record: dict[str, Any], card: str, axes: list[str]) -> None:
    """NAME.json, .csv and .md, and a picture where there are several lengths."""
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = record["rows"]
    write_json(path.with_name(f"{path.name}.json"), record)
    with path.with_name(f"{path.name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if "length" in axes:
        draw_lengths(rows, axes, path.with_name(f"{path.name}.png"))
        card += f"\n![Time and memory against the length]({path.name}.png)\n"
    path.with_name(f"{path.name}.md").write_text(card, encoding="utf-8")
