"""The study script: runs that are kept and not run again, and reports that are those of the committed runs."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import study as script
from studies.report import CARD, summary
from studies.results import adopt_runs, load_results, summarize
from studies.study_file import COSTS, Study, file_name, is_timed, load_costs
from tests.helpers.running import RECIPES, run_in
from tests.helpers.study_records import make_study, record_of, write_results


STUDIES = RECIPES.parent / "model_cards/studies"


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
    study = make_study(
        config="configs/cifar10-small.yaml", arms={"dot": {"attention": "dot"}, "b": {"attention": "neural", **arm}}
    )
    with pytest.raises(SystemExit, match=message):
        script.check_words(study, more)


def test_arms_that_come_later_are_timed_beside_the_baseline_alone(tmp_path, monkeypatch):
    study, timed = make_study(seeds=[0]), []
    experiment = SimpleNamespace(training=SimpleNamespace(should_save=True))
    recipe = SimpleNamespace(load_experiment=lambda words: (experiment, SimpleNamespace(metrics=["m", "v", "w"]), None))

    def time(steps: dict, turns: int) -> dict:
        timed.append(list(steps))
        return {arm: [seconds_of[arm], seconds_of[arm]] for arm in steps}

    where = dict.fromkeys((*script.OF_TIMES, "commit"), "x")
    monkeypatch.setattr(script, "import_module", lambda name: recipe)
    monkeypatch.setattr(script, "training_step", lambda *_, **__: None)
    monkeypatch.setattr(script, "time_by_turns", time)
    monkeypatch.setattr(script, "environment", lambda: dict(where))

    def costs_after() -> dict:
        script.time_arms(study, tmp_path, [])
        return load_costs(tmp_path)

    seconds_of = {"dot": 2.0, "first layer": 3.0, "unfinished": 3.0, "wide": 8.0}
    first = costs_after()
    assert timed.pop() == ["dot", "first layer"] and first["later"] == []
    assert first["seconds_per_step"] == {"dot": 2.0, "first layer": 3.0, "longer": 2.0, "unfinished": 3.0}

    # is twice as slow this day: the arm takes 4 times as long as the baseline, and so it did
    seconds_of["dot"] = 4.0
    seconds_of["wide"] = 16.0
    study.arms = {"wide": {"attention": "dot", "weight_decay": 1.0}, **study.arms}
    costs = costs_after()
    assert timed.pop() == ["dot", "wide"] and costs["later"] == ["wide"] and is_timed(study, costs)
    assert costs["seconds_per_step"] == {"wide": 8.0, **first["seconds_per_step"]}
    assert costs["ratios"]["wide"] == [4.0] * 3 and costs["quartiles"]["wide"] == [8.0, 8.0]
    assert costs["ratios"]["first layer"] == first["ratios"]["first layer"] and costs["steps"] == first["steps"]
    assert list(costs["ratios"]) == list(study.arms)

    # times all anew where all are known, or on another machine
    assert costs_after()["later"] == [] and timed.pop() == ["dot", "wide", "first layer"]
    study.arms["wider"] = {"attention": "dot", "weight_decay": 2.0}
    seconds_of["wider"], where["cpu"] = 9.0, "another"
    assert costs_after()["later"] == [] and timed.pop() == ["dot", "wide", "first layer", "wider"]


def test_a_study_that_is_stopped_goes_on_with_what_is_missing(tmp_path, monkeypatch, capsys):
    study, started = make_study(config="configs/cifar10-small.yaml", seeds=[0, 1]), []
    del study.arms["unfinished"]
    (tmp_path / "n.yaml").write_text(json.dumps({name: value for name, value in vars(study).items() if name != "name"}))
    write_results(study, tmp_path / "results", {})

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


def test_runs_of_another_study_are_adopted_where_they_are_the_same(tmp_path):
    other, study = make_study(seeds=[0, 1]), make_study(name="later", seeds=[0])
    write_results(other, tmp_path / "other", {"dot": [1.0, 2.0], "first layer": [3.0, 4.0]})
    study.arms = {"stock": study.arms["dot"], "faster": {**study.arms["first layer"], "learning_rate": 0.5}}
    assert adopt_runs(study, [tmp_path / "other"], tmp_path / "results") == ["stock-0.json"]
    record = json.loads((tmp_path / "results/stock-0.json").read_text())
    assert (record["study"], record["arm"], record["adopted_from"]) == ("later", "stock", other.name)
    assert record["metrics"] == record_of(other, "dot", 0, 1.0)["metrics"]
    assert adopt_runs(study, [tmp_path / "other"], tmp_path / "results") == []  # keeps what is there
    with pytest.raises(SystemExit, match="empty has no finished run of a study"):
        adopt_runs(study, [tmp_path / "empty"], tmp_path / "results")


def write_tiny_study(folder: Path, neural: dict[str, Any]) -> Path:
    flags = {"n_embd": 16, "n_layer": 1, "n_head": 1, "vocab_size": 300, "block_size": 32, "max_train_samples": 8}
    flags |= {"use_cpu": True, "max_eval_tokens": 100, "max_steps": 2, "save_steps": 2, "disable_tqdm": True}
    arms = {"dot": {"attention": "dot"}, "neural 2": {"attention": "neural", "scorer_weight_decay": 0.0, **neural}}
    arms["dot, longer"] = {"attention": "dot", "same_time_as": "neural 2"}
    content = {"recipe": "language_modeling.py", "config": "configs/quickstart.yaml", "seeds": [0], "baseline": "dot"}
    content |= {"dataset": "Python's reference", "metric": "test_perplexity_stride", "flags": flags, "arms": arms}
    content["choose_by"] = "validation_perplexity_stride"
    (folder / "s.yaml").write_text(json.dumps(content))
    return folder / "s.yaml"


# Starts several processes one after the other, each of which imports the libraries: on a machine that is busy, for minutes
MINUTES = 25
patient = pytest.mark.timeout(60 * MINUTES + 60)


@pytest.mark.slow
@patient
def test_a_study_runs(tmp_path):
    arms = Study.load(write_tiny_study(tmp_path, {})).arms
    said = run_in(tmp_path, "study.py", "s.yaml", "--results", "results", limit=60 * MINUTES)
    assert "| neural 2 | 1 |" in said and len(list((tmp_path / "results").glob("*-*.json"))) == 3
    costs = load_costs(tmp_path / "results")
    seconds, ratio = costs["seconds_per_step"], costs["ratios"]["neural 2"][1]
    assert seconds.keys() == arms.keys() and min(seconds.values()) > 0 and seconds["dot"] == seconds["dot, longer"]
    longer = json.loads((tmp_path / "results" / file_name("dot, longer", 0)).read_text())
    assert longer["steps"] == costs["steps"]["dot, longer"] == max(1, round(2 * ratio))
    before = (tmp_path / "results/report.md").read_text()
    run_in(tmp_path, "study.py", "s.yaml", "--results", "results", "--report_only")
    assert (tmp_path / "results/report.md").read_text() == before
    said = run_in(tmp_path, "study.py", "s.yaml", "--results", "results", "--report_only", "--page", "a.md", fails=True)
    assert "--report_only runs nothing, for which --page a.md would be" in said
    # refuses to compare runs of one process with one of two
    path = tmp_path / "results" / file_name("neural 2", 0)
    record = json.loads(path.read_text())
    record["run"]["processes"] = 2
    path.write_text(json.dumps(record))
    said = run_in(tmp_path, "study.py", "s.yaml", "--results", "results", "--report_only", fails=True)
    assert "neural-2-0.json is of a run with processes 2, dot-0.json of one with 1: they cannot be compared" in said


@pytest.mark.slow
@patient
def test_a_compact_arm_runs_in_two_processes(tmp_path):
    """A changed study is timed again, but keeps steps that were settled."""
    study = Study.load(write_tiny_study(tmp_path, {"neural_layers": "all", "neural_compact": True}))
    settled = {"steps": {"dot, longer": 77}, "settings": {arm: study.settings(arm) for arm in study.arms if arm != "dot"}}
    (tmp_path / "spread").mkdir()
    (tmp_path / "spread" / COSTS).write_text(json.dumps(settled))
    # takes a free port, since others on this machine may have the usual one
    two = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"
    flags = ("--arms", "neural 2", "--runs", "more", "--launcher", two, "--ddp_backend", "gloo")
    said = run_in(tmp_path, "study.py", "s.yaml", "--results", "spread", *flags, limit=60 * MINUTES)
    assert "neural: training from the start" in said and "dot, seed" not in said and "longer, seed" not in said
    costs = load_costs(tmp_path / "spread")
    assert costs["steps"] == settled["steps"] and costs["seconds_per_step"].keys() == study.arms.keys()
    record = json.loads((tmp_path / "spread" / file_name("neural 2", 0)).read_text())
    assert record["training_memory"] > 2**16 and record["environment"]["processes"] == 2
    assert record["settings"]["scorer_weight_decay"] == 0.0 and record["run"]["neural_compact"] is True
    assert record["environment"]["torch"] and record["scorer_health"]["end"][0]["scorers"] == 1


def committed_studies() -> list[Path]:
    """Study files of which runs are in the repository."""
    return [path for path in sorted((RECIPES / "studies").glob("*.yaml")) if (results_of(path) / COSTS).exists()]


def results_of(path: Path) -> Path:
    return STUDIES / path.stem.removesuffix("-small")


@pytest.mark.parametrize("path", committed_studies(), ids=lambda path: path.stem)  # skips while none is complete
def test_committed_reports_are_those_of_the_committed_runs(path, tmp_path, monkeypatch):
    folder = results_of(path)
    copy = tmp_path / folder.name
    copy.mkdir()
    for file in folder.glob("*.json"):
        shutil.copy(file, copy)
    study = Study.load(path)
    # checks that all are of the study; some of its runs may be still to come
    assert {file.name for file in copy.iterdir()} <= {COSTS, *(file_name(arm, seed) for arm, seed in study.runs())}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study.py", str(path), "--results", copy.name, "--report_only"])
    script.main()
    for name in ("report.md", "report.csv", f"{CARD}.md"):
        assert (copy / name).read_text() == (folder / name).read_text()
    found = load_results(study, folder)
    rows = summarize(study, found, load_costs(folder))
    pages = (RECIPES.parent / "docs").glob("**/*.md")
    assert any(summary(study, found, rows) in page.read_text() for page in pages)
    for name in ("report.png", "curves.png"):
        assert (copy / name).stat().st_size > 10_000 and (folder / name).exists()
    # checks that the control has as many parameters as the largest scorers bring, and not many more
    sizes, scorers = ({row["arm"]: row[name] for row in rows} for name in ("parameters", "scorer_parameters"))
    if (control := "dot, more parameters") in study.arms:
        assert max(scorers.values()) <= sizes[control] - sizes["dot"] <= 1.05 * max(scorers.values())
