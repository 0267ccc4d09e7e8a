"""Intervals from all runs of a study together, where an arm has few: three runs say little of how much chance does.

A figure is taken for what its arm makes, plus what its seed makes, plus chance that varies alike in all arms of the study
(two-way analysis of variance without interaction, by least squares). So an arm with a single run gets an interval, too.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from studies.study_file import Study


FEWEST_FREEDOM = 4  # below which chance is hardly known


class Pooled(NamedTuple):
    """The fit: what arms make, how surely, and how many runs are left to tell chance by."""

    arms: list[str]
    effects: Any  # [arms], of one seed for all
    covariance: Any  # [arms, arms]
    freedom: int

    def contrast(self, arms: list[str], bases: list[str]) -> tuple[float, float, float] | None:
        """The mean of some arms less that of others, and its 95 % interval; None if one has no run."""
        if not {*arms, *bases} <= set(self.arms):
            return None
        weights = np.zeros(len(self.arms))
        for group, sign in ((arms, 1), (bases, -1)):
            for arm in group:
                weights[self.arms.index(arm)] += sign / len(group)
        mean = float(weights @ self.effects)
        half = float(student.ppf(0.975, self.freedom)) * math.sqrt(float(weights @ self.covariance @ weights))
        return mean, mean - half, mean + half


def pooled(study: Study, found: dict[str, dict[int, dict[str, Any]]], metric: str | None = None) -> Pooled | None:
    """None where too few runs are left to tell chance by, or the study says that chance is not alike. Runs that diverged are
    left out."""
    runs = [
        (arm, seed, figure)
        for arm, records in found.items()
        for seed, record in records.items()
        if math.isfinite(figure := record["metrics"][metric or study.metric])
    ]
    if not study.pooled or not runs:
        return None
    arms, seeds = list(dict.fromkeys(arm for arm, _, _ in runs)), sorted({seed for _, seed, _ in runs})
    design = np.zeros((len(runs), len(arms) + len(seeds)))
    for row, (arm, seed, _) in enumerate(runs):
        design[row, arms.index(arm)] = design[row, len(arms) + seeds.index(seed)] = 1.0
    design = np.delete(design, len(arms), axis=1)  # counts from the first seed
    figures = np.array([figure for _, _, figure in runs])
    solution, _, rank, _ = np.linalg.lstsq(design, figures, rcond=None)
    freedom = len(runs) - int(rank)
    if rank < design.shape[1] or freedom < FEWEST_FREEDOM:
        return None
    variance = float(((figures - design @ solution) ** 2).sum()) / freedom
    covariance = variance * np.linalg.inv(design.T @ design)
    return Pooled(arms, solution[: len(arms)], covariance[: len(arms), : len(arms)], freedom)
