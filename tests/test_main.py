"""`python -m hf_neural_attention`, for bug reports."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from hf_neural_attention import __main__ as program
from hf_neural_attention.models.neural_attention_backends import BACKENDS
from hf_neural_attention.ops import choice, native_build
from tests.helpers.numerics import CPU_BACKENDS


ROOT = Path(__file__).parents[1]


def lines_of(output: str) -> dict[str, str]:
    """Lines that start with a name, by that name (backends: `name device`)."""
    words = (line.split() for line in output.splitlines() if line.startswith("  "))
    return {" ".join(line[: 2 if line[0] in BACKENDS else 1]): " ".join(line) for line in words}


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the program in this process: its exit status, and its lines."""
    monkeypatch.delenv(choice.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(program, "devices", lambda: {"cpu": "some processor"})

    def run() -> tuple[int, dict[str, str]]:
        status = program.main()
        return status, lines_of(capsys.readouterr().out)

    return run


def test_everything_is_said():
    if "native" in CPU_BACKENDS:
        native_build.load_library(torch.float32)  # is compiled here, since the report compiles nothing before it has said so
    done = subprocess.run([sys.executable, "-m", "hf_neural_attention"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = lines_of(done.stdout)
    for name in ("torch", "transformers", "peft"):
        assert lines[name] == f"{name} {version(name)}"
    assert lines["Python"].split()[1] == sys.version.split()[0]
    assert str(native_build.cache_folder()) in done.stdout
    if "native" in CPU_BACKENDS:
        assert lines["compiler"].startswith(f"compiler {native_build.find_compiler()[0]}, ")
        assert lines["torch.float32"] == "torch.float32 compiled"
    assert lines["HF_NEURAL_ATTENTION_BACKEND"] and lines["threads"] and lines["cpu"]
    for name in BACKENDS:
        assert lines[f"{name} cpu"].split()[2] == ("ok:" if name in CPU_BACKENDS else "unavailable:")


def change_output(run, factor: float):
    return lambda *arguments, **options: run(*arguments, **options) * factor


@pytest.mark.parametrize(("factor", "word"), [(1.0, "ok:"), (1.01, "WRONG:"), (float("nan"), "WRONG:")])
def test_a_backend_that_is_wrong(factor: float, word: str, main, monkeypatch: pytest.MonkeyPatch):
    blockwise = BACKENDS["blockwise"]
    monkeypatch.setitem(BACKENDS, "blockwise", blockwise._replace(run=change_output(blockwise.run, factor)))
    status, lines = main()
    assert status == (word != "ok:")
    assert lines["blockwise cpu"].split()[2] == word
    assert lines["reference cpu"].split()[2] == "ok:"


def test_a_gradient_that_is_wrong(main, monkeypatch: pytest.MonkeyPatch):
    def run(query, *arguments, **options):
        output = blockwise.run(query, *arguments, **options)
        return output + 0.01 * (query - query.detach())

    blockwise = BACKENDS["blockwise"]
    monkeypatch.setitem(BACKENDS, "blockwise", blockwise._replace(run=run))
    status, lines = main()
    assert status == 1 and "(query)" in lines["blockwise cpu"]


def test_a_backend_that_fails(main, monkeypatch: pytest.MonkeyPatch):
    def run(*arguments, **options):
        raise OSError("no luck")

    monkeypatch.setitem(BACKENDS, "blockwise", BACKENDS["blockwise"]._replace(run=run))
    status, lines = main()
    assert status == 1 and lines["blockwise cpu"].endswith("FAILS: OSError: no luck")
    assert lines["reference cpu"].split()[2] == "ok:"


def test_what_is_not_available_is_no_failure(main, monkeypatch: pytest.MonkeyPatch):
    missing = BACKENDS["native"]._replace(reason_against=lambda inputs: "there is no compiler")
    monkeypatch.setitem(BACKENDS, "native", missing)
    monkeypatch.setenv("CXX", "nosuchcompiler")
    monkeypatch.setattr(program, "PACKAGES", ("torch", "nosuchpackage"))
    status, lines = main()
    assert status == 0
    assert lines["native cpu"] == "native cpu unavailable: there is no compiler"
    assert lines["not"].startswith("not to be had there is no C++ compiler (nosuchcompiler)")
    assert lines["nosuchpackage"] == "nosuchpackage not installed"


def test_the_backend_that_is_asked_for(main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "blockwise")
    assert program.main() == 0
    output = capsys.readouterr().out
    assert "Backend asked for: 'blockwise', by the environment variable HF_NEURAL_ATTENTION_BACKEND" in output
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "fast")
    assert program.main() == 1
    assert "HF_NEURAL_ATTENTION_BACKEND is 'fast'; it must be one of" in capsys.readouterr().out


def test_random_numbers_of_the_caller_stay_as_they_are(main):
    before = torch.get_rng_state()
    main()
    assert torch.equal(torch.get_rng_state(), before)
