"""A study's tables in the documents, written anew from its runs.

Two kinds are known. One names the study in its head, and the arm that the others are compared with. The page says by their
names which arms stand in it; all other cells are filled in:

    | spread-images | seeds | test accuracy, % | difference to `dot` | 95 % interval | |
    | --- | --- | --- | --- | --- | --- |
    | dot, spread 1 |

The other has all arms that have run (`report.summary`), and stands below a line `<!-- summary of spread-images -->`.
"""

import re
from typing import Any

from studies.number_format import form_of
from studies.report import summary
from studies.results import Results, difference, seeds_and_pairs, summarize, verdict
from studies.study_file import Study
from tools.markdown import table_row


ROWS = (
    r"^(?P<head>\| {name} \| seeds \| [^|]+ \| difference to `(?P<base>[^`]+)` \| 95 % interval \| \|\n\|[ -|]+\|\n)"
    r"(?P<rows>(?:\|.+\|\n)+)"
)
SUMMARY = r"^(?P<head><!-- summary of {name} -->\n)(?:\n(?:\|.+\|\n)+)?"


def has_tables(page: str, study: Study) -> bool:
    return any(pattern.search(page) for pattern in patterns(study))


def patterns(study: Study) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Of a table of chosen arms, and of one of all."""
    rows, all_arms = (re.compile(pattern.format(name=re.escape(study.name)), re.MULTILINE) for pattern in (ROWS, SUMMARY))
    return rows, all_arms


def with_new_tables(page: str, study: Study, found: Results, costs: dict[str, Any]) -> str:
    """The text of a page, its tables of this study written anew.

    Raises:
        SystemExit: if a table names an arm that the study has not, or that has no finished run.
    """
    rows = summarize(study, found, costs)
    form = form_of(study, rows, study.metric)

    by_arm = {row["arm"]: row for row in rows}

    def row_of(arm: str) -> dict[str, Any]:
        if arm not in by_arm:
            raise SystemExit(f"A table of {study.name} names {arm!r}, of which no run is finished.")
        return by_arm[arm]

    def line(arm: str, base: str) -> str:
        row, change = row_of(arm), difference(study, found, arm, base)
        own = [arm, seeds_and_pairs(row["seeds"], change), form.value(row["mean"])]
        return table_row([*own, form.signed(change["difference"]), form.bounds(change), verdict(study, change)])

    def chosen_arms(match: re.Match[str]) -> str:
        row_of(match["base"])
        arms = [each.split("|")[1].strip() for each in match["rows"].splitlines()]
        return match["head"] + "".join(f"{line(arm, match['base'])}\n" for arm in arms)

    of_chosen, of_all = patterns(study)
    page = of_chosen.sub(chosen_arms, page)
    return of_all.sub(lambda match: f"{match['head']}\n{summary(study, found, rows)}\n", page)
