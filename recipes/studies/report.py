"""The report on a study, from the JSON files in its folder alone: its tables, and beside them pictures and a model card."""

import csv
import math
from pathlib import Path
from typing import Any

from studies.best_model_card import best_card
from studies.curve_pictures import NUMBERS, SPREAD, draw_curves_of, has_curves
from studies.number_format import form_of
from studies.pictures import draw_curves, draw_differences
from studies.results import (
    Results,
    best_row,
    compared_with,
    difference,
    load_results,
    rows_with,
    seeds_and_pairs,
    summarize,
    verdict,
)
from studies.score_pictures import draw_first_layer, were_watched
from studies.shape_pictures import draw_shapes
from studies.study_file import Study, load_costs
from tools.markdown import markdown_table
from training.arms import Arm


CARD = "best_neural_model"
# Gives by setting the name of a picture of curves, and what it shows
CURVES = {
    SPREAD: ("spreads", "The figure against how far scores spread when training starts and when it ends, as measured"),
    NUMBERS: ("numbers", "The figure against how many numbers a head compares"),
}


def report(study: Study, folder: Path) -> str:
    """Writes report.md, .csv and .png, curves.png and a model card into the folder, and scores.png,
    shapes.png, spreads.png or numbers.png where the study has what they show; returns the Markdown of the first.

    Raises:
        SystemExit: see `load_results`.
    """
    found, costs = load_results(study, folder), load_costs(folder)
    rows = summarize(study, found, costs)
    text = markdown(study, found, rows, costs["environment"] | {"later": costs.get("later", [])})
    (folder / "report.md").write_text(text, encoding="utf-8")
    with (folder / "report.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw_differences(study, found, rows, folder / "report.png")
    draw_curves(study, found, rows, folder / "curves.png")
    if were_watched(found):
        draw_first_layer(study, found, rows, folder / "scores.png")
    if study.shapes:
        draw_shapes(study, found, rows, folder / "shapes.png")
    for setting, (name, _) in CURVES.items():
        if has_curves(study, found, setting):
            draw_curves_of(study, found, rows, setting, folder / f"{name}.png")
    if (card := best_card(study, found, rows)) is not None:
        (folder / f"{CARD}.md").write_text(card, encoding="utf-8")
    return text


def markdown(study: Study, found: Results, rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """
    Args:
        where: the machine and the versions that steps were timed with, and which arms were later.
    """
    best, form, chosen = (
        best_row(study, found, rows),
        form_of(study, rows, study.metric),
        form_of(study, rows, study.choose_by),
    )
    parts = [
        f"# Study: {study.name}",
        f"{study.dataset}; `{study.recipe}` with `{study.config}` and `{study.flags}`; figure: `{study.metric}` "
        f"({'lower' if study.lower_is_better else 'higher'} is better). {study.note}".strip(),
        f"Differences are to `{study.baseline}` with the same seed, data order and dropout rate. Neural models copy the "
        "initial weights of the dot product with the same settings for all that both have; models of other settings draw "
        "their own. Intervals are of 95 %, by Student's t over pairs of seeds, from three on. A word says what they show: of "
        "twenty arms without any effect, one is called better or worse on average. In square brackets are "
        "intervals of all runs together, around differences of all of them, as if chance did as much in every arm "
        "(`studies/pooled.py`).",
        figures(study, rows),
        *diverged(study, found),
        f"Best by `{study.choose_by}`, of the arms with as many seeds as any other or with all of theirs: "
        f"**{best['arm']}** ({chosen.value(best[study.choose_by])}{chosen.unit}); its `{study.metric}` is "
        f"{form.value(best['mean'])}{form.unit}.",
        "![Differences to the dot product](report.png)",
        "![Training loss, as difference to the dot product](curves.png)",
    ]
    for setting, (name, title) in CURVES.items():
        if has_curves(study, found, setting):
            parts.append(
                f"{title}: a line per kind of scores through means, a dot per seed, and intervals from three seeds on. "
                f"All are placed by their differences to `{study.baseline}`.\n\n![{title}]({name}.png)"
            )
    if study.shapes:
        parts.append(
            "Error against cost, of arms at the baseline's learning rate: what attention takes by itself (for heads that the "
            "benchmark of shapes has timed; it has no dot product of few numbers), what a training step takes (measured, by "
            "turns), and what a pair's score takes and a cache keeps of a key (counted). Arms on a line are beaten by none in "
            "error and that cost.\n\n![Error against cost](shapes.png)"
        )
    if were_watched(found):
        those = "the arms that the study pictures" if study.pictured else "arms at the study's own rate"
        parts.append(
            f"The first layer's scores during training, of {those} (mean over seeds, on a few validation "
            "examples; at step 0 before any training): rows in which one key has over 0.99 of the weight, entropy of rows, "
            "and the norm of the gradient that reaches the weights of queries and keys (before clipping), of which a layer "
            "without scores has none. The last panel has what the models reach.\n\n"
            "![Scores of the first layer](scores.png)"
        )
    if len(rows_with(study, rows, Arm.DOT)) > 1:
        parts += [
            "Neural arms beside every dot-product arm: difference and interval, in bold where that is of three pairs or more "
            "and holds no zero.",
            beside_all(study, found, rows),
        ]
    later = (
        f" (later, beside `{study.baseline}` alone: {', '.join(f'`{arm}`' for arm in where['later'])})"
        if where["later"]
        else ""
    )
    parts += [
        f"Steps were timed in one process and by turns{later}, on {where['cpu']}, {where['threads']} thread(s) (GPU: "
        f"{where['gpu']}), torch {where['torch']}, transformers {where['transformers']}: the ratio to `{study.baseline}` is "
        "the median over turns, with quartiles. The time of all steps is that times their number. Memory is what training "
        "takes beyond the weights, at its peak (on a CPU of the whole process: a rough figure). A scorer is counted as dead "
        "if no unit of its last hidden layer is active for any pair of the examples that were looked at (all layers, heads "
        "and seeds). Spread is the standard deviation of the network's scores within a row, mean over layers and seeds."
        + (
            " Of all scores, whatever makes them, it is pooled over the rows of a layer. A row is saturated if one key has "
            "over 0.99 of its weight."
            if "spread_at_start" in rows[0]
            else ""
        ),
        costs_table(study, rows),
        f"The runs are of {commits(found)}.",
        "Settings:",
        "\n".join(f"- {arm}: `{fields}`" for arm, fields in study.arms.items()),
    ]
    return "\n\n".join(parts) + "\n"


def diverged(study: Study, found: Results) -> list[str]:
    """A sentence on runs with a figure that is no number, if there are any. A model that gives no numbers has an accuracy, of
    chance."""
    names = (study.metric, study.choose_by, *study.also)
    counts = {
        arm: sum(any(not math.isfinite(each["metrics"][name]) for name in names) for each in runs.values())
        for arm, runs in found.items()
    }
    named = [f"{count} of {len(found[arm])} of `{arm}`" for arm, count in counts.items() if count]
    return [f"Runs that diverged, by their figures: {', '.join(named)}."] if named else []


def commits(found: Results) -> str:
    """Which code the runs were made with."""
    known = {each["environment"].get("commit") for runs in found.values() for each in runs.values()}
    named = [f"`{commit}`" for commit in sorted(known - {None})]
    words = [f"commit{'s' if len(named) > 1 else ''} {', '.join(named)}"] if named else []
    return " and ".join([*words, *(["commits that were not recorded"] if None in known else [])])


def figures(study: Study, rows: list[dict[str, Any]]) -> str:
    form = form_of(study, rows, study.metric)
    extra = {name: form_of(study, rows, name) for name in (study.choose_by, *study.also)}
    return markdown_table(
        ["arm", "seeds", "mean", "std", "difference", "95 % interval", "", "pooled", *(each.label for each in extra.values())],
        [
            [
                row["arm"],
                seeds_and_pairs(row["seeds"], row),
                form.value(row["mean"]),
                "" if row["std"] is None else form.value(row["std"]),
                form.signed(row["difference"]),
                form.bounds(row),
                verdict(study, row),
                form.pooled(row),
                *(each.value(row[name]) for name, each in extra.items()),
            ]
            for row in rows
        ],
    )


def beside_all(study: Study, found: Results, rows: list[dict[str, Any]]) -> str:
    """The neural arms' differences to all dot-product arms."""
    bases, form = [row["arm"] for row in rows_with(study, rows, Arm.DOT)], form_of(study, rows, study.metric)

    def cell(arm: str, base: str) -> str:
        text = form.with_bounds(row := difference(study, found, arm, base))
        return f"**{text}**" if verdict(study, row) in ("better", "worse") else text

    lines = [[row["arm"], *(cell(row["arm"], base) for base in bases)] for row in rows_with(study, rows, Arm.NEURAL)]
    return markdown_table(["", *bases], lines)


# Gives title and form of a column, of all scores, whatever makes them
SCORE_COLUMNS = {
    "spread_at_start": ("all scores: spread at start", "{:.3f}"),
    "spread_at_end": ("all scores: spread at end", "{:.2f}"),
    "saturated_at_end": ("saturated rows at end", "{:.1%}"),
}


def costs_table(study: Study, rows: list[dict[str, Any]]) -> str:
    looked_at = SCORE_COLUMNS if "spread_at_start" in rows[0] else {}

    def line(row: dict[str, Any]) -> list[str]:
        dead = [f"{row[name]} of {row['scorers']}" if row["scorers"] else "" for name in ("dead_at_start", "dead_at_end")]
        return [
            row["arm"],
            f"{row['steps']:,}",
            f"{row['parameters']:,}",
            f"{row['scorer_parameters']:,}",
            f"{row['seconds_per_step']:.3f}",
            f"{row['relative_time']:.2f} ({row['relative_time_low']:.2f} to {row['relative_time_high']:.2f})",
            f"{row['relative_training_time']:.2f}",
            f"{row['training_memory'] / 2**20:,.0f}",
            *dead,
            "" if row["score_std"] is None else f"{row['score_std']:.2f}",
            *("" if row[name] is None else form.format(row[name]) for name, (_, form) in looked_at.items()),
        ]

    base = study.baseline
    header = ["arm", "steps", "parameters", "of scorers", "s / step", f"/ {base}", f"all steps / {base}", "MiB"]
    header += [
        "dead scorers at start",
        "dead scorers at end",
        "network's scores: spread at end",
        *(title for title, _ in looked_at.values()),
    ]
    return markdown_table(header, [line(row) for row in rows])


def summary(study: Study, found: Results, rows: list[dict[str, Any]]) -> str:
    """The short table, for a README: beside what an arm is `compared_with`, and beside the best dot-product arm."""
    best, form = best_row(study, found, rows_with(study, rows, Arm.DOT))["arm"], form_of(study, rows, study.metric)
    others = [best] if best != study.baseline else []
    bases = {arm: base for arms in compared_with(study, rows).values() for arm, base in arms.items()}
    header = [study.dataset, form.label, "difference (95 %)", ""]
    lines = []
    for row in rows:
        own = difference(study, found, row["arm"], bases.get(row["arm"], row["arm"]))
        beside = [form.with_bounds(difference(study, found, row["arm"], other)) for other in others]
        cells = [row["arm"], form.value(row["mean"]), form.with_bounds(own), verdict(study, own)]
        lines.append([*cells, *beside, f"x {row['relative_training_time']:.2f}"])
    return markdown_table([*header, *(f"to {other} (95 %)" for other in others), "time of all steps"], lines)
