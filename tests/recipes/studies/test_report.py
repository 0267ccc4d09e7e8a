"""A report says what the files of a study's runs say, and refuses runs that cannot be compared."""

import json

import pytest
from matplotlib.figure import Figure

from studies.report import CARD, report, summary
from studies.results import adopt_runs, compared_with, difference, interval, is_same, load_results, summarize, verdict
from studies.score_pictures import first_layer, points
from studies.shape_pictures import BENCHMARK, cost_of, error_of, head_dim, inside, pareto_front, shared_ending, write_names
from studies.study_file import COSTS, file_name
from tests.helpers.study_records import change_run, costs_of, make_study, record_of, write_results


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_run_that_diverged_is_said_and_is_not_the_best(tmp_path, value):
    study = make_study(choose_by="m")
    write_results(study, tmp_path, {"dot": [1.0, 2.0, 3.0], "first layer": [0.5, value, 2.6]})
    text = report(study, tmp_path)
    assert "Runs that diverged, by their figures: 1 of 3 of `first layer`." in text
    assert "**dot**" in text and interval([1.0, value]) is None
    write_results(study, tmp_path, {"dot": [1.0, value, 3.0], "first layer": [0.5, 1.4, 2.6]})
    assert "**first layer**" in report(study, tmp_path)


def test_runs_are_adopted_where_they_are_the_same(tmp_path):
    study = make_study()
    write_results(study, tmp_path / "other", {"dot": [1.0], "first layer": [2.0], "longer": [3.0]})
    # takes what an arm asks for, whatever it is called; how many steps "longer" makes hangs on times
    twice = ["first-layer-0.json", "unfinished-0.json"]
    assert adopt_runs(study, [tmp_path / "other"], tmp_path / "own") == ["dot-0.json", *twice]
    record = record_of(study, "dot", 0, 1.0) | {"recipe": "recall.py"}
    (tmp_path / "other" / "dot-0.json").write_text(json.dumps(record))
    assert adopt_runs(study, [tmp_path / "other"], tmp_path / "another") == twice


def test_figures_by_hand(tmp_path):
    study = make_study()
    write_results(study, tmp_path, {"dot": [1.0, 2.0, 3.0], "first layer": [0.5, 1.4, 2.6]})
    text = report(study, tmp_path)
    rows = {row["arm"]: row for row in summarize(study, load_results(study, tmp_path), costs_of(study))}
    row = rows["first layer"]
    assert row["mean"] == pytest.approx(1.5) and row["difference"] == pytest.approx(-0.5) and row["seeds"] == 3
    # computes by hand: differences -0.5, -0.6, -0.4 have standard deviation 0.1, and t is 4.303
    assert (row["low"], row["high"]) == pytest.approx((-0.5 - 4.303 * 0.1 / 3**0.5, -0.5 + 4.303 * 0.1 / 3**0.5), abs=1e-3)
    assert verdict(study, row) == "better" and verdict(make_study(lower_is_better=False), row) == "worse"
    assert verdict(study, {**row, "high": 0.1}) == "no difference shown" and verdict(study, rows["dot"]) == ""
    assert row["pairs"] == 3 and verdict(study, {**row, "pairs": 2}) == ""
    assert row["seconds_per_step"] == 3.0 and row["relative_time"] == 1.5 and "unfinished" not in rows
    assert row["relative_training_time"] == 1.5
    assert (row["v"], row["w"]) == (pytest.approx(2.5), 7.0) and rows["dot"]["scorers"] == 0
    assert (row["scorers"], row["dead_at_start"], row["dead_at_end"], row["score_std"]) == (24, 3, 6, 0.5)
    assert "| first layer | 3 | 1.500 | 1.054 | -0.500 | -0.748 to -0.252 | better |  | 2.500 | 7.000 |" in text
    assert ": **first layer** (2.500); its `m` is 1.500." in text
    assert "| 3.000 | 1.50 (1.40 to 1.60) | 1.50 | 1 | 3 of 24 | 6 of 24 | 0.50 |" in text
    assert "Neural arms beside every" not in text and "The runs are of commits that were not recorded." in text


