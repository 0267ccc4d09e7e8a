"""Figures in the README and in docs/ are those of the cards: tables are made again from the JSON beside these.

The long tables of the studies are in tests/recipes/test_study.py, the families in tests/patching/test_family_table.py.
"""

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student

from benchmarks.instruction_bounds import instructions_per_pair


ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
README, RESULTS, SPEED, PATCHING, START, EXPORT, INSIDE = (
    " ".join((ROOT / name).read_text().split())
    for name in (
        "README.md",
        "docs/results.md",
        "docs/speed-and-backends.md",
        "docs/patching.md",
        "docs/how-scorers-start.md",
        "docs/publishing-and-export.md",
        "docs/looking-inside.md",
    )
)
METRICS = {"images": ("test_accuracy", 100), "images-longer": ("test_accuracy", 100), "text": ("test_perplexity_stride", 1)}


def read(name: str) -> dict[str, Any]:
    return json.loads((CARDS / f"{name}.json").read_text())


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def runs_of(study: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (CARDS / "studies" / study).glob("*-[0-9].json")]


def figures_of(study: str, arm: str) -> dict[int, float]:
    """By seed, accuracies in percent."""
    metric, factor = METRICS[study]
    found = {each["seed"]: factor * each["metrics"][metric] for each in runs_of(study) if each["arm"] == arm}
    assert len(found) == 3, (study, arm)
    return found


def difference(study: str, arm: str, other: str) -> tuple[str, str, str]:
    """Mean of the differences paired by seed, its 95 % interval, and what that shows."""
    ours, theirs = figures_of(study, arm), figures_of(study, other)
    pairs = [ours[seed] - theirs[seed] for seed in ours]
    mean = statistics.mean(pairs)
    half = float(student.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / len(pairs) ** 0.5
    low, high = mean - half, mean + half
    lower_is_better = study == "text"
    word = "no difference shown" if low <= 0 <= high else "better" if (high < 0) == lower_is_better else "worse"
    return f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}", word


SLOW = "all layers, 16, a quarter of the rate"
SLOW_DOT = "dot, a quarter of the rate"
# Lists what the first cells of a row say, then the study and the two arms
COMPARED = [
    ("the dot product, all else equal", "2,112", "5e-4", "images-longer", "all layers, 16", "dot"),
    ("the dot product, all else equal", "500", "1e-3", "images", "all layers, 16", "dot"),
    ("the dot product, all else equal", "500", "5e-4", "images", "all layers, 16, half the rate", "dot, half the rate"),
    ("the dot product, all else equal", "500", "2.5e-4", "images", SLOW, SLOW_DOT),
    ("the dot product with 21 % more steps", "500", "1e-3", "images", "all layers, 16", "dot, more time"),
    ("the dot product with 16 % more steps", "500", "2.5e-4", "images", SLOW, f"{SLOW_DOT}, more time"),
    ("the dot product with as many parameters", "500", "1e-3", "images", "all layers, 16", "dot, more parameters"),
    ("`neural_proj_dim` 2", "2,112", "5e-4", "images-longer", "first layer, 2", "dot"),
    ("`neural_proj_dim` 2", "500", "1e-3", "images", "first layer, 2", "dot"),
    ("`neural_proj_dim` 8", "500", "1e-3", "images", "first layer, 8", "dot"),
    ("`neural_proj_dim` 16", "500", "1e-3", "images", "first layer, 16", "dot"),
    ('`"replace"`', "5e-4", "text", "all layers, 16, half the rate", "dot, half the rate"),
    ('`"replace"`', "1e-3", "text", "all layers, 16", "dot"),
    ('`"replace"`', "2e-3", "text", "all layers, 16, twice the rate", "dot, twice the rate"),
    ('`"residual"`', "1e-3", "text", "all layers, 16, residual", "dot"),
]


@pytest.mark.parametrize("case", COMPARED, ids=" ".join)
def test_differences(case: tuple[str, ...]):
    *cells, study, arm, other = case
    assert row(*cells, *difference(study, arm, other)) in RESULTS


