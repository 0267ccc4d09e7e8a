"""Study files: what they say, and what is wrong with those that are none."""

import pytest

import study as script
from studies.report import report
from studies.results import best_row, counterpart
from studies.study_file import Study, file_name, is_timed, with_new_arms
from tests.helpers.running import RECIPES
from tests.helpers.study_records import SECONDS, costs_of, make_study


def test_as_many_steps_as_take_the_same_time(tmp_path):
    study = make_study()
    ratios = {arm: seconds / SECONDS["dot"] for arm, seconds in SECONDS.items()}
    assert study.steps_of_same_time(ratios) == {"longer": 15}
    twice = make_study(arms={**study.arms, "first layer": {**study.arms["first layer"], "max_steps": 20}})
    assert twice.steps_of_same_time(ratios) == {"longer": 30}
    assert study.steps_of_same_time(ratios | {study.arms["longer"]["same_time_as"]: 1e-3}) == {"longer": 1}
    # keeps the steps after another timing, unless the study asks for something else
    costs = costs_of(study) | {"steps": {"longer": 77, "gone": 5}}
    assert script.steps_that_stay(study, costs) == {"longer": 77} and script.steps_that_stay(twice, costs) == {}
    words = study.words("longer", 15)
    assert words[1:3] == ["--max_steps", "15"] and "same_time_as" not in " ".join(words)
    assert study.timed_as("longer") == "dot" and study.timed_as("first layer") == "first layer"
    # times an arm as the first one, which it is but for another optimiser for its scorers
    for other in ({"scorer_weight_decay": 0.0}, {"learning_rate": 1.0}, {"max_steps": 5}, {"neural_init": "paper"}):
        assert make_study(arms={**study.arms, "b": {"attention": "neural", **other}}).timed_as("b") == "first layer"
    assert make_study(arms={**study.arms, "b": {"attention": "neural", "neural_proj_dim": 4}}).timed_as("b") == "b"


def test_arms_of_the_same_step_need_no_timing():
    study = make_study()
    costs = costs_of(study)
    faster = {"attention": "dot", "learning_rate": 0.1}
    larger = make_study(arms={"faster": faster, **study.arms})
    assert with_new_arms(study, costs) == costs and with_new_arms(study, {}) == {} and not is_timed(larger, costs)
    assert is_timed(study, costs)
    new = with_new_arms(larger, costs)
    assert is_timed(larger, new) and list(new["ratios"]) == list(larger.arms)
    for name in ("seconds_per_step", "quartiles", "ratios"):
        assert new[name] == {"faster": costs[name]["dot"], **costs[name]}
    another = make_study(arms={**study.arms, "spread": {"attention": "dot", "score_spread": 1.0}})
    changed = make_study(arms={**larger.arms, "dot": {"attention": "dot", "weight_decay": 0.1}})
    costs["later"] = ["dot"]
    assert with_new_arms(larger, costs)["later"] == ["faster", "dot"]
    del costs["later"]
    # knows the others where one is to be timed, and none where one is not what it was
    assert with_new_arms(another, costs) == costs and not is_timed(another, with_new_arms(another, costs))
    assert with_new_arms(changed, costs) == {}


def test_arms_may_have_fewer_seeds():
    study = make_study(seeds=[3, 4, 5], arms={"dot": {"attention": "dot"}, "b": {"attention": "neural", "seeds": 2}})
    assert study.runs() == [("dot", 3), ("b", 3), ("dot", 4), ("b", 4), ("dot", 5)] and study.fault() is None
    assert "seeds" not in study.settings("b") and "--seeds" not in study.words("b")
    for count in (0, 4, "2"):
        study.arms["b"]["seeds"] = count
        assert "expected how many of the study's 3" in (study.fault() or "")


def test_the_best_arm_has_as_many_seeds_as_any_or_as_it_shall():
    arms = {"dot": {"attention": "dot"}, "b": {"attention": "dot", "seeds": 2}, "c": {"attention": "dot"}}
    study = make_study(seeds=[3, 4, 5], arms=arms, choose_by="m", lower_is_better=True)
    rows = [{"arm": arm, "seeds": seeds, "m": value} for arm, seeds, value in (("dot", 3, 3.0), ("b", 2, 2.0), ("c", 2, 1.0))]
    found = {row["arm"]: {seed: {"metrics": {"m": row["m"]}} for seed in range(row["seeds"])} for row in rows}
    assert best_row(study, found, rows)["arm"] == "b"


