"""The benchmark refuses what is wrong, computes its ratios right, and says in all files what it measured."""

import csv
import dataclasses
import json
from functools import partial

import pytest
import torch
from transformers import DynamicCache

import benchmark_attention
from benchmarks import attention_modules, compact_bars
from benchmarks import bars as benchmark_bars
from benchmarks.bars import Bar, kernel_bars
from benchmarks.cases import DOT_PRODUCTS, GPU_PROVIDERS, MASKS, PHASES, PROVIDERS, SCORERS, Case, Entry, attend, draw_inputs
from benchmarks.correctness import Checker
from benchmarks.instruction_bounds import instructions_per_pair, least_seconds, pairs_of
from benchmarks.time_and_memory import FirstUse, Limits, measure_first_use, peak_bytes, time_entries
from benchmarks.whole_models import ATTENTIONS, CACHES, COMPACT, GPT2_124M, STOCK, VIT_BASE, measure_decoding, measure_steps
from hf_neural_attention.models.neural_attention_backends import BACKENDS
from hf_neural_attention.models.neural_attention_scorer import CompactScorer
from hf_neural_attention.ops import asked_backend
from tests.helpers.numerics import CPU_BACKENDS
from tools.timing_by_turns import Spread


SMALL = Case(length=40, heads=2, head_dim=16)
QUICK = Limits(repeats=2, fewest=2, seconds=0.0)
ON_CPU = [name for name in PROVIDERS if name in CPU_BACKENDS or name not in (*BACKENDS, *GPU_PROVIDERS)]
FASTEST = CPU_BACKENDS[0]

