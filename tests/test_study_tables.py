"""Figures of studies in the documents: each follows from the runs whose JSON is in the repository."""

import statistics
from pathlib import Path

import pytest

from studies.number_format import form_of
from studies.page_tables import has_tables, with_new_tables
from studies.results import difference, load_results, summarize
from studies.study_file import Study, load_costs


ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "model_cards/studies"
TEXT_ARMS = [f"{arm}, {size} embeddings" for size in ("authors'", "unit") for arm in ("dot", "neural")]
PAGES = {page.name: page.read_text() for page in sorted(ROOT.glob("docs/*.md"))}
TABLES = [
    pytest.param(name, path, id=f"{name}: {path.stem}")
    for path in sorted((ROOT / "recipes/studies").glob("*.yaml"))
    for name, page in PAGES.items()
    if has_tables(page, Study.load(path))
]


@pytest.mark.parametrize(("page", "path"), TABLES)
def test_tables(page: str, path: Path):
    study = Study.load(path)
    results = STUDIES / study.name.removesuffix("-small")
    assert with_new_tables(PAGES[page], study, load_results(study, results), load_costs(results)) == PAGES[page]


def mean(study: str, arm: str) -> str:
    metric, factor = ("test_accuracy", 100) if "images" in study else ("test_perplexity_stride", 1)
    found = load_results(Study.load(ROOT / f"recipes/studies/{study}.yaml"), STUDIES / study)[arm]
    return f"{factor * statistics.mean(each['metrics'][metric] for each in found.values()):.2f}"


def in_points(arm: str, base: str) -> str:
    study = Study.load(ROOT / "recipes/studies/spread-images.yaml")
    found = load_results(study, STUDIES / study.name)
    change = difference(study, found, arm, base)
    assert {*found[arm]} == {*found[base]}, "means are of the seeds that the difference is of"
    form = form_of(study, summarize(study, found, load_costs(STUDIES / study.name)), study.metric)
    return f"{form.signed(change['difference'])} points, 95 % interval: {form.bounds(change)}"


def test_the_verdict_of_the_readme():
    text = " ".join((ROOT / "README.md").read_text().split())
    stock, started, both = (mean("spread-images", arm) for arm in ("dot", "dot, spread 1", "network 16, spread 1"))
    assert f"Accuracy on CIFAR-10 is {stock} % with the stock dot product, {started} % with a dot product that" in text
    assert f"and {both} % with Neural Attention that starts likewise." in text
    dot, neural, dot_unit, neural_unit = (mean("paper-architecture-text", arm) for arm in TEXT_ARMS)
    assert f"perplexity is {dot} with the dot product and {neural} with Neural Attention." in text
    assert f"With embeddings of unit size, it is {dot_unit} and {neural_unit}." in text


def test_the_verdict_of_the_results():
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    stock, started, own, both = (
        mean("spread-images", arm) for arm in ("dot", "dot, spread 1", "network 16", "network 16, spread 1")
    )
    to_stock, to_started = in_points("dot, spread 1", "dot"), in_points("network 16, spread 1", "dot, spread 1")
    assert f"reaches {started} % accuracy, compared with {stock} % for the stock one (difference: {to_stock})." in text
    assert f"Neural Attention reaches {own} % with its own start, and {both} % with that one" in text
    assert f"(difference to the dot product with the same start: {to_started})" in text
    dot, neural, dot_unit, neural_unit = (mean("paper-architecture-text", arm) for arm in TEXT_ARMS)
    assert f"falls from {dot} to {neural} with the authors' embeddings" in text
    assert f"it is {dot_unit} for the dot product, and {neural_unit} for the network" in text


def test_the_first_layer_of_the_paper():
    text = " ".join((ROOT / "docs/what-gains-are-made-of.md").read_text().split())
    study = Study.load(ROOT / "recipes/studies/paper-architecture-text.yaml")
    found = load_results(study, STUDIES / study.name)

    def first_layer(arm: str, when: str, figure: str) -> float:
        return statistics.mean(each["score_statistics"][when][0][figure] for each in found[arm].values())

    authors, unit = "dot, authors' embeddings", "dot, unit embeddings"
    assert f"a spread of {first_layer(authors, 'start', 'spread'):.0f} with the authors' embeddings" in text
    shares = [f"{100 * first_layer(authors, when, 'saturated'):.0f} %" for when in ("start", "end")]
    assert "has over 0.99 of the weight in {} of the rows; after training, in {}.".format(*shares) in text
    assert f"With unit embeddings the spread is {first_layer(unit, 'start', 'spread'):.2f}, and no row is saturated." in text
    assert first_layer(unit, "start", "saturated") < 0.0005
    spread, saturated = (first_layer(f"{authors}, spread 1", "end", figure) for figure in ("spread", "saturated"))
    assert f"first layer ends at {spread:.0f}, and {100 * saturated:.0f} % of its rows are saturated" in text
    neural = [f"neural, {size} embeddings" for size in ("authors'", "unit")]
    most = [
        max(each["score_statistics"][when][0]["spread"] for arm in neural for each in found[arm].values())
        for when in ("start", "end")
    ]
    assert "start with a spread of {:.2f} at most, and end with one of {:.2f} at most".format(*most) in text
    entropies = [first_layer(arm, "end", "entropy") for arm in neural]
    assert "{:.2f} nats with the authors' embeddings, and {:.2f} with unit embeddings".format(*entropies) in text
    assert f"{first_layer(unit, 'start', 'uniform_entropy'):.2f}" == f"{entropies[1]:.2f}"
    dead = [each["scorer_health"]["end"][0]["dead"] for each in found[neural[1]].values()]
    assert sorted(dead) == [0, 1] and "In one of the two runs with unit embeddings its scorer is dead." in text


def test_the_start_at_other_rates():
    text = " ".join((ROOT / "docs/what-gains-are-made-of.md").read_text().split())
    rates = ("twice", "four times")
    worth = [
        float(mean("spread-images", f"dot, spread 1, {rate} the rate")) - float(mean("spread-images", f"dot, {rate} the rate"))
        for rate in rates
    ]
    assert "worth {:+.1f} points at twice the rate, and {:+.1f} at four times".format(*worth) in text
    stock, started = (float(mean("spread-images", arm)) for arm in ("dot", "dot, spread 1"))
    assert all(float(mean("spread-images", f"dot, {rate} the rate")) < stock for rate in rates)
    assert all(float(mean("spread-images", f"dot, spread 1, {rate} the rate")) < started for rate in rates)
