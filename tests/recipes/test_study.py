"""Studies: runs that are kept and not run again, and a report that is made of their files alone."""

import json
from typing import Any

import pytest
from running import RECIPES, run_in

from study import Study, file_name, interval, load_results, report, summarize, verdict


def make(**fields: Any) -> Study:
    arms = {"dot": {"attention": "dot"}, "first layer": {"attention": "neural"}, "unfinished": {"attention": "neural"}}
    given = {"name": "n", "recipe": "r.py", "config": "c", "seeds": [0, 1, 2], "baseline": "dot", "metric": "m", "arms": arms}
    return Study(**{**given, "flags": {}, **fields})


def results(study: Study, folder, values: dict[str, list[float]]) -> None:
    folder.mkdir(exist_ok=True)
    for arm, figures in values.items():
        for seed, value in enumerate(figures):
            record = {"metrics": {"m": value}, "parameters": 10, "scorer_parameters": 2, "seconds_per_step": 0.5 + seed}
            (folder / file_name(arm, seed)).write_text(json.dumps({**record, "peak_memory": 2**20}))


def test_figures_by_hand(tmp_path):
    study = make()
    results(study, tmp_path, {"dot": [1.0, 2.0, 3.0], "first layer": [0.5, 1.4, 2.6]})
    text = report(study, tmp_path)
    rows = {row["arm"]: row for row in summarize(study, load_results(study, tmp_path))}
    row = rows["first layer"]
    assert row["mean"] == pytest.approx(1.5) and row["difference"] == pytest.approx(-0.5) and row["seeds"] == 3
    # differences -0.5, -0.6, -0.4: standard deviation 0.1, t 4.303
    assert (row["low"], row["high"]) == pytest.approx((-0.5 - 4.303 * 0.1 / 3**0.5, -0.5 + 4.303 * 0.1 / 3**0.5), abs=1e-3)
    assert verdict(study, row) == "better" and verdict(make(lower_is_better=False), row) == "worse"
    assert verdict(study, {**row, "high": 0.1}) == "no difference shown" and verdict(study, rows["dot"]) == ""
    assert row["seconds_per_step"] == 1.5 and "unfinished" not in rows
    assert "| first layer | 3 | 1.5 |" in text and "| -0.5 |" in text
    assert {path.name for path in tmp_path.iterdir()} >= {"report.md", "report.csv", "report.png"}
    before = (tmp_path / "report.md").read_text(), (tmp_path / "report.csv").read_text()
    report(study, tmp_path)
    assert before == ((tmp_path / "report.md").read_text(), (tmp_path / "report.csv").read_text())


def test_pairs_are_of_the_same_seed(tmp_path):
    study = make()
    results(study, tmp_path, {"dot": [1.0], "first layer": [2.0, 9.0]})
    rows = summarize(study, load_results(study, tmp_path))
    assert rows[1]["difference"] == 1.0 and rows[1]["low"] is None and rows[1]["mean"] == 5.5
    assert interval([1.0]) is None


def test_studies_that_are_none(tmp_path):
    path = tmp_path / "s.yaml"
    with pytest.raises(SystemExit, match="is no study"):
        Study.load(path)
    path.write_text("recipe: x\ncolour: blue")
    with pytest.raises(SystemExit, match=r"is no study.*colour"):
        Study.load(path)
    path.write_text("{recipe: x, config: y, seeds: [0], baseline: a, metric: m, arms: {b: {}}}")
    with pytest.raises(SystemExit, match="baseline 'a' is none of the arms, b"):
        Study.load(path)
    with pytest.raises(SystemExit, match="no finished run"):
        report(make(), tmp_path)


@pytest.mark.slow
def test_a_study_runs_and_goes_on(tmp_path):
    flags = {"n_embd": 16, "n_layer": 1, "n_head": 1, "vocab_size": 300, "block_size": 32, "max_train_samples": 8}
    flags |= {"max_eval_tokens": 100, "max_steps": 2, "save_steps": 2, "disable_tqdm": True, "eval_strategy": "no"}
    arms = {"dot": {"attention": "dot"}, "neural 2": {"attention": "neural", "scorer_weight_decay": 0.0}}
    content = {"recipe": "language_modeling.py", "config": "configs/quickstart.yaml", "seeds": [0, 1], "baseline": "dot"}
    (tmp_path / "s.yaml").write_text(json.dumps({**content, "metric": "test_perplexity_stride", "flags": flags, "arms": arms}))
    said = run_in(tmp_path, "study.py", "s.yaml", "--results", "results")
    assert "| neural 2 | 2 |" in said and len(list((tmp_path / "results").glob("*.json"))) == 4
    (tmp_path / "results" / file_name("neural 2", 1)).unlink()
    said = run_in(tmp_path, "study.py", "s.yaml", "--results", "results")
    assert "neural: finished before" in said and "dot, seed" not in said
    record = json.loads((tmp_path / "results" / file_name("neural 2", 1)).read_text())
    assert record["peak_memory"] > 2**20 and record["settings"]["scorer_weight_decay"] == 0.0
    assert record["environment"]["torch"]
    before = (tmp_path / "results/report.md").read_text()
    run_in(tmp_path, "study.py", "s.yaml", "--results", "results", "--report_only")
    assert (tmp_path / "results/report.md").read_text() == before


@pytest.mark.parametrize("path", sorted((RECIPES / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_are_studies_of_recipes(path):
    study = Study.load(path)
    assert (RECIPES / study.recipe).exists() and (RECIPES / study.config).exists() and len(study.seeds) >= 3
    names = [file_name(arm, seed) for arm, seed in study.runs()]
    assert len(set(names)) == len(names)