SCORERS = "all layers, 2, per head"
OTHERS = [
    ("dot product: a quarter of the rate, less the recipe's rate", "images", SLOW_DOT, "dot"),
    ("dot product: twice the rate, less the recipe's rate", "text", "dot, twice the rate", "dot"),
    ('first layer, 2: `"mirrored"`, less the paper\'s start', "images", "first layer, 2", "first layer, 2, paper's start"),
    ('first layer, 2: `"mirrored"`, less the paper\'s start', "text", "first layer, 2", "first layer, 2, paper's start"),
    (f'{SCORERS}: `"mirrored"`, less the paper\'s start', "text", SCORERS, f"{SCORERS}, paper's start"),
    ("all layers, 16: a network per head, less one for all heads", "images", "all layers, 16, per head", "all layers, 16"),
    ("all layers, 16: a network per head, less one for all heads", "text", "all layers, 16, per head", "all layers, 16"),
]


@pytest.mark.parametrize("case", OTHERS, ids=" ".join)
def test_other_differences(case: tuple[str, str, str, str]):
    words, study, arm, other = case
    mean, bounds, verdict = difference(study, arm, other)
    unit = "in perplexity" if study == "text" else "points"
    assert row(words, study, f"{mean} {unit}", bounds, verdict) in RESULTS


def test_results_in_the_readme():
    change, bounds, word = difference("images-longer", "all layers, 16", "dot")
    assert word == "better" and f"by {change} points after three epochs (95 % interval: {bounds})" in README
    assert difference("text", "all layers, 16, twice the rate", "dot, twice the rate")[2] == "no difference shown"
    change, bounds, _ = difference("images", SLOW_DOT, "dot")
    assert f"{change} points to the dot product on images (95 % interval: {bounds})" in " ".join(README.split())


def dead(study: str, arm: str) -> tuple[int, int, int]:
    """Scorers of all seeds that were dead at the start and at the end, and all of them."""
    health = [each["scorer_health"] for each in runs_of(study) if each["arm"] == arm]
    start, end = (sum(layer["dead"] for each in health for layer in each[when]) for when in ("start", "end"))
    return start, end, sum(layer["scorers"] for each in health for layer in each["end"])


def test_dead_scorers():
    assert dead("images", "first layer, 2, paper's start") == (1, 1, 3)
    assert dead("text", f"{SCORERS}, paper's start") == (15, 15, 36)
    assert "15 of 36 in the text models with a network per head" in README
    assert "one of three image runs, and 15 of 36" in RESULTS
    arms = {(study, each["arm"]): each["settings"] for study in METRICS for each in runs_of(study)}
    mirrored = [
        arm
        for arm, settings in arms.items()
        if settings.get("neural_init") != "paper" and settings.get("neural_mode") != "residual"
    ]
    counts = [dead(*arm) for arm in mirrored]
    assert not any(end for _, end, _ in counts)
    number = sum(scorers for _, _, scorers in counts)
    for page in (README, RESULTS, START):
        assert re.search(rf"Of {number} scorers (in \[the studies\]\(results.md\) )?that started `\"mirrored\"`", page)


def bars(what: str) -> Iterable[str]:
    """Ratios of machine A and B at `neural_proj_dim` 2, then at 16 where that was measured."""
    found = [read(f"benchmarks/{name}")["rows"] for name in ("bars", "bars_xeon")]
    for size in (2, 16):
        for rows in found:
            yield from (f"{each['measured']:.2f}" for each in rows if each["what"] == what and each["proj_dim"] == size)


VIT = "batch 8, 8 heads of 96, 785 tokens, not causal"
BARS = {
    "forward": "forward",
    "forward and backward": "forward + backward",
    "forward, 4,096 tokens": "forward, 4,096 tokens",
    f"forward, the paper's ViT ({VIT})": ("forward, not causal, batch 8, 8 heads, head_dim 96, 785 tokens (the paper's ViT)"),
    "forward and backward, batch 16, 4 heads, 256 tokens": "forward + backward, batch 16, 4 heads, 256 tokens",
    'forward, mode `"residual"`': "residual mode, forward",
    "one token against 4,096 cached, keys projected, as in a `NeuralCache`": "decode, one token against 4,096 cached",
}


def test_speed():
    for words, what in BARS.items():
        assert row(words, *bars(what)) in SPEED
    for words in ("forward", "forward and backward"):
        assert row(words, *bars(BARS[words])) in README
    for words, layers in (("all", '"all"'), ("the first", "[0]")):
        for dropout in ("0.0", "0.1"):
            what = f"GPT-2 124M, training step, 1 x 1,024 tokens, dropout {dropout}, neural_layers={layers}"
            assert row(words, dropout, *bars(what)) in SPEED


