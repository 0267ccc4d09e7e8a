"""Compiles the native CPU kernel (native/*) once, with the compiler that is there, and loads it.

pip installs pure Python. The library goes into a cache of the user's, under a name made of everything that it depends on:
sources, flags, compiler, torch, CPU, kind of number. So several versions, machines with one home and processes that start
together do not disturb each other. Its checksum lies beside it, and what does not match or does not load is compiled anew: to
load half a library would end the process. What loads must agree with `native_interface` before it is used.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from .native_interface import declare_functions


logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
MAIN_SOURCE = "neural_attention.cpp"
COMPILERS = ("c++", "g++", "clang++")
X86 = ("x86_64", "AMD64", "i686")
# Keeps the meaning of infinities and NaN (no -ffast-math), since a NaN in an input must come out
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-w")
# Leaves out "-mcpu" on x86, where it only tunes; without any, the kernel is of what all processors of a kind can do
ARCHITECTURE_FLAGS = (("-march=native",), *((("-mcpu=native",),) if platform.machine() not in X86 else ()), ())
OPENMP_FLAGS = (("-fopenmp",), ("-Xpreprocessor", "-fopenmp"), ())
TIME_LIMIT = 300  # seconds
KILLED = "signal terminated program"  # says a compiler whose own part was
ONE_THREAD = "The native kernel was compiled without OpenMP, which the compiler lacks, and uses one thread alone"
ANY_PROCESSOR = "The native kernel was compiled for any processor, not for this one, and is slow"
INSTALL_OPENMP = "install OpenMP for it (`apt install libomp-dev`, `brew install libomp`), or set CXX to one that has it"
NEWER = "set CXX to a newer compiler, or HF_NEURAL_ATTENTION_CXXFLAGS to its flags for this processor"
INSTALL = (
    "install a C++ compiler (Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`; macOS: `xcode-select "
    "--install`; conda: `conda install gxx`) or set CXX to the path of one"
)
# Maps what a failure says to what helps, where another compiler does not
ANOTHER_FOLDER = {
    "failed to map segment": "nothing in that folder may be run; set HF_NEURAL_ATTENTION_CACHE to one whose files may",
    "No space left on device": "make room, or set HF_NEURAL_ATTENTION_CACHE to a folder where there is some",
}


class BuildError(RuntimeError):
    """The native kernel cannot be had here. The message says why, and what to do."""


def cache_folder() -> Path:
    """`HF_NEURAL_ATTENTION_CACHE`, or `hf_neural_attention` in the user's cache (`XDG_CACHE_HOME`, by default ~/.cache).

    Raises:
        BuildError: if the user's home is needed and there is none.
    """
    folder = os.environ.get("HF_NEURAL_ATTENTION_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return (Path(folder) if folder else base / "hf_neural_attention").expanduser().absolute()
    except RuntimeError:  # happens in containers that run under a user number without a name
        raise BuildError("the user has no home: set HF_NEURAL_ATTENTION_CACHE to a folder that can be written to") from None


def words_of(variable: str) -> list[str]:
    """The words of an environment variable, as a shell sees them.

    Raises:
        BuildError: if a quotation mark has no partner.
    """
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(f"{variable} cannot be read: {error}") from None


def find_compiler() -> list[str]:
    """Command of the C++ compiler: `CXX` (which may hold arguments, as in "ccache g++"), or the first of the usual names.

    Raises:
        BuildError: if there is none.
    """
    asked = words_of("CXX")
    names = asked[:1] or COMPILERS
    for name in names:
        if path := shutil.which(name):
            return [path, *asked[1:]]
    raise BuildError(f"there is no C++ compiler ({', '.join(names)}): {INSTALL}")


def cpu_description() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
        return "\n".join(line for line in lines if line.startswith(wanted))
    except OSError:
        return platform.processor()


def extra_flags() -> list[str]:
    return words_of("HF_NEURAL_ATTENTION_CXXFLAGS")


def library_name(compiler: list[str], dtype: torch.dtype) -> str:
    """Name of the library's file, from a digest of everything that it depends on."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(Path(__file__).read_bytes())  # has the flags, and how it is linked
    # changes with a program's version, and costs less than asking for that; behind "ccache" is another
    programs = [os.stat(program) for word in compiler if (program := shutil.which(word))]
    parts = (*extra_flags(), *compiler, *(f"{program.st_size} {program.st_mtime_ns}" for program in programs))
    parts = (*parts, torch.__version__, platform.platform(), cpu_description(), str(dtype))
    digest.update("\0".join(parts).encode())
    return f"neural_attention-{str(dtype).removeprefix('torch.')}-{digest.hexdigest()[:20]}.so"


def run(command: list[str]) -> str | None:
    """Runs a command; None if that went well, else its first error. All that it said is logged as information.

    Raises:
        BuildError: if it takes too long, or is killed.
    """
    options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "timeout": TIME_LIMIT}
    try:
        done = subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, **options)
    except OSError as error:
        return str(error)
    except subprocess.TimeoutExpired:
        late = f"the compiler {command[0]} took longer than {TIME_LIMIT} seconds"
        raise BuildError(f"{late}: try again when the machine is less busy") from None
    if done.returncode == 0:
        return None
    logger.info("%s\n%s", shlex.join(command), done.stderr)
    if done.returncode < 0 or KILLED in done.stderr:  # says nothing of the flags: others would make a slower kernel
        raise BuildError(f"the compiler {command[0]} was killed, perhaps for lack of memory: try again when there is more")
    lines = done.stderr.split("\n")
    message = next((line for line in lines if "error" in line.lower()), lines[0])[:500]
    return f"it ends with status {done.returncode}: {message}"


