"""A picture of what the first layer's attention scores do during training, and of what models with such scores reach."""

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from studies.number_format import form_of
from studies.pictures import save
from studies.results import Results
from studies.study_file import Study


# Maps what `WatchScores` records of a layer to its title
PANELS = {
    "saturated": "share of saturated rows",
    "entropy": "entropy of rows, nats",
    "gradient": "gradient of query and key weights, norm",
}


def were_watched(found: Results) -> bool:
    """Whether scores were recorded during the training of any run."""
    return any(first_layer(run) is not None for runs in found.values() for run in runs.values())


def first_layer(run: dict[str, Any]) -> str | None:
    """The name of the first layer that was watched."""
    names = (name.split("/")[1] for entry in run["history"] for name in entry if name.startswith("scores/"))
    return next(names, None)


def draw_first_layer(study: Study, found: Results, rows: list[dict[str, Any]], path: Path) -> None:
    """Panels of saturation, entropy and gradient norm against the step, a line per arm, mean over seeds; and one of the
    study's figure, a dot per seed and a line at their mean.

    Of the arms that `study.pictured` names. Where it names none, of all but those with a learning rate of their own, if others
    have none: their lines would hide the rest.
    """
    wanted = study.pictured or [arm for arm, settings in study.arms.items() if "learning_rate" not in settings]
    arms = [arm for arm in found if arm in wanted] or list(found)
    arms = [arm for arm in arms if any(points(run, "entropy") for run in found[arm].values())]
    # counts what is drawn, so that no two of a few lines have one colour
    numbers = {arm: number for number, arm in enumerate(arms)}
    figure = Figure(figsize=(19, 4.5), layout="constrained")
    *axes, last = figure.subplots(1, len(PANELS) + 1)
    for axis, (figure_name, title) in zip(axes, PANELS.items(), strict=True):
        for arm, number in numbers.items():
            curves = [curve for run in found[arm].values() if (curve := points(run, figure_name))]
            if not curves:
                continue
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = [statistics.mean(curve[step] for curve in curves) for step in steps]
            style = "-" if study.attention(arm).is_neural else "--"
            label = f"{arm} ({len(curves)} seed{'s' * (len(curves) > 1)})"
            axis.plot(steps, means, style, label=label, color=f"C{number % 10}", linewidth=1.5 + 1.5 * (number // 10))
        axis.set(title=title, xlabel="step", xscale="symlog", xlim=(0, None))
        axis.grid(alpha=0.3)
        if figure_name == "gradient":
            axis.set_yscale("log")
    form = form_of(study, rows, study.metric)
    for arm, number in numbers.items():
        figures = [form.factor * run["metrics"][study.metric] for run in found[arm].values()]
        finite = [each for each in figures if math.isfinite(each)]
        last.plot([number] * len(finite), finite, "o", color=f"C{number % 10}", alpha=0.4, markersize=5)
        if finite:
            last.plot(number, statistics.mean(finite), "_", color=f"C{number % 10}", markersize=18, markeredgewidth=2)
    last.set(title=f"{form.title}, by arm", xticks=[], xlim=(-0.5, len(arms) - 0.5))
    last.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save(figure, path)


def points(run: dict[str, Any], figure_name: str) -> dict[int, float]:
    """What was recorded of the first layer, by step; before training at step 0."""
    layer = first_layer(run)
    key = f"scores/{layer}/{figure_name}"
    before = [each[figure_name] for each in run["score_statistics"]["start"] if each["layer"] == layer and figure_name in each]
    return dict(enumerate(before[:1])) | {entry["step"]: entry[key] for entry in run["history"] if key in entry}