def test_cache():
    rows = read("benchmarks/cache")["rows"]

    def ratios(attention: str, cache: str) -> list[str]:
        found = [each for each in rows if each["attention"] == attention and each["cache"] == cache]
        return [f"{each['to_stock']:.2f}" for each in sorted(found, key=lambda each: each["cached_tokens"])]

    assert row("stock, SDPA", "`StaticCache`", *ratios("stock, SDPA", "StaticCache")) in SPEED
    for cache, words in (
        ("DynamicCache", "`DynamicCache`"),
        ("NeuralCache", "`NeuralCache`"),
        ("NeuralCache, fixed size", "`NeuralCache`, fixed size"),
    ):
        assert row("all layers neural", words, *ratios('neural_layers="all"', cache)) in SPEED
    stock, neural = (
        next(x for x in rows if x["cache"] == cache)["bytes_per_token"] for cache in ("DynamicCache", "NeuralCache")
    )
    assert f"a token takes {neural:,.0f} bytes instead of {stock:,.0f}" in SPEED


def test_memory():
    (found,) = (
        each
        for each in read("benchmarks/lengths")["rows"]
        if (each["provider"], each["length"], each["phase"], each["proj_dim"]) == ("native", 16384, "both", 2)
    )
    assert f"backward over 16,384 tokens need {found['peak_bytes'] / 2**20:.0f} MiB beyond the inputs" in SPEED


def test_how_scorers_start():
    results = read("studies/initialization")["results"]
    for size in ("2", "4", "8", "16"):
        paper, ours = results["paper"][size], results["mirrored"][size]
        dead = [f"{100 * each['dead']:.1f}".replace("0.0", "0") + " %" for each in (paper, ours)]
        assert row(size, dead[0], f"{paper['std_median']:.3f}", dead[1], f"{ours['std_median']:.2f}") in START


def test_expressiveness():
    rows = [each for each in read("studies/expressiveness")["rows"] if each["width"] == 2]
    assert len(rows) == 5
    for each in rows:
        figures = (each["dot_product"], each["network"], each["least_of_embeddings"])
        assert row(each["function"], *(f"{figure:.3f}" for figure in figures)) in RESULTS


def test_recipes():
    for name, metric, form in (
        ("neural-gpt2-wikitext2-small", "test_perplexity_stride", "{:.1f}"),
        ("neural-vit-cifar10-small", "test_accuracy", "{:.1%}"),
    ):
        dot, neural = (read(f"models/{name}")["results"][arm] for arm in ("dot", "neural"))
        figures = [form.format(each["metrics"][metric]).replace("%", " %") for each in (dot, neural)]
        ratio = neural["seconds_in_turn"] / dot["seconds_in_turn"]
        assert f"{' | '.join(figures)} | x {ratio:.2f} | [card](../model_cards/models/{name}.md) |" in RESULTS


def test_patched_checkpoints():
    for name, metric, form in (
        ("patched-gpt2-wikitext2", "test_perplexity_stride", "{:.1f}"),
        ("patched-vit-cifar10", "test_accuracy", "{:.1%}"),
    ):
        # reads the card, since the JSON has the last stages only
        card = (CARDS / f"models/{name}.md").read_text()
        last_cells = [
            re.findall(rf"^\| {stage} \|.*\| ([\d.]+) \|$", card, re.MULTILINE)
            for stage in ("checkpoint", "patched", "calibrated")
        ]
        figures = [float(figure) for (figure,) in last_cells]
        figures += [read(f"models/{name}")["results"][arm]["metrics"][metric] for arm in ("neural", "dot")]
        cells = [form.format(figure).replace("%", " %") for figure in figures]
        assert f"{' | '.join(cells)} | [card](../model_cards/models/{name}.md) |" in PATCHING


def test_int8():
    for each in read("models/int8-gpt2-wikitext2")["rows"]:
        assert row(each["weights"], f"{each['perplexity']:.4f}", f"{each['megabytes']:.2f}") in EXPORT


