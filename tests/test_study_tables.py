"""What the documents say of studies follows from the runs whose JSON is in the repository."""

import json
import re
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from studies.page_tables import has_tables, with_new_tables
from studies.pooled import pooled
from studies.results import Results, difference, load_results, verdict
from studies.study_file import Study, load_costs


ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "model_cards/studies"
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))}
# Reads as one: conclusions, and the pages of what they stand on
PAPER_LIKE = "\n".join(text for page, text in PAGES.items() if page.startswith(("docs/what-gains", "docs/evidence")))
TABLES = [
    pytest.param(name, path, id=f"{name}: {path.stem}")
    for path in sorted((ROOT / "recipes/studies").glob("*.yaml"))
    for name, page in PAGES.items()
    if has_tables(page, Study.load(path))
]

IMAGES, PAPER, TEXT, COMPACT = "spread-images", "paper-architecture-text", "spread-text", "compact-text"
AUTHORS, UNIT, BEST_RATE = "authors' embeddings", "unit embeddings", "four times the rate"
ARMS_OF_RATES = (f"neural, {AUTHORS}", f"dot, {UNIT}")
NOTHING = "no difference shown"
# Lists what the documents say in words: that an arm is so, compared with another
SAID = (
    (IMAGES, "dot, spread 1", "dot", "better"),
    (IMAGES, "network 16", "dot", "better"),
    (IMAGES, "network 16", "dot, spread 1", "worse"),
    (IMAGES, "network 16, spread 1", "dot, spread 1", NOTHING),
    (IMAGES, "dot, spread 0.14", "dot", NOTHING),
    (IMAGES, "network 16", "dot, spread 0.14", NOTHING),
    ("spread-images-longer", "network 16", "dot", "better"),
    ("paper-architecture-images", f"neural, {AUTHORS}", f"dot, {AUTHORS}", NOTHING),
    ("paper-architecture-images", f"dot, {AUTHORS}, first layer uniform", f"dot, {AUTHORS}", NOTHING),
    ("paper-architecture-images", f"dot, {AUTHORS}, spread 1", f"dot, {AUTHORS}", "better"),
    ("shapes-images", "16 to 2", "16 to 8", "better"),
    ("compact-images", "compact 16 to 2, spread 1", "dot, spread 1", NOTHING),
    (PAPER, f"neural, {AUTHORS}", f"dot, {AUTHORS}", "better"),
    (PAPER, f"dot, {AUTHORS}, first layer uniform", f"dot, {AUTHORS}", "better"),
    (PAPER, f"neural, {UNIT}", f"dot, {UNIT}", "worse"),
    (PAPER, f"dot, {UNIT}", f"dot, {AUTHORS}", "better"),
    (PAPER, f"neural, {AUTHORS}", f"dot, {AUTHORS}, first layer uniform", NOTHING),
    (PAPER, "neural, normalised embeddings", "dot, normalised embeddings", NOTHING),
    (TEXT, f"uniform, {BEST_RATE}", f"dot, {BEST_RATE}", "worse"),
    (COMPACT, "compact 16 to 2", "dot", "worse"),
    (COMPACT, f"compact 16 to 2, {BEST_RATE}", f"dot, {BEST_RATE}", NOTHING),
    (COMPACT, f"compact, same time, {BEST_RATE}", f"dot, {BEST_RATE}", "better"),
)


@cache
def loaded(name: str) -> tuple[Study, Results]:
    study = Study.load(ROOT / f"recipes/studies/{name}.yaml")
    return study, load_results(study, STUDIES / name)


def words_of(page: str) -> str:
    return " ".join(page.split())


def change_of(name: str, arm: str, base: str, metric: str | None = None) -> dict[str, Any]:
    study, found = loaded(name)
    return difference(study, found, arm, base, metric)


@pytest.mark.parametrize(("page", "path"), TABLES)
def test_tables_and_figures(page: str, path: Path):
    study = Study.load(path)
    results = STUDIES / study.name.removesuffix("-small")
    assert with_new_tables(PAGES[page], study, load_results(study, results), load_costs(results)) == PAGES[page]


