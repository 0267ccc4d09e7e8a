"""How the native kernel is compiled, kept and loaded, on a stand-in for it that compiles at once."""

import ctypes
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hf_neural_attention import NeuralScorer, explain, neural_attention
from hf_neural_attention.models.neural_attention_backends import warn_once
from hf_neural_attention.ops import native_build, native_interface
from hf_neural_attention.ops.native_build import cache_folder, library_name, load_library


ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
VARIABLES = ("CXX", "HF_NEURAL_ATTENTION_CXXFLAGS", "HF_NEURAL_ATTENTION_CACHE", "XDG_CACHE_HOME")

# Holds enough for half of it to be missed
STAND_IN = """
extern "C" {{
const char* describe_interface() {{
#ifdef NEURAL_ATTENTION_FLOAT64
  return R"({float64})";
#else
  return R"({float32})";
#endif
}}
long table[100000] = {{7}};
long working_memory(const void*) {{ return table[0]; }}
void forward() {{}}
void backward() {{}}
}}
"""

pytestmark = pytest.mark.skipif(COMPILER is None or platform.system() == "Windows", reason="there is no C++ compiler")


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


# Loads it by its folder, without the package and Transformers around it
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
    load_library.cache_clear()
    warn_once.cache_clear()


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    build = Build(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_NEURAL_ATTENTION_CACHE", str(build.cache))
    monkeypatch.setenv("CXX", str(build.compiler))
    monkeypatch.setattr(native_build, "SOURCES", build.sources)
    forget()
    yield build
    forget()


def load(dtype: torch.dtype = torch.float32) -> int:
    """As a new process would: what the stand-in says."""
    load_library.cache_clear()
    library = load_library(dtype)
    assert isinstance(library, ctypes.CDLL), library
    return library.working_memory(None)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_compiles_once_and_says_so(build: Build, caplog: pytest.LogCaptureFixture):
    assert [load(), load(), load(torch.float64), load(torch.float64)] == [7] * 4
    assert len(build.compilations()) == 2
    assert ["NEURAL_ATTENTION_FLOAT64" in call for call in build.compilations()] == [False, True]
    assert messages(caplog) == [
        f"Compiling the native kernel for torch.{name}, once, into {build.cache} (some seconds)."
        for name in ("float32", "float64")
    ]
    left = {path.suffix for path in build.cache.iterdir()}
    assert left == {".so", ".sha256", ".lock"}


def test_name_follows_all_that_the_library_depends_on(build: Build, monkeypatch: pytest.MonkeyPatch):
    def name(dtype: torch.dtype = torch.float32, *arguments: str) -> str:
        return library_name([str(build.compiler), *arguments], dtype)

    names = [name()]
    assert name() == names[0]
    names += [name(torch.float64), name(torch.float32, "-v")]
    other = build.sources / "other"
    shutil.copy(build.compiler, other)
    names.append(library_name([str(other)], torch.float32))
    os.utime(build.compiler, (1, 1))  # pretends an update of the compiler
    names.append(name())
    (build.sources / "header.h").write_text("")
    names.append(name())
    (build.sources / "header.h").write_text("//")
    names.append(name())
    monkeypatch.setenv("HF_NEURAL_ATTENTION_CXXFLAGS", "-O1")
    names.append(name())
    monkeypatch.setattr(torch, "__version__", "2.99")
    names.append(name())
    monkeypatch.setattr(native_build, "cpu_description", lambda: "another")
    names.append(name())
    assert len(set(names)) == len(names) == 10


def test_cpu_description():
    assert native_build.cpu_description()
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        assert "sse2" in native_build.cpu_description()


def test_processes_that_start_together(build: Build):
    build.write_compiler("sleep 1", f'exec {COMPILER} "$@"')
    processes = [build.start() for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    assert [output for output, _ in outputs] == ["7\n"] * 3, outputs
    assert len(build.compilations()) == 1
    assert sum("Compiling" in errors for _, errors in outputs) == 1


def test_threads_that_start_together(build: Build, caplog: pytest.LogCaptureFixture):
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(load_library, [torch.float32] * 4))
    assert [library.working_memory(None) for library in libraries] == [7] * 4
    assert len(build.compilations()) == len(messages(caplog)) == 1


def test_a_killed_compilation_leaves_nothing_behind(build: Build):
    build.write_compiler(f"[ -e {build.cache}/go ] || sleep 60", f'exec {COMPILER} "$@"')
    process = build.start()
    try:
        while not build.compilations():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)  # kills the process alone: its compiler goes on
        process.wait()
        assert [path for path in build.cache.iterdir() if path.is_dir()]
        (build.cache / "go").touch()
        assert load() == 7
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert not [path for path in build.cache.iterdir() if path.is_dir()]
    assert len(build.compilations()) == 2


