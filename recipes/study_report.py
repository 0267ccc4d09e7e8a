"""The report on a study, from the JSON files in its folder alone: tables, pictures, and the card of its best neural model."""

import csv
import math
import statistics
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from reporting import Task, card_text, markdown_table
from study_file import SAME_TIME, Study, load_costs
from study_results import (
    Results,
    best_row,
    counterpart,
    difference,
    differences,
    interval,
    load_results,
    rows_with,
    summarize,
    verdict,
)


CARD = "best_neural_model"


class Form(NamedTuple):
    """How a figure is written: accuracies in percent, all with four digits of the baseline's mean."""

    metric: str
    unit: str
    factor: float
    decimals: int

    @property
    def label(self) -> str:
        return f"`{self.metric}`,{self.unit}" if self.unit else f"`{self.metric}`"

    def value(self, number: float) -> str:
        return f"{self.factor * number:.{self.decimals}f}"

    def signed(self, number: float | None) -> str:
        return "" if number is None else f"{self.factor * number:+.{self.decimals}f}"

    def bounds(self, row: dict[str, Any]) -> str:
        return "" if row["low"] is None else f"{self.signed(row['low'])} to {self.signed(row['high'])}"

    def with_bounds(self, row: dict[str, Any]) -> str:
        return (
            f"{self.signed(row['difference'])} ({self.bounds(row)})"
            if row["low"] is not None
            else self.signed(row["difference"])
        )


def form_of(study: Study, rows: list[dict[str, Any]], metric: str) -> Form:
    """
    Args:
        metric: `study.metric`, or one of those that rows have by name.
    """
    accuracy = metric.endswith("accuracy")
    factor = 100.0 if accuracy else 1.0
    row = next((row for row in rows if row["arm"] == study.baseline), rows[0])
    size = abs(factor * row["mean" if metric == study.metric else metric])
    decimals = max(0, 3 - math.floor(math.log10(size))) if size and math.isfinite(size) else 3
    return Form(metric, " %" if accuracy else "", factor, decimals)