def test_a_report_names_the_code_of_its_runs(tmp_path):
    study = make_study()
    write_results(study, tmp_path, {"dot": [1.0, 2.0, 3.0]})
    for seed, commit in enumerate(("b2+", "a1", None)):
        path = tmp_path / file_name("dot", seed)
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"environment": record["environment"] | {"commit": commit}}))
    assert "The runs are of commits `a1`, `b2+` and commits that were not recorded." in report(study, tmp_path)


def test_runs_of_before_and_of_now_are_compared_and_other_data_are_not(tmp_path):
    """Held-out images are drawn by the seed, and records of before say neither them nor the same arguments."""
    study = make_study()
    write_results(study, tmp_path, {"dot": [1.0, 2.0, 3.0], "first layer": [0.5, 1.4]})
    paths = {(arm, seed): tmp_path / file_name(arm, seed) for arm in ("dot", "first layer") for seed in (0, 1)}
    change_run(paths["dot", 0], do_eval=False, do_train=False)
    for (arm, seed), path in paths.items():
        if (arm, seed) != ("dot", 0):
            change_run(path, images=f"of seed {seed}")
    assert len(load_results(study, tmp_path)["dot"]) == 3
    change_run(paths["first layer", 1], images="others")
    with pytest.raises(SystemExit, match=r"with images 'others', dot-1\.json of one with 'of seed 1': they cannot"):
        load_results(study, tmp_path)


def test_error_against_cost(tmp_path):
    network = {"attention": "neural", "neural_proj_dim": 8}
    arms = {"dot": {"attention": "dot"}, "first layer": network, "longer": {"attention": "dot", "score_spread": 0.0}}
    study = make_study(shapes=True, arms=arms)
    write_results(study, tmp_path, {"dot": [0.4], "first layer": [0.3], "longer": [0.5]})
    for path in tmp_path.glob("*-0.json"):
        change_run(path, hidden_size=128, num_attention_heads=2, max_steps=10)
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"settings": study.settings(record["arm"])}))
    assert "![Error against cost](shapes.png)" in report(study, tmp_path)
    assert (tmp_path / "shapes.png").stat().st_size > 5_000
    assert cost_of(arms["dot"], 32) == {"pair": 32, "key": 128} and cost_of(arms["longer"], 32) == {"pair": 0, "key": 0}
    assert cost_of(network, 32) == {"pair": 8 + 16 + 4, "key": 32}
    assert cost_of({**network, "neural_hidden_dims": "paper"}, 32) == {"pair": 8 + 32 + 8, "key": 32}
    assert cost_of({**network, "neural_hidden_dims": [16, 2]}, 32) == {"pair": 16 + 32 + 4, "key": 64}
    assert cost_of({**network, "neural_mode": "thin"}, 32) == {"pair": 8, "key": 32}
    assert cost_of({**network, "neural_mode": "residual"}, 32) == {"pair": 28 + 32, "key": 32 + 128}
    run = {"n_embd": 192, "n_head": 3}
    records = ({"run": run}, {"run": run, "config": {"n_head": 6}}, {"run": run, "config": {"head_dim": 16}})
    assert [head_dim(record) for record in records] == [64, 32, 16]
    # has been timed with heads of 64, and networks alone
    rows = json.loads(BENCHMARK.read_text())["rows"]
    (ratio,) = (row["to_sdpa"] for row in rows if (row["phase"], row["shape"]) == ("both", "8x2"))
    assert cost_of(network, 64)["attention"] == ratio and cost_of(arms["longer"], 64)["attention"] == 1.0
    assert "attention" not in cost_of({**network, "neural_mode": "thin"}, 64)
    assert pareto_front([(2, 1.0), (1, 3.0), (3, 2.0), (4, 0.5), (1, 4.0)]) == [(1, 3.0), (2, 1.0), (4, 0.5)]


def test_names_lie_on_no_other_name_or_point_nor_beyond_the_frame():
    figure = Figure(figsize=(5, 5))
    axis = figure.subplots()
    points = {"network 8": (1.0, 1.0), "network 16 to 2": (1.01, 1.01), "thin 2": (3.0, 1.0), "dot": (3.0, 3.0)}
    for point in points.values():
        axis.plot(*point, "o")
    figure.draw_without_rendering()
    write_names(axis, points)
    boxes = [text.get_window_extent() for text in axis.texts]
    assert [text.get_text() for text in axis.texts] == list(points)
    assert all(inside(axis.bbox, box) and box.count_overlaps(boxes) == 1 for box in boxes)
    assert not any(box.contains(*place) for box in boxes for place in axis.transData.transform(list(points.values())))


