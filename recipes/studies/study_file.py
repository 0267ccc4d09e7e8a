"""Study files: what `study.py` reads, and how it names what it writes."""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

import yaml

from tools.command_lines import as_flags
from training import image_task, recall_task, text_task
from training.arms import Arm


SCRIPTS = Path(__file__).parents[1]
COSTS = "costs.json"
SAME_TIME = "same_time_as"
SEEDS = "seeds"
BESIDE = "beside"

# Lists settings of an arm that do not change what a step costs
OF_THE_SAME_STEP = {
    SAME_TIME,
    "learning_rate",
    "max_steps",
    "neural_init",
    "scorer_learning_rate",
    "scorer_weight_decay",
}
PER_ARM = ("seconds_per_step", "quartiles", "ratios")  # of what was timed
# Lists what an arm of a study may say; how its scores start is a setting of its own, `score_spread`
ATTENTIONS = (Arm.DOT, Arm.NEURAL)
RECIPES = {"language_modeling.py": text_task, "image_classification.py": image_task, "recall.py": recall_task}


class NamesOnce(yaml.SafeLoader):
    """Refuses a name that stands twice in one place, of which YAML would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.composer.ComposerError(None, None, f"{key.value!r} stands here twice", key.start_mark)
            seen.add(name)
        return node


@dataclass
class Study:
    """A study file."""

    name: str
    recipe: str
    config: str
    dataset: str
    seeds: list[int]
    baseline: str
    metric: str
    choose_by: str
    arms: dict[str, dict[str, Any]]
    flags: dict[str, Any]
    also: list[str] = field(default_factory=list)
    lower_is_better: bool = True
    shapes: bool = False  # draw error against what scorers cost
    pictured: list[str] = field(default_factory=list)  # arms of the picture of the first layer
    pooled: bool = True  # intervals of all runs together: chance does as much in every arm
    note: str = ""

    @classmethod
    def load(cls, path: Path) -> "Study":
        """Raises SystemExit if the file is not there, or lacks or has what a study has not."""
        try:
            words = NamesOnce(path.read_text(encoding="utf-8")).get_single_data()  # makes plain values alone, as safe_load
            study = cls(**{"name": path.stem, "flags": {}, **words})
        except (OSError, yaml.YAMLError, TypeError) as error:
            raise SystemExit(f"{path} is no study: {error}") from None
        if (fault := study.fault()) is not None:
            raise SystemExit(f"{path}: {fault}")
        return study

    def fault(self) -> str | None:
        """What is wrong with it, if anything."""
        for each in fields(self):
            expected: Any = get_origin(each.type) or each.type
            if not isinstance(value := getattr(self, each.name), expected):
                return f"`{each.name}` is {value!r}; expected a {expected.__name__}."
        if numbers := [arm for arm in self.arms if not isinstance(arm, str)]:
            return f"an arm is named {numbers[0]!r}, which is no text: put it in quotes."
        if self.recipe not in RECIPES:
            return f"the recipe is {self.recipe!r}; expected {' or '.join(RECIPES)}."
        if self.baseline not in self.arms:
            return f"the baseline {self.baseline!r} is none of the arms, {', '.join(self.arms)}."
        if unknown := [arm for arm in self.pictured if arm not in self.arms]:
            return f"`pictured` names {unknown[0]!r}, which is none of the arms, {', '.join(self.arms)}."
        names: dict[str, str] = {}
        for arm, settings in self.arms.items():
            if not isinstance(settings, dict) or settings.get("attention") not in ATTENTIONS:
                return f"the arm {arm!r} must say {' or '.join(f'`attention: {attention}`' for attention in ATTENTIONS)}."
            count = settings.get(SEEDS)
            if count is not None and not (isinstance(count, int) and 1 <= count <= len(self.seeds)):
                return f"the arm {arm!r} has `seeds: {count}`; expected how many of the study's {len(self.seeds)} it gets."
            if (same := names.setdefault(file_name(arm, 0), arm)) != arm:
                return f"the arms {same!r} and {arm!r} would have the same file names."
            twin = settings.get(BESIDE)
            if twin is not None and (self.arms.get(twin) or {}).get("attention") != Arm.DOT:
                return f"{arm!r} is to stand beside {twin!r}, which must be a dot-product arm."
            other = settings.get(SAME_TIME)
            if other is not None and (other not in self.arms or "max_steps" not in self.settings(other)):
                return (
                    f"{arm!r} is to take the same time as {other!r}, which must be an arm with `max_steps` (or `flags` must "
                    "have them), whose number is scaled."
                )
            if other is not None and SAME_TIME in self.arms[other]:
                return (
                    f"{arm!r} is to take the same time as {other!r}, whose own steps are scaled: name the arm that it names."
                )
            if self.shapes and settings["attention"] != Arm.DOT and self.settings(arm).get("neural_layers") != "all":
                return (
                    f"{arm!r} has other than neural layers, whose costs a picture of shapes cannot show: `neural_layers: all`."
                )
        return None

    def runs(self) -> list[tuple[str, int]]:
        """Seed by seed, so that a study that is stopped early has whole pairs."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms if seed in self.seeds_of(arm)]

    def seeds_of(self, arm: str) -> list[int]:
        """All of the study's, or the first so many."""
        return self.seeds[: self.arms[arm].get(SEEDS)]

    def settings(self, arm: str) -> dict[str, Any]:
        """All that is asked of an arm beside the recipe's configuration."""
        return {name: value for name, value in {**self.flags, **self.arms[arm]}.items() if name not in (SEEDS, BESIDE)}

    @property
    def origin(self) -> dict[str, str]:
        """Names in records what its runs were made with."""
        return {"recipe": self.recipe, "recipe_config": self.config}

    def attention(self, arm: str) -> Arm:
        """What the recipe calls the model of an arm of the study."""
        return Arm(self.arms[arm]["attention"])

    def timed_as(self, arm: str) -> str:
        """The first arm whose steps are the same: rates, decay, the start of scorers and the number of steps change none.

        How scores start may: a saturated softmax leaves subnormal numbers, with which processors are slow.
        """
        return next(other for other in self.arms if of_a_step(self.settings(other)) == of_a_step(self.settings(arm)))

    def words(self, arm: str, steps: int | None = None) -> list[str]:
        """The recipe's command line for an arm, but for the seed and the folder."""
        settings = {name: value for name, value in self.settings(arm).items() if name != SAME_TIME}
        if steps is not None:
            settings["max_steps"] = steps
        return [str(SCRIPTS / self.config), *as_flags(settings)]

    def steps_of_same_time(self, ratios: dict[str, float]) -> dict[str, int]:
        """Of arms that are to take the same time as another: how many steps that is.

        Args:
            ratios: how many times as long as the baseline's a step takes, by arm.
        """
        others = {arm: settings[SAME_TIME] for arm, settings in self.arms.items() if SAME_TIME in settings}
        # takes one step at least, since a recipe without would train for epochs
        return {
            arm: max(1, round(self.settings(other)["max_steps"] * ratios[other] / ratios[arm]))
            for arm, other in others.items()
        }