def report(study: Study, folder: Path) -> str:
    """Writes report.md, .csv and .png, curves.png and a model card into the folder, and returns the Markdown of the first.

    Raises:
        SystemExit: see `load_results`.
    """
    found, costs = load_results(study, folder), load_costs(folder)
    rows = summarize(study, found, costs)
    text = markdown(study, found, rows, costs["environment"])
    (folder / "report.md").write_text(text)
    with (folder / "report.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw_differences(study, found, rows, folder / "report.png")
    draw_curves(study, found, rows, folder / "curves.png")
    if (card := best_card(study, found, rows)) is not None:
        (folder / f"{CARD}.md").write_text(card)
    return text


def markdown(study: Study, found: Results, rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """
    Args:
        where: the machine and the versions that steps were timed with.
    """
    best, form, chosen = best_row(study, rows), form_of(study, rows, study.metric), form_of(study, rows, study.choose_by)
    parts = [
        f"# Study: {study.name}",
        f"{study.dataset}; `{study.recipe}` with `{study.config}` and `{study.flags}`; figure: `{study.metric}` "
        f"({'lower' if study.lower_is_better else 'higher'} is better). {study.note}".strip(),
        f"Differences are to `{study.baseline}` with the same seed, data order and dropout rate. Neural models copy the "
        f"initial weights of `{study.baseline}` for all that both have; a wider dot-product model draws its own. Intervals "
        "are of 95 %, by Student's t over seeds: of twenty arms without any effect, one is called better or worse on average.",
        figures(study, rows),
        f"Best by `{study.choose_by}`: **{best['arm']}** ({chosen.value(best[study.choose_by])}{chosen.unit}); its "
        f"`{study.metric}` is {form.value(best['mean'])}{form.unit}.",
        "![Differences to the dot product](report.png)",
        "![Training loss, as difference to the dot product](curves.png)",
    ]
    if len(rows_with(study, rows, "dot")) > 1:
        parts += [
            "Neural arms beside every dot-product arm: difference and interval, in bold where that holds no zero.",
            beside_all(study, found, rows),
        ]
    parts += [
        f"Steps were timed in one process and by turns, on {where['cpu']}, {where['threads']} thread(s) (GPU: "
        f"{where['gpu']}), torch {where['torch']}, transformers {where['transformers']}: the ratio to `{study.baseline}` is "
        "the median over turns, with quartiles. The time of all steps is that times their number. Memory is what training "
        "takes beyond the weights, at its peak (on a CPU of the whole process: a rough figure). A scorer is counted as dead "
        "if no unit of its last hidden layer is active for any pair of the examples that were looked at (all layers, heads "
        "and seeds). Spread is the standard deviation of the network's scores within a row, mean over layers and seeds.",
        costs_table(study, rows),
        "Settings:",
        "\n".join(f"- {arm}: `{fields}`" for arm, fields in study.arms.items()),
    ]
    return "\n\n".join(parts) + "\n"


def figures(study: Study, rows: list[dict[str, Any]]) -> str:
    form = form_of(study, rows, study.metric)
    extra = {name: form_of(study, rows, name) for name in (study.choose_by, *study.also)}
    return markdown_table(
        ["arm", "seeds", "mean", "std", "difference", "95 % interval", "", *(each.label for each in extra.values())],
        [
            [
                row["arm"],
                str(row["seeds"]),
                form.value(row["mean"]),
                "" if row["std"] is None else form.value(row["std"]),
                form.signed(row["difference"]),
                form.bounds(row),
                verdict(study, row),
                *(each.value(row[name]) for name, each in extra.items()),
            ]
            for row in rows
        ],
    )


def beside_all(study: Study, found: Results, rows: list[dict[str, Any]]) -> str:
    """The neural arms' differences to all dot-product arms."""
    bases, form = [row["arm"] for row in rows_with(study, rows, "dot")], form_of(study, rows, study.metric)

    def cell(arm: str, base: str) -> str:
        text = form.with_bounds(row := difference(study, found, arm, base))
        return f"**{text}**" if verdict(study, row) in ("better", "worse") else text

    lines = [[row["arm"], *(cell(row["arm"], base) for base in bases)] for row in rows_with(study, rows, "neural")]
    return markdown_table(["", *bases], lines)


def costs_table(study: Study, rows: list[dict[str, Any]]) -> str:
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
        ]

    base = study.baseline
    header = ["arm", "steps", "parameters", "of scorers", "s / step", f"/ {base}", f"all steps / {base}", "MiB"]
    return markdown_table([*header, "dead scorers at start", "at end", "spread at end"], [line(row) for row in rows])


def compared_with(study: Study, rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """By panel of a picture: arms, and the arm that each is compared with. Neural ones are beside the dot product with all
    else equal: what learning rates and the like do would hide the difference."""
    neural = {}
    for row in rows_with(study, rows, "neural"):
        twin = counterpart(study, rows, row["arm"])
        neural[row["arm"]] = study.baseline if twin is None else twin["arm"]
    dot = {row["arm"]: study.baseline for row in rows_with(study, rows, "dot") if row["arm"] != study.baseline}
    panels = {"neural, less the dot product with all else equal": neural, f"dot product, less {study.baseline}": dot}
    return {title: arms for title, arms in panels.items() if arms}


def summary(study: Study, found: Results, rows: list[dict[str, Any]]) -> str:
    """The short table, for a README: beside what an arm is `compared_with`, and beside the best dot-product arm."""
    best, form = best_row(study, rows_with(study, rows, "dot"))["arm"], form_of(study, rows, study.metric)
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


def best_card(study: Study, found: Results, rows: list[dict[str, Any]]) -> str | None:
    """The model card of the best neural arm's best run, both by `choose_by`, beside the run of its seed of the dot-product arm
    that differs in its attention alone, if there is one."""
    neural = rows_with(study, rows, "neural")
    if not neural:
        return None
    row, form = best_row(study, neural), form_of(study, rows, study.metric)
    runs, base = found[row["arm"]], counterpart(study, rows, row["arm"])
    seed = (min if study.lower_is_better else max)(runs, key=lambda seed: runs[seed]["metrics"][study.choose_by])
    results = {"neural": runs[seed] | {"seconds_in_turn": row["seconds_per_step"]}}
    words = f"of its runs the best (seed {seed})"
    if base is not None and seed in found[base["arm"]]:
        # in the ratio that was measured turn by turn, which is not that of two medians
        seconds = row["seconds_per_step"] * base["relative_time"] / row["relative_time"]
        results = {"dot": found[base["arm"]][seed] | {"seconds_in_turn": seconds}, **results}
        beside = verdict(study, difference(study, found, row["arm"], base["arm"])) or "too few seeds to compare"
        words += f", beside *{base['arm']}* of that seed (over all seeds: {beside})"
    recipe = import_module(Path(study.recipe).stem)
    others = "; ".join(
        f"*{each['arm']}* {form.value(each['mean'])}, to which it is "
        f"{form.with_bounds(difference(study, found, row['arm'], each['arm']))}"
        for each in rows_with(study, rows, "dot")
    )
    task = Task(
        name=recipe.TASK,
        pipeline_tag=recipe.PIPELINE_TAG,
        dataset=study.dataset,
        hub_dataset=None,
        main_metric=study.metric,
        is_accuracy=not study.lower_is_better,
        metrics={name: name.replace("_", " ") for name in (study.choose_by, study.metric, *study.also)},
        loading=recipe.how_to_load,
        notes=(
            f"{study.note} The best neural arm of the study `{study.name}` by `{study.choose_by}`, *{row['arm']}*, and "
            f"{words}. Its `{study.metric}` over {row['seeds']} seeds is {form.value(row['mean'])}{form.unit}; the "
            f"dot-product models' are, with the difference and its 95 % interval: {others} ([all arms](report.md))."
        ).strip(),
        picture="Training loss of the study's arms, as difference to the dot product",
        step="whole",
    )
    more = " --use_cpu True" if runs[seed]["run"].get("use_cpu") else ""
    record = {
        "command": f"python recipes/study.py recipes/studies/{study.name}.yaml --results FOLDER --dataset_name DATA{more}",
        "environment": runs[seed]["environment"],
        "note": "Trainings of a study may share their machine: its minutes are upper bounds, the times by turns are not.",
        "results": results,
    }
    return card_text(record, task, "neural", "curves.png")


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, metadata={"Software": None})  # a version that would make equal pictures differ


def panels_of(titles: list[str], heights: list[int], size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    """One panel below the other, of these heights."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(max(1, len(titles)), 1, squeeze=False, height_ratios=heights or None)[:, 0]
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=10)
    return figure, list(axes)


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
            color = "tab:blue" if study.arms[arm]["attention"] == "neural" else "tab:gray"
            axis.plot(pairs, [place] * len(pairs), "o", color=color, alpha=0.5)
            if (bar := interval(pairs)) is not None:
                axis.plot(bar, [place, place], color="black", linewidth=1)
            if pairs:
                axis.plot(statistics.mean(pairs), place, "|", color="black", markersize=14)
        axis.axvline(0.0, color="tab:gray", linestyle="--")
        axis.set_yticks(range(len(arms)), list(arms))
        axis.set_ylim(len(arms) - 0.5, -0.5)
    direction = "left" if study.lower_is_better else "right"
    figure.supxlabel(
        f"{study.metric}{', points' if form.unit else ''} ({direction} is better); bars: 95 % intervals", fontsize=10
    )
    save(figure, path)


def draw_curves(study: Study, found: Results, rows: list[dict[str, Any]], path: Path) -> None:
    """Training loss less that of the arm that it is compared with, batch for batch the same, mean over seeds; of arms with as
    many steps."""
    panels = compared_with(study, rows)
    figure, axes = panels_of(list(panels), [1] * len(panels), (8, 1 + 3.5 * max(1, len(panels))))
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