@pytest.mark.parametrize("page", PAGES)
def test_figures_begin_no_line(page: str):
    assert not re.findall(r"^\s*<!-- [\w-]+: .+", PAGES[page], re.MULTILINE), "Markdown takes them for blocks of their own"


@pytest.mark.parametrize(("name", "arm", "base", "word"), SAID)
def test_what_is_said_in_words(name: str, arm: str, base: str, word: str):
    study, found = loaded(name)
    assert verdict(study, difference(study, found, arm, base)) == word


def test_the_verdict_of_the_readme_says_that_nothing_is_shown():
    text = re.sub("<!--.*?-->", "", words_of(PAGES["README.md"]))
    assert re.search(r"Attention that starts likewise has *[\d.]+ %: no difference to that dot product is shown\.", text)
    assert "At the best rates of small models, no loss is shown." in text


def test_means_that_are_compared_are_of_the_same_seeds():
    for name, arms in (
        (IMAGES, ("dot", "dot, spread 1", "network 16", "network 16, spread 1")),
        (PAPER, (f"dot, {AUTHORS}", f"neural, {AUTHORS}", f"dot, {AUTHORS}, first layer uniform")),
        (PAPER, (f"dot, {UNIT}", f"neural, {UNIT}")),
        (COMPACT, (f"compact 16 to 2, {BEST_RATE}", f"dot, {BEST_RATE}", f"compact, same time, {BEST_RATE}")),
    ):
        _, found = loaded(name)
        assert len({tuple(found[arm]) for arm in arms}) == 1, arms


def test_validation_is_said_where_it_says_less():
    change = change_of("shapes-images", "16 to 2", "16 to 8", "validation_accuracy")
    assert change["low"] < 0 < change["high"]


def test_the_first_layer_of_the_paper():
    text = words_of(PAPER_LIKE)
    _, found = loaded(PAPER)

    def first_layer(arm: str, when: str, figure: str) -> float:
        return statistics.mean(each["score_statistics"][when][0][figure] for each in found[arm].values())

    authors, unit = f"dot, {AUTHORS}", f"dot, {UNIT}"
    assert f"a spread of {first_layer(authors, 'start', 'spread'):.0f} with the authors' embeddings" in text
    shares = [f"{100 * first_layer(authors, when, 'saturated'):.0f} %" for when in ("start", "end")]
    assert "has over 0.99 of the weight in {} of the rows; after training, in {}.".format(*shares) in text
    assert f"With unit embeddings the spread is {first_layer(unit, 'start', 'spread'):.2f}, and no row is saturated." in text
    assert first_layer(unit, "start", "saturated") < 0.0005
    # starts "factor 1" as the same function
    assert first_layer("dot, factor 1", "start", "spread") == pytest.approx(
        found[unit][0]["score_statistics"]["start"][0]["spread"], rel=1e-3
    )
    spread, saturated = (first_layer(f"{authors}, spread 1", "end", figure) for figure in ("spread", "saturated"))
    assert f"its spread ends at {spread:.0f}, and {100 * saturated:.0f} % of its rows are saturated" in text
    neural = [f"neural, {size} embeddings" for size in ("authors'", "unit")]
    most = [
        max(each["score_statistics"][when][0]["spread"] for arm in neural for each in found[arm].values())
        for when in ("start", "end")
    ]
    assert "start with a spread of {:.2f} at most, and end with one of {:.2f} at most".format(*most) in text
    ends = [each["score_statistics"]["end"][0]["entropy"] for arm in neural for each in found[arm].values()]
    assert f"an entropy of {min(ends):.2f} to {max(ends):.2f} nats at the end" in text
    entropies = [first_layer(arm, "end", "entropy") for arm in neural]
    assert "{:.2f} nats with the authors' embeddings, and {:.2f} with unit embeddings".format(*entropies) in text
    assert f"uniform attention has {first_layer(unit, 'start', 'uniform_entropy'):.2f}" in text

    def dead_of(arm: str) -> list[int]:
        return sorted(each["scorer_health"]["end"][0]["dead"] for each in found[arm].values())

    assert dead_of(neural[1]) == [0, 0, 0, 0, 1] and "In one of the five runs with unit embeddings its scorer is dead" in text
    assert dead_of("neural, normalised embeddings") == [0, 0, 1] and "in one of the three with normalised ones" in text
    for size in (AUTHORS, UNIT):
        arm = f"dot, {size}, first layer uniform"
        assert first_layer(arm, "end", "spread") == 0.0 and first_layer(arm, "end", "entropy") > 4.57


