"""What the runs of a study have come to: their records, and each arm's mean, spread and differences."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from studies.number_format import FEWEST_PAIRS
from studies.pooled import pooled
from studies.study_file import BESIDE, COSTS, SAME_TIME, Study, file_name, is_timed, load_costs
from tools.json_files import write_json
from training.arms import Arm
from training.run_folder import BATCHES, FINGERPRINTS, FREE_ARGUMENTS


# Lists arguments of a run that say where it runs, not what is learned
OF_THE_MACHINE = {
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_backend",
    "ddp_timeout",
    "local_rank",
    "use_cpu",
}

Results = dict[str, dict[int, dict[str, Any]]]  # by arm and seed, of the runs that are finished


def load_results(study: Study, folder: Path) -> Results:
    """
    Raises:
        SystemExit: if there are none, they lack a figure, or are of another study than the file now describes.
    """
    found: Results = {arm: {} for arm in study.arms}
    for arm, seed in study.runs():
        path = folder / file_name(arm, seed)
        if not path.exists():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["settings"] != study.settings(arm):
            raise SystemExit(
                f"{path} is of a run with {record['settings']}; the study file now asks for {study.settings(arm)}. Restore "
                "the file, or take another folder for results and runs."
            )
        for metric in (study.metric, study.choose_by, *study.also):
            if metric not in record["metrics"]:
                raise SystemExit(f"{path} has no {metric!r}; the study can have {', '.join(record['metrics'])}.")
        found[arm][seed] = record
    records = [(file_name(arm, seed), each) for arm, runs in found.items() for seed, each in runs.items()]
    if not records:
        raise SystemExit(f"{folder} has no finished run of the study {study.name}.")
    if not is_timed(study, load_costs(folder)):
        raise SystemExit(f"{folder / COSTS} is not of the study {study.name} as it now is: run the study, or --time_only.")
    check_alike(records)
    return found


def adopt_runs(study: Study, others: list[Path], folder: Path) -> list[str]:
    """Copies runs that other studies have finished and this one asks for with the same words, so that none is made twice.

    Args:
        others: folders of their results; `check_alike` refuses what differs from the runs that are here.
        folder: of this study's results.

    Returns:
        Names of the files that are new here.

    Raises:
        SystemExit: if a folder has no run.
    """
    adopted = []
    for other in others:
        records = [
            record
            for path in sorted(other.glob("*.json"))
            if "seed" in (record := json.loads(path.read_text(encoding="utf-8")))
        ]
        if not records:
            raise SystemExit(f"{other} has no finished run of a study.")
        for arm, seed in study.runs():
            target = folder / file_name(arm, seed)
            same = [each for each in records if is_run_of(study, arm, seed, each)]
            if same and not target.exists():
                folder.mkdir(parents=True, exist_ok=True)
                write_json(target, same[0] | {"study": study.name, "arm": arm, "adopted_from": same[0]["study"]})
                adopted.append(target.name)
    return adopted


def is_run_of(study: Study, arm: str, seed: int, record: dict[str, Any]) -> bool:
    """Whether a record of another study is of a run that this one asks for. None is where the number of steps hangs on times,
    which each study measures for itself."""
    asked = study.settings(arm)
    # allows for records of before, which do not name their recipe
    alike = all(record.get(name, value) == value for name, value in study.origin.items())
    return alike and record["seed"] == seed and record["settings"] == asked and SAME_TIME not in asked


def check_alike(records: list[tuple[str, dict[str, Any]]]) -> None:
    """Refuses runs that differ in more than their arms and seeds, as by a flag that only some of them were given.

    What an arm asks for, its runs must have had; what arms do not ask for must be the same in all of them.
    """
    said = set().union(*(record["run"] for _, record in records))
    keys = sorted(said - {"seed", BATCHES, *OF_THE_MACHINE, *FREE_ARGUMENTS})
    firsts: dict[tuple[str, Any], tuple[str, Any]] = {}
    for name, record in records:
        run, settings = record["run"], record["settings"]
        own = record["arm"] if SAME_TIME in settings else None  # marks steps that only an arm's seeds have in common
        asked = {key for key in settings if key in run} - ({"max_steps"} if own else set())
        wrong = {key: run[key] for key in sorted(asked) if not is_same(run[key], settings[key])}
        if wrong:
            raise SystemExit(f"{name} is of a run with {wrong}, for which the study does not ask. Delete it to run it again.")
        for key in keys:
            if key in asked or (key in FINGERPRINTS and key not in run):  # records of before do not say all of their data
                continue
            # allows for held-out images that are drawn by the seed
            group = run["seed"] if key in FINGERPRINTS else own if key == "max_steps" else None
            first, value = firsts.setdefault((key, group), (name, run.get(key)))
            if run.get(key) != value:
                raise SystemExit(
                    f"{name} is of a run with {key} {run.get(key)!r}, {first} of one with {value!r}: they cannot be compared. "
                    "Delete those that are to be run again."
                )


def is_same(had: Any, asked: Any) -> bool:
    """Whether a run had what was asked for, which words of a command line may stand for: `["0"]` for `[0]`, `["none"]` for an
    empty list, and 0.001 for "1e-3", which YAML takes for a word."""
    pairs = [value if isinstance(value, list) else [value] for value in (had, asked)]
    if len(pairs[0]) != len(pairs[1]):
        return asked == [] and had == ["none"]
    return all(a == b or str(a) == str(b) or as_number(a) == as_number(b) for a, b in zip(*pairs, strict=True))


def as_number(value: Any) -> float:
    """NaN, which equals nothing, for what is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def differences(study: Study, found: Results, arm: str, base: str, metric: str | None = None) -> list[float]:
    """Of an arm's figure (`study.metric`) to that of another with the same seed, where both are finished."""
    metric = metric or study.metric
    return [
        each["metrics"][metric] - found[base][seed]["metrics"][metric]
        for seed, each in found[arm].items()
        if seed in found[base]
    ]


