"""Runs a grid of models and seeds, each as a run of its own that can be stopped and resumed, and reports on all of them.

    python recipes/study.py recipes/studies/text-small.yaml --results model_cards/studies/text
    python recipes/study.py recipes/studies/text-small.yaml --results model_cards/studies/text --report_only
    python recipes/study.py STUDY --results FOLDER --report_only --pages docs/results.md
    python recipes/study.py STUDY --results FOLDER --launcher "accelerate launch --config_file CONFIG"

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
      all layers: {attention: neural, neural_layers: all, seeds: 2}   for the first two of the seeds
      faster: {attention: neural, learning_rate: 1.0e-3, beside: dot}   which dot-product arm it is compared with, where none
                                                                        differs from it in its attention alone

First, a step of each arm is timed, in one process and by turns (`costs.json`); let the machine be quiet meanwhile. Arms that
are added later are timed by turns with the baseline, on the same machine and with the same versions. Each
finished run leaves a small JSON file in the results' folder, named by arm and seed, and is not run again; seeds and arms that
are added later are run then. The report (Markdown, CSV, PNG) is made of these files alone, and so are the study's tables in
--pages (`studies/page_tables.py` says how a page asks for one).

A grid may be shared out by --arms and --seeds, each run to one process. For runs that span several machines, start the same
command on each, with a launcher for it and folders that all see.
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
from typing import Any

import torch

from studies.page_tables import has_tables, with_new_tables
from studies.report import report
from studies.results import adopt_runs, load_results
from studies.study_file import COSTS, SAME_TIME, SCRIPTS, Study, file_name, is_timed, load_costs, with_new_arms
from tools.command_lines import as_flags, unknown_words
from tools.json_files import write_json
from tools.provenance import environment
from tools.timing_by_turns import Spread, ratio_of, time_by_turns
from training.run_folder import RESULTS
from training.timed_steps import training_step


TURNS, STEPS = 20, 3  # of an arm in a turn


def check_words(study: Study, more: list[str]) -> None:
    """Refuses words that the recipe does not know, before hours are spent on the first arm.

    Raises:
        SystemExit: with what is wrong.
    """
    own = {"max_steps", "seed", "output_dir"}.union(*(study.settings(arm) for arm in study.arms))
    for word in more:
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("--") and name in own:
            raise SystemExit(f"{word}: this is the study's to say, in its file or for each run.")
    recipe = import_module(Path(study.recipe).stem)
    for arm in study.arms:
        if unknown := unknown_words(recipe.ARGUMENTS, [*study.words(arm), *more]):
            raise SystemExit(
                f"The arm {arm!r}: {study.recipe} does not know {' '.join(unknown)} (--help lists its arguments)."
            )


# Lists what of an environment the time of a step hangs on
OF_TIMES = ("cpu", "gpu", "threads", "processes", "torch", "transformers")


def known_costs(study: Study, results: Path, words: list[str]) -> dict[str, Any]:
    """Those of arms that were timed before in the same way and place; none where all arms were, which are then timed anew."""
    known, where = with_new_arms(study, load_costs(results)), environment()
    alike = all(known.get("environment", {}).get(name) == where[name] for name in OF_TIMES)
    return known if alike and known.get("words", words) == words and not is_timed(study, known) else {}


def time_arms(study: Study, results: Path, more: list[str]) -> None:
    """Times steps of each arm by turns, and keeps that; of arms that came later, by turns with the baseline alone."""
    recipe, words = import_module(Path(study.recipe).stem), [Path(word).name if Path(word).exists() else word for word in more]
    with TemporaryDirectory() as folder:

        def load(arm: str) -> Any:
            return recipe.load_experiment([*study.words(arm), *more, "--output_dir", folder])

        # starts with the baseline, since the arguments of a run say how its processes find each other
        baseline = study.timed_as(study.baseline)
        first, task, _ = load(baseline)
        experiments = {baseline: first}
        known = known_costs(study, results, words)
        later = [arm for arm in study.arms if arm not in known.get("settings", {})]
        for arm in map(study.timed_as, later):
            if arm not in experiments:
                experiments[arm], _, _ = load(arm)
        for metric in (study.metric, study.choose_by, *study.also):
            if metric not in task.metrics:
                raise SystemExit(f"{study.recipe} measures no {metric!r}, but {', '.join(task.metrics)}.")
        one_step = {
            arm: training_step(experiment, study.attention(arm), whole=True, fewest_calls=STEPS)
            for arm, experiment in experiments.items()
        }
        measured = time_by_turns(one_step, TURNS)
        if first.training.should_save:
            turns = {arm: measured[study.timed_as(arm)] for arm in (study.baseline, *later)}
            base = statistics.median(turns[study.baseline])
            before = known.get("seconds_per_step", {}).get(study.baseline, base)
            # counts later arms in the baseline's seconds of before, since machines are not as fast every day
            fields = {
                "seconds_per_step": {arm: statistics.median(turns[arm]) * before / base for arm in later},
                "quartiles": {arm: [each * before / base for each in Spread.of(turns[arm])[::2]] for arm in later},
                "ratios": {arm: ratio_of(turns[arm], turns[study.baseline]) for arm in later},
            }
            record: dict[str, Any] = {}
            for name, of_arms in fields.items():
                of_arms |= known.get(name, {})
                record[name] = {arm: of_arms[arm] for arm in study.arms}
            steps = study.steps_of_same_time({arm: ratio[1] for arm, ratio in record["ratios"].items()})
            record |= {
                "steps": steps | steps_that_stay(study, load_costs(results)),
                "settings": {arm: study.settings(arm) for arm in study.arms},
                "environment": known.get("environment", environment()),
                "words": words,
                "later": [arm for arm in study.arms if known and arm in (*known.get("later", ()), *later)],
            }
            results.mkdir(parents=True, exist_ok=True)
            write_json(results / COSTS, record)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # waits until the file is there
        torch.distributed.destroy_process_group()


def steps_that_stay(study: Study, costs: dict[str, Any]) -> dict[str, int]:
    """What has been settled once is not changed by another timing, since runs of other seeds have that many."""

    def as_before(arm: str) -> bool:
        return arm in study.arms and costs["settings"].get(arm) == study.settings(arm)

    return {
        arm: steps for arm, steps in costs.get("steps", {}).items() if as_before(arm) and as_before(study.arms[arm][SAME_TIME])
    }


def run(study: Study, arm: str, seed: int, launcher: list[str], folder: Path, results: Path, more: list[str]) -> None:
    """Runs one model to its end, or on to it, and keeps its figures.

    Raises:
        SystemExit: if the run fails.
    """
    output = folder / study.name / Path(file_name(arm, seed)).stem
    words = [*study.words(arm, load_costs(results)["steps"].get(arm)), *more]
    command = [*launcher, str(SCRIPTS / study.recipe), *words, *as_flags({"seed": seed, "output_dir": output})]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"The run of {arm!r} with seed {seed} failed: {shlex.join(command)}\nRun the study again to go on.")
    finished = json.loads((output / study.attention(arm) / RESULTS).read_text(encoding="utf-8"))
    comparison = json.loads((output / "comparison.json").read_text(encoding="utf-8"))
    where = comparison["environment"]  # reads that of the run's own processes
    asked = settings_of_run(json.loads((output / "run.json").read_text(encoding="utf-8"))) | {"processes": where["processes"]}
    record = {"study": study.name, **study.origin, "arm": arm, "seed": seed, "settings": study.settings(arm)}
    record |= {**finished, "run": asked, "environment": where}
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / file_name(arm, seed), record)


def settings_of_run(settings: dict[str, Any]) -> dict[str, Any]:
    """Every argument that decides what is learned; folders of this machine by their last names."""
    folders = {name: value for name, value in settings.items() if isinstance(value, str) and Path(value).is_dir()}
    return settings | {name: Path(value).name for name, value in folders.items()}


def read_page(page: Path) -> str:
    """Raises SystemExit if it cannot be read, before anything is run."""
    try:
        return page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"--pages {page}: {error}") from None


def write_tables(pages: dict[Path, str], study: Study, results: Path) -> None:
    """Writes the study's tables and figures in all pages, or in none.

    Raises:
        SystemExit: if no page has one, or see `with_new_tables`.
    """
    if not any(has_tables(text, study) for text in pages.values()):
        names = ", ".join(map(str, pages))
        raise SystemExit(f"No table or figure of {study.name} is in {names}: see recipes/studies/page_tables.py.")
    found, costs = load_results(study, results), load_costs(results)
    texts = {page: with_new_tables(text, study, found, costs) for page, text in pages.items()}
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--results", type=Path, required=True, help="Folder of the finished runs' JSON files, and of the report."
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), help="Folder of models and checkpoints.")
    parser.add_argument(
        "--adopt",
        type=Path,
        nargs="+",
        default=[],
        help="Results of other studies, whose runs are copied where they are the same.",
    )
    parser.add_argument("--report_only", action="store_true", help="Run nothing.")
    parser.add_argument(
        "--pages", type=Path, nargs="+", default=[], help="Documents whose tables and figures of this study are written anew."
    )
    parser.add_argument(
        "--time_only",
        action="store_true",
        help="Time a step of each arm, and run nothing; of arms that came later, beside the baseline alone.",
    )
    parser.add_argument("--arms", nargs="+", help="Run these alone. Default: all of the study.")
    parser.add_argument("--seeds", nargs="+", type=int, help="Run these alone. Default: all of the study.")
    parser.add_argument("--launcher", help="In place of python, as `accelerate launch ...`.")
    arguments, more = parser.parse_known_args()
    study, results, launcher = Study.load(arguments.study), arguments.results, shlex.split(arguments.launcher or "")
    launcher = launcher or [sys.executable]
    for name, given, known in (("arms", arguments.arms, study.arms), ("seeds", arguments.seeds, study.seeds)):
        if unknown := set(given or ()) - set(known):
            raise SystemExit(f"--{name} {' '.join(map(str, unknown))}: the study has {', '.join(map(str, known))}.")
    pages = {page: read_page(page) for page in arguments.pages}
    if adopted := adopt_runs(study, arguments.adopt, results):
        print(f"adopted: {', '.join(adopted)}", flush=True)
    if arguments.time_only:  # does nothing else, since it may be one of several processes
        return time_arms(study, results, more)
    costs = load_costs(results)
    if not is_timed(study, costs) and is_timed(study, more_costs := with_new_arms(study, costs)):
        write_json(results / COSTS, more_costs)
    if arguments.report_only and more:
        raise SystemExit(f"--report_only runs nothing, for which {shlex.join(more)} would be: leave that out.")
    if not arguments.report_only:
        check_words(study, more)
        if not is_timed(study, load_costs(results)):
            command = [*launcher, __file__, str(arguments.study), "--results", str(results), "--time_only", *more]
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(f"The steps of the arms could not be timed: {shlex.join(command)}")
        for arm, seed in study.runs():
            wanted = arm in (arguments.arms or study.arms) and seed in (arguments.seeds or study.seeds)
            if wanted and not (results / file_name(arm, seed)).exists():
                print(f"{arm}, seed {seed}", flush=True)
                run(study, arm, seed, launcher, arguments.runs, results, more)
                report(study, results)
    print(report(study, results))
    if pages:
        write_tables(pages, study, results)


if __name__ == "__main__":
    main()