def test_gradients_of_the_papers_first_layer():
    """A saturated layer has the larger part of the model's gradient, by its norm."""
    _, found = loaded(PAPER)

    def mean_of(arm: str, ending: str) -> float:
        histories = [each["history"] for each in found[arm].values()]
        name = next(name for entry in histories[0] for name in entry if name.endswith(ending))
        return statistics.mean(statistics.mean(entry[name] for entry in each if name in entry) for each in histories)

    norms = [mean_of(arm, ending) for arm in (f"dot, {AUTHORS}", f"dot, {UNIT}") for ending in ("/gradient", "grad_norm")]
    said = "norm of {:.1f} during training, of {:.1f} for the whole model. With unit embeddings it is {:.2f} of {:.1f}."
    assert said.format(*norms) in words_of(PAPER_LIKE)


def test_the_first_layer_of_the_papers_images():
    _, found = loaded("paper-architecture-images")
    stock, neural = (found[f"{kind}, {AUTHORS}"].values() for kind in ("dot", "neural"))
    starts = [each["score_statistics"]["start"][0]["spread"] for each in stock]
    rows = [each["score_statistics"][when][0]["saturated"] for each in stock for when in ("start", "end")]
    said = f"spreads of {min(starts):.1f} to {max(starts):.1f}, and at most {100 * max(rows):.1f} % of the rows are saturated"
    assert said in words_of(PAPER_LIKE)
    most = [
        max(entry[name] for entry in each["history"] for name in entry if re.search(r"\b0\b.*/saturated$", name))
        for each in stock
    ]
    assert sum(share > max(rows) for share in most) == 2
    assert f"In two of five seeds more are for a while, up to {100 * max(most):.0f} %." in words_of(PAPER_LIKE)
    ends = [each["score_statistics"]["end"][0]["entropy"] for each in neural]
    assert f"It ends with an entropy of {min(ends):.2f} to {max(ends):.2f} nats" in words_of(PAPER_LIKE)


def test_where_scores_end():
    """Accuracy follows how far scores have come by the end, whatever makes them, at the study's own rate."""
    text = words_of(PAPER_LIKE)
    study, found = loaded(IMAGES)

    def spread(arm: str, when: str) -> float:
        return statistics.mean(layer["spread"] for run in found[arm].values() for layer in run["score_statistics"][when])

    def accuracy(arm: str) -> float:
        return 100 * statistics.mean(run["metrics"]["test_accuracy"] for run in found[arm].values())

    assert f"The network's scores start with a spread of {spread('network 16', 'start'):.2f}" in text
    ends = [spread(arm, "end") for arm in ("dot, spread 0.14", "network 16")]
    assert "scores of the dot product spread by {:.2f} and those of the network by {:.2f}".format(*ends) in text
    fit = pooled(study, found)
    assert fit is not None
    change = fit.contrast(["network 16"], ["dot, spread 0.14"])
    assert change is not None and change[1] > 0, "is shown by all runs together"
    change = fit.contrast(["thin 16, spread 0.14"], ["network 16"])
    assert change is not None and (change[2] < 0) == ("it is behind the network, too, which all runs together show" in text)
    ends = [spread(arm, "end") for arm in ("thin 16", "thin 16, spread 0.14")]
    assert "its scores end with {:.2f} and {:.2f}.".format(*ends) in text
    own = [arm for arm, runs in found.items() if runs and not {"learning_rate", "config_overrides"} & study.arms[arm].keys()]
    rising = [arm for arm in own if spread(arm, "end") < 1.75 and "uniform" not in arm]
    by_end = {arm: accuracy(arm) for arm in sorted(rising, key=lambda arm: spread(arm, "end"))}
    for low, high, least, most in ((0.2, 0.45, 34, 37), (0.6, 1.0, 37, 39.5), (1.3, 1.75, 39, 41)):
        assert all(least < by_end[arm] < most for arm in by_end if low < spread(arm, "end") < high), by_end


