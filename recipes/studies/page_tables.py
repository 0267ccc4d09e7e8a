"""A study's tables and figures in the documents, written anew from its runs.

Two kinds of tables are known. One names the study in its head, and the arm that the others are compared with. The page says
by their names which arms stand in it; all other cells are filled in:

    | spread-images | seeds | test accuracy, % | difference to `dot` | 95 % interval | | pooled |
    | --- | --- | --- | --- | --- | --- | --- |
    | dot, spread 1 |

The other has all arms that have run (`report.summary`), and stands below a line `<!-- summary of spread-images -->`.

In a sentence, a comment says what follows it: an arm's mean, or the difference to another arm with its interval. A new one
is followed by a question mark. ` by FIGURE` asks for another one than the study's main figure (`by validation_accuracy`). Plus
signs between the arms of a difference, ` + `, ask for their mean, whose interval is the pooled one. None may begin a line,
where Markdown takes it for a block of its own.

    It is <!-- spread-images: dot, spread 1 less dot -->+4.45 points (95 % interval: +1.89 to +7.00),
    up to <!-- spread-images: dot, spread 1 -->?.
"""

import math
import re
from typing import Any

from studies.number_format import Form, form_of
from studies.pooled import pooled
from studies.report import summary
from studies.results import Results, difference, seeds_and_pairs, summarize, verdict
from studies.study_file import Study
from tools.markdown import table_row


ROWS = (
    r"^(?P<head>\| {name} \| seeds \| [^|]+ \| difference to `(?P<base>[^`]+)` \| 95 % interval \| \| pooled \|\n\|[ -|]+\|\n)"
    r"(?P<rows>(?:\|.+\|\n)+)"
)
PLUS = " + "
SUMMARY = r"^(?P<head><!-- summary of {name} -->\n)(?:\n(?:\|.+\|\n)+)?"
FIGURE = (
    r"(?P<head><!-- {name}: (?P<arm>(?:(?! less | by |-->).)+?)(?: less (?P<base>(?:(?! by |-->).)+?))?"
    r"(?: by (?P<metric>\w+))? -->)"
    r"(?:\?|[+-]?\d+(?:\.\d+)?\s+(?:points|in\s+(?:perplexity|loss))\s+\([^)]*\)|"
    r"no\s+difference\s+\(a\s+run\s+diverged\)|(?:nan|inf|\d+(?:\.\d+)?)(?:\s+%)?)"
)


def has_tables(page: str, study: Study) -> bool:
    return any(pattern.search(page) for pattern in patterns(study))


def patterns(study: Study) -> list[re.Pattern[str]]:
    """Of a table of chosen arms, of one of all, and of a figure in a sentence."""
    return [re.compile(pattern.format(name=re.escape(study.name)), re.MULTILINE) for pattern in (ROWS, SUMMARY, FIGURE)]


def with_new_tables(page: str, study: Study, found: Results, costs: dict[str, Any]) -> str:
    """The text of a page, its tables and figures of this study written anew.

    Raises:
        SystemExit: if a table or a figure names an arm that the study has not, or that has no finished run; or two arms that
            have no seed in common.
    """
    rows = summarize(study, found, costs)
    form = form_of(study, rows, study.metric)

    by_arm = {row["arm"]: row for row in rows}

    def row_of(arm: str) -> dict[str, Any]:
        if arm not in by_arm:
            raise SystemExit(f"A table or figure of {study.name} names {arm!r}, of which no run is finished.")
        return by_arm[arm]

    def line(arm: str, base: str) -> str:
        row, change = row_of(arm), difference(study, found, arm, base)
        own = [arm, seeds_and_pairs(row["seeds"], change), form.value(row["mean"])]
        ours = [form.signed(change["difference"]), form.bounds(change), verdict(study, change), form.pooled(change)]
        return table_row([*own, *ours])

    def chosen_arms(match: re.Match[str]) -> str:
        row_of(match["base"])
        arms = [each.split("|")[1].strip() for each in match["rows"].splitlines()]
        return match["head"] + "".join(f"{line(arm, match['base'])}\n" for arm in arms)

    def figure(match: re.Match[str]) -> str:
        metric = match["metric"] or study.metric
        row = row_of(match["arm"] if match["base"] is None else match["arm"].split(PLUS)[0])
        if metric not in (study.metric, study.choose_by, *study.also):
            raise SystemExit(f"A figure of {study.name} asks for {metric!r}, which is none that the study reports.")
        own = form_of(study, rows, metric)
        if match["base"] is not None and PLUS in match["arm"] + match["base"]:
            return match["head"] + of_groups(own, match["arm"].split(PLUS), match["base"].split(PLUS), metric)
        if match["base"] is None:
            return f"{match['head']}{own.value(row['mean' if metric == study.metric else metric])}{own.unit}"
        change = difference(study, found, match["arm"], row_of(match["base"])["arm"], metric)
        if not change["pairs"]:
            raise SystemExit(f"A figure of {study.name} compares {match['arm']!r} with {match['base']!r}: no seed has both.")
        return match["head"] + in_words(own, change)

    def of_groups(form: Form, arms: list[str], bases: list[str], metric: str) -> str:
        for arm in (*arms, *bases):
            row_of(arm)
        fit = pooled(study, found, metric)
        change = fit and fit.contrast(arms, bases)
        if change is None:
            raise SystemExit(f"A figure of {study.name} compares groups of arms, which have too few runs: {arms}, {bases}.")
        mean, low, high = change
        return f"{form.signed(mean)} {kind_of(form)} (pooled: [{form.signed(low)} to {form.signed(high)}])"

    of_chosen, of_all, of_figures = patterns(study)
    page = of_chosen.sub(chosen_arms, page)
    page = of_all.sub(lambda match: f"{match['head']}\n{summary(study, found, rows)}\n", page)
    return of_figures.sub(figure, page)


def in_words(form: Form, change: dict[str, Any]) -> str:
    """A difference as a sentence says it; of few pairs, with their number."""
    if not math.isfinite(change["difference"]):
        return "no difference (a run diverged)"
    together = f"; pooled: {form.pooled(change)}" if form.pooled(change) else ""
    few = {1: "one seed", 2: "two seeds"}.get(change["pairs"])
    more = f"{few}{together}" if few else f"95 % interval: {form.bounds(change)}"
    return f"{form.signed(change['difference'])} {kind_of(form)} ({more})"


def kind_of(form: Form) -> str:
    """What a difference is counted in."""
    return "points" if form.unit else "in loss" if form.metric.endswith("loss") else "in perplexity"
