"""The model card of a study's best neural model."""

from typing import Any

from studies.number_format import Form, form_of
from studies.results import Results, all_else, best_of, best_row, counterpart, difference, rows_with, verdict
from studies.study_file import RECIPES, Study
from training import recall_task
from training.arms import Arm
from training.reporting import Task, card_text


def best_card(study: Study, found: Results, rows: list[dict[str, Any]]) -> str | None:
    """The model card of the best neural arm's best run, both by `choose_by`, beside the run of its seed of the dot-product arm
    that differs in its attention alone, if there is one."""
    neural = rows_with(study, rows, Arm.NEURAL)
    if not neural:
        return None
    recipe, row, form = RECIPES[study.recipe], best_row(study, found, neural), form_of(study, rows, study.metric)
    runs, base = found[row["arm"]], counterpart(study, rows, row["arm"])
    seed = best_of(study, list(runs), lambda seed: runs[seed]["metrics"][study.choose_by])
    results = {Arm.NEURAL: runs[seed] | {"seconds_in_turn": row["seconds_per_step"]}}
    words = f"of its runs the best (seed {seed})"
    if base is not None and seed in found[base["arm"]]:
        # derives it from the ratio that was measured turn by turn, which is not that of two medians
        seconds = row["seconds_per_step"] * base["relative_time"] / row["relative_time"]
        results = {Arm.DOT: found[base["arm"]][seed] | {"seconds_in_turn": seconds}, **results}
        beside = verdict(study, difference(study, found, row["arm"], base["arm"])) or "too few seeds to compare"
        words += f", beside *{base['arm']}* of that seed (over all seeds: {beside})"
    others = "; ".join(beside_in_words(study, found, form, row, each) for each in rows_with(study, rows, Arm.DOT))
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
            f"dot-product models' are, with the difference and its 95 % interval (in square "
            f"brackets, of all runs together): {others} ([all arms](report.md))."
        ).strip(),
        picture="Training loss of the study's arms, as difference to the dot product",
        step="whole",
        is_shared=base is not None and all_else(study, row["arm"]) == all_else(study, base["arm"]),
    )
    asked = runs[seed]["run"]
    more = f"{' --dataset_name DATA' if recipe is not recall_task else ''}{' --use_cpu True' if asked.get('use_cpu') else ''}"
    record = {
        "command": f"python recipes/study.py recipes/studies/{study.name}.yaml --results FOLDER{more}",
        "environment": runs[seed]["environment"],
        "note": "Trainings of a study may share their machine: its minutes are upper bounds, the times by turns are not.",
        "results": results,
    }
    return card_text(record, task, Arm.NEURAL, "curves.png")


def beside_in_words(study: Study, found: Results, form: Form, row: dict[str, Any], other: dict[str, Any]) -> str:
    """A dot-product arm's figure and the difference to it, with the number of pairs where seeds have none."""
    change = difference(study, found, row["arm"], other["arm"])
    pairs = "" if change["pairs"] == row["seeds"] == other["seeds"] else f", of {change['pairs']} seed(s) that both have"
    return f"*{other['arm']}* {form.value(other['mean'])}, to which it is {form.with_bounds(change)}{pairs}"