def test_arms_with_few_seeds_stand_where_their_differences_put_them():
    study = make_study()
    rows = [{"arm": "dot", "mean": 0.4, "difference": None}, {"arm": "first layer", "mean": 0.1, "difference": -0.1}]
    for lower_is_better, errors in ((True, (0.4, 0.3)), (False, (0.6, 0.7))):
        study.lower_is_better = lower_is_better
        assert tuple(error_of(study, 0.4, row) for row in rows) == pytest.approx(errors)


def test_arms_beside_no_baseline_or_at_another_rate_have_no_place(tmp_path, monkeypatch):
    drawn: list[str] = []
    dot = {"attention": "dot"}
    arms = {"dot": dot, "first layer": {"attention": "neural"}, "longer": dot, "faster": {**dot, "learning_rate": 1.0}}
    study = make_study(shapes=True, arms=arms)
    monkeypatch.setattr("studies.shape_pictures.write_names", lambda axis, points: drawn.extend(points))

    def write(figures):
        write_results(study, tmp_path, figures)
        for path in tmp_path.glob("*-*.json"):
            change_run(path, hidden_size=128, num_attention_heads=2, max_steps=10)

    write({"first layer": [0.3], "longer": [0.2]})
    report(study, tmp_path)
    assert not (tmp_path / "shapes.png").exists()
    write({"dot": [0.4], "first layer": [0.3, 0.3], "longer": [0.2], "faster": [0.1]})
    (tmp_path / "first-layer-0.json").unlink()
    report(study, tmp_path)
    assert set(drawn) == {"dot", "longer"}


def test_what_all_names_end_with_is_not_drawn():
    assert shared_ending(["dot, high rate", "thin 2, high rate"]) == ", high rate"
    assert shared_ending(["dot, high rate", "thin 2"]) == "" == shared_ending(["dot", "thin 2"])


def test_scores_that_were_watched_are_drawn(tmp_path):
    study = make_study()
    write_results(study, tmp_path, {"dot": [1.0, 2.0], "first layer": [0.5, 1.4]})
    report(study, tmp_path)
    assert not (tmp_path / "scores.png").exists()
    for path in tmp_path.glob("*-*.json"):
        record = json.loads(path.read_text())
        figures = {"saturated": 0.9, "entropy": 0.1, "gradient": 1e-3}
        record["score_statistics"] = {"start": [{"layer": "a.b", "spread": 9.0, **figures}], "end": []}
        watched = {f"scores/{layer}/{name}": value for layer in ("a.b", "a.c") for name, value in figures.items()}
        record["history"] = [entry | watched for entry in record["history"]]
        path.write_text(json.dumps(record))
    assert "![Scores of the first layer](scores.png)" in report(study, tmp_path)
    assert (tmp_path / "scores.png").stat().st_size > 5_000
    assert "of arms at the study's own rate" in (tmp_path / "report.md").read_text()
    study.pictured = ["dot"]
    assert "of the arms that the study pictures" in report(study, tmp_path)
    assert first_layer(record) == "a.b" and points(record, "saturated") == {0: 0.9, 5: 0.9, 10: 0.9}


def test_neural_arms_beside_the_other_dot_product_arms(tmp_path):
    study = make_study(note="Of a part.")
    write_results(study, tmp_path, {"dot": [1.0, 2.0, 3.0], "first layer": [0.5, 1.4, 2.6], "longer": [0.4, 1.4, 2.7]})
    text, found = report(study, tmp_path), load_results(study, tmp_path)
    rows = summarize(study, found, costs_of(study))
    assert difference(study, found, "first layer", "longer")["difference"] == pytest.approx(0.0)
    assert "| | dot | longer |" in text.replace("|  |", "| |") and "Of a part." in text
    assert "| first layer | **-0.500 (-0.748 to -0.252)** | " in text and "Of a part." in (tmp_path / f"{CARD}.md").read_text()
    short = summary(study, found, rows)
    assert "| to longer (95 %) |" in short and "| longer | 1.500 | -0.500 (" in short and short.endswith("| x 1.50 |")
    assert "*longer* 1.500, to which it is " in (tmp_path / f"{CARD}.md").read_text()