def test_arms_may_name_what_they_stand_beside():
    arms = {"dot": {"attention": "dot"}, "slow": {"attention": "dot", "learning_rate": 1}}
    arms["b"] = {"attention": "neural", "learning_rate": 2, "beside": "slow"}
    study = make_study(arms=arms)
    assert study.fault() is None and "beside" not in study.settings("b") and "--beside" not in study.words("b")
    rows = [{"arm": arm} for arm in arms]
    assert counterpart(study, rows, "b") == {"arm": "slow"} and counterpart(study, rows[:1], "b") is None
    for other in ("b", "c"):
        arms["b"]["beside"] = other
        assert "which must be a dot-product arm" in (study.fault() or "")


def test_studies_that_are_none(tmp_path):
    path = tmp_path / "s.yaml"
    with pytest.raises(SystemExit, match="is no study"):
        Study.load(path)

    def refused(content: str, match: str) -> None:
        path.write_text(content)
        with pytest.raises(SystemExit, match=match):
            Study.load(path)

    refused("recipe: x\ncolour: blue", r"is no study.*colour")
    given = "recipe: language_modeling.py, config: y, dataset: d, seeds: [0], baseline: a, metric: m, choose_by: m"
    refused(
        f"{{{given}, arms: {{a: {{attention: dot}}, b: {{attention: dot, same_time_as: c}}}}}}",
        "'b' is to take the same time as 'c', which must be an arm",
    )
    chain = "a: {attention: dot}, b: {attention: dot, same_time_as: a}, c: {attention: dot, same_time_as: b}"
    refused(
        f"{{{given}, flags: {{max_steps: 9}}, arms: {{{chain}}}}}",
        "'c' is to take the same time as 'b', whose own steps are scaled",
    )
    refused(
        f"{{{given}, shapes: true, arms: {{a: {{attention: dot}}, b: {{attention: neural}}}}}}",
        "'b' has other than neural layers",
    )
    refused(
        f"{{{given}, pictured: [b], arms: {{a: {{attention: dot}}}}}}", "`pictured` names 'b', which is none of the arms, a"
    )
    refused(f"{{{given}, arms: {{a: }}}}", "'a' must say `attention: dot` or `attention: neural`")
    refused(f"{{{given}, arms: {{a: {{attention: dot}}, a: {{attention: neural}}}}}}", "is no study: 'a' stands here twice")
    refused(f"{{{given}, arms: {{a: {{attention: dot}}, 16: {{attention: dot}}}}}}", "an arm is named 16, which is no text")
    refused(f"{{{given}, arms: {{a: {{attention: dot}}}}}}".replace("[0]", "3"), "`seeds` is 3; expected a list")
    refused(f"{{{given}, arms: {{b: {{attention: dot}}}}}}", "baseline 'a' is none of the arms, b")
    refused(f"{{{given}, arms: {{a: {{attention: both}}}}}}", "'a' must say `attention: dot` or `attention: neural`")
    refused(
        f"{{{given}, arms: {{a: {{attention: dot}}, a.: {{attention: dot}}}}}}",
        r"'a' and 'a\.' would have the same file names",
    )
    refused(f"{{{given}, arms: }}", "`arms` is None; expected a dict")
    refused(
        f"{{{given}, arms: {{}}}}".replace("recipe: language_modeling.py", "recipe: quantize.py"),
        r"the recipe is 'quantize\.py'; expected language_modeling\.py or",
    )
    with pytest.raises(SystemExit, match="no finished run"):
        report(make_study(), tmp_path)


@pytest.mark.parametrize("path", sorted((RECIPES / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_are_studies_of_recipes(path):
    study = Study.load(path)
    assert (RECIPES / study.recipe).exists() and (RECIPES / study.config).exists() and len(study.seeds) >= 3
    names = [file_name(arm, seed) for arm, seed in study.runs()]
    assert len(set(names)) == len(names)
    script.check_words(study, ["--use_cpu", "True"])
