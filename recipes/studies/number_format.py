"""How the figures of a study are written."""

import math
from typing import Any, NamedTuple

from studies.study_file import Study


FEWEST_PAIRS = 3  # for an interval by pairs, and for a verdict


class Form(NamedTuple):
    """How a figure is written: accuracies in percent, all with four digits of the baseline's mean."""

    metric: str
    unit: str
    factor: float
    decimals: int

    @property
    def label(self) -> str:
        return f"`{self.metric}`,{self.unit}" if self.unit else f"`{self.metric}`"

    @property
    def words(self) -> str:
        """The metric without its unit, for pictures, whose reports say how it is measured."""
        return self.metric.removesuffix("_stride").replace("_", " ")

    @property
    def title(self) -> str:
        """The words, and the unit where there is one."""
        return f"{self.words},{self.unit}" if self.unit else self.words

    def value(self, number: float) -> str:
        return f"{self.factor * number:.{self.decimals}f}"

    def signed(self, number: float | None) -> str:
        if number is None:
            return ""
        text = f"{self.factor * number:+.{self.decimals}f}"
        return text[1:] if not text.strip("+-0.") else text  # leaves out the sign of what rounds to zero

    def bounds(self, row: dict[str, Any]) -> str:
        """Of an interval by pairs, where there are three: of two it says as much of their luck as of the arms."""
        if row["low"] is None or row["pairs"] < FEWEST_PAIRS:
            return ""
        return f"{self.signed(row['low'])} to {self.signed(row['high'])}"

    def pooled(self, row: dict[str, Any]) -> str:
        """The difference by all runs together, and its interval."""
        if row["pooled"] is None:
            return ""
        return f"{self.signed(row['pooled'])} [{self.signed(row['pooled_low'])} to {self.signed(row['pooled_high'])}]"

    def with_bounds(self, row: dict[str, Any]) -> str:
        """A difference with its interval by pairs, or by all runs together, in square brackets, or alone."""
        difference, bounds = self.signed(row["difference"]), self.bounds(row)
        return f"{difference} ({bounds})" if bounds else self.pooled(row) or difference


def form_of(study: Study, rows: list[dict[str, Any]], metric: str) -> Form:
    """
    Args:
        metric: `study.metric`, or one of those that rows have by name.
    """
    accuracy = metric.endswith("accuracy")
    factor = 100.0 if accuracy else 1.0
    row = next((row for row in rows if row["arm"] == study.baseline), rows[0])
    size = abs(factor * row["mean" if metric == study.metric else metric])
    decimals = max(0, 3 - math.floor(math.log10(size))) if size and math.isfinite(size) else 3
    return Form(metric, " %" if accuracy else "", factor, decimals)