def replace(path: Path, content: bytes) -> None:
    # writes a new file, since the first one was tried out after linking and stays mapped into this process
    path.unlink()
    path.write_bytes(content)


def cut(library: Path, checksum: Path) -> None:
    replace(library, library.read_bytes()[: library.stat().st_size // 2])


def empty(library: Path, checksum: Path) -> None:
    replace(library, b"")


def flip(library: Path, checksum: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    replace(library, bytes(content))


def without_checksum(library: Path, checksum: Path) -> None:
    checksum.unlink()


def spoil_checksum(library: Path, checksum: Path) -> None:
    checksum.write_bytes(b"\xff\x00")


def does_not_load(library: Path, checksum: Path) -> None:
    replace(library, b"no library")
    checksum.write_text(native_build.checksum(library))


@pytest.mark.parametrize("damage", [cut, empty, flip, without_checksum, spoil_checksum, does_not_load])
def test_a_damaged_library_is_compiled_anew(damage, build: Build):
    compiler = [str(build.compiler)]
    library = build.cache / library_name(compiler, torch.float32)
    build.cache.mkdir()
    native_build.compile_library(compiler, torch.float32, library)  # does not load it: it would stay in this process
    before = library.read_bytes()
    damage(library, native_build.checksum_file(library))
    assert load() == load() == 7
    assert library.read_bytes() == before
    assert len(build.compilations()) == 2


def no_compiler(build: Build, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(build.sources))
    return r"there is no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\): install a C\+\+ compiler \(Debian, Ubuntu: `apt install g"


def unknown_compiler(build: Build, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CXX", "nosuchcompiler")
    return r"there is no C\+\+ compiler \(nosuchcompiler\): install .* or set CXX"


def unreadable_compiler(build: Build, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CXX", "'g++")
    return "CXX cannot be read: No closing quotation"


def failing_compiler(build: Build, monkeypatch: pytest.MonkeyPatch) -> str:
    build.write_compiler("echo 'In file x:' >&2", "echo 'a.h:3: fatal error: no such header' >&2", "exit 3")
    return "compiler gives no kernel .it ends with status 3: a.h:3: fatal error: no such header.: install a C"


def useless_compiler(build: Build, monkeypatch: pytest.MonkeyPatch) -> str:
    build.write_compiler('while [ "$1" != "-o" ]; do shift; done', 'echo nothing > "$2"')
    return "compiler gives no kernel .what it makes does not load: .*: install a C"


def endless_compiler(build: Build, monkeypatch: pytest.MonkeyPatch) -> str:
    build.write_compiler("exec sleep 60")
    monkeypatch.setattr(native_build, "TIME_LIMIT", 0.2)
    return "compiler took longer than 0.2 seconds: install a C"


def unwritable_folder(build: Build, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(
        "HF_NEURAL_ATTENTION_CACHE", str(build.compiler / "cache")
    )  # puts a file in the way, since root can write to all folders
    return "Not a directory: .*: set HF_NEURAL_ATTENTION_CACHE to a folder that can be written to"


def no_home(build: Build, monkeypatch: pytest.MonkeyPatch) -> str:
    import pwd

    def unknown(number: int):
        raise KeyError(number)

    monkeypatch.delenv("HF_NEURAL_ATTENTION_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    return "the user has no home: set HF_NEURAL_ATTENTION_CACHE to a folder that can be written to"


def other_system(build: Build, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    return "it is built on Linux and macOS only"


@pytest.mark.parametrize(
    "trouble",
    [
        no_compiler,
        unknown_compiler,
        unreadable_compiler,
        failing_compiler,
        useless_compiler,
        endless_compiler,
        unwritable_folder,
        no_home,
        other_system,
    ],
)
def test_without_a_kernel_one_warning_and_the_same_results(
    trouble, build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.delenv("HF_NEURAL_ATTENTION_BACKEND", raising=False)
    reason = trouble(build, monkeypatch)
    for dtype in (torch.float32, torch.float32, torch.float64):
        scorer, tensors = NeuralScorer(8).to(dtype), torch.randn(3, 1, 2, 5, 8, dtype=dtype)
        assert torch.equal(neural_attention(*tensors, scorer), neural_attention(*tensors, scorer, backend="blockwise"))
    (warning,) = [message for message in messages(caplog) if not message.startswith("Compiling")]
    assert warning.startswith("Neural Attention's native CPU kernel is not available, the blockwise PyTorch backend runs")
    with pytest.raises(ValueError, match=f"The backend 'native' cannot run here: .*{reason}") as raised:
        neural_attention(*tensors, scorer, backend="native")
    assert str(raised.value).removeprefix("The backend 'native' cannot run here: ") in warning
    assert not list(build.cache.glob("*/"))


def assert_refused(build: Build, difference: str, caplog: pytest.LogCaptureFixture) -> None:
    """By all who ask for the kernel, saying what differs and what to do, before anything is computed."""
    forget()
    refusal = load_library(torch.float32)
    assert isinstance(refusal, native_build.BuildError)
    (library,) = build.cache.glob("*float32*.so")
    assert str(refusal) == (
        f"the compiled kernel and Python do not agree ({difference}), so nothing is computed with it: the package's files are "
        f"damaged, or of several versions. Install hf_neural_attention again and delete {library}, which is then compiled anew"
    )
    scorer, tensors = NeuralScorer(8), torch.randn(3, 1, 2, 5, 8)
    with pytest.raises(ValueError, match="The backend 'native' cannot run here: the compiled kernel and Python do not agree"):
        neural_attention(*tensors, scorer, backend="native")
    assert torch.equal(neural_attention(*tensors, scorer), neural_attention(*tensors, scorer, backend="blockwise"))
    (warning,) = [message for message in messages(caplog) if not message.startswith("Compiling")]
    assert str(refusal) in warning
    assert str(refusal) in str(explain(*tensors, scorer))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (("Problem.keys: int64 at byte 32", "Problem.keys: int64 at byte 40"),
         "`Problem.keys` is int64 at byte 40 in the library and int64 at byte 32 in Python"),
        (("Problem.residual_scale: float64", "Problem.residual_scale: int64"),
         "`Problem.residual_scale` is int64 at byte 136 in the library and float64 at byte 136 in Python"),
        (("Tensor.type", "Tensor.kind"), "`Tensor.kind` is int64 at byte 40 in the library and unknown in Python"),
        (("Tensor.type: int64 at byte 40\n", ""), "`Tensor.type` is unknown in the library and int64 at byte 40 in Python"),
        (("ForwardResult: 56", "ForwardResult: 64"), "`ForwardResult` is 64 bytes in the library and 56 bytes in Python"),
        (("ElementType.bool: 4", "ElementType.bool: 5"), "`ElementType.bool` is 5 in the library and 4 in Python"),
        (("INTERFACE_VERSION: ", "INTERFACE_VERSION: 10"), "`INTERFACE_VERSION` is 101 in the library and 1 in Python"),
        (("Real: float32", "Real: float64"), "`Real` is float64 in the library and float32 in Python"),
    ],
    ids=["moved", "another type", "another name", "missing", "size", "number of a type", "version", "arithmetic"],
)  # fmt: skip
def test_a_library_that_sees_the_interface_differently_is_refused(
    change: tuple[str, str], difference: str, build: Build, caplog: pytest.LogCaptureFixture
):
    build.write_source(lambda text: text.replace(*change))
    assert_refused(build, difference, caplog)


@pytest.mark.parametrize("name", native_interface.FUNCTIONS)
def test_a_library_without_one_of_the_functions_is_refused(name: str, build: Build, caplog: pytest.LogCaptureFixture):
    source = build.sources / native_build.MAIN_SOURCE
    source.write_text(source.read_text().replace(f" {name}(", f" other_{name}("))
    assert_refused(build, f"the library has no function `{name}`", caplog)


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("heads, kv_heads, queries", "heads, queries, kv_heads",
         "`Problem.kv_heads` is int64 at byte 24 in the library and int64 at byte 16 in Python"),
        ("double residual_scale;", "int64_t residual_scale;",
         "`Problem.residual_scale` is int64 at byte 136 in the library and float64 at byte 136 in Python"),
    ],
    ids=["moved", "another type"],
)  # fmt: skip
def test_a_field_that_is_changed_in_the_sources_alone_is_refused(
    old: str, new: str, difference: str, build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    shutil.copytree(Path(native_build.__file__).parent / "native", build.sources, dirs_exist_ok=True)
    monkeypatch.setenv("HF_NEURAL_ATTENTION_CXXFLAGS", "-O0")  # compiles sooner
    interface = build.sources / "interface.h"
    assert old in interface.read_text()
    interface.write_text(interface.read_text().replace(old, new))
    assert_refused(build, difference, caplog)


def test_compiler_with_arguments(build: Build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", f"{shlex.quote(str(build.compiler))} -DFIRST '-DSECOND=a b'")
    monkeypatch.setenv("HF_NEURAL_ATTENTION_CXXFLAGS", "-O0 -DTHIRD")
    assert load() == 7
    (call,) = build.compilations()
    assert call.startswith("-DFIRST -DSECOND=a b -std") and call.index("-O3") < call.index("-O0 -DTHIRD")


def test_flags_that_the_compiler_does_not_know_are_left_out(build: Build):
    build.write_compiler('case "$*" in *march*|*mcpu*|*fopenmp*) exit 1;; esac', f'exec {COMPILER} "$@"')
    assert load() == 7
    assert len(build.compilations()) == 9


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_NEURAL_ATTENTION_CACHE": "some/folder"}, "here/some/folder"),
        ({"HF_NEURAL_ATTENTION_CACHE": "~/folder"}, "home/folder"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/hf_neural_attention"),
        ({"HF_NEURAL_ATTENTION_CACHE": "/first", "XDG_CACHE_HOME": "/caches"}, "/first"),
        ({}, "home/.cache/hf_neural_attention"),
    ],
)
def test_cache_folder(variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path / "home"), **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == tmp_path / expected
    assert cache_folder().is_absolute()


# Measures seconds of CPU, the compiler's included, since other work on the machine would count in seconds of the clock
FIRST_USE = """
import os, torch
from hf_neural_attention import NeuralScorer
from hf_neural_attention.ops.native_build import load_library
scorer, tensors = NeuralScorer(8), torch.randn(3, 1, 2, 5, 8)
scorer(*tensors, backend="blockwise")
start = sum(os.times()[:4])
load_library(torch.float32)
loaded = sum(os.times()[:4])
scorer(*tensors, backend="native")
print(loaded - start, sum(os.times()[:4]) - start)
"""


@pytest.mark.slow
def test_first_use_takes_seconds_and_later_ones_nothing(tmp_path: Path):
    def use() -> tuple[float, float]:
        variables = {"HF_NEURAL_ATTENTION_CACHE": str(tmp_path)}
        output = subprocess.check_output([sys.executable, "-c", FIRST_USE], cwd=ROOT, env=os.environ | variables, text=True)
        loading, everything = map(float, output.split())
        return loading, everything

    assert use()[1] <= 10
    assert use()[0] <= 0.1