def test_scores_of_few_numbers_run_away_on_text():
    text = words_of(PAPER_LIKE)
    _, found = loaded("thin-text")
    thin, network = (found[f"{kind} 2, {BEST_RATE}"][0]["score_statistics"]["end"][-1] for kind in ("thin", "network"))
    said = "scores of `thin 2` end with a spread of {:.0f}, and {:.0f} % of its rows are saturated; "
    said += "those of the network of two end with {:.1f}"
    assert said.format(thin["spread"], 100 * thin["saturated"], network["spread"]) in text and network["saturated"] == 0

    def mean(arm: str) -> float:
        return statistics.mean(run["metrics"]["test_perplexity_stride"] for run in found[f"{arm}, {BEST_RATE}"].values())

    assert all(mean(f"network {n}") < mean("uniform") < mean(f"thin {n}") for n in (2, 4))


def test_llama():
    text = words_of(PAPER_LIKE)
    _, found = loaded("llama-text")

    def of(arm: str) -> float:
        return statistics.mean(run["metrics"]["test_perplexity_stride"] for run in found[arm].values())

    dot, uniform = of("dot"), of("uniform")
    lost = [(of(arm) - dot) / (uniform - dot) for arm in ("thin 16", "thin 64", "network 16")]
    assert all(0.4 < share < 0.7 for share in lost), "about half of what scores are worth"
    saturated = statistics.mean(layer["saturated"] for layer in found["dot, twice the rate"][0]["score_statistics"]["end"])
    assert f"At 8e-3, {100 * saturated:.0f} % of the dot product's rows are saturated at the end" in text
    remedies = [of(f"{kind}, twice the rate") for kind in ("network 16", "normalised dot")]
    assert dot < min(remedies) < max(remedies) < of("uniform, twice the rate") < of("dot, twice the rate")
    for rate in ("", ", half the rate"):
        assert of(f"normalised dot{rate}") > of(f"dot{rate}") + 4, "a norm is no help at these rates"
    rates = [f"dot{rate}" for rate in ("", ", half the rate", ", twice the rate")]
    assert min(rates, key=lambda arm: found[arm][0]["metrics"]["validation_perplexity_stride"]) == "dot", "its best rate"


def test_four_times_as_many_steps():
    text = words_of(PAPER_LIKE)
    _, found = loaded("paper-architecture-text-longer")
    _, shorter = loaded(PAPER)

    def percent(runs: Results, arm: str, base: str) -> float:
        one, two = (runs[each][0]["metrics"]["test_perplexity_stride"] for each in (arm, base))
        return 100 * (one / two - 1)

    saturated, network = (found[f"{kind}, {AUTHORS}"][0]["score_statistics"]["end"][0] for kind in ("dot", "neural"))
    said = "{:.0f} % of its rows are saturated, and scores spread by {:.0f}."
    assert said.format(100 * saturated["saturated"], saturated["spread"]) in text
    assert f"still near uniform (an entropy of {network['entropy']:.2f} nats)" in text
    averaging = f"dot, {AUTHORS}, first layer uniform"
    assert f"A first layer that averages is ahead by {-percent(found, averaging, f'dot, {AUTHORS}'):.1f} %" in text
    leads = [-percent(runs, f"neural, {AUTHORS}", f"dot, {AUTHORS}") for runs in (found, shorter)]
    assert "It is ahead by {:.1f} %, where it was by {:.1f} % after 600 steps.".format(*leads) in text
    assert f"With unit embeddings the network is behind by {percent(found, f'neural, {UNIT}', f'dot, {UNIT}'):.1f} %." in text


