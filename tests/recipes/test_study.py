"""Studies: runs that are kept and not run again, and a report that is made of their files alone."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from running import RECIPES, run_in

from study import steps_of_same_time
from study_file import COSTS, Study, file_name, load_costs
from study_report import CARD, interval, load_results, report, summarize, summary, verdict


CARDS = RECIPES.parent / "model_cards"
SECONDS = {"dot": 2.0, "first layer": 3.0, "longer": 2.0, "unfinished": 1.0}


def make(**fields: Any) -> Study:
    arms = {name: {"attention": "dot" if name in ("dot", "longer") else "neural"} for name in SECONDS}
    arms["longer"]["same_time_as"] = "first layer"
    given = {"name": "n", "recipe": "image_classification.py", "config": "c", "seeds": [0, 1, 2], "baseline": "dot"}
    given |= {"dataset": "Digits", "metric": "m", "choose_by": "v", "also": ["w"], "arms": arms, "flags": {"max_steps": 10}}
    return Study(**{**given, **fields})


def results(study: Study, folder, values: dict[str, list[float]]) -> None:
    folder.mkdir(exist_ok=True)
    where = dict.fromkeys(("cpu", "gpu", "threads", "python", "torch", "transformers"), "x") | {"processes": 1}
    (folder / COSTS).write_text(json.dumps({"seconds_per_step": SECONDS, "environment": where}))
    for arm, figures in values.items():
        neural = study.arms[arm]["attention"] == "neural"
        for seed, value in enumerate(figures):
            alive = {"layer": "a", "scorers": 4, "dead": 0, "score_std": 0.5}
            health = {"start": [{**alive, "dead": 1}, alive], "end": [{**alive, "dead": 2}, alive]}
            record = {"metrics": {"m": value, "v": value + seed, "w": 7.0}, "parameters": 10, "scorer_parameters": 2 * neural}
            record |= {"scorer_health": health if neural else {"start": [], "end": []}, "steps": 10, "epochs": 1.0}
            record |= {
                "training_memory": 2**20,
                "settings": study.settings(arm),
                "environment": where,
                "history": [{"step": 5, "loss": value}, {"step": 10, "loss": value - 0.1}],
            }
            record |= {"train_seconds": 60.0, "config": {"a": 1}, "sample": f"sample of seed {seed}"}
            (folder / file_name(arm, seed)).write_text(json.dumps(record))


def test_figures_by_hand(tmp_path):
    study = make()
    results(study, tmp_path, {"dot": [1.0, 2.0, 3.0], "first layer": [0.5, 1.4, 2.6]})
    text = report(study, tmp_path)
    rows = {row["arm"]: row for row in summarize(study, load_results(study, tmp_path), SECONDS)}
    row = rows["first layer"]
    assert row["mean"] == pytest.approx(1.5) and row["difference"] == pytest.approx(-0.5) and row["seeds"] == 3
    # differences -0.5, -0.6, -0.4: standard deviation 0.1, t 4.303
    assert (row["low"], row["high"]) == pytest.approx((-0.5 - 4.303 * 0.1 / 3**0.5, -0.5 + 4.303 * 0.1 / 3**0.5), abs=1e-3)
    assert verdict(study, row) == "better" and verdict(make(lower_is_better=False), row) == "worse"
    assert verdict(study, {**row, "high": 0.1}) == "no difference shown" and verdict(study, rows["dot"]) == ""
    assert row["seconds_per_step"] == 3.0 and row["relative_time"] == 1.5 and "unfinished" not in rows
    assert (row["v"], row["w"]) == (pytest.approx(2.5), 7.0) and rows["dot"]["scorers"] == 0
    assert (row["scorers"], row["dead_at_start"], row["dead_at_end"], row["score_std"]) == (24, 3, 6, 0.5)
    assert "| first layer | 3 | 1.5 |" in text and "| -0.5 |" in text and "Best by `v`: **first layer** (2.5)" in text
    assert "| 3.000 | 1.50 | 1.50 | 1 | 3 of 24 | 6 of 24 | 0.50 |" in text


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
    assert "Digits" in card and "is 1.5 (better, beside *dot*)" in card and "*dot* 2 (3 seeds)" in card


def test_as_many_steps_as_take_the_same_time(tmp_path):
    study = make()
    assert steps_of_same_time(study, SECONDS) == {"longer": 15}
    words = study.words("longer", 15)
    assert words[1:3] == ["--max_steps", "15"] and "same_time_as" not in " ".join(words)
    assert study.timed_as("longer") == "dot" and study.timed_as("first layer") == "first layer"
    # the second is the first with another optimiser for its scorers
    assert make(arms={**study.arms, "b": {"attention": "neural", "scorer_weight_decay": 0.0}}).timed_as("b") == "first layer"


def test_results_of_another_study_are_refused(tmp_path):
    results(make(), tmp_path, {"dot": [1.0], "first layer": [2.0]})
    with pytest.raises(SystemExit, match=r"dot-0.json is of a run with .*'max_steps': 10.* now asks for .*'max_steps': 11"):
        report(make(flags={"max_steps": 11}), tmp_path)
    (tmp_path / COSTS).unlink()
    with pytest.raises(SystemExit, match=r"costs.json has not the arms of the study n: run the study, or --time_only"):
        report(make(), tmp_path)


def test_an_arm_with_fewer_seeds_is_not_the_best(tmp_path):
    study = make()
    results(study, tmp_path, {"dot": [1.0, 2.0], "first layer": [0.5]})
    assert "Best by `v`: **dot**" in report(study, tmp_path)


def test_pairs_are_of_the_same_seed(tmp_path):
    study = make()
    results(study, tmp_path, {"dot": [1.0], "first layer": [2.0, 9.0]})
    rows = summarize(study, load_results(study, tmp_path), SECONDS)
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
    with pytest.raises(SystemExit, match="baseline 'a' is none of the arms"):
        Study.load(path)
    path.write_text(f"{{{given}, arms: }}".replace("recipe: language_modeling.py", "recipe: quantize.py"))
    with pytest.raises(SystemExit, match=r"the recipe is 'quantize\.py'; expected language_modeling\.py or"):
        Study.load(path)
    with pytest.raises(SystemExit, match="no finished run"):
        report(make(), tmp_path)


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
    seconds = costs["seconds_per_step"]
    assert seconds.keys() == arms.keys() and min(seconds.values()) > 0 and seconds["dot"] == seconds["dot, longer"]
    longer = json.loads((tmp_path / "results" / file_name("dot, longer", 0)).read_text())
    assert longer["steps"] == costs["steps"]["dot, longer"] == round(2 * seconds["neural 2"] / seconds["dot"])
    # what is missing is run again, here by two processes, and only what is missing
    (tmp_path / "results" / file_name("neural 2", 0)).unlink()
    # a study that has got an arm since is timed again, and steps that runs have had stay
    for arm in ("seconds_per_step", "steps"):
        costs[arm] = {"dot, longer": 77} if arm == "steps" else {"dot": 1.0}
    (tmp_path / "results" / COSTS).write_text(json.dumps(costs))
    shutil.rmtree(tmp_path / "runs/studies/s/neural-2-0")
    two = f"{sys.executable} -m torch.distributed.run --nproc_per_node 2"
    said = run_in(tmp_path, "study.py", "s.yaml", "--results", "results", "--launcher", two, "--ddp_backend", "gloo")
    assert "neural: training from the start" in said and "dot, seed" not in said and "longer, seed" not in said
    assert load_costs(tmp_path / "results")["steps"] == {"dot, longer": 77}
    record = json.loads((tmp_path / "results" / file_name("neural 2", 0)).read_text())
    assert record["training_memory"] > 2**16 and record["environment"]["processes"] == 2
    assert record["settings"]["scorer_weight_decay"] == 0.0
    assert record["environment"]["torch"] and record["scorer_health"]["end"][0]["scorers"] == 1
    before = (tmp_path / "results/report.md").read_text()
    run_in(tmp_path, "study.py", "s.yaml", "--results", "results", "--report_only")
    assert (tmp_path / "results/report.md").read_text() == before


def committed_studies() -> list[Path]:
    """Study files of which every run is in the repository."""

    def complete(path: Path) -> bool:
        return all((CARDS / results_of(path) / file_name(arm, seed)).exists() for arm, seed in Study.load(path).runs())

    return [path for path in sorted((RECIPES / "studies").glob("*.yaml")) if complete(path)]


def results_of(path: Path) -> str:
    return f"study-{path.stem.removesuffix('-small')}"


@pytest.mark.parametrize("path", committed_studies(), ids=lambda path: path.stem)  # skipped while none is complete
def test_committed_reports_are_those_of_the_committed_runs(path, tmp_path):
    folder = CARDS / results_of(path)
    copy = tmp_path / folder.name
    copy.mkdir()
    for file in folder.glob("*.json"):
        shutil.copy(file, copy)
    study = Study.load(path)
    assert {file.name for file in copy.iterdir()} == {COSTS, *(file_name(arm, seed) for arm, seed in study.runs())}
    run_in(tmp_path, "study.py", str(path), "--results", copy.name, "--report_only")
    for name in ("report.md", "report.csv", f"{CARD}.md"):
        assert (copy / name).read_text() == (folder / name).read_text()
    rows = summarize(study, load_results(study, folder), load_costs(folder)["seconds_per_step"])
    assert summary(study, rows) in (CARDS.parent / "README.md").read_text()
    for name in ("report.png", "curves.png"):
        assert (copy / name).stat().st_size > 10_000 and (folder / name).exists()
    # the control has as many parameters as the largest scorers bring, and not many more
    found = load_results(study, folder)
    sizes = {arm: next(iter(runs.values()))["parameters"] for arm, runs in found.items()}
    scorers = max(next(iter(runs.values()))["scorer_parameters"] for runs in found.values())
    assert scorers <= sizes["dot, more parameters"] - sizes["dot"] <= 1.05 * scorers


@pytest.mark.parametrize("path", sorted((RECIPES / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_are_studies_of_recipes(path):
    study = Study.load(path)
    assert (RECIPES / study.recipe).exists() and (RECIPES / study.config).exists() and len(study.seeds) >= 3
    names = [file_name(arm, seed) for arm, seed in study.runs()]
    assert len(set(names)) == len(names)
