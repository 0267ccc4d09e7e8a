"""A study's tables and figures in the documents."""

import sys

import pytest

import study as script
from studies.page_tables import has_tables, with_new_tables
from studies.pooled import pooled
from studies.report import summary
from studies.results import load_results, summarize
from studies.study_file import COSTS
from tests.helpers.study_records import costs_of, make_study, write_results
from tools.json_files import write_json


HEAD = """| n | seeds | m | difference to `dot` | 95 % interval | | pooled |
| --- | --- | --- | --- | --- | --- | --- |
"""
PAGE = f"""Text before.

{HEAD}| first layer |
| dot | 9 | old |

Text between, and a table of another study:

{HEAD.replace("n |", "other |", 1)}| first layer | as it was |

<!-- summary of n -->

| old | table |
| --- | --- |

Text after.
"""


def test_tables_are_written_anew_and_all_else_stays(tmp_path):
    study = make_study()
    write_results(study, tmp_path, {"dot": [9.0, 10.0, 11.0], "first layer": [7.0, 8.0, 9.0], "longer": [6.0]})
    found, costs = load_results(study, tmp_path), costs_of(study)
    page = with_new_tables(PAGE, study, found, costs)
    rows = "| first layer | 3 | 8.00 | -2.00 | -2.00 to -2.00 | better |  |\n| dot | 3 | 10.00 |  |  |  |  |\n"
    expected = PAGE.replace("| first layer |\n| dot | 9 | old |\n", rows)
    expected = expected.replace("| old | table |\n| --- | --- |", summary(study, found, summarize(study, found, costs)))
    assert page == expected and "| longer | 6.00 |" in page
    assert with_new_tables(page, study, found, costs) == page
    assert has_tables(PAGE, study) and not has_tables(PAGE, make_study(name="t"))


def test_a_table_asks_for_its_first_figures(tmp_path):
    """A page may have the line of a summary before there is one."""
    study = make_study()
    write_results(study, tmp_path, {"dot": [1.0], "first layer": [2.0]})
    page = with_new_tables("<!-- summary of n -->\n\nText after.\n", study, load_results(study, tmp_path), costs_of(study))
    assert page.startswith("<!-- summary of n -->\n\n| Digits |") and page.endswith(" |\n\nText after.\n")


def test_figures_in_sentences_are_written_anew(tmp_path):
    study = make_study()
    write_results(study, tmp_path, {"dot": [9.0, 10.0, 11.0], "first layer": [7.0, 8.5, 9.0], "longer": [6.0]})
    page = (
        "It is <!-- n: first layer less dot -->?, to <!-- n: dot -->?. One seed: <!-- n: longer less first layer -->-9.00 in\n"
        "perplexity (two seeds,\n95 % interval: old). <!-- other: a less b -->+1.00 points (one seed) and "
        "<!-- n: first layer -->9.1 stay (as they are)."
    )
    found, costs = load_results(study, tmp_path), costs_of(study)
    new = with_new_tables(page, study, found, costs)
    assert new == (
        "It is <!-- n: first layer less dot -->-1.83 in perplexity (95 % interval: -2.55 to -1.12), to <!-- n: dot -->10.00. "
        "One seed: <!-- n: longer less first layer -->-1.00 in perplexity (one seed). <!-- other: a less b -->+1.00 points "
        "(one seed) and <!-- n: first layer -->8.17 stay (as they are)."
    )
    assert with_new_tables(new, study, found, costs) == new and has_tables(page, study)
    by_others = "<!-- n: longer less dot by v -->? <!-- n: dot by w -->?"
    expected = "<!-- n: longer less dot by v -->-3.00 in perplexity (one seed) <!-- n: dot by w -->7.000"
    assert with_new_tables(by_others, study, found, costs) == expected
    with pytest.raises(SystemExit, match="asks for 'x', which is none that the study reports"):
        with_new_tables("<!-- n: dot by x -->?", study, found, costs)
    write_results(study, tmp_path / "other", {"dot": [9.0, 10.0], "longer": [6.0]})
    (tmp_path / "other/dot-0.json").unlink()
    with pytest.raises(SystemExit, match="compares 'longer' with 'dot': no seed has both"):
        with_new_tables("<!-- n: longer less dot -->?", study, load_results(study, tmp_path / "other"), costs)