CASES = {
    **{phase: {"phase": phase} for phase in PHASES},
    "not causal": {"causal": False},
    "padding": {"mask": "padding", "batch_size": 2},
    "bool mask": {"mask": "bool"},
    "float mask": {"mask": "float", "causal": False},
    "masked decode": {"mask": "padding", "phase": "decode"},
    "dropout": {"dropout": 0.3},
    "residual": {"mode": "residual", "proj_dim": 16},
    "residual decode": {"mode": "residual", "phase": "decode"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 decode": {"dtype": "bfloat16", "phase": "decode"},
    "initial weights": {"scorer": "initial"},
    "paper's weights": {"scorer": "paper", "proj_dim": 5},
    "projections": {"projections": True},
}
TINY_GPT2 = {"vocab_size": 99, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
# has many labels, since the norms of a few numbers' rounding errors differ by chance
TINY_VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 400,
}


def spoil(monkeypatch, backend: str, change) -> None:
    """Changes what a backend returns."""
    right = BACKENDS[backend]

    def run(*tensors, **arguments):
        return change(right.run(*tensors, **arguments))

    monkeypatch.setitem(BACKENDS, backend, right._replace(run=run))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_every_provider_is_right(changes):
    case = dataclasses.replace(SMALL, **{"phase": "both", **changes})
    timings = time_entries([Entry.of(provider, case) for provider in ON_CPU], Checker(), QUICK)
    assert len(timings) == len(ON_CPU)
    for entry, timing in timings.items():
        assert len(timing.times) == 2 and min(timing.times) > 0, (entry.provider, timing.note)
        assert timing.note.startswith("all queries")


WRONG = {
    "by 1 %": (lambda output: output * 1.01, ("forward", "both")),
    "NaN": (lambda output: output * float("nan"), ("forward", "both")),
    "one number": (lambda output: output.index_put((torch.tensor(0),) * 4, torch.tensor(1e-3), accumulate=True), ("forward",)),
    "its gradient by 1 %": (lambda output: output + 0.01 * (output - output.detach()), ("backward", "both")),
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("change", "phases"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_gets_no_figure(monkeypatch, backend, change, phases):
    spoil(monkeypatch, backend, change)
    for phase in ("forward", "backward", "both"):
        entries = [Entry.of(provider, dataclasses.replace(SMALL, phase=phase)) for provider in (backend, "sdpa")]
        wrong, right = time_entries(entries, Checker(), QUICK).values()
        if phase in phases:
            assert not wrong.times and "does not match the reference" in wrong.note
        assert right.times


def test_a_part_of_the_queries_is_checked_where_there_are_too_many(monkeypatch):
    case = dataclasses.replace(SMALL, length=400, phase="both", dropout=0.1, mask="padding")
    monkeypatch.setattr("benchmarks.correctness.CHECKED_NUMBERS", case.num_pairs * 2 * case.proj_dim // 4)
    monkeypatch.setattr("benchmarks.correctness.BLOCK_NUMBERS", case.num_pairs * 2 * case.proj_dim // 50)
    assert Checker().check(Entry("blockwise", case)) == (True, "96 of 400 queries")
    spoil(monkeypatch, "blockwise", lambda output: output * 1.01)
    assert not Checker().check(Entry("blockwise", case)).passed


def test_what_relus_see_has_no_rounding_error():
    """Two orders of summation give the same bits, which is why no ReLU opens in one provider only."""
    for scorer in SCORERS:
        inputs = draw_inputs(Case(length=64, proj_dim=16, scorer=scorer, projections=True))
        hidden, weight = inputs.tensors["hidden"], inputs.tensors["in_proj"]
        key = (hidden @ weight.T)[..., :64]
        first = inputs.scorer.linear1.weight[:, 16:]
        assert torch.equal(first @ inputs.scorer.k_proj.weight @ key.mT, first @ (inputs.scorer.k_proj.weight @ key.mT))
        assert not torch.equal(hidden @ torch.randn_like(weight).T, hidden.flip(-1) @ weight.flip(-1).T)


def test_all_providers_get_the_same_inputs():
    cases = [dataclasses.replace(SMALL, proj_dim=size, scorer=scorer) for size, scorer in ((2, "random"), (16, "initial"))]
    for case in cases:
        for name, tensor in draw_inputs(cases[0]).tensors.items():
            assert torch.equal(tensor, draw_inputs(case).tensors[name])
    assert Entry.of("sdpa", cases[0]) == Entry.of("sdpa", cases[1])
    assert Entry.of("native", cases[0]) != Entry.of("native", cases[1])
    assert not torch.equal(draw_inputs(SMALL, 0).tensors["query"], draw_inputs(SMALL, 1).tensors["query"])


def test_masks_reach_the_scores():
    outputs = [attend("sdpa", draw_inputs(case), case) for case in (dataclasses.replace(SMALL, mask=mask) for mask in MASKS)]
    for index, output in enumerate(outputs):
        assert not any(torch.allclose(output, other) for other in outputs[:index])


@pytest.mark.slow
def test_memory_grows_with_the_pairs_or_with_the_tokens():
    def growth(provider: str) -> float:
        small, large = (peak_bytes(Entry(provider, Case(length=length, heads=1, phase="both"))) for length in (1024, 2048))
        assert small > 2**20
        return large / small

    assert 3.5 < growth("reference") < 4.5
    assert 1.0 < growth(FASTEST) < 2.4


@pytest.mark.slow
@pytest.mark.skipif("native" not in CPU_BACKENDS, reason="there is no compiler")
def test_first_use():
    new, later = measure_first_use()
    assert new.call > new.load > 5 * later.call > 0


def files_of(path) -> tuple[list[dict], list[dict], list[list[str]]]:
    record = json.loads(path.with_suffix(".json").read_text())
    with path.with_suffix(".csv").open() as file:
        cells = list(csv.DictReader(file))
    lines = [line for line in path.with_suffix(".md").read_text().splitlines() if line.startswith("|")]
    assert record["environment"]["torch"] == torch.__version__ and record["command"]
    assert len(record["rows"]) == len(cells) == len(lines) - 2
    for row, line in zip(record["rows"], cells, strict=True):
        assert {name: "" if value is None else str(value) for name, value in row.items()} == {n: line[n] for n in row}
    return record["rows"], cells, [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_a_sweep_leaves_files_that_say_the_same(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, "blockwise", lambda output: output * 1.01)
    output = tmp_path / "cards" / "sweep-0.1"
    axes = "--length 32 64 --phase forward both --heads 2 --head_dim 16 --provider sdpa blockwise reference --proj_dim 2 3"
    benchmark_attention.main([*axes.split(), "--repeats", "2", "--fewest", "2", "--output", f"{output}"])
    rows, _, table = files_of(output.with_name("sweep-0.1.x"))
    assert len(rows) == 4 * (1 + 2 * 2)
    for row, cells in zip(rows, table[2:], strict=True):
        if row["provider"] == "blockwise":
            assert "seconds" not in row and "to_sdpa" not in row
            assert cells[-1].startswith("not timed: does not match the reference") and not any(cells[4:-1])
        else:
            assert row["seconds_25%"] <= row["seconds"] <= row["seconds_75%"] and row["turns"] == 2
            assert cells[-1] == row["note"] == "all queries" and all(cells[4:])
        assert (row["proj_dim"] is None) == (row["provider"] in DOT_PRODUCTS) == (row.get("to_sdpa") == 1.0)
    assert output.with_name("sweep-0.1.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed in (card := output.with_name("sweep-0.1.md").read_text()) and "not measured on a GPU" in card
    assert "(sweep-0.1.png)" in card


def test_what_would_take_too_long_is_left_out():
    flags = "--length 16 64 --heads 2 --provider reference sdpa"
    arguments = benchmark_attention.parse_arguments(flags.split())
    limits = Limits(repeats=2, fewest=2, call=0.0)
    rows = list(benchmark_attention.sweep(arguments, Checker(), limits))
    timed = {(row["provider"], row["length"], row["phase"]) for row in rows if "seconds" in row}
    assert {length for provider, length, _ in timed if provider == "reference"} == {16}
    assert {length for provider, length, _ in timed if provider == "sdpa"} == {16, 64}
    assert "a call would take" in rows[-2]["note"]
    timings = time_entries([Entry("reference", Case())], Checker(), Limits(memory=0.1))
    assert "GiB for its pairs" in timings[Entry("reference", Case())].note


@pytest.mark.parametrize("preset", benchmark_attention.LIMITS)
def test_presets_can_be_listed(preset, capsys):
    benchmark_attention.main(["--preset", preset, "--dry_run"])
    assert len(capsys.readouterr().out.splitlines()) >= 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--preset bars --length 5", "leave out --length"),
        ("--causal maybe", "neither yes nor no"),
        ("--phase decode --projections yes", "does not go with the phase"),
        pytest.param(
            "--device cuda", "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
)
def test_flags_that_do_not_fit(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark_attention.main(flags.split())
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_bars_are_those_of_the_issue():
    bars = {(item.bar.what, item.bar.proj_dim): item for group in kernel_bars("cpu") for item in group}
    assert len(bars) == 2 * (7 + 2 * 3 + 1)
    assert bars["forward + backward", 16].bar.bound == 1.0 and bars["forward + backward", 16].over.provider == "sdpa"
    module = bars["the authors' module, projections included, forward", 2]
    assert module.entry == ("literal", Case(projections=True)) and module.over == ("native", Case(projections=True))
    bf16 = bars["bf16 over fp32, forward + backward", 2]
    assert bf16.entry == ("native", Case(phase="both", dtype="bfloat16")) and bf16.over == ("native", Case(phase="both"))


def test_what_is_reached():
    bar = Bar("a", 2, 0.5)
    assert bar.row(0.5)["reached"] and not bar.row(0.6)["reached"] and not bar.row(None)["reached"]
    assert bar.row(Spread(0.4, 0.5, 9.0))["measured_75%"] == 9.0 and "measured" not in bar.row(None)
    assert not bar.row(float("nan"))["reached"]
    speedup = bar._replace(at_least=True)
    assert speedup.row(0.6)["reached"] and not speedup.row(0.4)["reached"]


def test_all_bars_come_into_the_files(tmp_path, monkeypatch):
    """With few tokens, without the native kernel, and a tiny GPT-2 whose backend is wrong."""

    def shrink(entry: Entry) -> Entry:
        provider = "reference" if entry.provider == "native" else entry.provider
        return Entry.of(provider, dataclasses.replace(entry.case, length=32, batch_size=1))

    groups = [
        [item._replace(entry=shrink(item.entry), over=shrink(item.over)) for item in group] for group in kernel_bars("cpu")
    ]
    monkeypatch.setattr(benchmark_bars, "kernel_bars", lambda device: groups)
    monkeypatch.setattr(benchmark_bars, "peak_bytes", lambda entry: 2**29 * entry.case.proj_dim)
    monkeypatch.setattr(benchmark_bars, "measure_first_use", lambda: (FirstUse(3.0, 2.0), FirstUse(0.2, 0.1)))
    monkeypatch.setattr(benchmark_bars, "measure_steps", partial(measure_steps, **TINY_GPT2))
    spoil(monkeypatch, FASTEST, lambda output: output * 1.01)
    benchmark_attention.main(["--preset", "bars", "--repeats", "2", "--fewest", "2", "--output", f"{tmp_path / 'bars'}"])
    rows, _, table = files_of(tmp_path / "bars.x")
    reached = {(row["what"], row["proj_dim"]): row["reached"] for row in rows}
    assert len(rows) == len(reached) == 28 + 2 + 2 + 4
    memory = [reached[what] for what in reached if "memory" in what[0]]
    first_uses = [reached[what] for what in reached if "first use" in what[0]]
    assert (memory, first_uses) == ([True, False], [True, False])
    for row, cells in zip(rows[-4:], table[-4:], strict=True):
        assert "measured" not in row and cells[3:5] == ["not measured", "**no**"] and "does not match" in row["note"]
    for row in rows[:28]:
        below = row["measured"] <= row["bound"]
        assert row["reached"] == (not below if row["at_least"] else below) and row["note"] == "all queries"


def test_bars_of_the_compact_form_come_into_the_files(tmp_path, monkeypatch):
    """With few tokens, without the native kernel, and with tiny models."""

    def shrink(entry: Entry) -> Entry:
        provider = "reference" if entry.provider == "native" else entry.provider
        return Entry.of(provider, dataclasses.replace(entry.case, length=32))

    groups = [
        [item._replace(entry=shrink(item.entry), over=shrink(item.over)) for item in group]
        for group in compact_bars.operation_bars("cpu")
    ]

    def tiny_steps(family, *arguments, **options):
        fields = TINY_GPT2 if family is GPT2_124M else TINY_VIT
        return measure_steps(family, *arguments, **options | fields)

    def tiny_decoding(cached_tokens, *arguments, **options):
        return measure_decoding(cached_tokens // 64, *arguments, **options | TINY_GPT2 | {"n_positions": 80})

    monkeypatch.setattr(compact_bars, "operation_bars", lambda device: groups)
    monkeypatch.setattr(compact_bars, "measure_steps", tiny_steps)
    monkeypatch.setattr(compact_bars, "measure_decoding", tiny_decoding)
    words = ["--preset", "compact", "--repeats", "2", "--fewest", "2", "--output", f"{tmp_path / 'compact'}"]
    benchmark_attention.main(words)
    rows, _, _ = files_of(tmp_path / "compact.x")
    assert len(rows) == 4 + 2 + 1 + 2 + 1 + 2 and all("measured" in row for row in rows)
    by_name = {row["what"]: row["measured"] for row in rows}
    assert by_name["GPT-2 124M compact, bytes of a cached token"] == (2 + 8) / (8 + 8)
    assert by_name["GPT-2 124M compact, parameters"] < 1
    assert all(row["least_seconds"] > 0 for row in rows[:4]) and "least ms by count" in (tmp_path / "compact.md").read_text()


def test_modules_against_the_length_come_into_the_files(tmp_path, monkeypatch):
    measure = partial(attention_modules.measure_modules, lengths=(16, 32))
    monkeypatch.setattr(benchmark_attention, "measure_modules", measure)
    monkeypatch.setattr(attention_modules, "in_own_process", lambda *arguments: 2**20)
    monkeypatch.setattr(attention_modules, "CHECKED_LENGTH", 32)
    words = ["--preset", "modules", "--repeats", "2", "--fewest", "2", "--output", f"{tmp_path / 'modules'}"]
    benchmark_attention.main(words)
    rows, _, card = files_of(tmp_path / "modules.x")
    assert len(rows) == 2 * 2 * len(attention_modules.MODULES) and all(row["note"] == "at 32 tokens" for row in rows)
    assert all(row["to_sdpa"] == 1 for row in rows if row["provider"] == "stock")
    assert card[2 + 3][0] == "compact, (16, 2)" and (tmp_path / "modules.png").stat().st_size > 10_000


def test_a_module_that_is_wrong_is_not_timed(monkeypatch):
    forward = CompactScorer.forward

    def wrong(self, *args, **kwargs):
        """By the factor of a percent under all backends but the reference."""
        output, weights = forward(self, *args, **kwargs)
        return output * (1 if asked_backend().name == "reference" else 1.01), weights

    monkeypatch.setattr(CompactScorer, "forward", wrong)
    monkeypatch.setattr(attention_modules, "CHECKED_LENGTH", 32)
    assert attention_modules.check_module("stock").passed
    assert attention_modules.check_module("compact 2x1").message.startswith("does not match the reference")


def test_instructions_of_a_pair():
    """By hand, of ops/native: 16 maxima, 32 products, two ReLUs and products; the exponential and its sum; 64 values."""
    assert instructions_per_pair((16, 2), 64, "forward") == 16 + 32 + 4 + 10 + 64
    assert instructions_per_pair((2, 1), 64, "both") == (2 + 2 + 2 + 10 + 64) + (6 + 10 + 128 + 2 + 4 + 2 * 7)
    assert pairs_of(Case(length=4, heads=2)) == 2 * 10 and pairs_of(Case(length=4, heads=2, causal=False)) == 2 * 16
    assert least_seconds(Case(length=4, heads=2, proj_dim=2), rate=1e9) == 20 * 80 / 1e9


def test_shapes_of_the_network():
    case = Case(shape="16x2")
    assert draw_inputs(case).scorer.hidden_dims == case.hidden_dims == (16, 2) and Case().hidden_dims is None
    assert Entry.of("sdpa", case) == Entry.of("sdpa", Case())
    for wrong in ("16", "x2", "16x0", "16x2x1"):
        with pytest.raises(ValueError, match="must be paper, or two sizes like 16x2"):
            Case(shape=wrong)


def test_steps_of_whole_models(monkeypatch):
    for family, fields in ((GPT2_124M, TINY_GPT2), (VIT_BASE, TINY_VIT)):
        rows = list(measure_steps(family, "cpu", QUICK, 2, (0.0, 0.1), True, **fields))
        assert [row["attention"] for row in rows] == list(ATTENTIONS) * 3
        assert all(row["turns"] == 2 and row["seconds"] > 0 for row in rows)
        assert [row["to_stock"] for row in rows[:: len(ATTENTIONS)]] == [1.0] * 3
        assert {row["note"] for row in rows} == {"", "logits and gradient, without dropout"}
    rows = list(measure_steps(VIT_BASE, "cpu", QUICK, 2, (0.0,), False, attentions=(STOCK, COMPACT), **TINY_VIT))
    assert [row["note"] for row in rows] == ["", "logits and gradient, without dropout"] and rows[1]["attention"] == COMPACT
    spoil(monkeypatch, FASTEST, lambda output: output * 1.01)
    rows = list(measure_steps(GPT2_124M, "cpu", QUICK, 2, (0.0,), False, **TINY_GPT2))
    assert "seconds" in rows[0] and not any("seconds" in row for row in rows[1:])


def test_decoding_with_every_cache(monkeypatch):
    """Two float32 numbers for a key of 8; the bytes of the others count both."""
    attentions = [STOCK, 'neural_layers="all"']
    rows = list(measure_decoding(20, attentions, list(CACHES), "cpu", QUICK, **TINY_GPT2 | {"n_positions": 40}))
    whole, projected = 2 * 4 * (8 + 8) * 4, 2 * 4 * (2 + 8) * 4
    assert [row["bytes_per_token"] for row in rows] == [whole] * 4 + [projected] * 2
    assert all(row["turns"] == 2 and row["note"] == "same tokens" for row in rows)
    assert rows[0]["to_stock"] == 1.0 and rows[-1]["to_stock"] != 1.0
    rows = list(measure_decoding(20, [STOCK, COMPACT], ["DynamicCache"], "cpu", QUICK, **TINY_GPT2 | {"n_positions": 40}))
    assert [row["bytes_per_token"] for row in rows] == [whole, projected] and rows[1]["note"] == "same tokens"


def test_caches_that_lead_elsewhere_get_no_figure(monkeypatch):
    class Forgetful(DynamicCache):
        def update(self, keys, values, *args, **kwargs):
            keys, values = super().update(keys, values, *args, **kwargs)
            return keys, values * (torch.arange(values.shape[2]) > 5)[:, None]

    monkeypatch.setitem(CACHES, "StaticCache", lambda model, room: Forgetful(config=model.config))
    rows = list(
        measure_decoding(20, [STOCK], ["DynamicCache", "StaticCache"], "cpu", QUICK, **TINY_GPT2 | {"n_positions": 40})
    )
    assert "seconds" in rows[0] and "seconds" not in rows[1] and "other tokens" in rows[1]["note"]
