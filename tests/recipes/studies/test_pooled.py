"""Intervals of all runs of a study together."""

import statistics

import pytest
from scipy.stats import t as student

from studies.number_format import form_of
from studies.pooled import pooled
from studies.results import difference, load_results, summarize
from tests.helpers.study_records import costs_of, make_study, write_results


ARMS = {"dot": [1.0, 2.0, 3.0], "first layer": [0.5, 1.4, 2.6], "unfinished": [2.0, 2.6, 4.1]}


def test_whole_designs_are_as_by_hand(tmp_path):
    study = make_study()
    write_results(study, tmp_path, ARMS)
    fit = pooled(study, load_results(study, tmp_path))
    means = {arm: statistics.mean(figures) for arm, figures in ARMS.items()}
    seeds = [statistics.mean(figures) for figures in zip(*ARMS.values(), strict=True)]
    whole = statistics.mean(seeds)
    residuals = [
        figure - means[arm] - seed + whole
        for arm, figures in ARMS.items()
        for figure, seed in zip(figures, seeds, strict=True)
    ]
    variance = sum(residual**2 for residual in residuals) / 4
    assert fit.freedom == 4
    half = student.ppf(0.975, 4) * (2 * variance / 3) ** 0.5
    mean = means["first layer"] - means["dot"]
    assert fit.contrast(["first layer"], ["dot"]) == pytest.approx((mean, mean - half, mean + half))
    # knows the mean of two arms better than one
    mean = (means["first layer"] + means["unfinished"]) / 2 - means["dot"]
    half = student.ppf(0.975, 4) * (variance / 3 * 1.5) ** 0.5
    assert fit.contrast(["first layer", "unfinished"], ["dot"]) == pytest.approx((mean, mean - half, mean + half))
    assert fit.contrast(["longer"], ["dot"]) is None


def test_arms_with_few_runs_have_wider_ones(tmp_path):
    study = make_study()
    write_results(study, tmp_path, {**ARMS, "longer": [0.7]})
    found = load_results(study, tmp_path)
    fit, rows = pooled(study, found), summarize(study, found, costs_of(study))
    assert fit.freedom == 4
    mean, low, high = fit.contrast(["longer"], ["dot"])
    assert mean == pytest.approx(difference(study, found, "longer", "dot")["difference"], abs=0.5)
    _, less_low, less_high = fit.contrast(["first layer"], ["dot"])
    assert high - low > 1.2 * (less_high - less_low)
    row = next(row for row in rows if row["arm"] == "longer")
    form = form_of(study, rows, "m")
    assert form.bounds(row) == "" and form.with_bounds(row) == f"{mean:+.3f} [{low:+.3f} to {high:+.3f}]"


def test_too_few_runs_and_those_that_diverged(tmp_path):
    study = make_study()
    write_results(study, tmp_path, {"dot": [1.0, 2.0, 3.0], "first layer": [0.5, 1.4, 2.6]})
    found = load_results(study, tmp_path)
    assert pooled(study, {"dot": {}}) is None
    assert pooled(study, found) is None and difference(study, found, "first layer", "dot")["pooled_low"] is None
    write_results(study, tmp_path, {**ARMS, "longer": [float("nan"), 1.0]})
    fit = pooled(study, load_results(study, tmp_path))
    study.pooled = False
    assert pooled(study, load_results(study, tmp_path)) is None
    assert fit.freedom == 4 and "longer" in fit.arms and all(effect < 10 for effect in fit.effects)