def test_few_runs_and_groups_have_intervals_of_all_runs_together(tmp_path):
    study = make_study()
    figures = {"dot": [9.0, 10.0, 11.0], "first layer": [7.0, 8.5, 9.0], "unfinished": [8.0, 9.0, 9.7], "longer": [6.0]}
    write_results(study, tmp_path, figures)
    found, costs = load_results(study, tmp_path), costs_of(study)
    page = "<!-- n: longer less dot -->? <!-- n: first layer + unfinished less dot -->?\n" + HEAD + "| longer |\n"
    new = with_new_tables(page, study, found, costs)
    mean, low, high = pooled(study, found).contrast(["longer"], ["dot"])
    assert f"-->-3.00 in perplexity (one seed; pooled: {mean:.2f} [{low:.2f} to {high:.2f}]) " in new
    assert f"| longer | 1 | 6.00 | -3.00 |  |  | {mean:.2f} [{low:.2f} to {high:.2f}] |" in new
    mean, low, high = pooled(study, found).contrast(["first layer", "unfinished"], ["dot"])
    assert f"-->{mean:.2f} in perplexity (pooled: [{low:.2f} to {high:.2f}])\n" in new
    assert mean == pytest.approx(-(2 + 1.5 + 2 + 1 + 1 + 1.3) / 6)
    assert with_new_tables(new, study, found, costs) == new
    with pytest.raises(SystemExit, match=r"names 'dot \+ longer', of which no run is finished"):
        with_new_tables("<!-- n: dot + longer -->?", study, found, costs)
    with pytest.raises(SystemExit, match="names 'second layer', of which no run is finished"):
        with_new_tables("<!-- n: first layer + second layer less dot -->?", study, found, costs)
    write_results(study, tmp_path / "few", {"dot": [9.0], "first layer": [7.0], "longer": [6.0]})
    with pytest.raises(SystemExit, match="compares groups of arms, which have too few runs"):
        with_new_tables("<!-- n: first layer + longer less dot -->?", study, load_results(study, tmp_path / "few"), costs)


def test_a_run_that_diverged_has_no_difference(tmp_path):
    study = make_study()
    write_results(study, tmp_path, {"dot": [1.0, 2.0, 3.0], "first layer": [2.0, float("nan"), 3.0]})
    found, costs = load_results(study, tmp_path), costs_of(study)
    page = with_new_tables("It is <!-- n: first layer less dot -->?, <!-- n: first layer -->?.", study, found, costs)
    assert page == "It is <!-- n: first layer less dot -->no difference (a run diverged), <!-- n: first layer -->nan."
    write_results(study, tmp_path, {"first layer": [2.0, 2.0, 3.0]})
    found = load_results(study, tmp_path)
    page = with_new_tables(page, study, found, costs)
    assert "-->+0.333 in perplexity (95 % interval: -1.101 to +1.768), " in page and page.endswith("-->2.333.")


@pytest.mark.parametrize("arm", ("second layer", "unfinished"))
@pytest.mark.parametrize(
    "old, new",
    (
        ("| dot | 9 | old |", "| {} |"),
        ("`dot`", "`{}`"),
        ("Text before.", "<!-- n: {} -->?"),
        ("Text before.", "<!-- n: dot less {} -->?"),
    ),
)
def test_an_arm_that_has_not_run_is_refused_and_no_page_changed(arm, old, new, tmp_path, monkeypatch):
    study = make_study()
    write_results(study, tmp_path, {"dot": [1.0], "first layer": [2.0]})
    (tmp_path / "good.md").write_text(PAGE)
    (tmp_path / "bad.md").write_text(page := PAGE.replace(old, new.format(arm), 1))
    pages = {path: path.read_text() for path in (tmp_path / "good.md", tmp_path / "bad.md")}
    with pytest.raises(SystemExit, match=f"A table or figure of n names '{arm}', of which no run is finished."):
        script.write_tables(pages, study, tmp_path)
    assert (tmp_path / "good.md").read_text() == PAGE and (tmp_path / "bad.md").read_text() == page
    with pytest.raises(SystemExit, match=r"No table or figure of n is in .*other\.md: see recipes/studies/page_tables\.py"):
        script.write_tables({tmp_path / "other.md": "Text."}, study, tmp_path)


def test_every_page_is_written_anew(tmp_path):
    study = make_study()
    write_results(study, tmp_path, {"dot": [1.0], "first layer": [2.0]})
    write_json(tmp_path / COSTS, costs_of(study))
    texts = {tmp_path / "a.md": PAGE, tmp_path / "b.md": "It is <!-- n: first layer -->?\n", tmp_path / "c.md": "Text.\n"}
    for path, text in texts.items():
        path.write_text(text)
    script.write_tables(dict(texts), study, tmp_path)
    found, costs = load_results(study, tmp_path), costs_of(study)
    assert {path: path.read_text() for path in texts} == {
        path: with_new_tables(text, study, found, costs) for path, text in texts.items()
    }
    assert (tmp_path / "b.md").read_text() == "It is <!-- n: first layer -->2.000\n"
    assert (tmp_path / "c.md").read_text() == "Text.\n" and (tmp_path / "a.md").read_text() != PAGE


def test_a_page_that_is_not_there_is_refused_before_anything_runs(tmp_path, monkeypatch):
    study = make_study(config="configs/cifar10-small.yaml")
    monkeypatch.setattr(script.Study, "load", lambda path: study)
    monkeypatch.setattr(script, "check_words", lambda *_: pytest.fail("went on"))
    words = ["study.py", "n.yaml", "--results", str(tmp_path / "r"), "--pages", str(tmp_path / "no.md")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=r"--pages .*no\.md: .*No such file"):
        script.main()
