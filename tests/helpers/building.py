"""Builds of the native kernel on a stand-in for it that compiles at once."""

import logging
import platform
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_neural_attention.models.neural_attention_backends import warn_once
from hf_neural_attention.ops import native_build, native_interface


COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
VARIABLES = ("CXX", "HF_NEURAL_ATTENTION_CXXFLAGS", "HF_NEURAL_ATTENTION_CACHE", "XDG_CACHE_HOME")

needs_compiler = pytest.mark.skipif(COMPILER is None or platform.system() == "Windows", reason="there is no C++ compiler")

# Has enough in it for half of it to be missed
STAND_IN = """
extern "C" {{
const char* describe_interface() {{
#ifdef NEURAL_ATTENTION_FLOAT64
  return R"({float64})";
#else
  return R"({float32})";
#endif
}}
#ifdef _OPENMP
long has_threads() {{ return 1; }}
#else
long has_threads() {{ return 0; }}
#endif
long table[100000] = {{7}};
long working_memory(const void*) {{ return table[0]; }}
void forward() {{}}
long backward() {{ return 0; }}
}}
"""


class Build:
    """A cache, a compiler that writes down its calls, and sources."""

    def __init__(self, folder: Path):
        self.cache, self.sources, self.calls, self.compiler = (
            folder / name for name in ("cache", "sources", "calls", "compiler")
        )
        self.sources.mkdir()
        self.write_source()
        self.write_compiler(f'exec {COMPILER} "$@"')

    def write_source(self, change: Callable[[str], str] = str) -> None:
        """The stand-in, which sees the interface as Python does, but for a change."""
        said = {}
        for dtype in (torch.float32, torch.float64):
            facts = native_interface.describe_interface(dtype)
            said[str(dtype).removeprefix("torch.")] = change("".join(f"{name}: {fact}\n" for name, fact in facts.items()))
        (self.sources / native_build.MAIN_SOURCE).write_text(STAND_IN.format(**said))

    def write_compiler(self, *lines: str) -> None:
        self.compiler.write_text("\n".join(["#!/bin/sh", f'echo "$@" >> {shlex.quote(str(self.calls))}', *lines]))
        self.compiler.chmod(self.compiler.stat().st_mode | stat.S_IXUSR)

    def compilations(self) -> list[str]:
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [line for line in lines if " -c " in line]

    def start(self) -> subprocess.Popen:
        """A process of its own that loads the stand-in, and prints what it says."""
        command = [sys.executable, "-c", LOAD, native_build.__file__, str(self.sources)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


# Imports `ops` by its folder, without the package and Transformers around it
LOAD = """
import sys, torch, types
from pathlib import Path
sys.modules["ops"] = types.ModuleType("ops")
sys.modules["ops"].__path__ = [str(Path(sys.argv[1]).parent)]
from ops import native_build
native_build.SOURCES = Path(sys.argv[2])
print(native_build.load_library(torch.float32).working_memory(None))
"""


def forget() -> None:
    native_build.load_library.cache_clear()
    warn_once.cache_clear()


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
