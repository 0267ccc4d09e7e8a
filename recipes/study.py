"""Runs a grid of models and seeds, each as a run of its own that can be stopped and resumed, and reports on all of them.

    python recipes/study.py recipes/studies/text-small.yaml --results model_cards/study-text
    python recipes/study.py recipes/studies/text-small.yaml --results model_cards/study-text --report_only
    python recipes/study.py STUDY --launcher "accelerate launch --config_file CONFIG"

A study is a YAML file:

    recipe: language_modeling.py           which of the recipes
    config: configs/wikitext2-small.yaml   its settings, beside this script
    dataset: WikiText-2                    its name in the report
    flags: {max_steps: 600}                what all runs have besides
    seeds: [0, 1, 2]
    baseline: dot                          the arm that the others are compared with, seed by seed
    metric: test_perplexity_stride         and by which figure; lower_is_better: true
    choose_by: validation_perplexity_stride   which figure chooses the best arm
    also: [test_word_perplexity_stride]    further figures for the table
    arms:
      dot: {attention: dot}
      first layer: {attention: neural, neural_proj_dim: 2}
      dot, longer: {attention: dot, same_time_as: first layer}   as many steps as take the same time

First, a step of each arm is timed, in one process and by turns (`costs.json`); let the machine be quiet meanwhile. Each
finished run leaves a small JSON file in the results' folder, named by arm and seed, and is not run again; seeds and arms that
are added later are run then. The report (Markdown, CSV, PNG) is made of these files alone.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from experiment import RESULTS, time_in_turn, write_json
from reporting import environment
from study_file import COSTS, HERE, SAME_TIME, Study, file_name, load_costs
from study_report import report


TURNS = 30


def time_arms(study: Study, results: Path, more: list[str]) -> None:
    """Times a step of each arm by turns, and keeps that."""
    recipe = import_module(Path(study.recipe).stem)
    with TemporaryDirectory() as folder:
        runs = {}
        for arm in {study.timed_as(arm): None for arm in study.arms}:
            experiment, *_ = recipe.load_experiment([*study.words(arm), *more, "--output_dir", folder])
            runs[arm] = experiment, study.arms[arm]["attention"]
        measured = time_in_turn(runs, TURNS, whole_step=True)
        if experiment.training.should_save:
            turns = {arm: measured[study.timed_as(arm)] for arm in study.arms}
            seconds = {arm: statistics.median(times) for arm, times in turns.items()}
            record = {
                "seconds_per_step": seconds,
                "quartiles": {arm: statistics.quantiles(times, n=4)[::2] for arm, times in turns.items()},
                # what has been settled once is not changed: runs of other seeds have that many
                "steps": steps_of_same_time(study, seconds) | load_costs(results).get("steps", {}),
                "environment": environment(),
            }
            results.mkdir(parents=True, exist_ok=True)
            write_json(results / COSTS, record)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def steps_of_same_time(study: Study, seconds: dict[str, float]) -> dict[str, int]:
    """Of arms that are to take the same time as another: how many steps that is."""
    others = {arm: fields[SAME_TIME] for arm, fields in study.arms.items() if SAME_TIME in fields}
    return {arm: round(study.flags["max_steps"] * seconds[other] / seconds[arm]) for arm, other in others.items()}


def run(study: Study, arm: str, seed: int, launcher: list[str], folder: Path, results: Path, more: list[str]) -> None:
    """Runs one model to its end, or on to it, and keeps its figures.

    Raises:
        SystemExit: if the run fails.
    """
    output = folder / study.name / Path(file_name(arm, seed)).stem
    words = [*study.words(arm, load_costs(results)["steps"].get(arm)), *more]
    command = [*launcher, str(HERE / study.recipe), *words, "--seed", str(seed), "--output_dir", str(output)]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"The run of {arm!r} with seed {seed} failed: {shlex.join(command)}\nRun the study again to go on.")
    finished = json.loads((output / study.arms[arm]["attention"] / RESULTS).read_text())
    where = json.loads((output / "comparison.json").read_text())["environment"]  # of the run's own processes
    record = {"study": study.name, "arm": arm, "seed": seed, "settings": study.settings(arm), **finished, "environment": where}
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / file_name(arm, seed), record)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--results", type=Path, required=True, help="Folder of the finished runs' JSON files, and of the report."
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), help="Folder of models and checkpoints.")
    parser.add_argument("--report_only", action="store_true", help="Run nothing.")
    parser.add_argument("--time_only", action="store_true", help="Time a step of each arm, and run nothing.")
    parser.add_argument("--launcher", default=sys.executable, help="In place of python, as `accelerate launch ...`.")
    arguments, more = parser.parse_known_args()
    study, results, launcher = Study.load(arguments.study), arguments.results, shlex.split(arguments.launcher)
    if "--max_steps" in more:
        raise SystemExit(
            "--max_steps: the number of steps belongs into the study file, where it can be scaled for single arms."
        )
    if arguments.time_only:
        return time_arms(study, results, more)
    if not arguments.report_only:
        if load_costs(results).get("seconds_per_step", {}).keys() != study.arms.keys():
            command = [*launcher, __file__, str(arguments.study), "--results", str(results), "--time_only", *more]
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(f"The steps of the arms could not be timed: {shlex.join(command)}")
        for arm, seed in study.runs():
            if not (results / file_name(arm, seed)).exists():
                print(f"{arm}, seed {seed}", flush=True)
                run(study, arm, seed, launcher, arguments.runs, results, more)
                report(study, results)
    print(report(study, results))


if __name__ == "__main__":
    main()
