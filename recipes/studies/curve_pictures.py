"""A picture of a study's figure as a curve per kind of scores: against how far scores spread when training starts and when it
ends, or against how many numbers a head compares."""

import math
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.number_format import FEWEST_PAIRS, form_of
from studies.pictures import save
from studies.results import Results, differences, interval
from studies.study_file import Study


SPREAD, NUMBERS = "score_spread", "neural_proj_dim"
# Names the axes of pictures
START, END = "start", "end"
TITLES = {START: "spread of scores within rows at the start", END: "and at the end of training"}
NUMBERS_TITLE = "numbers that a head compares (neural_proj_dim)"
FEWEST = {SPREAD: 3, NUMBERS: 2}  # points of a curve
FIRST_LAYER = ("0",)  # is neural where flags say nothing
SMALLEST_SPREAD = 0.02  # below which the axis is linear, so that it has a zero


class Point(NamedTuple):
    """An arm of a curve."""

    place: float
    arm: str


def curves_of(study: Study, found: Results, setting: str) -> dict[str, list[Point]]:
    """By name: the arms that have run and differ in this setting alone (`SPREAD`), or in it and in the hidden layers that
    their names do not tell apart (`NUMBERS`). Of spreads, the place is what was measured of new models."""
    groups: dict[str, list[Point]] = defaultdict(list)
    names: dict[str, str] = {}
    for arm, runs in found.items():
        place = measured_spread(runs, START) if setting == SPREAD else study.arms[arm].get(NUMBERS)
        if not runs or place is None:
            continue
        if setting == SPREAD:
            group = str({name: value for name, value in study.settings(arm).items() if name != SPREAD})
        else:
            group = re.sub(rf" {place}(?!\d)", "", arm, count=1)
        groups[group].append(Point(place, arm))
        # is named after the arm that says nothing of its start, or after the first one
        if SPREAD not in study.arms[arm] or group not in names:
            names[group] = arm if setting == SPREAD else group
    return {names[group]: sorted(points) for group, points in groups.items() if len(points) >= FEWEST[setting]}


def measured_spread(runs: dict[int, dict[str, Any]], when: str) -> float | None:
    """Of new or trained models, mean over layers and seeds; None where no run has looked."""
    spreads = [layer["spread"] for run in runs.values() for layer in run.get("score_statistics", {}).get(when, ())]
    return statistics.mean(spreads) if spreads else None


def has_curves(study: Study, found: Results, setting: str) -> bool:
    """Whether there is more than one curve to compare, and a baseline by which to place their arms."""
    return bool(found[study.baseline]) and len(curves_of(study, found, setting)) > 1


def draw_curves_of(study: Study, found: Results, rows: list[dict[str, Any]], setting: str, path: Path) -> None:
    """A line per curve through the means of its arms, with every seed as a dot and intervals where an arm has three. All are
    placed by their paired differences to the baseline, since arms have other seeds while a study runs."""
    curves, form = curves_of(study, found, setting), form_of(study, rows, study.metric)
    panels = panels_of(found, curves, setting)
    figure = Figure(figsize=(4 + 5 * len(panels), 5.5), layout="constrained")
    styles = {name: (f"C{number % 10}", "-" if number < 10 else "--") for number, name in enumerate(curves)}
    base = statistics.mean(run["metrics"][study.metric] for run in found[study.baseline].values())

    def placed(arm: str) -> list[float]:
        pairs = differences(study, found, arm, study.baseline) if arm != study.baseline else [0.0]
        return [form.factor * (base + pair) for pair in pairs if math.isfinite(pair)]

    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, when, names) in zip(axes, panels, strict=True):
        for name in names:
            points, (color, style) = curves[name], styles[name]
            places = [measured_spread(found[arm], END) if when == END else place for place, arm in points]
            drawn = [(place, values) for place, (_, arm) in zip(places, points, strict=True) if (values := placed(arm))]
            means = [statistics.mean(values) for _, values in drawn]
            axis.plot([place for place, _ in drawn], means, style, color=color, label=name)
            for (place, values), mean in zip(drawn, means, strict=True):
                axis.plot([place] * len(values), values, "o", color=color, alpha=0.4, markersize=5)
                if len(values) >= FEWEST_PAIRS and (bar := interval(values)) is not None:
                    axis.plot([place, place], bar, color=color, linewidth=1)
                axis.plot(place, mean, "_", color=color, markersize=10)
        rates = {study.settings(arm).get("learning_rate") for name in names for _, arm in curves[name]}
        for arm in found if setting == NUMBERS else ():
            settings = study.settings(arm)
            if NUMBERS in settings or settings.get("learning_rate") not in rates or not (values := placed(arm)):
                continue
            axis.axhline(statistics.mean(values), color="tab:gray", linestyle="--", linewidth=0.8)
            if axis is axes[-1]:
                beside = axis.get_yaxis_transform()
                axis.text(1.01, statistics.mean(values), arm, transform=beside, fontsize=8, verticalalignment="center")
        scale(axis, setting)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
        if setting == NUMBERS or axis is axes[-1]:
            axis.legend(fontsize=8)
    figure.supylabel(f"{form.title} (each seed by its difference to {study.baseline})", fontsize=10)
    save(figure, path)


def panels_of(found: Results, curves: dict[str, list[Point]], setting: str) -> list[tuple[str, str, list[str]]]:
    """Titles, what their places are of, and curves: of spreads at the start and at the end, of numbers by the layers that are
    neural."""
    if setting == SPREAD:
        return [(title, when, list(curves)) for when, title in TITLES.items()]
    by_layers: dict[str, list[str]] = defaultdict(list)
    for name, points in curves.items():
        run = next(iter(found[points[0].arm].values()))["run"]
        by_layers[" ".join(map(str, run.get("neural_layers") or FIRST_LAYER))].append(name)
    more = len(by_layers) > 1
    return [(NUMBERS_TITLE + f", neural layers: {layers}" * more, START, names) for layers, names in by_layers.items()]


def scale(axis: Axes, setting: str) -> None:
    """A logarithmic one, in powers of two for numbers, with a zero for spreads."""
    if setting == SPREAD:
        axis.set_xscale("symlog", linthresh=SMALLEST_SPREAD)
        axis.set_xticks([0, 0.03, 0.1, 0.25, 0.5, 1, 2, 4])
        axis.set_xlim(-SMALLEST_SPREAD / 4, None)
    else:
        axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