def compile_library(compiler: list[str], dtype: torch.dtype, target: Path) -> None:
    """Compiles and links into `target`, all at once or not at all; its checksum goes beside it.

    Raises:
        BuildError: if the compiler fails whatever the flags.
        OSError: if the folder cannot be written to.
    """
    for leftover in target.parent.glob(f"{target.stem}-*"):  # removes those of a process that was killed, by their age,
        with suppress(OSError):  # since another machine may compile into a home that both share, whose locks it does not see
            if time.time() - leftover.stat().st_mtime > TIME_LIMIT:
                shutil.rmtree(leftover, ignore_errors=True)
    kind = ("-DNEURAL_ATTENTION_FLOAT64",) if dtype == torch.float64 else ()
    problems = []
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.stem}-") as folder:
        compiled, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        for openmp in OPENMP_FLAGS:
            for architecture in ARCHITECTURE_FLAGS:
                flags = (*FLAGS, *architecture, *openmp, *extra_flags(), *kind)
                problem = run([*compiler, *flags, "-c", str(SOURCES / MAIN_SOURCE), "-o", str(compiled)])
                if problem is None:
                    problem = link(compiler, compiled, linked, openmp)
                    if problem is None and not architecture and not extra_flags():
                        logger.warning("%s: to change that, %s, and delete %s.", ANY_PROCESSOR, NEWER, target)
                    break
                problems.append(problem)
            if problem is None:
                checksum_file(target).write_text(checksum(linked), encoding="utf-8")
                os.replace(linked, target)
                return
            problems.append(problem)
    helps = next((advice for sign, advice in ANOTHER_FOLDER.items() if sign in problems[-1]), INSTALL)
    raise BuildError(f"the compiler {compiler[0]} gives no kernel ({problems[-1]}): {helps}")


def link(compiler: list[str], compiled: Path, linked: Path, openmp: tuple[str, ...]) -> str | None:
    """Makes a library that loads here; None if that went well, else what is wrong."""
    shared = ("-dynamiclib", "-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ("-shared",)
    # Tries without OpenMP's library first: its names are then found in the one that torch has loaded, so that one set of
    # threads serves both instead of two that wait for each other by spinning
    for libraries in dict.fromkeys(((), openmp[-1:])):
        problem = run([*compiler, *shared, str(compiled), "-o", str(linked), *libraries])
        if problem is not None:
            continue
        try:
            ctypes.CDLL(str(linked), mode=os.RTLD_NOW)
            return None
        except OSError as error:
            problem = f"what it makes does not load: {str(error).removeprefix(f'{linked}: ')}"
    return problem


def checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def checksum_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def is_compiled(library: Path) -> bool:
    """Whether it lies there, whole."""
    try:
        return checksum_file(library).read_text(errors="replace", encoding="utf-8") == checksum(library)
    except OSError:
        return False


def open_library(path: Path) -> ctypes.CDLL | None:
    """None if it was never compiled, is damaged, or does not load beside this torch."""
    try:
        return ctypes.CDLL(str(path), mode=os.RTLD_NOW) if is_compiled(path) else None
    except OSError:
        return None


@functools.cache
def load_library(dtype: torch.dtype) -> ctypes.CDLL | BuildError:
    """The kernel for float32 or float64 arithmetic, compiled first if this user, machine and version never did.

    Returns:
        The library, or the reason why there is none: asked once per process.
    """
    try:
        if platform.system() == "Windows":
            raise BuildError("it is built on Linux and macOS only")
        compiler = find_compiler()
        path = cache_folder() / library_name(compiler, dtype)
        library = open_library(path)
        if library is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                library = open_library(path)  # looks again, since another process may just have made it
                if library is None:
                    logger.warning("Compiling the native kernel for %s, once, into %s (some seconds).", dtype, path.parent)
                    compile_library(compiler, dtype, path)
                    library = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except BuildError as error:
        return error
    except OSError as error:
        return BuildError(f"{error}: set HF_NEURAL_ATTENTION_CACHE to a folder that can be written to")
    if difference := declare_functions(library, dtype):
        return BuildError(
            f"the compiled kernel and Python do not agree ({difference}), so nothing is computed with it: the package's files "
            "are damaged, or of several versions. Install hf_neural_attention again and delete "
            f"{path}, which is then compiled anew"
        )
    if not library.has_threads():
        logger.warning("%s: to change that, %s, and delete %s.", ONE_THREAD, INSTALL_OPENMP, path)
    return library


def has_one_thread(dtype: torch.dtype) -> bool:
    """Whether the kernel that is there knows no threads. It must be loaded."""
    library = load_library(dtype)
    return not isinstance(library, BuildError) and not library.has_threads()