def test_what_ran_is_counted():
    rows = re.findall(r"^\| \[`([\w-]+)`\]\(([^)]+)\) \| .+ \| (\d+) \| (\d+) of (\d+) \|$", PAPER_LIKE, re.MULTILINE)
    assert len(rows) == 14
    for name, report, *numbers in rows:
        study, found = loaded(name)
        assert (ROOT / "docs" / report).resolve() == STUDIES / name / "report.md"
        assert list(map(int, numbers)) == [len(study.arms), sum(map(len, found.values())), len(study.runs())], name


def test_where_the_code_of_runs_is_from():
    records = [json.loads(path.read_text()) for path in STUDIES.glob("*/*-[0-9].json")]
    commits = [record["environment"].get("commit") for record in records]
    unknown, changed = sum(each is None for each in commits), sum((each or "").endswith("+") for each in commits)
    said = f"Of {len(commits)} records, {unknown} name no commit, {changed} one with changes beside it"
    assert said in words_of(PAPER_LIKE)


def test_three_epochs():
    _, found = loaded("spread-images-longer")
    figures = {
        arm: sorted(100 * each["metrics"]["test_accuracy"] for each in found[arm].values())
        for arm in ("dot", "dot, spread 1", "network 16")
    }
    started, stock, network = figures["dot, spread 1"], figures["dot"], figures["network 16"]
    assert len(started) == 3 and started[0] > network[-1] and network[0] > stock[-1]
    assert f"better start ({started[0]:.1f} % to {started[-1]:.1f} %) are above all three of the stock one" in words_of(
        PAPER_LIKE
    )
    assert f"({stock[0]:.1f} % to {stock[-1]:.1f} %)" in words_of(PAPER_LIKE)
    assert f"({network[0]:.1f} % to {network[-1]:.1f} %)" in words_of(PAPER_LIKE)
    both = sorted(100 * each["metrics"]["test_accuracy"] for each in found["network 16, spread 1"].values())
    assert len(both) == 3 and both[0] > network[-1]
    assert f"a network with the better start ({both[0]:.1f} % to {both[-1]:.1f} %)" in words_of(PAPER_LIKE)


def test_a_network_that_does_not_average_beside_a_saturated_dot_product():
    _, found = loaded(PAPER)
    start, end = (found[f"neural mirrored, {AUTHORS}"][0]["score_statistics"][when][0] for when in ("start", "end"))
    said = f"with a spread of {start['spread']:.1f}, and {100 * start['saturated']:.0f} % of its rows are saturated; "
    assert f"{said}it ends at {end['spread']:.1f} and {100 * end['saturated']:.0f} %" in words_of(PAPER_LIKE)


def test_sizes_of_compact_models():
    for name, arms, share in (
        ("compact-images", ("compact 16 to 2, spread 1", "dot, spread 1"), "On images it has 12 % fewer parameters"),
        (COMPACT, ("compact 16 to 2", "dot"), "the compact form with 10 % fewer parameters"),
    ):
        _, found = loaded(name)
        compact, stock = (next(iter(found[arm].values()))["parameters"] for arm in arms)
        assert share in words_of(PAPER_LIKE) and f"{1 - compact / stock:.0%}".replace("%", " %") in share
    _, found = loaded(COMPACT)
    steps = [found[arm][0]["steps"] for arm in (f"compact, same time, {BEST_RATE}", f"dot, {BEST_RATE}")]
    assert "makes {} steps in place of {}".format(*steps) in words_of(PAPER_LIKE)
    assert f"it makes {steps[0] / steps[1] - 1:.0%} more steps".replace("%", " %") in words_of(PAPER_LIKE)


def test_weights_of_a_usual_size():
    _, found = loaded(IMAGES)
    runs = found["dot, larger weights"].values()
    spreads = [layer["spread"] for each in runs for layer in each["score_statistics"]["start"]]
    assert f"start with spreads of {min(spreads):.1f} to {max(spreads):.1f} by themselves" in words_of(PAPER_LIKE)


