"""How the native kernel is compiled, kept and loaded, on a stand-in for it that compiles at once."""

import ctypes
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hf_neural_attention import NeuralScorer, explain, neural_attention
from hf_neural_attention.ops import native_build
from hf_neural_attention.ops.native_build import ONE_THREAD, cache_folder, has_one_thread, library_name, load_library
from tests.helpers.building import COMPILER, VARIABLES, Build, messages, needs_compiler


ROOT = Path(__file__).parents[2]

pytestmark = needs_compiler


def load(dtype: torch.dtype = torch.float32) -> int:
    """As a new process would: what the stand-in says."""
    load_library.cache_clear()
    library = load_library(dtype)
    assert isinstance(library, ctypes.CDLL), library
    return library.working_memory(None)


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
    # looks at a compiler behind another program, too
    names.append(library_name([COMPILER, str(other)], torch.float32))
    os.utime(other, (1, 1))
    names.append(library_name([COMPILER, str(other)], torch.float32))
    copy = build.sources / "build.py"
    copy.write_text(Path(native_build.__file__).read_text() + "# another way to link\n")
    monkeypatch.setattr(native_build, "__file__", str(copy))
    names.append(name())
    monkeypatch.setattr(torch, "__version__", "2.99")
    names.append(name())
    monkeypatch.setattr(native_build, "cpu_description", lambda: "another")
    names.append(name())
    assert len(set(names)) == len(names) == 13


def test_cpu_description():
    assert native_build.cpu_description()
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        assert "sse2" in native_build.cpu_description()


@pytest.mark.slow
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
        [leftover] = [path for path in build.cache.iterdir() if path.is_dir()]
        os.utime(leftover, (0, 0))  # tells a killed compilation from one on another machine
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


def full_disk(build: Build, monkeypatch: pytest.MonkeyPatch) -> str:
    build.write_compiler("echo 'fatal error: error writing to /x: No space left on device' >&2", "exit 1")
    return "No space left on device.: make room, or set HF_NEURAL_ATTENTION_CACHE"


def folder_without_programs(build: Build, monkeypatch: pytest.MonkeyPatch) -> str:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("failed to map segment from shared object")  # as of a file system mounted noexec

    monkeypatch.setattr(native_build.ctypes, "CDLL", refuse)
    return "failed to map segment from shared object.: nothing in that folder may be run; set HF_NEURAL_ATTENTION_CACHE"


def endless_compiler(build: Build, monkeypatch: pytest.MonkeyPatch) -> str:
    build.write_compiler("exec sleep 60")
    monkeypatch.setattr(native_build, "TIME_LIMIT", 0.2)
    return "compiler took longer than 0.2 seconds: try again"


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
        full_disk,
        folder_without_programs,
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


def test_compiler_with_arguments(build: Build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", f"{shlex.quote(str(build.compiler))} -DFIRST '-DSECOND=a b'")
    monkeypatch.setenv("HF_NEURAL_ATTENTION_CXXFLAGS", "-O0 -DTHIRD")
    assert load() == 7
    (call,) = build.compilations()
    assert call.startswith("-DFIRST -DSECOND=a b -std") and call.index("-O3") < call.index("-O0 -DTHIRD")


def test_flags_that_the_compiler_does_not_know_are_left_out(build: Build, caplog: pytest.LogCaptureFixture):
    build.write_compiler('case "$*" in *march*|*mcpu*|*fopenmp*) exit 1;; esac', f'exec {COMPILER} "$@"')
    assert load() == 7
    assert len(build.compilations()) == 3 * len(native_build.ARCHITECTURE_FLAGS)
    (said,) = [each for each in messages(caplog) if "any processor" in each]
    assert said.startswith(f"{native_build.ANY_PROCESSOR}: to change that, set CXX to a newer compiler")
    (said,) = [each for each in messages(caplog) if "OpenMP" in each]
    assert said.startswith(f"{ONE_THREAD}: to change that, install OpenMP") and said.endswith(".so.")
    (layer,) = explain(*torch.zeros(3, 1, 1, 2, 8), NeuralScorer(8), backend="native")
    assert layer.is_fused and layer.notes == (ONE_THREAD,)


@pytest.mark.parametrize(
    "line", ["kill -KILL $$", "echo 'c++: fatal error: Killed signal terminated program cc1plus' >&2; exit 1"]
)
def test_a_compiler_that_was_killed_is_not_given_other_flags(line: str, build: Build):
    build.write_compiler(line)
    load_library.cache_clear()
    assert "was killed, perhaps for lack of memory: try again" in str(load_library(torch.float32))
    assert len(build.compilations()) == 1 and not list(build.cache.glob("*.so"))
    load_library.cache_clear()


def test_a_kernel_with_threads_says_nothing_of_them(build: Build, caplog: pytest.LogCaptureFixture):
    assert load() == 7 and not has_one_thread(torch.float32)
    assert not any("OpenMP" in each or "any processor" in each for each in messages(caplog))
    (layer,) = explain(*torch.zeros(3, 1, 1, 2, 8), NeuralScorer(8), backend="native")
    assert layer.notes == ()


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


# Measures the machine: a program that takes a compiler about 2.5 times less than the kernel. Seconds alone would not do, since
# those of one core double where its neighbour is busy
PROGRAM = """
#include <iostream>
#include <regex>
int main(int argc, char** argv) { std::cout << std::regex_match(argv[0], std::regex("a+b*")); }
"""


def seconds_of_a_program(folder: Path) -> float:
    (folder / "program.cpp").write_text(PROGRAM)
    before = sum(os.times()[2:4])
    subprocess.check_call([str(COMPILER), "-std=c++17", "-O3", "-c", "program.cpp", "-o", "program.o"], cwd=folder)
    return sum(os.times()[2:4]) - before


@pytest.mark.slow
def test_first_use_takes_seconds_and_later_ones_nothing(tmp_path: Path):
    def use() -> tuple[float, float]:
        variables = {"HF_NEURAL_ATTENTION_CACHE": str(tmp_path)}
        output = subprocess.check_output([sys.executable, "-c", FIRST_USE], cwd=ROOT, env=os.environ | variables, text=True)
        loading, everything = map(float, output.split())
        return loading, everything

    assert use()[1] <= 4 * seconds_of_a_program(tmp_path)
    assert use()[0] <= 0.1