def interval(pairs: list[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of paired differences, by Student's t; None of fewer than two, and where a run diverged."""
    if len(pairs) < 2 or not all(map(math.isfinite, pairs)):
        return None
    half = float(student.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / len(pairs) ** 0.5
    mean = statistics.mean(pairs)
    return mean - half, mean + half


def difference(study: Study, found: Results, arm: str, base: str, metric: str | None = None) -> dict[str, Any]:
    """The mean of the paired differences (of `study.metric`), its interval, of how many pairs they are, and what all runs
    together say of it (`pooled`)."""
    pairs = differences(study, found, arm, base, metric) if arm != base else []
    low, high = interval(pairs) or (None, None)
    fit = pooled(study, found, metric) if pairs and all(map(math.isfinite, pairs)) else None
    together = (fit and fit.contrast([arm], [base])) or (None, None, None)
    mean = statistics.mean(pairs) if pairs else None
    of_pairs = {"difference": mean, "low": low, "high": high, "pairs": len(pairs)}
    return of_pairs | dict(zip(("pooled", "pooled_low", "pooled_high"), together, strict=True))


def seeds_and_pairs(seeds: int, change: dict[str, Any]) -> str:
    """How many runs an arm has, and of how many a `difference` is where these are fewer."""
    return str(seeds) if change["pairs"] in (0, seeds) else f"{seeds} ({change['pairs']} in pairs)"


def verdict(study: Study, row: dict[str, Any]) -> str:
    """In a word, of a row or a `difference`; none of fewer than three pairs."""
    if row["low"] is None or row["pairs"] < FEWEST_PAIRS:
        return ""
    if row["low"] <= 0 <= row["high"]:
        return "no difference shown"
    return "better" if (row["high"] < 0) == study.lower_is_better else "worse"


def summarize(study: Study, found: Results, costs: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per arm that has finished runs.

    Args:
        costs: of a step of each arm, timed by turns (`load_costs`).
    """
    rows = []
    base = found[study.baseline]
    for arm, runs in found.items():
        if not runs:
            continue
        values = [each["metrics"][study.metric] for each in runs.values()]
        first = next(iter(runs.values()))
        health = [layer for each in runs.values() for layer in each["scorer_health"]["end"]]
        rows.append(
            {
                "arm": arm,
                "seeds": len(runs),
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None,
                **difference(study, found, arm, study.baseline),
                **{name: mean_of(runs, name) for name in (study.choose_by, *study.also)},
                "steps": first["steps"],
                "parameters": first["parameters"],
                "scorer_parameters": first["scorer_parameters"],
                "seconds_per_step": costs["seconds_per_step"][arm],
                "relative_time": costs["ratios"][arm][1],
                "relative_time_low": costs["ratios"][arm][0],
                "relative_time_high": costs["ratios"][arm][2],
                "relative_training_time": relative_steps(first, base) * costs["ratios"][arm][1],
                # takes 0 where there is none, as in the first records that were made
                "training_memory": max(each.get("training_memory", 0) for each in runs.values()),
                "scorers": sum(layer["scorers"] for layer in health),
                "dead_at_start": sum(layer["dead"] for each in runs.values() for layer in each["scorer_health"]["start"]),
                "dead_at_end": sum(layer["dead"] for layer in health),
                "score_std": statistics.mean(layer["score_std"] for layer in health) if health else None,
                **scores_of(found, runs),
            }
        )
    return rows


def scores_of(found: Results, runs: dict[int, dict[str, Any]]) -> dict[str, float | None]:
    """Spread of attention scores and saturation of rows, mean over layers and seeds; nothing where no run of the study has
    looked at them, as runs before these figures were taken."""
    if not any("score_statistics" in each for of_arm in found.values() for each in of_arm.values()):
        return {}

    def mean(when: str, name: str) -> float | None:
        values = [layer[name] for each in runs.values() for layer in each.get("score_statistics", {}).get(when, ())]
        return statistics.mean(values) if values else None

    return {
        "spread_at_start": mean("start", "spread"),
        "spread_at_end": mean("end", "spread"),
        "saturated_at_end": mean("end", "saturated"),
    }


def relative_steps(record: dict[str, Any], base: dict[int, dict[str, Any]]) -> float:
    """How many times as many steps as the baseline."""
    return record["steps"] / next(iter(base.values()))["steps"] if base else 1.0


def mean_of(runs: dict[int, dict[str, Any]], metric: str) -> float:
    return statistics.mean(each["metrics"][metric] for each in runs.values())


def best_row(study: Study, found: Results, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By `choose_by`, of the arms with as many seeds as any other, or with all that the study asks of them. Each counts with
    the baseline's mean and its paired difference to that, since arms of fewer seeds would win by the luck of these."""
    most = max(row["seeds"] for row in rows)
    complete = [row for row in rows if row["seeds"] in (most, len(study.seeds_of(row["arm"])))]
    base = found[study.baseline]

    def figure(row: dict[str, Any]) -> float:
        pairs = differences(study, found, row["arm"], study.baseline, study.choose_by)
        paired = mean_of(base, study.choose_by) + statistics.mean(pairs) if pairs else math.nan
        return paired if math.isfinite(paired) else row[study.choose_by]

    return best_of(study, complete, figure)


def best_of(study: Study, candidates: list[Any], figure: Callable[[Any], float]) -> Any:
    """The one with the best figure, of those that have one: what diverged has none."""
    finite = [each for each in candidates if math.isfinite(figure(each))] or candidates
    return (min if study.lower_is_better else max)(finite, key=figure)


def counterpart(study: Study, rows: list[dict[str, Any]], arm: str) -> dict[str, Any] | None:
    """The row of the dot-product arm that a neural one names (`beside`), or else of that which differs from it in its
    attention alone, if there is one."""
    named = study.arms[arm].get(BESIDE)
    candidates = rows_with(study, rows, Arm.DOT)
    if named is not None:
        return next((row for row in candidates if row["arm"] == named), None)
    return next((row for row in candidates if all_else(study, row["arm"]) == all_else(study, arm)), None)


def all_else(study: Study, arm: str) -> dict[str, Any]:
    """What an arm asks for beside its attention."""
    return {
        key: value
        for key, value in study.settings(arm).items()
        if key != "attention" and not key.startswith(("neural_", "scorer_"))
    }


def rows_with(study: Study, rows: list[dict[str, Any]], attention: Arm) -> list[dict[str, Any]]:
    """The rows of dot-product or of neural arms."""
    return [row for row in rows if study.attention(row["arm"]) is attention]


def compared_with(study: Study, rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """By panel of a picture: arms, and the arm that each is compared with. Neural ones are beside the dot product with all
    else equal: what learning rates and the like do would hide the difference."""
    twins = {row["arm"]: counterpart(study, rows, row["arm"]) for row in rows_with(study, rows, Arm.NEURAL)}
    neural = {arm: study.baseline if twin is None else twin["arm"] for arm, twin in twins.items()}
    are_twins = all(twin is not None and all_else(study, arm) == all_else(study, twin["arm"]) for arm, twin in twins.items())
    dots = [row["arm"] for row in rows_with(study, rows, Arm.DOT)]
    bases = {arm: study.arms[arm].get(BESIDE, study.baseline) for arm in dots if arm != study.baseline}
    dot = {arm: base for arm, base in bases.items() if base in dots}
    title = "neural, less the dot product with all else equal" if are_twins else "neural, less its counterpart (dot product)"
    panels = {title: neural, f"dot product, less {study.baseline}": dot}
    return {title: arms for title, arms in panels.items() if arms}