def test_the_start_at_other_rates():
    study, found = loaded(IMAGES)
    rates = (", half the rate", "", ", twice the rate", ", four times the rate")

    def worth(metric: str) -> list[float]:
        runs = [(found[f"dot, spread 1{rate}"][0], found[f"dot{rate}"][0]) for rate in rates]
        return [100 * (started["metrics"][metric] - stock["metrics"][metric]) for started, stock in runs]

    said = "worth {:+.1f} points at half the rate, {:+.1f} at this one, {:+.1f} at twice the rate, and {:+.1f} at four times "
    said += "(on validation images, {:+.1f}, {:+.1f}, {:+.1f} and {:+.1f})"
    assert said.format(*worth(study.metric), *worth(study.choose_by)) in words_of(PAPER_LIKE)

    def of_one_seed(arm: str, metric: str) -> float:
        return found[arm][0]["metrics"][metric]

    for arm in ("dot", "dot, spread 1"):
        best = max((f"{arm}{rate}" for rate in rates), key=lambda each: of_one_seed(each, study.choose_by))
        assert best == arm
    lower = (", a quarter of the rate", *rates[:3])
    for arm in ("dot, spread 1", "network 16, spread 1"):  # has its best rates between others
        tried = [of_one_seed(f"{arm}{rate}", study.metric) for rate in lower]
        assert max(tried) not in (tried[0], tried[-1])
    best = max(lower, key=lambda rate: of_one_seed(f"network 16, spread 1{rate}", study.choose_by))
    assert best == ", half the rate"
    high = {arm: of_one_seed(f"{arm}, four times the rate", study.metric) for arm in ("dot", "dot, spread 1", "network 16")}
    assert max(high, key=lambda arm: high[arm]) == "network 16"
    assert all(high[arm] < of_one_seed(arm, study.metric) for arm in high)


def test_other_rates_in_the_papers_architecture():
    """The network's lead is that of averaging, and it is behind where nothing is saturated."""
    text = words_of(PAPER_LIKE)
    _, found = loaded(PAPER)

    def percent(arm: str, other: str, rate: str) -> float:
        one, two = (found[f"{each}{rate}"][0]["metrics"]["test_perplexity_stride"] for each in (arm, other))
        return 100 * (one / two - 1)

    rates = (", half the rate", "", ", twice the rate", ", four times the rate")
    leads = [-percent(f"neural, {AUTHORS}", f"dot, {AUTHORS}", rate) for rate in rates]
    said = (
        "{:.1f} % below that of the saturated dot product at 1.5e-4, and {:.1f}, {:.1f} and {:.1f} % at 3e-4, 6e-4 and 1.2e-3"
    )
    assert said.format(*leads) in text
    behind = [percent(f"neural, {UNIT}", f"dot, {UNIT}", rate) for rate in rates]
    assert "behind by {:.1f}, {:.1f}, {:.1f} and {:.1f} % at 1.5e-4, 3e-4, 6e-4 and 1.2e-3".format(*behind) in text
    assert f"by {behind[0]:.1f} % at half of it, and by {behind[-1]:.1f} % at four times of it" in text
    averaging = [percent(f"neural, {AUTHORS}", f"dot, {AUTHORS}, first layer uniform", rate) for rate in rates[1:]]
    assert all(abs(difference) < 0.35 for difference in averaging)
    entropies = [found[f"{arm}, four times the rate"][0]["score_statistics"]["end"][0]["entropy"] for arm in ARMS_OF_RATES]
    assert f"a mean entropy of {entropies[0]:.2f} nats at 1.2e-3" in text and f"ends at {entropies[1]:.2f} at 1.2e-3" in text


