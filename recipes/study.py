"""Runs a grid of models and seeds, each as a run of its own that can be stopped and resumed, and reports on all of them.

    python recipes/study.py recipes/studies/text-small.yaml --results model_cards/study-text
    python recipes/study.py recipes/studies/text-small.yaml --results model_cards/study-text --report_only
    python recipes/study.py STUDY --launcher "accelerate launch --config_file CONFIG"

A study is a YAML file:

    recipe: language_modeling.py           which of the recipes
    config: configs/wikitext2-small.yaml   its settings, beside this script
    flags: {max_steps: 600}                what all runs have besides
    seeds: [0, 1, 2]
    baseline: dot                          the arm that the others are compared with, seed by seed
    metric: test_perplexity_stride         and by which figure; lower_is_better: true
    arms:
      dot: {attention: dot}
      first layer: {attention: neural, neural_proj_dim: 2}

Each finished run leaves a small JSON file in the results' folder, named by arm and seed, and is not run again. The report
(Markdown, CSV, PNG) is made of those files alone: mean and standard deviation over seeds, and differences to the baseline of
the same seed, with an interval of 95 % by Student's t.
"""

import argparse
import csv
import json
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import t as student

from experiment import RESULTS, write_json
from reporting import environment


HERE = Path(__file__).parent


@dataclass
class Study:
    """A study file."""

    name: str
    recipe: str
    config: str
    seeds: list[int]
    baseline: str
    metric: str
    arms: dict[str, dict[str, Any]]
    flags: dict[str, Any]
    lower_is_better: bool = True

    @classmethod
    def load(cls, path: Path) -> "Study":
        """Raises SystemExit if the file is not there, or lacks or has what a study has not."""
        try:
            content = yaml.safe_load(path.read_text())
            study = cls(**{"name": path.stem, "flags": {}, **content})
        except (OSError, yaml.YAMLError, TypeError) as error:
            raise SystemExit(f"{path} is no study: {error}") from None
        if study.baseline not in study.arms:
            raise SystemExit(f"{path}: the baseline {study.baseline!r} is none of the arms, {', '.join(study.arms)}.")
        return study

    def runs(self) -> list[tuple[str, int]]:
        """Seed by seed, so that a study that is stopped early has whole pairs."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]


def file_name(arm: str, seed: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', arm).strip('-')}-{seed}.json"


def run(study: Study, arm: str, seed: int, launcher: list[str], folder: Path, results: Path, more: list[str]) -> None:
    """Runs one model to its end, or on to it, and keeps its figures.

    Raises:
        SystemExit: if the run fails.
    """
    settings = {**study.flags, **study.arms[arm]}
    output = folder / study.name / Path(file_name(arm, seed)).stem
    flags = [word for name, value in settings.items() for word in words(name, value)]
    command = [*launcher, str(HERE / study.recipe), str(HERE / study.config), *flags, *more]
    command += ["--seed", str(seed), "--output_dir", str(output)]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"The run of {arm!r} with seed {seed} failed: {shlex.join(command)}\nRun the study again to go on.")
    kind = settings["attention"]
    finished = json.loads((output / kind / RESULTS).read_text())
    kept = ("metrics", "parameters", "scorer_parameters", "steps", "epochs", "seconds_per_step", "peak_memory", "config")
    record = {
        "study": study.name,
        "arm": arm,
        "seed": seed,
        "settings": settings,
        **{name: finished.get(name) for name in kept},
    }
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / file_name(arm, seed), {**record, "environment": environment()})


def words(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)]


def load_results(study: Study, results: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """By arm and seed, of the runs that are finished."""
    found: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in study.arms}
    for arm, seed in study.runs():
        if (path := results / file_name(arm, seed)).exists():
            found[arm][seed] = json.loads(path.read_text())
    return found


def differences(study: Study, found: dict[str, dict[int, dict[str, Any]]], arm: str) -> list[float]:
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


def summarize(study: Study, found: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row per arm that has finished runs."""
    rows = []
    for arm, runs in found.items():
        if not runs:
            continue
        values = [each["metrics"][study.metric] for each in runs.values()]
        pairs = differences(study, found, arm)
        bounds = interval(pairs) if arm != study.baseline else None
        first = next(iter(runs.values()))
        rows.append(
            {
                "arm": arm,
                "seeds": len(runs),
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "difference": statistics.mean(pairs) if pairs and arm != study.baseline else None,
                "low": bounds[0] if bounds else None,
                "high": bounds[1] if bounds else None,
                "parameters": first["parameters"],
                "scorer_parameters": first["scorer_parameters"],
                "seconds_per_step": statistics.median(each["seconds_per_step"] for each in runs.values()),
                "peak_memory": max((each["peak_memory"] or 0 for each in runs.values()), default=0),
            }
        )
    return rows


