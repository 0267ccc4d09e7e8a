"""Tables of studies in the documents: each row follows from the runs whose JSON is in the repository.

Such a table names a study in its first cell, and in its fourth the arm that the others are compared with.
"""

import re
import statistics
from pathlib import Path

import pytest

from studies.number_format import form_of
from studies.results import difference, load_results, summarize, verdict
from studies.study_file import Study, load_costs


ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "model_cards/studies"
TABLE = re.compile(
    r"^\| ([a-z-]+) \| seeds \| [^|]+ \| difference to `(.+)` \| 95 % interval \| \|\n\|[ -|]+\|\n((?:\|.+\|\n)+)", re.M
)
TABLES = [
    pytest.param(*match.groups(), id=f"{page.name}: {match[1]} to {match[2]}")
    for page in sorted(ROOT.glob("docs/*.md"))
    for match in TABLE.finditer(page.read_text())
]


@pytest.mark.parametrize(("name", "base", "rows"), TABLES)
def test_rows(name: str, base: str, rows: str):
    study = Study.load(ROOT / f"recipes/studies/{name}.yaml")
    found = load_results(study, STUDIES / name)
    form = form_of(study, summarize(study, found, load_costs(STUDIES / name)), study.metric)
    for line in rows.splitlines():
        arm, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        runs = found[arm]
        mean = statistics.mean(each["metrics"][study.metric] for each in runs.values())
        change = difference(study, found, arm, base)
        expected = [form.value(mean), form.signed(change["difference"]), form.bounds(change), verdict(study, change)]
        assert cells == [str(len(runs)), *expected], line