def test_scores_of_text_grow_at_high_rates():
    _, found = loaded(TEXT)

    def at_end(arm: str, figure: str) -> float:
        return statistics.mean(layer[figure] for each in found[arm].values() for layer in each["score_statistics"]["end"])

    eight, started = "dot, eight times the rate", f"dot, spread 1, {BEST_RATE}"
    said = "grown to a spread of {:.0f}, and {:.0f} % of its rows are saturated"
    assert said.format(at_end(eight, "spread"), 100 * at_end(eight, "saturated")) in words_of(PAPER_LIKE)
    said = "(a spread of {:.0f} and {:.0f} % at the end, mean of two seeds)"
    assert len(found[started]) == 2
    assert said.format(at_end(started, "spread"), 100 * at_end(started, "saturated")) in words_of(PAPER_LIKE)
    assert f"({at_end(f'network 16, {BEST_RATE}', 'spread'):.1f} at 4e-3)" in words_of(PAPER_LIKE)


def test_the_best_rate_of_text():
    study, found = loaded(TEXT)
    for kind in ("uniform", "network 16"):
        arms = [f"{kind}, {rate} the rate" for rate in ("twice", "four times", "eight times")]
        assert min((kind, *arms), key=lambda arm: found[arm][0]["metrics"][study.choose_by]) == f"{kind}, {BEST_RATE}"
    rates = [f"dot, {rate} the rate" for rate in ("half", "twice", "four times", "eight times")]
    means = {arm: found[arm][0]["metrics"][study.choose_by] for arm in ("dot", *rates)}  # of one seed, which all have
    assert min(means, key=lambda arm: means[arm]) == f"dot, {BEST_RATE}"


def test_the_nearest_number():
    """What is said of rates, and that none is left out that is better."""
    _, found = loaded("recall-nearest")
    best = {arm: [100 * run["metrics"]["test_accuracy"] for _, run in sorted(runs.items())] for arm, runs in found.items()}
    floor = max(best["uniform"])
    few = (1, 2, 4, 16)
    assert all(max(best[f"{kind} {number}"]) < floor + 2 for kind in ("thin", "network") for number in few)
    two = best["thin 2, half the rate"]
    assert two[0] > 99.9 and len(two) == 2 and f"comes to {two[1]:.0f} % in the other" in words_of(PAPER_LIKE)
    assert all(best[f"thin {number}, half the rate"][0] > 99 for number in (4, 16))
    rates = ("half the rate", "a quarter of the rate")
    both = [arm for arm in best if arm.startswith("network") and arm.endswith(rates)]
    assert len(both) == 7 and all(max(best[arm]) < 61 for arm in both)
    assert best["last, thin 16"][0] < floor + 4 < 99 < min(best[f"last, thin 16, {rate}"][0] for rate in rates)
    assert min(best[f"{part}, network {n}"][0] for part, n in (("first", 16), *(("last", n) for n in few))) > 84
    assert all(best[f"last, compact thin {number}"][0] > 98 for number in (4, 16))
    for kind, said in (("network 1", "network 1, half the rate"), ("thin 1", "thin 1, a quarter of the rate")):
        assert max(best[said]) == max(max(best[arm]) for arm in (kind, *(f"{kind}, {rate}" for rate in rates)))
    ones = [arm for arm in best if arm.startswith(("last, network 1", "last, thin 1")) and "16" not in arm]
    for kind, said in (("network", "last, network 1 wide, half the rate"), ("thin", "last, thin 1, half the rate")):
        assert max(best[said]) == max(max(best[arm]) for arm in ones if kind in arm)


def test_gradients_are_clipped_on_images():
    _, found = loaded(IMAGES)
    norms = {
        arm: [[entry["grad_norm"] for entry in each["history"] if "grad_norm" in entry] for each in runs.values()]
        for arm, runs in found.items()
    }
    assert all(norm > 1 for runs in norms.values() for run in runs for norm in run)
    means = {arm: [statistics.mean(run) for run in norms[arm]] for arm in ("dot", "dot, spread 1")}
    assert all(4 < mean < 5.5 for mean in means["dot"]) and all(6.5 < mean < 7.5 for mean in means["dot, spread 1"])
