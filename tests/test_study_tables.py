"""Figures of studies in the documents: each follows from the runs whose JSON is in the repository."""

import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student

from studies.number_format import Form, form_of
from studies.page_tables import has_tables, with_new_tables
from studies.results import difference, load_results, summarize
from studies.study_file import Study, load_costs


ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "model_cards/studies"
AUTHORS = "authors' embeddings"
TEXT_ARMS = [f"{arm}, {size} embeddings" for size in ("authors'", "unit") for arm in ("dot", "neural")]
IMAGE_ARMS = ("dot", "dot, spread 1", "network 16", "network 16, spread 1")
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


def change_of(study: str, arm: str, base: str) -> tuple[Form, dict[str, Any]]:
    loaded = Study.load(ROOT / f"recipes/studies/{study}.yaml")
    found = load_results(loaded, STUDIES / study)
    form = form_of(loaded, summarize(loaded, found, load_costs(STUDIES / study)), loaded.metric)
    return form, difference(loaded, found, arm, base)


def in_points(arm: str, base: str) -> str:
    form, change = change_of("spread-images", arm, base)
    found = load_results(Study.load(ROOT / "recipes/studies/spread-images.yaml"), STUDIES / "spread-images")
    assert {*found[arm]} == {*found[base]}, "means are of the seeds that the difference is of"
    return f"{form.signed(change['difference'])} points, 95 % interval: {form.bounds(change)}"


def in_words(study: str, arm: str, base: str) -> str:
    """As the pages say a difference."""
    form, change = change_of(study, arm, base)
    interval = f"95 % interval: {form.bounds(change)}"
    more = {1: "one seed", 2: f"two seeds, {interval}"}.get(change["pairs"], interval)
    return f"{form.signed(change['difference'])} {'points' if form.unit else 'in perplexity'} ({more})"


def test_the_verdict_of_the_readme():
    text = " ".join((ROOT / "README.md").read_text().split())
    stock, started, own, both = (mean("spread-images", arm) for arm in IMAGE_ARMS)
    assert (
        f"accuracy is {stock} % with the stock dot product, {own} % with Neural Attention, and {started} % with a dot" in text
    )
    assert f"Neural Attention that starts likewise has {both} %: no difference is shown." in text
    dot, neural, dot_unit, neural_unit = (mean("paper-architecture-text", arm) for arm in TEXT_ARMS)
    assert f"perplexity is {dot} with the dot product and {neural} with Neural Attention." in text
    assert f"in place of the authors' large ones, it is {dot_unit} and {neural_unit}." in text
    compact, stock = (mean("compact-text", arm) for arm in ("compact 16 to 2", "dot"))
    assert f"a small GPT-2 on WikiText-2 has a perplexity of {compact}, compared with {stock}." in text
    _, change = change_of("compact-images", "compact 16 to 2, spread 1", "dot, spread 1")
    assert change["low"] < 0 < change["high"] and "With 16 numbers, no loss of accuracy is shown on images" in text
    worth = in_words("spread-images-longer", "dot, spread 1", "dot")
    assert f"The better start of the dot product is worth {worth} there." in text


def test_the_verdict_of_the_results():
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    stock, started, own, both = (mean("spread-images", arm) for arm in IMAGE_ARMS)
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
    assert sorted(dead) == [0, 0, 1] and "In one of the three runs with unit embeddings its scorer is dead." in text


def test_differences_in_the_text_of_the_page():
    text = " ".join(PAGES["what-gains-are-made-of.md"].split())
    images, paper = "spread-images", "paper-architecture-text"
    longer = "spread-images-longer"
    start, unit_start = "dot, spread 1", "unit embeddings, spread 1"
    for said, study, arm, base in (
        ("start with a spread of one gains {} over the stock one", images, start, "dot"),
        ("The network of our first studies gains {}.", images, "network 16", "dot"),
        ("that starts better, this network's difference is {}.", images, "network 16", start),
        ("Started alike, no difference is shown: {}.", images, "network 16, spread 1", start),
        ("After three epochs it is worth {} to the dot product.", longer, start, "dot"),
        ("differs from the network, which starts with its own, by {}.", longer, start, "network 16"),
        ("a dot product that starts so differs from the stock one by {}.", images, "dot, spread 0.14", "dot"),
        ("To the dot product, that is worth {} over the stock one", images, "dot, larger weights", "dot"),
        ("whose scores start with a spread of one, it is {}.", images, "dot, larger weights", start),
        ("its difference to the dot product is {}.", paper, f"neural, {AUTHORS}", f"dot, {AUTHORS}"),
        ("which ends the saturation, it is {}.", paper, "neural, normalised embeddings", "dot, normalised embeddings"),
        ("With embeddings of unit size, it is {}.", paper, "neural, unit embeddings", "dot, unit embeddings"),
        (
            "To the dot product, that is worth {}, and the network's lead is gone",
            paper,
            "dot, normalised embeddings",
            f"dot, {AUTHORS}",
        ),
        ("to a dot product that starts likewise is {}.", paper, f"neural mirrored, {unit_start}", f"dot, {unit_start}"),
        ("to a dot product that starts alike is {} on images.", "compact-images", "compact 16 to 2, spread 1", start),
        ("10 % fewer parameters than stock, it is {}, of 89.1.", "compact-text", "compact 16 to 2", "dot"),
    ):
        assert said.format(in_words(study, arm, base)) in text, said
    assert mean("compact-text", "dot")[:4] == "89.1"
    # counts what few seeds show from how much a difference varies
    low, high = (change_of(images, "network 16, spread 1", start)[1][end] for end in ("low", "high"))
    deviation = 100 * (high - low) / 2 * 3**0.5 / student.ppf(0.975, 2)
    assert f"vary by {deviation:.1f} points from seed to seed" in text
    shown = {seeds: student.ppf(0.975, seeds - 1) * deviation / seeds**0.5 for seeds in (3, 5, 14)}
    assert [round(each) for each in shown.values()] == [4, 2, 1]


def test_sizes_of_compact_models():
    for study, arms, share in (
        ("compact-images", ("compact 16 to 2, spread 1", "dot, spread 1"), "On images it has 12 % fewer parameters"),
        ("compact-text", ("compact 16 to 2", "dot"), "the compact form has 10 % fewer parameters"),
    ):
        found = load_results(Study.load(ROOT / f"recipes/studies/{study}.yaml"), STUDIES / study)
        compact, stock = (next(iter(found[arm].values()))["parameters"] for arm in arms)
        assert share in " ".join(PAGES["what-gains-are-made-of.md"].split())
        assert f"{1 - compact / stock:.0%}".replace("%", " %") in share


def test_weights_of_a_usual_size():
    found = load_results(Study.load(ROOT / "recipes/studies/spread-images.yaml"), STUDIES / "spread-images")
    runs = found["dot, larger weights"].values()
    spreads = [layer["spread"] for each in runs for layer in each["score_statistics"]["start"]]
    said = f"start with spreads of {min(spreads):.1f} to {max(spreads):.1f} by themselves"
    assert said in " ".join(PAGES["what-gains-are-made-of.md"].split())


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