def test_a_report_is_made_of_files_alone(tmp_path):
    study = make_study()
    write_results(study, tmp_path, {"dot": [1.0, 2.0, 3.0], "first layer": [0.5, 1.4, 2.6]})
    report(study, tmp_path)
    names = ("report.md", "report.csv", "report.png", "curves.png", f"{CARD}.md")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    report(study, tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in names}
    card = before[f"{CARD}.md"].decode()
    # expects the best run by v, 0.5, and the baseline of its seed
    assert "| v | 1 | 0.5 | 0.500 |" in card and "sample of seed 0" in card and "*first layer*" in card
    assert "Digits" in card and "beside *dot* of that seed (over all seeds: better). Its `m` over 3 seeds is 1.500; " in card
    assert "*dot* 2.000, to which it is -0.500" in card
    assert "| seconds per step, whole, timed by turns | 2.000 | 3.000 | 1.500 |" in card and "Both models had" in card


def test_the_best_neural_run_stands_beside_the_dot_product_with_all_else_equal(tmp_path):
    arms = {"dot": {"attention": "dot"}, "first layer": {"attention": "neural", "neural_proj_dim": 4, "learning_rate": 1}}
    twin = arms | {"longer": {"attention": "dot", "learning_rate": 1}}
    for given, values in ((twin, {"longer": [1.9, 2.0, 2.1]}), (arms, {})):
        study = make_study(arms=given, also=[], flags={})
        folder = tmp_path / str(len(given))
        write_results(study, folder, {"dot": [1.0, 2.0, 3.0], "first layer": [0.5, 1.4, 2.6], **values})
        for path in folder.glob("first-layer-*.json"):
            change_run(path, learning_rate=1)
        for path in folder.glob("longer-*.json"):
            change_run(path, learning_rate=1, max_steps=10)
        report(study, folder)
        card = (folder / f"{CARD}.md").read_text()
        assert ("beside *longer* of that seed" in card and "| m | 1.9 | 0.5 |" in card) == (given is twin)
        assert ("Both models had" in card) == (given is twin) and ("nothing is compared" in card) == (given is arms)
        assert "*dot* 2.000, to which it is -0.500" in card
        found = load_results(study, folder)
        rows = summarize(study, found, costs_of(study))
        title = "the dot product with all else equal" if given is twin else "its counterpart (dot product)"
        assert compared_with(study, rows)[f"neural, less {title}"] == {"first layer": "longer" if given is twin else "dot"}
        assert ("| first layer | 1.500 | -0.500 (-2.870 to +1.870) |" in summary(study, found, rows)) == (given is twin)


def test_accuracies_are_written_in_percent_and_points(tmp_path):
    study = make_study(metric="test_accuracy", choose_by="test_accuracy", also=[], lower_is_better=False)
    write_results(study, tmp_path, {})
    for arm, figures in {"dot": [0.31, 0.32, 0.33], "first layer": [0.33, 0.35, 0.34]}.items():
        for seed, value in enumerate(figures):
            record = record_of(study, arm, seed, value) | {"metrics": {"test_accuracy": value}}
            (tmp_path / file_name(arm, seed)).write_text(json.dumps(record))
    text, found = report(study, tmp_path), load_results(study, tmp_path)
    assert "| first layer | 3 | 34.00 | 1.00 | +2.00 | -0.48 to +4.48 | no difference shown |  | 34.00 |" in text
    short = summary(study, found, summarize(study, found, costs_of(study)))
    assert "| Digits | `test_accuracy`, % |" in short and "| first layer | 34.00 | +2.00 (-0.48 to +4.48) |" in short


