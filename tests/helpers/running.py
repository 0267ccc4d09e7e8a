"""Runs recipes as users do, in processes of their own that need not import the libraries again, and Python.

A server with the libraries imported forks a process for each run, which saves seconds of every run. What a run does, and the
environment that it does it in, is its own.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"

LIBRARIES = [
    "accelerate",
    "datasets",
    "evaluate",
    "hf_neural_attention",
    "matplotlib.figure",
    "sklearn.metrics",
    "transformers.trainer",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.vit.modeling_vit",
]
TIME_LIMIT = 500  # seconds

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(LIBRARIES)


def run_script(script: str, flags: list[str], folder: str, environment: dict[str, str], said: list[str]) -> None:
    """Does in a fresh process what `python script flags` does, and writes what it says into two files."""
    os.setsid()  # lets whoever waits too long end what this starts as well
    for descriptor, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv, sys.path[0] = [script, *flags], str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def of_the_hub() -> dict[str, str]:
    """Variables that libraries read when they are imported."""
    return {name: value for name, value in os.environ.items() if name.startswith("HF_")}


WHEN_IMPORTED = of_the_hub()


def run_in(
    folder: Path, script: str | Path, *flags: object, fails: bool = False, limit: float = TIME_LIMIT, **environment: str
) -> str:
    """Runs a recipe, or a script by its whole path, in a process of its own, as a user would, and returns what it printed. It
    may take `limit` seconds.

    It inherits the environment, to which `environment` adds.
    """
    path, words = str(RECIPES / script), [str(flag) for flag in flags]
    variables = {**os.environ, **environment}
    if of_the_hub() != WHEN_IMPORTED:
        done = subprocess.run(
            [sys.executable, path, *words],
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        status, stdout, stderr = done.returncode, done.stdout, done.stderr
    else:
        status, stdout, stderr = run_forked(path, words, folder, variables, limit)
    assert (status != 0) == fails, stdout[-3000:] + stderr[-3000:]
    assert not fails or "Traceback" not in stderr, stderr[-3000:]
    return stdout + stderr


def run_forked(
    path: str, words: list[str], folder: Path, variables: dict[str, str], limit: float
) -> tuple[int | None, str, str]:
    """Exit status, and what was said on both streams."""
    with tempfile.TemporaryDirectory() as name:
        said = [str(Path(name, stream)) for stream in ("stdout", "stderr")]
        process = server.Process(target=run_script, args=(path, words, str(folder), variables, said))
        process.start()
        is_late = True
        try:
            process.join(limit)
            is_late = process.is_alive()
        finally:
            if is_late:
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
        stdout, stderr = (Path(stream).read_text(errors="replace") for stream in said)
    assert not is_late, f"not done after {limit} s: {stdout[-3000:]}{stderr[-3000:]}"
    return process.exitcode, stdout, stderr


def run_python(*arguments: object, **environment: str) -> str:
    """Runs Python in the repository's root and returns what it printed. It must succeed.

    It inherits the environment but for pytest's variables and Triton's interpreter, which `environment` can ask for.
    """
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-3000:]
    return done.stdout
