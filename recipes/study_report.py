"""The report on a study, from the JSON files in its folder alone: tables, pictures, and the card of its best neural model."""

import csv
import json
import statistics
from importlib import import_module
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import t as student

from reporting import Task, card_text
from study_file import COSTS, SAME_TIME, Study, file_name, load_costs


CARD = "best_neural_model"

Results = dict[str, dict[int, dict[str, Any]]]  # by arm and seed, of the runs that are finished


def report(study: Study, folder: Path) -> str:
    """Writes report.md, .csv and .png, curves.png and a model card into the folder, and returns the Markdown of the first.

    Raises:
        SystemExit: if no run is finished, or runs are of another study than the file now describes.
    """
    found = load_results(study, folder)
    if not any(found.values()):
        raise SystemExit(f"{folder} has no finished run of the study {study.name}.")
    costs = load_costs(folder)
    if costs.get("seconds_per_step", {}).keys() != study.arms.keys():
        raise SystemExit(f"{folder / COSTS} has not the arms of the study {study.name}: run the study, or --time_only.")
    rows = summarize(study, found, costs["seconds_per_step"])
    text = markdown(study, rows, costs["environment"])
    (folder / "report.md").write_text(text)
    with (folder / "report.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw_differences(study, found, rows, folder / "report.png")
    draw_curves(study, found, folder / "curves.png")
    if (card := best_card(study, found, rows)) is not None:
        (folder / f"{CARD}.md").write_text(card)
    return text


def load_results(study: Study, folder: Path) -> Results:
    found: Results = {arm: {} for arm in study.arms}
    for arm, seed in study.runs():
        path = folder / file_name(arm, seed)
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        if record["settings"] != study.settings(arm):
            raise SystemExit(
                f"{path} is of a run with {record['settings']}; the study file now asks for {study.settings(arm)}. Restore "
                "the file, or take another folder for results and runs."
            )
        found[arm][seed] = record
    return found


def differences(study: Study, found: Results, arm: str) -> list[float]:
    """Of an arm's figure to the baseline's of the same seed, where both are finished."""
    base, metric = found[study.baseline], study.metric
    return [each["metrics"][metric] - base[seed]["metrics"][metric] for seed, each in found[arm].items() if seed in base]


def interval(pairs: list[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of paired differences, by Student's t; None of fewer than two."""
    if len(pairs) < 2:
        return None
    half = student.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5
    mean = statistics.mean(pairs)
    return mean - half, mean + half


def summarize(study: Study, found: Results, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """A row per arm that has finished runs.

    Args:
        seconds: of a step of each arm, timed by turns.
    """
    rows = []
    base_time = study.flags.get("max_steps", 1) * seconds[study.baseline]
    for arm, runs in found.items():
        if not runs:
            continue
        values = [each["metrics"][study.metric] for each in runs.values()]
        pairs = differences(study, found, arm) if arm != study.baseline else []
        low, high = interval(pairs) or (None, None)
        first = next(iter(runs.values()))
        means = {name: mean_of(runs, name) for name in (study.choose_by, *study.also)}
        health = [layer for each in runs.values() for layer in each["scorer_health"]["end"]]
        rows.append(
            {
                "arm": arm,
                "seeds": len(runs),
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "difference": statistics.mean(pairs) if pairs else None,
                "low": low,
                "high": high,
                **means,
                "steps": first["steps"],
                "parameters": first["parameters"],
                "scorer_parameters": first["scorer_parameters"],
                "seconds_per_step": seconds[arm],
                "relative_time": seconds[arm] / seconds[study.baseline],
                "relative_training_time": first["steps"] * seconds[arm] / base_time,
                "training_memory": max(each.get("training_memory", 0) for each in runs.values()),
                "scorers": sum(layer["scorers"] for layer in health),
                "dead_at_start": sum(layer["dead"] for each in runs.values() for layer in each["scorer_health"]["start"]),
                "dead_at_end": sum(layer["dead"] for layer in health),
                "score_std": statistics.mean(layer["score_std"] for layer in health) if health else None,
            }
        )
    return rows


def mean_of(runs: dict[int, dict[str, Any]], metric: str) -> float:
    return statistics.mean(each["metrics"][metric] for each in runs.values())


def verdict(study: Study, row: dict[str, Any]) -> str:
    if row["low"] is None:
        return ""
    if row["low"] <= 0 <= row["high"]:
        return "no difference shown"
    return "better" if (row["high"] < 0) == study.lower_is_better else "worse"


def markdown(study: Study, rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """
    Args:
        where: the machine and the versions that steps were timed with.
    """
    extra = [study.choose_by, *study.also]
    lines = [
        f"# Study: {study.name}",
        "",
        f"{study.dataset}; `{study.recipe}` with `{study.config}` and `{study.flags}`; figure: `{study.metric}` "
        f"({'lower' if study.lower_is_better else 'higher'} is better). Differences are to `{study.baseline}` with the same "
        f"seed, data order and dropout rate. Neural models copy the initial weights of `{study.baseline}` for all that both "
        "have; a wider dot-product model draws its own. The interval is of 95 %, by Student's t over seeds: of twenty arms "
        "without any effect, one is called better or worse on average.",
        "",
        f"| arm | seeds | mean | std | difference | 95 % interval | | {' | '.join(extra)} |",
        "| --- " * (7 + len(extra)) + "|",
    ]
    for row in rows:
        std = "" if row["std"] is None else f"{row['std']:.3g}"
        more = " | ".join(f"{row[name]:.4g}" for name in extra)
        lines.append(
            f"| {row['arm']} | {row['seeds']} | {row['mean']:.4g} | {std} | {signed(row['difference'])} | {bounds(row)} | "
            f"{verdict(study, row)} | {more} |"
        )
    best = best_row(study, rows)
    lines += [
        "",
        f"Best by `{study.choose_by}`: **{best['arm']}** ({best[study.choose_by]:.4g}); its `{study.metric}` is "
        f"{best['mean']:.4g}.",
        "",
        f"![Differences to {study.baseline}](report.png)",
        "",
        f"![Training loss, as difference to {study.baseline}](curves.png)",
        "",
        f"Steps were timed in one process and by turns, on {where['cpu']}, {where['threads']} thread(s) (GPU: "
        f"{where['gpu']}), torch {where['torch']}, transformers {where['transformers']}; the time of all steps is that times "
        "their number. Memory is what training takes beyond the weights, at its peak. A scorer is counted as dead if no unit "
        "of its last hidden layer is active for any pair of the examples that were looked at (all layers, heads and seeds). "
        "Spread is the standard deviation of the network's scores within a row, mean over layers and seeds.",
        "",
        f"| arm | steps | parameters | of scorers | s / step | / {study.baseline} | all steps / {study.baseline} | MiB | "
        "dead scorers at start | at end | spread at end |",
        "| --- " * 11 + "|",
    ]
    for row in rows:
        dead = [f"{row[name]} of {row['scorers']}" if row["scorers"] else "" for name in ("dead_at_start", "dead_at_end")]
        lines.append(
            f"| {row['arm']} | {row['steps']:,} | {row['parameters']:,} | {row['scorer_parameters']:,} | "
            f"{row['seconds_per_step']:.3f} | {row['relative_time']:.2f} | {row['relative_training_time']:.2f} | "
            f"{row['training_memory'] / 2**20:,.0f} | {' | '.join(dead)} | "
            f"{'' if row['score_std'] is None else format(row['score_std'], '.2f')} |"
        )
    settings = [f"- {arm}: `{fields}`" for arm, fields in study.arms.items()]
    return "\n".join([*lines, "", "Settings:", "", *settings, ""])


def signed(number: float | None) -> str:
    return "" if number is None else f"{number:+.3g}"


def bounds(row: dict[str, Any]) -> str:
    return "" if row["low"] is None else f"{signed(row['low'])} to {signed(row['high'])}"


def summary(study: Study, rows: list[dict[str, Any]]) -> str:
    """The short table, for a README."""
    lines = [f"| {study.dataset} | `{study.metric}` | difference to {study.baseline} | | all steps |", "| --- " * 5 + "|"]
    for row in rows:
        difference = f"{signed(row['difference'])} ({bounds(row)})" if row["low"] is not None else ""
        cells = [row["arm"], f"{row['mean']:.4g}", difference, verdict(study, row), f"x {row['relative_training_time']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def best_row(study: Study, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the arms with as many seeds as any other."""
    most = max(row["seeds"] for row in rows)
    complete = [row for row in rows if row["seeds"] == most]
    return (min if study.lower_is_better else max)(complete, key=lambda row: row[study.choose_by])


def best_card(study: Study, found: Results, rows: list[dict[str, Any]]) -> str | None:
    """The model card of the best neural arm's best run, both by `choose_by`, beside the baseline of its seed."""
    seeds = found[study.baseline].keys()
    neural = [row for row in rows if study.arms[row["arm"]]["attention"] == "neural" and seeds & found[row["arm"]].keys()]
    if not neural:
        return None
    row = best_row(study, neural)
    runs = {seed: each for seed, each in found[row["arm"]].items() if seed in seeds}
    seed = (min if study.lower_is_better else max)(runs, key=lambda seed: runs[seed]["metrics"][study.choose_by])
    baselines = [each for each in rows if study.arms[each["arm"]]["attention"] == "dot"]
    seconds = {each["arm"]: each["seconds_per_step"] for each in rows}
    results = {
        "dot": found[study.baseline][seed] | {"seconds_in_turn": seconds[study.baseline]},
        "neural": runs[seed] | {"seconds_in_turn": seconds[row["arm"]]},
    }
    recipe = import_module(Path(study.recipe).stem)
    others = "; ".join(f"*{each['arm']}* {each['mean']:.4g} ({each['seeds']} seeds)" for each in baselines)
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
            f"The best neural arm of the study `{study.name}` by `{study.choose_by}`, *{row['arm']}*, and of its runs the "
            f"best (seed {seed}). Over {row['seeds']} seeds, its `{study.metric}` is {row['mean']:.4g} "
            f"({verdict(study, row) or 'too few seeds to compare'}, beside *{study.baseline}*); the dot-product models' are: "
            f"{others} ([all arms](report.md))."
        ),
        picture="Training loss of the study's arms, as difference to the baseline",
    )
    record = {
        "command": f"python recipes/study.py recipes/studies/{study.name}.yaml --results FOLDER --dataset_name DATA",
        "environment": runs[seed]["environment"],
        "note": "Trainings of a study may share their machine: its minutes are upper bounds, the times by turns are not.",
        "results": results,
    }
    return card_text(record, task, "neural", "curves.png")


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, metadata={"Software": None})  # a version that would make equal pictures differ


def draw_differences(study: Study, found: Results, rows: list[dict[str, Any]], path: Path) -> None:
    """Every seed's difference to the baseline, with the mean and its interval."""
    shown = [row for row in rows if row["difference"] is not None]
    figure = Figure(figsize=(8, 1.2 + 0.4 * max(1, len(shown))), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(shown):
        pairs = differences(study, found, row["arm"])
        color = "tab:blue" if study.arms[row["arm"]]["attention"] == "neural" else "tab:gray"
        axis.plot(pairs, [place] * len(pairs), "o", color=color, alpha=0.5)
        if row["low"] is not None:
            axis.plot([row["low"], row["high"]], [place, place], color="black", linewidth=1)
        axis.plot(row["difference"], place, "|", color="black", markersize=14)
    axis.axvline(0.0, color="tab:gray", linestyle="--")
    axis.set_yticks(range(len(shown)), [row["arm"] for row in shown])
    direction = "left" if study.lower_is_better else "right"
    axis.set_xlabel(f"{study.metric}, difference to {study.baseline} ({direction} is better); bars: 95 % intervals")
    axis.invert_yaxis()
    save(figure, path)


def draw_curves(study: Study, found: Results, path: Path) -> None:
    """Training loss less the baseline's, batch for batch the same, mean over seeds; of arms with as many steps."""
    base = {seed: losses(each) for seed, each in found[study.baseline].items()}
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for number, arm in enumerate(found):
        both = [(losses(each), base[seed]) for seed, each in found[arm].items() if seed in base]
        if arm == study.baseline or SAME_TIME in study.arms[arm] or not both:
            continue
        steps = sorted(set.intersection(*(losses_of.keys() & other.keys() for losses_of, other in both)))
        means = [statistics.mean(own[step] - other[step] for own, other in both) for step in steps]
        style = "-" if study.arms[arm]["attention"] == "neural" else ":"
        axis.plot(steps, means, style, label=arm, color=f"C{number % 10}", linewidth=1 + number // 10)
    axis.axhline(0.0, color="tab:gray", linestyle="--", label=study.baseline)
    axis.set(xlabel="step", ylabel=f"training loss less that of {study.baseline}, nats")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def losses(result: dict[str, Any]) -> dict[int, float]:
    return {entry["step"]: float(entry["loss"]) for entry in result["history"] if "loss" in entry}
