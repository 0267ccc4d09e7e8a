"""Shared by the tests of the operation."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_neural_attention.ops import native_build
from tests.helpers.building import VARIABLES, Build, forget


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


@pytest.fixture(scope="session", autouse=INTERPRETED)
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter readies its language once per launch and device function, instead of at every call of one.

    That is two thirds of its time. It computes the same: whatever a call readies stays so until the launch ends. It replaces
    two private methods, since Triton 3.9 has no setting and no hook for it: its settings (`triton.knobs`) turn the interpreter
    on or off, and no more. Where a new Triton has moved them, the tests end with an error here instead of running slowly.
    """
    from triton.runtime import interpreter

    readied: set = set()
    launch = interpreter.GridExecutor.__call__

    def start(self, *arguments, **options):
        readied.clear()
        return launch(self, *arguments, **options)

    def call(self, *arguments, **options):
        if self.fn not in readied:
            interpreter._patch_lang(self.fn)
            readied.add(self.fn)
        return self.rewrite()(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", start)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """A build for which nothing is set or compiled yet."""
    build = Build(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_NEURAL_ATTENTION_CACHE", str(build.cache))
    monkeypatch.setenv("CXX", str(build.compiler))
    monkeypatch.setattr(native_build, "SOURCES", build.sources)
    forget()
    yield build
    forget()
