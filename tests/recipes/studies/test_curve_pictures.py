"""A figure as a curve: which arms are one, where they stand, and what is drawn of them."""

import json

import pytest
from matplotlib.axes import Axes

from studies.curve_pictures import NUMBERS, SPREAD, Point, curves_of, has_curves, panels_of
from studies.report import report
from studies.results import load_results
from studies.study_file import file_name
from tests.helpers.study_records import make_study, write_results


DOT = {"attention": "dot"}
THIN = {"attention": "neural", "neural_mode": "thin"}
NETWORK = {"attention": "neural"}
STARTS = {
    "dot": DOT,
    "uniform": {**DOT, "score_spread": 0.0},
    "dot, spread 1": {**DOT, "score_spread": 1.0},
    "network 16, spread 2": {**NETWORK, "neural_proj_dim": 16, "score_spread": 2.0},
    "network 16": {**NETWORK, "neural_proj_dim": 16},
    "network 16, spread 1": {**NETWORK, "neural_proj_dim": 16, "score_spread": 1.0},
    "dot, twice the rate": {**DOT, "learning_rate": 0.2},
    "network 16, spread 4": {**NETWORK, "neural_proj_dim": 16, "score_spread": 4.0},
}
FEW = {
    "dot": DOT,
    "thin 2": {**THIN, "neural_proj_dim": 2},
    "thin 16": {**THIN, "neural_proj_dim": 16},
    "last, thin 2": {**THIN, "neural_proj_dim": 2, "neural_layers": [1]},
    "network 8 to 2": {**NETWORK, "neural_proj_dim": 8, "neural_hidden_dims": [8, 2]},
    "network 2 to 2": {**NETWORK, "neural_proj_dim": 2, "neural_hidden_dims": [2, 2]},
    "network 2": {**NETWORK, "neural_proj_dim": 2, "neural_hidden_dims": [2, 1]},
}


def with_starts(folder, spreads):
    """Records what scores of a new model of each arm spread by, in two layers whose mean it is."""
    for arm, spread in spreads.items():
        for path in folder.glob(file_name(arm, 0).replace("-0.json", "-[0-9].json")):
            layers = [{"layer": name, "spread": spread + by, "saturated": 0.0} for name, by in (("a", -0.01), ("b", 0.01))]
            path.write_text(json.dumps(json.loads(path.read_text()) | {"score_statistics": {"start": layers, "end": layers}}))


def test_arms_of_a_curve_differ_in_their_start_alone(tmp_path):
    study = make_study(arms=STARTS)
    spreads = {"dot": 0.04, "uniform": 0.01, "dot, spread 1": 0.9, "dot, twice the rate": 0.04}
    spreads |= {"network 16, spread 2": 1.9, "network 16": 0.2, "network 16, spread 1": 1.1}
    write_results(study, tmp_path, {arm: [1.0] for arm in spreads})
    with_starts(tmp_path, spreads)
    found = load_results(study, tmp_path)
    curves = curves_of(study, found, SPREAD)
    assert list(curves) == ["dot", "network 16"] and has_curves(study, found, SPREAD)
    # stands where its scores were measured, in the order of these; the arm of another rate has a curve of its own
    assert [point.arm for point in curves["dot"]] == ["uniform", "dot", "dot, spread 1"]
    assert [point.place for point in curves["network 16"]] == pytest.approx([0.2, 1.1, 1.9])
    assert not has_curves(study, found | {"dot": {}}, SPREAD) and not has_curves(study, found, NUMBERS)


def test_arms_of_a_curve_differ_in_their_numbers(tmp_path):
    study = make_study(arms=FEW)
    write_results(study, tmp_path, {arm: [1.0] for arm in FEW})
    curves = curves_of(study, load_results(study, tmp_path), NUMBERS)
    assert curves == {
        "thin": [Point(2, "thin 2"), Point(16, "thin 16")],
        "network to 2": [Point(2, "network 2 to 2"), Point(8, "network 8 to 2")],
    }


def test_means_and_seeds_are_drawn_where_their_differences_put_them(tmp_path, monkeypatch):
    lines: list[tuple[list[float], list[float]]] = []
    write_results(study := make_study(arms=FEW), tmp_path, {arm: [3.0] for arm in FEW})
    report(study, tmp_path)
    assert "a dot per seed" in report(study, tmp_path) and "![The figure against how many numbers" in report(study, tmp_path)
    assert (tmp_path / "numbers.png").stat().st_size > 5_000 and not (tmp_path / "spreads.png").exists()

    # has a seed more than the others, in which all is one higher
    write_results(study, tmp_path, {"dot": [1.0, 2.0], "thin 2": [5.0], "thin 16": [6.0, 8.0]})
    plot = Axes.plot

    def noted(axis, x, y, *style, **how):
        lines.extend([(x, y)] if "label" in how else [])
        return plot(axis, x, y, *style, **how)

    monkeypatch.setattr(Axes, "plot", noted)
    report(study, tmp_path)
    assert ([2, 16], pytest.approx([1.5 + 4.0, 1.5 + 5.5])) in lines


def test_curves_of_other_layers_have_a_panel_of_their_own():
    curves = {name: [Point(2, arm)] for name, arm in (("thin", "a"), ("network", "b"), ("last, thin", "c"))}
    found = {arm: {0: {"run": {"neural_layers": layers}}} for arm, layers in (("a", ["all"]), ("b", ["all"]), ("c", ["1"]))}
    panels = panels_of(found, curves, NUMBERS)
    assert [(title.rpartition(": ")[2], names) for title, _, names in panels] == [
        ("all", ["thin", "network"]),
        ("1", ["last, thin"]),
    ]
    assert [names for *_, names in panels_of(found, curves, SPREAD)] == [list(curves)] * 2
