"""Pictures of a study: every seed's difference, and how the training losses part."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from studies.number_format import FEWEST_PAIRS, form_of
from studies.results import Results, compared_with, difference, differences
from studies.study_file import SAME_TIME, Study


def draw_differences(study: Study, found: Results, rows: list[dict[str, Any]], path: Path) -> None:
    """Every seed's difference, with the mean and its interval."""
    panels, form = compared_with(study, rows), form_of(study, rows, study.metric)
    lengths = [len(arms) for arms in panels.values()]
    figure, axes = panels_of(
        list(panels), [count + 1 for count in lengths], (8, 1.4 + 0.35 * sum(lengths) + 0.8 * len(panels))
    )
    for axis, arms in zip(axes, panels.values(), strict=False):
        for place, (arm, base) in enumerate(arms.items()):
            pairs = [form.factor * pair for pair in differences(study, found, arm, base)]
            axis.plot(pairs, [place] * len(pairs), "o", color=study.attention(arm).color, alpha=0.5)
            change = difference(study, found, arm, base)
            if change["low"] is not None and change["pairs"] >= FEWEST_PAIRS:
                bar = [form.factor * change[end] for end in ("low", "high")]
                axis.plot(bar, [place, place], color="black", linewidth=1)
            elif change["pooled"] is not None:
                bar = [form.factor * change[end] for end in ("pooled_low", "pooled_high")]
                axis.plot(bar, [place, place], color="tab:gray", linewidth=1, linestyle=":")
                axis.plot(form.factor * change["pooled"], place, "|", color="tab:gray", markersize=8)
            if pairs:
                axis.plot(statistics.mean(pairs), place, "|", color="black", markersize=14)
        axis.axvline(0.0, color="tab:gray", linestyle="--")
        axis.set_yticks(range(len(arms)), list(arms))
        axis.set_ylim(len(arms) - 0.5, -0.5)
    direction = "left" if study.lower_is_better else "right"
    figure.supxlabel(
        f"{form.words}{', points' if form.unit else ''} ({direction} is better); bars: 95 % intervals, dotted: pooled",
        fontsize=10,
    )
    save(figure, path)


def draw_curves(study: Study, found: Results, rows: list[dict[str, Any]], path: Path) -> None:
    """Training loss less that of the arm that it is compared with, batch for batch the same, mean over seeds; of arms with as
    many steps."""
    panels = compared_with(study, rows)
    heights = [max(3.5, 0.17 * len(arms)) for arms in panels.values()]  # in inches; has room for the names of all arms
    figure, axes = panels_of(list(panels), heights, (8, 1 + max(3.5, sum(heights))))
    for axis, arms in zip(axes, panels.values(), strict=False):
        for number, (arm, base) in enumerate(arms.items()):
            if SAME_TIME in study.arms[arm]:
                continue
            both = [(losses(each), losses(found[base][seed])) for seed, each in found[arm].items() if seed in found[base]]
            if not both:
                continue
            steps = sorted(set.intersection(*(own.keys() & other.keys() for own, other in both)))
            means = [statistics.mean(own[step] - other[step] for own, other in both) for step in steps]
            axis.plot(steps, means, label=arm, color=f"C{number % 10}", linewidth=1 + number // 10)
        axis.axhline(0.0, color="tab:gray", linestyle="--")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("difference of training losses, nats", fontsize=10)
    save(figure, path)


def losses(result: dict[str, Any]) -> dict[int, float]:
    return {entry["step"]: float(entry["loss"]) for entry in result["history"] if "loss" in entry}


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, metadata={"Software": None})  # leaves out a version that would make equal pictures differ


def panels_of(titles: list[str], heights: list[int] | list[float], size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    """One panel below the other, of these heights."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(max(1, len(titles)), 1, squeeze=False, height_ratios=heights or None)[:, 0]
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=10)
    return figure, list(axes)