def verdict(study: Study, row: dict[str, Any]) -> str:
    if row["low"] is None:
        return ""
    if row["low"] <= 0 <= row["high"]:
        return "no difference shown"
    return "better" if (row["high"] < 0) == study.lower_is_better else "worse"


def markdown(study: Study, rows: list[dict[str, Any]], pictures: str) -> str:
    lines = [
        f"# Study: {study.name}",
        "",
        f"`{study.recipe}` with `{study.config}` and `{study.flags}`; figure: `{study.metric}` "
        f"({'lower' if study.lower_is_better else 'higher'} is better). Differences are to `{study.baseline}` with the same "
        "seed, data order and initial weights of all that both have; the interval is of 95 %, by Student's t over seeds.",
        "",
        "| arm | seeds | mean | std | difference | 95 % interval | | parameters | of scorers | s / step | MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        std = "" if row["std"] is None else f"{row['std']:.3g}"
        difference = "" if row["difference"] is None else f"{row['difference']:+.4g}"
        bounds = "" if row["low"] is None else f"{row['low']:+.3g} to {row['high']:+.3g}"
        lines.append(
            f"| {row['arm']} | {row['seeds']} | {row['mean']:.5g} | {std} | {difference} | {bounds} | {verdict(study, row)} | "
            f"{row['parameters']:,} | {row['scorer_parameters']:,} | {row['seconds_per_step']:.3f} | "
            f"{row['peak_memory'] / 2**20:.0f} |"
        )
    settings = [f"- `{arm}`: `{fields}`" for arm, fields in study.arms.items()]
    return "\n".join([*lines, "", f"![Differences to {study.baseline}]({pictures})", "", *settings, ""])


def draw(study: Study, found: dict[str, dict[int, dict[str, Any]]], rows: list[dict[str, Any]], path: Path) -> None:
    """Every seed's difference to the baseline, with the mean and its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row["difference"] is not None]
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.5 * max(1, len(shown))), layout="constrained")
    for place, row in enumerate(shown):
        pairs = differences(study, found, row["arm"])
        axis.plot(pairs, [place] * len(pairs), "o", color="tab:blue", alpha=0.5)
        if row["low"] is not None:
            axis.plot([row["low"], row["high"]], [place, place], color="black")
        axis.plot(row["difference"], place, "|", color="black", markersize=14)
    axis.axvline(0.0, color="tab:gray", linestyle="--")
    axis.set_yticks(range(len(shown)), [row["arm"] for row in shown])
    axis.set_xlabel(f"{study.metric}, difference to {study.baseline}")
    axis.invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(study: Study, results: Path) -> str:
    """Writes report.md, .csv and .png into the results' folder, from its JSON files alone, and returns the Markdown."""
    found = load_results(study, results)
    rows = summarize(study, found)
    if not rows:
        raise SystemExit(f"{results} has no finished run of the study {study.name}.")
    text = markdown(study, rows, "report.png")
    (results / "report.md").write_text(text)
    with (results / "report.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(study, found, rows, results / "report.png")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--results", type=Path, required=True, help="Folder of the finished runs' JSON files, and of the report."
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), help="Folder of models and checkpoints.")
    parser.add_argument("--report_only", action="store_true", help="Run nothing.")
    parser.add_argument("--launcher", default=sys.executable, help="In place of python, as `accelerate launch ...`.")
    arguments, more = parser.parse_known_args()
    study = Study.load(arguments.study)
    if not arguments.report_only:
        for arm, seed in study.runs():
            if not (arguments.results / file_name(arm, seed)).exists():
                print(f"{arm}, seed {seed}", flush=True)
                run(study, arm, seed, shlex.split(arguments.launcher), arguments.runs, arguments.results, more)
                report(study, arguments.results)
    print(report(study, arguments.results))


if __name__ == "__main__":
    main()