def test_long_runs():
    days = {}
    for name in ("wikitext103", "cifar100"):
        found = read(f"benchmarks/estimate-{name}")
        dot = found["arms"]["dot"]
        seconds = dot["seconds_per_step"] * found["steps"] + dot["seconds_of_evaluation"] * found["evaluations"]
        days[name] = seconds / (24 * 3600)
    assert round(days["wikitext103"] / 7) == 7 and round(days["cifar100"] / 30.4) == 9
    for page in (README, RESULTS):
        assert "seven weeks for one" in page and "nine months for one" in page


def bytes_of(parameters: int, per_token: int, tokens: int) -> int:
    """What a decode step of GPT-2 124M reads: all weights but those of positions, in float32, and the cache."""
    return 4 * (parameters - 1024 * 768) + per_token * tokens


def test_bars_of_the_compact_form():
    found = read("benchmarks/compact")["rows"]
    for bar in found:
        assert row(bar["what"], f"{bar['measured']:.2f}", f"{bar['bound']:.2f}") in SPEED
    measured = {bar["what"]: f"{bar['measured']:.2f}" for bar in found}
    step, dropout = (
        measured[f"GPT-2 124M compact, training step, 1 x 1,024 tokens, dropout {rate}"] for rate in ("0.0", "0.1")
    )
    decode = [measured[f"GPT-2 124M, untied compact, decode, {tokens} cached tokens"] for tokens in ("1,024", "4,096")]
    vit = measured["ViT-B/16 compact, training step, 4 images, dropout 0.0, shape 16x2"]
    wide, narrow, wide_both, narrow_both = (
        [f"{bar['least_seconds'] / seconds:.0%}" for seconds in (bar["seconds"], bar["bound"] * bar["over_seconds"])]
        for bar in found[:4]
    )
    said = f"It took 5.8 ms, which is {narrow[0]} of that rate, and its aim asks for {narrow[1]}."
    assert said.replace("%", " %") in " ".join(SPEED.split())
    reached, asked = zip(wide, wide_both, narrow_both, strict=True)
    others = "The other three rows reach {}, {} and {}, where their aims ask for {}, {} and {}.".format(*reached, *asked)
    assert others.replace("%", " %") in " ".join(SPEED.split())
    steps = [next(bar for bar in found if f"dropout {rate}" in bar["what"]) for rate in ("0.0", "0.1")]
    assert [f"{bar['seconds']:.1f}" for bar in steps] == ["5.3", "5.3"] and "as long as without (5.3 s)" in SPEED
    low, high = steps[0]["measured_25%"], steps[0]["measured_75%"]
    assert f"the quartiles of GPT-2's without dropout are {low:.2f} and {high:.2f}" in " ".join(SPEED.split())
    assert f"{low:.2f} to {high:.2f}" in README
    assert f"{steps[1]['over_seconds'] / steps[0]['over_seconds']:.1f}" == "1.5" and "takes 1.5 times as long with" in SPEED
    by_bytes = [bytes_of(110_708_604, 38_016, tokens) / bytes_of(124_439_808, 73_728, tokens) for tokens in (1024, 4096)]
    assert "compact would take {:.2f} of stock after 1,024 tokens, and {:.2f} after 4,096".format(*by_bytes) in SPEED
    of_sdpa = found[1]["least_seconds"] / instructions_per_pair((2, 1), 64, "forward") * 138 / found[1]["over_seconds"]
    assert f"SDPA, with 138 instructions of a pair, reaches {of_sdpa:.0%}.".replace("%", " %") in " ".join(SPEED.split())
    assert row("number of parameters", measured["GPT-2 124M compact, parameters"], "0.88") in README
    assert row("time of a training step without dropout", step, vit) in README
    assert row("time of a training step, dropout 0.1", dropout, "not measured") in README
    assert row("time of a token after 1,024 others, and after 4,096", ", ".join(decode), "no decoding") in README
    assert row("bytes of a token in the cache", measured["GPT-2 124M compact, bytes of a cached token"], "no cache") in README
    page = " ".join((ROOT / "docs/compact-form.md").read_text().split())
    assert f"takes {step} of the time of stock GPT-2, and a token after 4,096 others {decode[1]}." in page


def test_shapes():
    ratios = {(each["phase"], each["shape"]): each["to_sdpa"] for each in read("benchmarks/shapes")["rows"]}
    for first in (2, 4, 8, 16, 32):
        assert row(str(first), *(f"{ratios['both', f'{first}x{second}']:.2f}" for second in (1, 2, 4, 8))) in SPEED
