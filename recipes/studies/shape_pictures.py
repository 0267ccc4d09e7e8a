"""A picture of what shapes of scorers are worth: error against what attention, a step, a pair of tokens and a key cost."""

import functools
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from matplotlib.transforms import Bbox, BboxBase

from hf_neural_attention.models.configuration_neural_attention import resolve_sizes
from studies.number_format import FEWEST_PAIRS, form_of
from studies.pictures import save
from studies.results import Results
from studies.study_file import Study


BENCHMARK = Path(__file__).parents[2] / "model_cards" / "benchmarks" / "shapes.json"
PANELS = {
    "attention": "time of attention, forward and backward, to SDPA's (1,024 tokens)",
    "step": "time of a training step, to that of the dot product with SDPA",
    "pair": "multiplications and additions for a pair's score",
    "key": "bytes of a key in a float32 cache, per head",
}


def head_dim(record: dict[str, Any]) -> int:
    """By the model's config, which names what is no default, or else by the run's arguments."""
    known = record["run"] | record.get("config", {})
    if known.get("head_dim") is not None:
        return int(known["head_dim"])
    width, heads = ("hidden_size", "num_attention_heads") if "hidden_size" in known else ("n_embd", "n_head")
    return int(known[width]) // int(known[heads])


def cost_of(settings: dict[str, Any], size: int) -> dict[str, float]:
    """What a pair's score takes, in multiplications and additions that a processor does as one, a key, in bytes, and
    attention, in times of SDPA where that was measured.

    Args:
        settings: of an arm.
        size: of a head.
    """
    if settings["attention"] == "dot":
        # needs no key without scores
        is_uniform = settings.get("score_spread") == 0 and "score_spread_layers" not in settings
        first = pair = 0 if is_uniform else size
        row: str | None = None
    elif settings.get("neural_mode") == "thin":
        first = pair = resolve_sizes(size, settings.get("neural_proj_dim"), "auto")[0]
        row = "thin"
    else:
        shape = settings.get("neural_hidden_dims", "auto")
        _, (first, second) = resolve_sizes(size, settings.get("neural_proj_dim"), shape)
        # adds u + w, multiplies by the second layer, and weighs its units; of ReLU one each for both layers
        pair = first + first * second + 2 * second
        row = f"{first}x{second}"
        if settings.get("neural_mode") == "residual":
            # makes and keeps the dot product as well, which the benchmark has not timed
            first, pair, row = first + size, pair + size, "residual"
    timed = attention_times(size)
    return {"pair": pair, "key": 4 * first} | ({"attention": timed[row]} if row in timed else {})


@functools.cache
def attention_times(size: int) -> dict[str | None, float]:
    """Of attention with each of the benchmark's hidden layers, and with the dot product (`None`); none for heads of a size
    that it has not timed. It has no dot product of few numbers."""
    rows = json.loads(BENCHMARK.read_text(encoding="utf-8"))["rows"] if BENCHMARK.exists() else []
    return {row["shape"]: row["to_sdpa"] for row in rows if row["phase"] == "both" and row["head_dim"] == size}


def error_of(study: Study, base: float, row: dict[str, Any]) -> float:
    """An arm's error where its paired difference puts it beside the baseline: arms have other seeds while a study runs."""
    mean = base + (0.0 if row["arm"] == study.baseline else row["difference"])
    return mean if study.lower_is_better else 1 - mean


def draw_shapes(study: Study, found: Results, rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each cost, with the arms that no other one beats in both joined by a line (the Pareto front).

    Arms at another learning rate than the baseline's differ in more than their shape, and are left out. Arms without a seed of
    the baseline's have no place yet, and there is no picture without the baseline.
    """
    base = next((row["mean"] for row in rows if row["arm"] == study.baseline), None)
    if base is None:
        return
    form = form_of(study, rows, study.metric)
    places, rate = [], study.settings(study.baseline).get("learning_rate")
    for row in rows:
        if study.settings(row["arm"]).get("learning_rate") != rate:
            continue
        if row["arm"] != study.baseline and (row["difference"] is None or not math.isfinite(row["difference"])):
            continue
        size = head_dim(next(iter(found[row["arm"]].values())))
        places.append({"arm": row["arm"], "error": form.factor * error_of(study, base, row), "step": row["relative_time"]})
        places[-1] |= cost_of(study.settings(row["arm"]), size) | {"seeds": row["seeds"]}
    shared = shared_ending([place["arm"] for place in places])
    panels = {cost: title for cost, title in PANELS.items() if any(cost in place for place in places)}
    figure = Figure(figsize=(5 * len(panels), 5), layout="constrained")
    for axis, (cost, title) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for place in (place for place in places if cost in place):
            fill = "full" if place["seeds"] >= FEWEST_PAIRS else "none"
            axis.plot(place[cost], place["error"], "o", color=study.attention(place["arm"]).color, fillstyle=fill)
        front = pareto_front([(place[cost], place["error"]) for place in places if cost in place])
        axis.plot(*zip(*front, strict=True), color="tab:red", linewidth=1, drawstyle="steps-post", zorder=0)
        axis.set_xlabel(title, fontsize=9)
        axis.grid(alpha=0.3)
        axis.margins(x=0.2)  # leaves room for names
        if cost in ("pair", "key"):
            axis.set_xscale("symlog", base=2)
            axis.xaxis.set_major_formatter(ScalarFormatter())
    few = f" (hollow: fewer than {FEWEST_PAIRS} seeds)" if any(place["seeds"] < FEWEST_PAIRS for place in places) else ""
    figure.supylabel((f"error, {form.unit.strip()}" if form.unit else form.words) + few)
    figure.draw_without_rendering()  # settles where all is, which names go by
    for axis, cost in zip(figure.axes, panels, strict=True):
        points = {place["arm"].removesuffix(shared): (place[cost], place["error"]) for place in places if cost in place}
        write_names(axis, points)
    save(figure, path)


def write_names(axis: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Writes each point's name at the first of its corners where neither names nor points are, nor the frame."""
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axis.transData.transform(list(points.values()))]
    for name, point in points.items():
        texts = [
            axis.annotate(name, point, (4 * right, 3 * up), textcoords="offset points", fontsize=8, ha=side, va=place)
            for up, place in ((1, "bottom"), (-1, "top"))
            for right, side in ((1, "left"), (-1, "right"))
        ]
        boxes = {text: text.get_window_extent() for text in texts}
        free = (text for text, box in boxes.items() if not box.count_overlaps(taken) and inside(axis.bbox, box))
        chosen = next(free, texts[0])
        taken.append(boxes[chosen])
        for text in texts:
            if text is not chosen:
                text.remove()


def inside(frame: BboxBase, box: BboxBase) -> bool:
    return bool(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)


def shared_ending(names: list[str]) -> str:
    """What all names say behind a comma, which a picture of them need not repeat."""
    _, comma, words = names[0].rpartition(", ")
    ending = comma + words
    return ending if comma and all(name.endswith(ending) for name in names) else ""


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those to which none is better in one figure and at least as good in the other, by the first; lower is better."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
