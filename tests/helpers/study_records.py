"""A study that nobody ran: its file, its costs, and the records of its runs."""

import json
from pathlib import Path
from typing import Any

from studies.study_file import COSTS, Study, file_name


SECONDS = {"dot": 2.0, "first layer": 3.0, "longer": 2.0, "unfinished": 1.0}
WHERE = dict.fromkeys(("cpu", "gpu", "threads", "python", "torch", "transformers"), "x") | {"processes": 1}


def make_study(**fields: Any) -> Study:
    arms = {name: {"attention": "dot" if name in ("dot", "longer") else "neural"} for name in SECONDS}
    arms["longer"]["same_time_as"] = "first layer"
    given = {"name": "n", "recipe": "image_classification.py", "config": "c", "seeds": [0, 1, 2], "baseline": "dot"}
    given |= {"dataset": "Digits", "metric": "m", "choose_by": "v", "also": ["w"], "arms": arms, "flags": {"max_steps": 10}}
    return Study(**{**given, **fields})


def costs_of(study: Study) -> dict[str, Any]:
    times = {arm: SECONDS.get(arm, 2.0) for arm in study.arms}
    ratios = {arm: [seconds / 2 - 0.1, seconds / 2, seconds / 2 + 0.1] for arm, seconds in times.items()}
    settings = {arm: study.settings(arm) for arm in study.arms}
    quartiles = {arm: [seconds, seconds] for arm, seconds in times.items()}
    return {
        "seconds_per_step": times,
        "quartiles": quartiles,
        "ratios": ratios,
        "steps": {"longer": 15},
        "settings": settings,
        "environment": WHERE,
    }


def record_of(study: Study, arm: str, seed: int, value: float) -> dict[str, Any]:
    neural = study.arms[arm]["attention"] == "neural"
    alive = {"layer": "a", "scorers": 4, "dead": 0, "score_std": 0.5}
    health = {"start": [{**alive, "dead": 1}, alive], "end": [{**alive, "dead": 2}, alive]}
    steps = 15 if "same_time_as" in study.arms[arm] else 10
    return {
        "study": study.name,
        "seed": seed,
        "arm": arm,
        "settings": study.settings(arm),
        "run": {"seed": seed, "max_steps": steps, "learning_rate": study.arms[arm].get("learning_rate", 0.1)},
        "metrics": {"m": value, "v": value + seed, "w": 7.0},
        "parameters": 10,
        "scorer_parameters": 2 * neural,
        "scorer_health": health if neural else {"start": [], "end": []},
        "steps": steps,
        "epochs": 1.0,
        "training_memory": 2**20,
        "train_seconds": 60.0,
        "environment": WHERE,
        "config": {"a": 1},
        "sample": f"sample of seed {seed}",
        "history": [{"step": 5, "loss": value}, {"step": 10, "loss": value - 0.1}],
    }


def write_results(study: Study, folder, values: dict[str, list[float]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / COSTS).write_text(json.dumps(costs_of(study)))
    for arm, figures in values.items():
        for seed, value in enumerate(figures):
            (folder / file_name(arm, seed)).write_text(json.dumps(record_of(study, arm, seed, value)))


def change_run(path: Path, **fields: Any) -> None:
    """Changes what was asked of a run."""
    record = json.loads(path.read_text())
    record["run"] |= fields
    path.write_text(json.dumps(record))
