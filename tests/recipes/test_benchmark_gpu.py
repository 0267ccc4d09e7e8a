"""What `make gpu` runs: planned and found on the CPU, where it says what it would do; and what is timed there alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmark_attention
import benchmark_gpu
from benchmark_gpu import Step
from benchmarks.cases import Case, Entry, draw_inputs, reason_against
from benchmarks.correctness import Check, Checker
from benchmarks.flex import network_score_mod
from benchmarks.time_and_memory import check_or_reason
from hf_neural_attention.models.neural_attention_reference import key_features, query_features, reference_scores
from tests.helpers.running import ROOT, run_in


SMALL = Case(length=40, heads=2, head_dim=16)


def test_without_a_gpu_it_says_what_it_would_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(benchmark_gpu, "gpu_is_here", lambda: False)
    assert benchmark_gpu.main([]) == 0
    printed = capsys.readouterr().out
    assert "There is no GPU here" in printed and printed.count("at most") == 3
    for word in ("-m gpu", "--preset gpu ", "--preset gpu-models"):
        assert word in printed


def test_it_needs_nothing_but_python():
    words = [sys.executable, "-I", "-S", str(ROOT / "recipes" / "benchmark_gpu.py"), "--dry_run"]
    assert "This would run" in subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_all_tests_that_need_a_gpu_are_run():
    marked = re.compile(r"^@pytest\.mark\.gpu$|^    return pytest\.mark\.gpu\(", re.MULTILINE)
    found = {path for path in (ROOT / "tests").rglob("test_*.py") if marked.search(path.read_text())}
    assert found == {ROOT / name for name in benchmark_gpu.GPU_TESTS}


def test_steps_fit_and_can_be_parsed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    steps = benchmark_gpu.plan(Path("cards"))
    assert sum(step.seconds for step in steps) + len(steps) * benchmark_gpu.STOP_SECONDS <= benchmark_gpu.TOTAL_SECONDS
    assert all((ROOT / name).exists() for name in benchmark_gpu.GPU_TESTS)
    for step in steps[1:]:
        arguments = benchmark_attention.parse_arguments(step.words[1:])
        assert arguments.device == "cuda" and len(list(benchmark_attention.plan(arguments))) >= 6


@pytest.mark.slow
def test_tests_for_gpus_are_found():
    option, module, *words = benchmark_gpu.plan(Path())[0].words
    assert (option, module) == ("-m", "pytest")
    found = run_in(ROOT, Path(pytest.__file__).with_name("__main__.py"), *words, "--collect-only")
    assert all(name in found for name in benchmark_gpu.GPU_TESTS) and "test_gpu_dropout_and_repeated_runs" in found


@pytest.mark.slow
def test_an_environment_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    if not torch.cuda.is_available():
        assert benchmark_gpu.reason_against(Path(sys.executable)) == "torch sees no GPU"
    monkeypatch.setattr(benchmark_gpu, "NEEDED", ("torch", "no_such_package"))
    assert benchmark_gpu.reason_against(Path(sys.executable)) == "no_such_package missing"


def test_steps_that_fail_or_take_too_long(tmp_path: Path):
    python = Path(sys.executable)
    assert benchmark_gpu.run_step(python, Step("right", ["-c", "pass"], 60), 60) is None
    assert benchmark_gpu.run_step(python, Step("wrong", ["-c", "raise SystemExit(3)"], 60), 60) == "ended with 3"
    # writes what it has when it is stopped, as the benchmark does
    code = "import sys, time, pathlib\ntry: time.sleep(60)\nfinally: pathlib.Path(sys.argv[1]).write_text('card')"
    reason = benchmark_gpu.run_step(python, Step("slow", ["-c", code, str(tmp_path / "card")], 60), 4)
    assert reason == "was stopped after 4 s" and (tmp_path / "card").read_text() == "card"


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("proj_dim", [2, 16])
def test_the_network_as_a_score_mod(proj_dim: int, adds: bool):
    """Scores and gradients of the captured tensors, with indices of all pairs in place of each pair's."""
    inputs = draw_inputs(Case(length=9, heads=2, head_dim=16, proj_dim=proj_dim, phase="both"))
    scorer = inputs.scorer.double()
    query, key = (inputs.tensors[name].detach().double() for name in ("query", "key"))
    weights = scorer.weights()
    u, w = query_features(query, weights), key_features(key, weights)
    score_mod = network_score_mod(u, w, weights, adds)
    start = torch.ones(1, 2, 9, 9, dtype=torch.float64)
    ours = score_mod(start, *torch.meshgrid(*(torch.arange(size) for size in start.shape), indexing="ij"))
    exact = reference_scores(query, key, weights, residual_scale=None) + (start if adds else 0.0)
    ours_centred, exact_centred = (scores - scores.mean() for scores in (ours, exact))  # b3 is left out
    torch.testing.assert_close(ours_centred, exact_centred)
    parameters = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    for ours_gradient, exact_gradient in zip(
        *(torch.autograd.grad(scores.square().sum(), parameters) for scores in (ours_centred, exact_centred)), strict=True
    ):
        torch.testing.assert_close(ours_gradient, exact_gradient)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", [SMALL, Case(length=40, heads=2, head_dim=16, mode="residual", causal=False)], ids=str)
def test_flex_attention_is_right_where_it_runs(case: Case):
    assert Checker().check(Entry("flex", case)) == (True, "all queries")


def test_what_gpus_alone_run_is_named_with_the_reason():
    assert reason_against(Entry("flash", SMALL), 8.0) == reason_against(Entry("flex", SMALL), 8.0) == "it runs on GPUs"
    on_gpu = {"length": 40, "device": "cuda"}
    assert "half precision" in reason_against(Entry("flash", Case(**on_gpu)), 8.0)
    assert reason_against(Entry("flash", Case(**on_gpu, dtype="bfloat16")), 8.0) is None
    assert "no dropout" in reason_against(Entry("flex", Case(**on_gpu, dropout=0.1)), 8.0)


def test_flex_attention_that_fails_gets_a_note_and_no_figure(monkeypatch: pytest.MonkeyPatch):
    checker = Checker()

    def refuse(entry: Entry) -> Check:
        raise RuntimeError("cannot\nbe compiled")

    monkeypatch.setattr(checker, "check", refuse)
    assert check_or_reason(Entry("flex", SMALL), checker) == (False, "RuntimeError: cannot")
    with pytest.raises(RuntimeError):
        check_or_reason(Entry("sdpa", SMALL), checker)
