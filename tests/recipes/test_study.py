"""Studies: runs that are kept and not run again, and a report that is made of their files alone."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import study as script
from study_file import COSTS, Study, file_name, load_costs
from study_report import CARD, compared_with, report, summary
from study_results import difference, interval, load_results, summarize, verdict
from tests.helpers.running import RECIPES, run_in


STUDIES = RECIPES.parent / "model_cards/studies"
SECONDS = {"dot": 2.0, "first layer": 3.0, "longer": 2.0, "unfinished": 1.0}
WHERE = dict.fromkeys(("cpu", "gpu", "threads", "python", "torch", "transformers"), "x") | {"processes": 1}


def make(**fields: Any) -> Study:
    arms = {name: {"attention": "dot" if name in ("dot", "longer") else "neural"} for name in SECONDS}
    arms["longer"]["same_time_as"] = "first layer"
    given = {"name": "n", "recipe": "image_classification.py", "config": "c", "seeds": [0, 1, 2], "baseline": "dot"}
    given |= {"dataset": "Digits", "metric": "m", "choose_by": "v", "also": ["w"], "arms": arms, "flags": {"max_steps": 10}}
    return Study(**{**given, **fields})


def costs_of(study: Study) -> dict[str, Any]:
    ratios = {arm: [seconds / 2 - 0.1, seconds / 2, seconds / 2 + 0.1] for arm, seconds in SECONDS.items()}
    settings = {arm: study.settings(arm) for arm in study.arms}
    return {"seconds_per_step": SECONDS, "ratios": ratios, "steps": {"longer": 15}, "settings": settings, "environment": WHERE}


def record_of(study: Study, arm: str, seed: int, value: float) -> dict[str, Any]:
    neural = study.arms[arm]["attention"] == "neural"
    alive = {"layer": "a", "scorers": 4, "dead": 0, "score_std": 0.5}
    health = {"start": [{**alive, "dead": 1}, alive], "end": [{**alive, "dead": 2}, alive]}
    steps = 15 if "same_time_as" in study.arms[arm] else 10
    return {
        "arm": arm,
        "settings": study.settings(arm),
        "run": {"seed": seed, "max_steps": steps, "learning_rate": 0.1},
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


def results(study: Study, folder, values: dict[str, list[float]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / COSTS).write_text(json.dumps(costs_of(study)))
    for arm, figures in values.items():
        for seed, value in enumerate(figures):
            (folder / file_name(arm, seed)).write_text(json.dumps(record_of(study, arm, seed, value)))


def change(path: Path, **fields: Any) -> None:
    """Changes what was asked of a run."""
    record = json.loads(path.read_text())
    record["run"] |= fields
    path.write_text(json.dumps(record))


def test_figures_by_hand(tmp_path):
    study = make()
    results(study, tmp_path, {"dot": [1.0, 2.0, 3.0], "first layer": [0.5, 1.4, 2.6]})
    text = report(study, tmp_path)
    rows = {row["arm"]: row for row in summarize(study, load_results(study, tmp_path), costs_of(study))}
    row = rows["first layer"]
    assert row["mean"] == pytest.approx(1.5) and row["difference"] == pytest.approx(-0.5) and row["seeds"] == 3
    # differences -0.5, -0.6, -0.4: standard deviation 0.1, t 4.303
    assert (row["low"], row["high"]) == pytest.approx((-0.5 - 4.303 * 0.1 / 3**0.5, -0.5 + 4.303 * 0.1 / 3**0.5), abs=1e-3)
    assert verdict(study, row) == "better" and verdict(make(lower_is_better=False), row) == "worse"
    assert verdict(study, {**row, "high": 0.1}) == "no difference shown" and verdict(study, rows["dot"]) == ""
    assert row["seconds_per_step"] == 3.0 and row["relative_time"] == 1.5 and "unfinished" not in rows
    assert row["relative_training_time"] == 1.5
    assert (row["v"], row["w"]) == (pytest.approx(2.5), 7.0) and rows["dot"]["scorers"] == 0
    assert (row["scorers"], row["dead_at_start"], row["dead_at_end"], row["score_std"]) == (24, 3, 6, 0.5)
    assert "| first layer | 3 | 1.500 | 1.054 | -0.500 | -0.748 to -0.252 | better | 2.500 | 7.000 |" in text
    assert "Best by `v`: **first layer** (2.500); its `m` is 1.500." in text
    assert "| 3.000 | 1.50 (1.40 to 1.60) | 1.50 | 1 | 3 of 24 | 6 of 24 | 0.50 |" in text
    assert "Neural arms beside every" not in text


def test_neural_arms_beside_the_other_dot_product_arms(tmp_path):
    study = make(note="Of a part.")
    results(study, tmp_path, {"dot": [1.0, 2.0, 3.0], "first layer": [0.5, 1.4, 2.6], "longer": [0.4, 1.4, 2.7]})
    text, found = report(study, tmp_path), load_results(study, tmp_path)
    rows = summarize(study, found, costs_of(study))
    assert difference(study, found, "first layer", "longer")["difference"] == pytest.approx(0.0)
    assert "| | dot | longer |" in text.replace("|  |", "| |") and "Of a part." in text
    assert "| first layer | **-0.500 (-0.748 to -0.252)** | " in text and "Of a part." in (tmp_path / f"{CARD}.md").read_text()
    short = summary(study, found, rows)
    assert "| to longer (95 %) |" in short and "| longer | 1.500 | -0.500 (" in short and short.endswith("| x 1.50 |")
    assert "*longer* 1.500, to which it is " in (tmp_path / f"{CARD}.md").read_text()


def test_a_report_is_made_of_files_alone(tmp_path):
    study = make()
    results(study, tmp_path, {"dot": [1.0, 2.0, 3.0], "first layer": [0.5, 1.4, 2.6]})
    report(study, tmp_path)
    names = ("report.md", "report.csv", "report.png", "curves.png", f"{CARD}.md")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    report(study, tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in names}
    card = before[f"{CARD}.md"].decode()
    # the best run by v, 0.5, and the baseline of its seed
    assert "| v | 1 | 0.5 | 0.500 |" in card and "sample of seed 0" in card and "*first layer*" in card
    assert "Digits" in card and "beside *dot* of that seed (over all seeds: better). Its `m` over 3 seeds is 1.500; " in card
    assert "*dot* 2.000, to which it is -0.500" in card
    assert "| seconds per step, whole, timed by turns | 2.000 | 3.000 | 1.500 |" in card and "Both models had" in card


def test_the_best_neural_run_stands_beside_the_dot_product_with_all_else_equal(tmp_path):
    arms = {"dot": {"attention": "dot"}, "first layer": {"attention": "neural", "neural_proj_dim": 4, "learning_rate": 1}}
    twin = arms | {"longer": {"attention": "dot", "learning_rate": 1}}
    for given, values in ((twin, {"longer": [1.9, 2.0, 2.1]}), (arms, {})):
        study = make(arms=given, also=[], flags={})
        folder = tmp_path / str(len(given))
        results(study, folder, {"dot": [1.0, 2.0, 3.0], "first layer": [0.5, 1.4, 2.6], **values})
        for path in folder.glob("first-layer-*.json"):
            change(path, learning_rate=1)
        for path in folder.glob("longer-*.json"):
            change(path, learning_rate=1, max_steps=10)
        report(study, folder)
        card = (folder / f"{CARD}.md").read_text()
        assert ("beside *longer* of that seed" in card and "| m | 1.9 | 0.5 |" in card) == (given is twin)
        assert ("Both models had" in card) == (given is twin) and ("nothing is compared" in card) == (given is arms)
        assert "*dot* 2.000, to which it is -0.500" in card
        found = load_results(study, folder)
        rows = summarize(study, found, costs_of(study))
        assert compared_with(study, rows)["neural, less the dot product with all else equal"] == {
            "first layer": "longer" if given is twin else "dot"
        }
        assert ("| first layer | 1.500 | -0.500 (-2.870 to +1.870) |" in summary(study, found, rows)) == (given is twin)


def test_accuracies_are_written_in_percent_and_points(tmp_path):
    study = make(metric="test_accuracy", choose_by="test_accuracy", also=[], lower_is_better=False)
    results(study, tmp_path, {})
    for arm, figures in {"dot": [0.31, 0.32, 0.33], "first layer": [0.33, 0.35, 0.34]}.items():
        for seed, value in enumerate(figures):
            record = record_of(study, arm, seed, value) | {"metrics": {"test_accuracy": value}}
            (tmp_path / file_name(arm, seed)).write_text(json.dumps(record))
    text, found = report(study, tmp_path), load_results(study, tmp_path)
    assert "| first layer | 3 | 34.00 | 1.00 | +2.00 | -0.48 to +4.48 | no difference shown | 34.00 |" in text
    short = summary(study, found, summarize(study, found, costs_of(study)))
    assert "| Digits | `test_accuracy`, % |" in short and "| first layer | 34.00 | +2.00 (-0.48 to +4.48) |" in short


def test_as_many_steps_as_take_the_same_time(tmp_path):
    study = make()
    ratios = {arm: seconds / SECONDS["dot"] for arm, seconds in SECONDS.items()}
    assert study.steps_of_same_time(ratios) == {"longer": 15}
    twice = make(arms={**study.arms, "first layer": {**study.arms["first layer"], "max_steps": 20}})
    assert twice.steps_of_same_time(ratios) == {"longer": 30}
    # another timing changes none, unless the study asks for something else
    costs = costs_of(study) | {"steps": {"longer": 77, "gone": 5}}
    assert script.steps_that_stay(study, costs) == {"longer": 77} and script.steps_that_stay(twice, costs) == {}
    words = study.words("longer", 15)
    assert words[1:3] == ["--max_steps", "15"] and "same_time_as" not in " ".join(words)
    assert study.timed_as("longer") == "dot" and study.timed_as("first layer") == "first layer"
    # the second is the first with another optimiser for its scorers
    for other in ({"scorer_weight_decay": 0.0}, {"learning_rate": 1.0}, {"max_steps": 5}, {"neural_init": "paper"}):
        assert make(arms={**study.arms, "b": {"attention": "neural", **other}}).timed_as("b") == "first layer"
    assert make(arms={**study.arms, "b": {"attention": "neural", "neural_proj_dim": 4}}).timed_as("b") == "b"


def test_results_of_another_study_are_refused(tmp_path):
    results(make(), tmp_path, {"dot": [1.0], "first layer": [2.0]})
    with pytest.raises(SystemExit, match=r"dot-0.json is of a run with .*'max_steps': 10.* now asks for .*'max_steps': 11"):
        report(make(flags={"max_steps": 11}), tmp_path)
    costs = costs_of(make())
    costs["settings"]["longer"]["same_time_as"] = "dot"
    (tmp_path / COSTS).write_text(json.dumps(costs))
    with pytest.raises(SystemExit, match=r"costs.json is not of the study n as it now is: run the study, or --time_only"):
        report(make(), tmp_path)
    results(make(metric="accuracy"), tmp_path, {})
    with pytest.raises(SystemExit, match=r"dot-0.json has no 'accuracy'; the study can have m, v, w\."):
        report(make(metric="accuracy"), tmp_path)


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    study = make()
    results(study, tmp_path, {"dot": [1.0], "first layer": [2.0], "longer": [1.0]})
    report(study, tmp_path)
    path = tmp_path / file_name("first layer", 0)
    change(path, learning_rate=0.2)
    with pytest.raises(
        SystemExit, match=r"first-layer-0.json is of a run with learning_rate 0.2, dot-0.json of one with 0.1: they cannot be"
    ):
        report(study, tmp_path)
    change(path, learning_rate=0.1, max_steps=9)
    with pytest.raises(
        SystemExit, match=r"first-layer-0.json is of a run with \{'max_steps': 9\}, for which the study does not"
    ):
        report(study, tmp_path)


def test_runs_of_arms_that_leave_a_setting_to_the_recipe_have_it_alike(tmp_path):
    # though another arm has it as its own
    arms = make().arms | {"unfinished": {"attention": "neural", "learning_rate": 3}}
    study = make(arms=arms)
    results(study, tmp_path, {"dot": [1.0, 1.0], "first layer": [2.0], "longer": [1.0, 1.0], "unfinished": [1.0]})
    change(tmp_path / "unfinished-0.json", learning_rate=3)
    report(study, tmp_path)
    change(tmp_path / "dot-1.json", learning_rate=3)
    with pytest.raises(SystemExit, match=r"dot-1.json is of a run with learning_rate 3, dot-0.json of one with 0.1"):
        report(study, tmp_path)
    change(tmp_path / "dot-1.json", learning_rate=0.1)
    change(tmp_path / "longer-1.json", max_steps=77)
    with pytest.raises(SystemExit, match=r"longer-1.json is of a run with max_steps 77, longer-0.json of one with 15"):
        report(study, tmp_path)


def test_an_arm_with_fewer_seeds_is_not_the_best(tmp_path):
    study = make()
    results(study, tmp_path, {"dot": [1.0, 2.0], "first layer": [0.5]})
    assert "Best by `v`: **dot**" in report(study, tmp_path)


def test_pairs_are_of_the_same_seed(tmp_path):
    study = make()
    results(study, tmp_path, {"dot": [1.0], "first layer": [2.0, 9.0]})
    rows = summarize(study, load_results(study, tmp_path), costs_of(study))
    assert rows[1]["difference"] == 1.0 and rows[1]["low"] is None and rows[1]["mean"] == 5.5
    assert interval([1.0]) is None


def test_studies_that_are_none(tmp_path):
    path = tmp_path / "s.yaml"
    with pytest.raises(SystemExit, match="is no study"):
        Study.load(path)
    path.write_text("recipe: x\ncolour: blue")
    with pytest.raises(SystemExit, match=r"is no study.*colour"):
        Study.load(path)
    given = "recipe: language_modeling.py, config: y, dataset: d, seeds: [0], baseline: a, metric: m, choose_by: m"
    path.write_text(f"{{{given}, arms: {{a: {{attention: dot}}, b: {{attention: dot, same_time_as: c}}}}}}")
    with pytest.raises(SystemExit, match="'b' is to take the same time as 'c', which must be an arm"):
        Study.load(path)
    path.write_text(f"{{{given}, arms: {{a: }}}}")
    with pytest.raises(SystemExit, match="'a' must say `attention: dot` or `attention: neural`"):
        Study.load(path)
    path.write_text(f"{{{given}, arms: {{a: {{attention: dot}}}}}}".replace("[0]", "3"))
    with pytest.raises(SystemExit, match="`seeds` is 3; expected a list"):
        Study.load(path)
    path.write_text(f"{{{given}, arms: {{b: {{attention: dot}}}}}}")
    with pytest.raises(SystemExit, match="baseline 'a' is none of the arms, b"):
        Study.load(path)
    path.write_text(f"{{{given}, arms: {{a: {{attention: both}}}}}}")
    with pytest.raises(SystemExit, match="'a' must say `attention: dot` or `attention: neural`"):
        Study.load(path)
    path.write_text(f"{{{given}, arms: {{a: {{attention: dot}}, a.: {{attention: dot}}}}}}")
    with pytest.raises(SystemExit, match=r"'a' and 'a\.' would have the same file names"):
        Study.load(path)
    path.write_text(f"{{{given}, arms: }}")
    with pytest.raises(SystemExit, match="`arms` is None; expected a dict"):
        Study.load(path)
    path.write_text(f"{{{given}, arms: {{}}}}".replace("recipe: language_modeling.py", "recipe: quantize.py"))
    with pytest.raises(SystemExit, match=r"the recipe is 'quantize\.py'; expected language_modeling\.py or"):
        Study.load(path)
    with pytest.raises(SystemExit, match="no finished run"):
        report(make(), tmp_path)


@pytest.mark.parametrize(
    "arm, more, message",
    (
        ({"neural_size": 4}, [], r"The arm 'b': image_classification.py does not know --neural_size 4 "),
        ({"neural_proj_dim": 4}, ["--max_steps=5"], "--max_steps=5: this is the study's to say"),
        ({"neural_proj_dim": 4}, ["--output-dir", "a"], "--output-dir: this is the study's to say"),
        ({"neural_proj_dim": 4}, ["--neural_proj_dim", "2"], "--neural_proj_dim: this is the study's to say"),
    ),
)
def test_words_that_no_run_has_are_refused_before_the_first(arm, more, message):
    study = make(config="configs/cifar10-small.yaml", arms={"dot": {"attention": "dot"}, "b": {"attention": "neural", **arm}})
    with pytest.raises(SystemExit, match=message):
        script.check_words(study, more)


def test_a_study_that_is_stopped_goes_on_with_what_is_missing(tmp_path, monkeypatch, capsys):
    study, started = make(config="configs/cifar10-small.yaml", seeds=[0, 1]), []
    del study.arms["unfinished"]
    (tmp_path / "n.yaml").write_text(json.dumps({name: value for name, value in vars(study).items() if name != "name"}))
    results(study, tmp_path / "results", {})

    def run(command: list[str], check: bool) -> SimpleNamespace:
        """A run that leaves what runs leave, or is killed."""
        output = Path(command[command.index("--output_dir") + 1])
        started.append((output.name, command[command.index("--max_steps") + 1]))
        if len(started) == 3:
            return SimpleNamespace(returncode=-9)
        arm, seed = next((arm, seed) for arm, seed in study.runs() if file_name(arm, seed) == f"{output.name}.json")
        record = record_of(study, arm, seed, 1.0 + seed)
        folder = output / study.arms[arm]["attention"]
        folder.mkdir(parents=True)
        (output / "run.json").write_text(json.dumps(record["run"] | {"dataset_name": str(tmp_path)}))
        (output / "comparison.json").write_text(json.dumps({"environment": record["environment"]}))
        (folder / "results.json").write_text(json.dumps(record))
        return SimpleNamespace(returncode=0)

    def start(*flags: str) -> None:
        words = ["study.py", "n.yaml", "--results", "results", "--runs", "runs", *flags]
        monkeypatch.setattr(sys, "argv", words)
        script.main()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"(?s)'longer' with seed 0 failed: .*Run the study again to go on"):
        start("--seeds", "0")
    start("--arms", "longer", "dot")
    assert started == [
        ("dot-0", "10"),
        ("first-layer-0", "10"),
        *[("longer-0", "15")] * 2,
        ("dot-1", "10"),
        ("longer-1", "15"),
    ]
    assert "| longer | 2 |" in capsys.readouterr().out
    record = json.loads((tmp_path / "results/longer-1.json").read_text())
    assert record["run"]["dataset_name"] == tmp_path.name and record["seed"] == 1
    with pytest.raises(SystemExit, match=r"--seeds 7: the study has 0, 1\."):
        start("--seeds", "7", "0")


@pytest.mark.slow
def test_a_study_runs_and_goes_on(tmp_path):
    flags = {"n_embd": 16, "n_layer": 1, "n_head": 1, "vocab_size": 300, "block_size": 32, "max_train_samples": 8}
    flags |= {"use_cpu": True, "max_eval_tokens": 100, "max_steps": 2, "save_steps": 2, "disable_tqdm": True}
    arms = {"dot": {"attention": "dot"}, "neural 2": {"attention": "neural", "scorer_weight_decay": 0.0}}
    arms["dot, longer"] = {"attention": "dot", "same_time_as": "neural 2"}
    content = {"recipe": "language_modeling.py", "config": "configs/quickstart.yaml", "seeds": [0], "baseline": "dot"}
    content |= {"dataset": "Python's reference", "metric": "test_perplexity_stride", "flags": flags, "arms": arms}
    content["choose_by"] = "validation_perplexity_stride"
    (tmp_path / "s.yaml").write_text(json.dumps(content))
    said = run_in(tmp_path, "study.py", "s.yaml", "--results", "results")
    assert "| neural 2 | 1 |" in said and len(list((tmp_path / "results").glob("*-*.json"))) == 3
    costs = load_costs(tmp_path / "results")
    seconds, ratio = costs["seconds_per_step"], costs["ratios"]["neural 2"][1]
    assert seconds.keys() == arms.keys() and min(seconds.values()) > 0 and seconds["dot"] == seconds["dot, longer"]
    longer = json.loads((tmp_path / "results" / file_name("dot, longer", 0)).read_text())
    assert longer["steps"] == costs["steps"]["dot, longer"] == round(2 * ratio)
    before = (tmp_path / "results/report.md").read_text()
    run_in(tmp_path, "study.py", "s.yaml", "--results", "results", "--report_only")
    assert (tmp_path / "results/report.md").read_text() == before
    # by two processes, whose batch is twice as large; a changed study is timed again, and steps that were settled stay
    del costs["settings"]["dot"]
    costs["steps"]["dot, longer"] = 77
    (tmp_path / "spread").mkdir()
    (tmp_path / "spread" / COSTS).write_text(json.dumps(costs))
    two = f"{sys.executable} -m torch.distributed.run --nproc_per_node 2"
    flags = ("--arms", "neural 2", "--runs", "more", "--launcher", two, "--ddp_backend", "gloo")
    said = run_in(tmp_path, "study.py", "s.yaml", "--results", "spread", *flags)
    assert "neural: training from the start" in said and "dot, seed" not in said and "longer, seed" not in said
    assert load_costs(tmp_path / "spread")["steps"] == {"dot, longer": 77}
    record = json.loads((tmp_path / "spread" / file_name("neural 2", 0)).read_text())
    assert record["training_memory"] > 2**16 and record["environment"]["processes"] == 2
    assert record["settings"]["scorer_weight_decay"] == 0.0
    assert record["environment"]["torch"] and record["scorer_health"]["end"][0]["scorers"] == 1
    shutil.copy(tmp_path / "spread" / file_name("neural 2", 0), tmp_path / "results")
    said = run_in(tmp_path, "study.py", "s.yaml", "--results", "results", "--report_only", fails=True)
    assert "neural-2-0.json is of a run with processes 2, dot-0.json of one with 1: they cannot be compared" in said


def committed_studies() -> list[Path]:
    """Study files of which every run is in the repository."""

    def complete(path: Path) -> bool:
        return all((results_of(path) / file_name(arm, seed)).exists() for arm, seed in Study.load(path).runs())

    return [path for path in sorted((RECIPES / "studies").glob("*.yaml")) if complete(path)]


def results_of(path: Path) -> Path:
    return STUDIES / path.stem.removesuffix("-small")


@pytest.mark.parametrize("path", committed_studies(), ids=lambda path: path.stem)  # skipped while none is complete
def test_committed_reports_are_those_of_the_committed_runs(path, tmp_path):
    folder = results_of(path)
    copy = tmp_path / folder.name
    copy.mkdir()
    for file in folder.glob("*.json"):
        shutil.copy(file, copy)
    study = Study.load(path)
    assert {file.name for file in copy.iterdir()} == {COSTS, *(file_name(arm, seed) for arm, seed in study.runs())}
    run_in(tmp_path, "study.py", str(path), "--results", copy.name, "--report_only")
    for name in ("report.md", "report.csv", f"{CARD}.md"):
        assert (copy / name).read_text() == (folder / name).read_text()
    found = load_results(study, folder)
    rows = summarize(study, found, load_costs(folder))
    assert summary(study, found, rows) in (RECIPES.parent / "README.md").read_text()
    for name in ("report.png", "curves.png"):
        assert (copy / name).stat().st_size > 10_000 and (folder / name).exists()
    # the control has as many parameters as the largest scorers bring, and not many more
    sizes, scorers = ({row["arm"]: row[name] for row in rows} for name in ("parameters", "scorer_parameters"))
    if (control := "dot, more parameters") in study.arms:
        assert max(scorers.values()) <= sizes[control] - sizes["dot"] <= 1.05 * max(scorers.values())


@pytest.mark.parametrize("path", sorted((RECIPES / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_are_studies_of_recipes(path):
    study = Study.load(path)
    assert (RECIPES / study.recipe).exists() and (RECIPES / study.config).exists() and len(study.seeds) >= 3
    names = [file_name(arm, seed) for arm, seed in study.runs()]
    assert len(set(names)) == len(names)