def of_a_step(settings: dict[str, Any]) -> dict[str, Any]:
    """What of an arm's settings a step's cost hangs on."""
    return {name: value for name, value in settings.items() if name not in OF_THE_SAME_STEP}


def file_name(arm: str, seed: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', arm).strip('-')}-{seed}.json"


def load_costs(results: Path) -> dict[str, Any]:
    """What `study.py` has measured of a step of each arm; empty if it has not."""
    path = results / COSTS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def with_new_arms(study: Study, costs: dict[str, Any]) -> dict[str, Any]:
    """The costs of the study's arms as far as they are known: those that were timed, and later ones whose steps are the same
    as of one of these. Nothing is known where an arm is not what it was."""
    asked, seconds = costs.get("settings", {}), costs.get("seconds_per_step", {})
    timed = {arm: settings for arm, settings in asked.items() if arm in study.arms and arm in seconds}
    if study.baseline not in timed or any(study.settings(arm) != settings for arm, settings in timed.items()):
        return {}
    alike: dict[str, str] = {}  # arm -> one that was timed
    for arm in study.arms:
        step = of_a_step(study.settings(arm))
        found = next((each for each in (arm, *timed) if each in timed and of_a_step(timed[each]) == step), None)
        if found is not None:
            alike[arm] = found
    taken: dict[str, Any] = {name: {arm: costs[name][each] for arm, each in alike.items()} for name in PER_ARM}
    if "later" in costs:
        taken["later"] = [arm for arm, source in alike.items() if source in costs["later"]]
    return costs | taken | {"settings": {arm: study.settings(arm) for arm in alike}}


def is_timed(study: Study, costs: dict[str, Any]) -> bool:
    """Whether the costs are of the study's arms as the file now describes them."""
    return costs.get("settings") == {arm: study.settings(arm) for arm in study.arms}
