"""Runs recipes as users do, in processes of their own that need not import the libraries again.

A server with the libraries imported forks a process for each run, which saves seconds of every run. What a run does, and the
environment that it does it in, is its own.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path


RECIPES = Path(__file__).parents[2] / "recipes"

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
    for descriptor, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv, sys.path[0] = [script, *flags], str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def run_in(folder: Path, script: str, *flags: object, fails: bool = False) -> str:
    """Runs a recipe in a process of its own, as a user would, and returns what it printed."""
    with tempfile.TemporaryDirectory() as name:
        said = [str(Path(name, stream)) for stream in ("stdout", "stderr")]
        arguments = (str(RECIPES / script), [str(flag) for flag in flags], str(folder), dict(os.environ), said)
        process = server.Process(target=run_script, args=arguments)
        process.start()
        process.join(TIME_LIMIT)
        is_late = process.is_alive()
        if is_late:
            process.kill()
            process.join()
        stdout, stderr = (Path(path).read_text(errors="replace") for path in said)
    assert not is_late, f"not done after {TIME_LIMIT} s: {stdout[-3000:]}{stderr[-3000:]}"
    assert (process.exitcode != 0) == fails, stdout[-3000:] + stderr[-3000:]
    assert not fails or "Traceback" not in stderr, stderr[-3000:]
    return stdout + stderr