def test_results_of_another_study_are_refused(tmp_path):
    write_results(make_study(), tmp_path, {"dot": [1.0], "first layer": [2.0]})
    with pytest.raises(SystemExit, match=r"dot-0.json is of a run with .*'max_steps': 10.* now asks for .*'max_steps': 11"):
        report(make_study(flags={"max_steps": 11}), tmp_path)
    costs = costs_of(make_study())
    costs["settings"]["longer"]["same_time_as"] = "dot"
    (tmp_path / COSTS).write_text(json.dumps(costs))
    with pytest.raises(SystemExit, match=r"costs.json is not of the study n as it now is: run the study, or --time_only"):
        report(make_study(), tmp_path)
    write_results(make_study(metric="accuracy"), tmp_path, {})
    with pytest.raises(SystemExit, match=r"dot-0.json has no 'accuracy'; the study can have m, v, w\."):
        report(make_study(metric="accuracy"), tmp_path)


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    study = make_study()
    write_results(study, tmp_path, {"dot": [1.0], "first layer": [2.0], "longer": [1.0]})
    report(study, tmp_path)
    path = tmp_path / file_name("first layer", 0)
    change_run(path, learning_rate=0.2)
    with pytest.raises(
        SystemExit, match=r"first-layer-0.json is of a run with learning_rate 0.2, dot-0.json of one with 0.1: they cannot be"
    ):
        report(study, tmp_path)
    change_run(path, learning_rate=0.1, max_steps=9)
    with pytest.raises(
        SystemExit, match=r"first-layer-0.json is of a run with \{'max_steps': 9\}, for which the study does not"
    ):
        report(study, tmp_path)


def test_runs_of_arms_that_leave_a_setting_to_the_recipe_have_it_alike(tmp_path):
    # gives another arm that setting as its own
    arms = make_study().arms | {"unfinished": {"attention": "neural", "learning_rate": 3}}
    study = make_study(arms=arms)
    write_results(study, tmp_path, {"dot": [1.0, 1.0], "first layer": [2.0], "longer": [1.0, 1.0], "unfinished": [1.0]})
    change_run(tmp_path / "unfinished-0.json", learning_rate=3)
    report(study, tmp_path)
    change_run(tmp_path / "dot-1.json", learning_rate=3)
    with pytest.raises(SystemExit, match=r"dot-1.json is of a run with learning_rate 3, dot-0.json of one with 0.1"):
        report(study, tmp_path)
    change_run(tmp_path / "dot-1.json", learning_rate=0.1)
    change_run(tmp_path / "longer-1.json", max_steps=77)
    with pytest.raises(SystemExit, match=r"longer-1.json is of a run with max_steps 77, longer-0.json of one with 15"):
        report(study, tmp_path)


def test_words_of_a_command_line_are_what_was_asked_for():
    assert is_same(["0", "2"], [0, 2]) and is_same(["all"], "all") and is_same(0.0, 0) and is_same([16, 2], [16, 2])
    assert is_same(0.001, "1e-3") and is_same(["none"], []) and not is_same(True, "1.0") and not is_same("none", [])
    assert not is_same(["0"], [1]) and not is_same(["0"], [0, 1]) and not is_same(None, 0) and not is_same(0.1, 1)


def test_an_arm_with_fewer_seeds_is_not_the_best(tmp_path):
    study = make_study()
    write_results(study, tmp_path, {"dot": [1.0, 2.0], "first layer": [0.5]})
    text = report(study, tmp_path)
    assert "Best by `v`, of the arms with as many seeds as any other or with all of theirs: **dot**" in text


def test_the_best_arm_is_not_so_by_the_luck_of_its_seeds(tmp_path):
    arms = {"dot": {"attention": "dot"}, "first layer": {"attention": "neural", "seeds": 2}}
    study = make_study(arms=arms, choose_by="m", also=[])
    write_results(study, tmp_path, {"dot": [1.0, 2.0, 9.0], "first layer": [1.1, 2.1]})
    text = report(study, tmp_path)
    assert "theirs: **dot** (4.000)" in text and "| first layer | 2 | 1.600 |" in text
    card = (tmp_path / f"{CARD}.md").read_text()
    assert "*dot* 4.000, to which it is +0.100, of 2 seed(s) that both have" in card


def test_arms_say_of_how_many_pairs_a_difference_is(tmp_path):
    study = make_study()
    write_results(study, tmp_path, {"dot": [1.0, 2.0], "first layer": [0.5, 1.0, 9.0]})
    assert "| first layer | 3 (2 in pairs) | 3.500 |" in report(study, tmp_path)


def test_pairs_are_of_the_same_seed(tmp_path):
    study = make_study()
    write_results(study, tmp_path, {"dot": [1.0], "first layer": [2.0, 9.0]})
    rows = summarize(study, load_results(study, tmp_path), costs_of(study))
    assert rows[1]["difference"] == 1.0 and rows[1]["low"] is None and rows[1]["mean"] == 5.5
    assert interval([1.0]) is None
