"""Compiles the native CPU kernel (native/*) once, with the compiler that is there, and loads it.

pip installs pure Python. The library goes into a cache of the user's, under a name made of everything that it depends on:
sources, flags, compiler, torch, CPU, kind of number. So several versions, machines with one home and processes that start
together do not disturb each other.
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
from pathlib import Path

import torch
from filelock import FileLock


logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
MAIN_SOURCE = "neural_attention.cpp"
COMPILERS = ("c++", "g++", "clang++")
# Infinities and NaN keep their meaning (no -ffast-math): a NaN in an input must come out
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-w")
ARCHITECTURE_FLAGS = (("-march=native",), ("-mcpu=native",), ())
OPENMP_FLAGS = (("-fopenmp",), ("-Xpreprocessor", "-fopenmp"), ())
TIME_LIMIT = 300  # seconds


class BuildError(RuntimeError):
    """The native kernel cannot be had here. The message says why, and what to do."""


def cache_folder() -> Path:
    """`HF_NEURAL_ATTENTION_CACHE`, or `hf_neural_attention` in the user's cache (`XDG_CACHE_HOME`, by default ~/.cache).

    Raises:
        BuildError: if none of these is set and the user has no home.
    """
    if folder := os.environ.get("HF_NEURAL_ATTENTION_CACHE"):
        return Path(folder).absolute()
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # containers that run under a number without a name
        raise BuildError("the user has no home: set HF_NEURAL_ATTENTION_CACHE to a folder that can be written to") from None
    return Path(base).absolute() / "hf_neural_attention"


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
    raise BuildError(
        f"there is no C++ compiler ({', '.join(names)}): install one (Debian, Ubuntu: `apt install g++`; Fedora: `dnf install "
        "gcc-c++`; macOS: `xcode-select --install`; conda: `conda install gxx`) or set CXX to its path"
    )


def cpu_description() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
        return "\n".join(line for line in lines if line.startswith(wanted))
    except OSError:
        return platform.processor()


def extra_flags() -> list[str]:
    return words_of("HF_NEURAL_ATTENTION_CXXFLAGS")


def library_name(compiler: list[str], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    parts = (*FLAGS, *extra_flags(), *compiler, torch.__version__, platform.platform(), cpu_description(), str(dtype))
    digest.update("\0".join(parts).encode())
    return f"neural_attention-{str(dtype).removeprefix('torch.')}-{digest.hexdigest()[:20]}.so"


def run(command: list[str]) -> str | None:
    """Runs a command; None if it went well, else what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else f"{shlex.join(command)}\n{done.stderr.strip()[-2000:]}"


def compile_library(compiler: list[str], dtype: torch.dtype, target: Path) -> None:
    """Compiles and links into `target`, all at once or not at all.

    Raises:
        BuildError: if the compiler fails whatever the flags.
        OSError: if the folder cannot be written to.
    """
    kind = ("-DNEURAL_ATTENTION_FLOAT64",) if dtype == torch.float64 else ()
    problems = []
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        for openmp in OPENMP_FLAGS:
            for architecture in ARCHITECTURE_FLAGS:
                flags = (*FLAGS, *architecture, *openmp, *extra_flags(), *kind)
                problem = run([*compiler, *flags, "-c", str(SOURCES / MAIN_SOURCE), "-o", str(compiled)])
                if problem is not None:
                    problems.append(problem)
                    continue
                # First without OpenMP's library: its names are then found in the one that torch has loaded, so that one
                # set of threads serves both instead of two that wait for each other by spinning
                shared = "-dynamiclib" if platform.system() == "Darwin" else "-shared"
                undefined = ("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()
                for libraries in ((), openmp[-1:]):
                    problem = run([*compiler, shared, str(compiled), "-o", str(linked), *undefined, *libraries])
                    if problem is None and loads(linked):
                        os.replace(linked, target)
                        return
                    problems.append(problem or f"{linked.name}, linked with {libraries}, does not load")
    raise BuildError(f"the compiler {shlex.join(compiler)} fails; its first message:\n{problems[0]}")


def loads(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library), mode=os.RTLD_NOW)
    except OSError:
        return False
    return True


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
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.exists():  # another process may just have made it
                    logger.warning("Compiling the native kernel for %s, once, into %s (some seconds).", dtype, path.parent)
                    compile_library(compiler, dtype, path)
        library = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except BuildError as error:
        return error
    except OSError as error:
        return BuildError(f"{error}: set HF_NEURAL_ATTENTION_CACHE to a folder that can be written to")
    library.feature_numbers.restype = ctypes.c_int64
    for function in (library.forward, library.backward):
        function.restype = None
    return library
