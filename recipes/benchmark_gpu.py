"""Tests the Triton kernels on the GPU that is here and measures them, in at most eight minutes.

    python recipes/benchmark_gpu.py              # or `make gpu`
    python recipes/benchmark_gpu.py --dry_run    # what it would do; the same where there is no GPU

It runs in the first Python that has what is needed, torch for this GPU included: the one that it is started with, then `.venv`
and `.venv-gpu` beside this folder. If none has, it makes `.venv-gpu`, which sees the packages of the Python that started it,
and has pip add the rest; that takes the network, and its minutes are not counted. Steps that fail or take too long are named
at the end, and the others run all the same. Cards go to `model_cards/benchmarks`. This file imports nothing but Python's own.
"""

import argparse
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parent.parent
DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA's driver, AMD's, and Windows' for Linux
NEEDED = ("torch", "triton", "transformers", "accelerate", "datasets", "matplotlib", "psutil", "pytest", "pytest_timeout")
NEEDED_TOO = ("hypothesis",)  # by tests alone
PACKAGES = (".[gpu,recipes]", "pytest", "pytest-timeout", "hypothesis")
PROBE = (
    "import importlib.util, sys, torch; "
    "missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]; "
    "sys.exit(', '.join(missing) + ' missing' if missing else None if torch.cuda.is_available() else 'torch sees no GPU')"
)
GPU_TESTS = (
    "tests/ops/test_triton.py",
    "tests/models/test_cache_integration.py",
    "tests/models/test_generation.py",
    "tests/test_convergence.py",
)
TOTAL_SECONDS = 480
STOP_SECONDS = 15  # for a step to write what it has


class Step(NamedTuple):
    name: str
    words: list[str]  # after `python`
    seconds: int  # at most

    def show(self) -> str:
        return f"{self.name} (at most {self.seconds} s): python {shlex.join(self.words)}"


def plan(cards: Path) -> list[Step]:
    benchmark = ["recipes/benchmark_attention.py", "--device", "cuda", "--preset"]
    return [
        Step("tests", ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *GPU_TESTS], 100),
        Step("attention", [*benchmark, "gpu", "--output", f"{cards / 'gpu'}"], 185),
        Step("models", [*benchmark, "gpu-models", "--output", f"{cards / 'gpu_models'}"], 145),
    ]


def gpu_is_here() -> bool:
    return any(Path(name).exists() for name in DEVICE_FILES)


def candidates() -> list[Path]:
    """Pythons that may have what is needed, without those that are not there."""
    places = [Path(sys.executable), *(ROOT / name / "bin" / "python" for name in (".venv", ".venv-gpu"))]
    return [place for place in dict.fromkeys(places) if place.exists()]


def reason_against(python: Path) -> str | None:
    """Why the steps cannot run in this Python, or None."""
    words = [str(python), "-c", PROBE, *NEEDED, *NEEDED_TOO]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    lines = result.stderr.strip().splitlines()
    return None if result.returncode == 0 else lines[-1] if lines else f"it ended with {result.returncode}"


def find_environment() -> Path:
    for python in candidates():
        reason = reason_against(python)
        print(f"{python}: {reason or 'has what is needed'}", flush=True)
        if reason is None:
            return python
    return make_environment()


def make_environment() -> Path:
    """`.venv-gpu`. torch is the one that is there, or what pip takes by itself: on Linux a build for NVIDIA's GPUs."""
    python = ROOT / ".venv-gpu" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(ROOT / ".venv-gpu")], check=True)
    installed = subprocess.run([str(python), "-m", "pip", "install", "-q", "-e", PACKAGES[0], *PACKAGES[1:]], cwd=ROOT)
    reason = reason_against(python)
    if reason is not None:
        reason = f"{reason} (pip ended with {installed.returncode})"
        raise SystemExit(
            f"{python}: {reason}. Install a torch that sees this GPU, or name a Python that has one: make gpu PYTHON=..."
        )
    return python


def run_step(python: Path, step: Step, seconds: float) -> str | None:
    """Runs a step for so long at most, then asks it to stop as Ctrl+C does, which lets it write its card. Returns what went
    wrong, or None."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    # hears Ctrl+C also where this script was started in the background by a shell, which makes its processes ignore it
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([str(python), *step.words], cwd=ROOT, env=environment, preexec_fn=listen)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return f"was stopped after {seconds:.0f} s"
    return None if code == 0 else f"ended with {code}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=Path, default=Path("model_cards/benchmarks"), help="The folder of the cards.")
    parser.add_argument("--dry_run", action="store_true", help="Say what would be done, and do nothing.")
    arguments = parser.parse_args(words)
    steps = plan(arguments.cards)
    if arguments.dry_run or not gpu_is_here():
        print("This would run:" if arguments.dry_run else "There is no GPU here. Where there is one, this runs:")
        print("\n".join(f"  {step.show()}" for step in steps))
        return 0
    python = find_environment()
    if smi := shutil.which("nvidia-smi"):
        subprocess.run([smi, "-L"])
    started = time.monotonic()
    failures = {}
    for step in steps:
        print(f"\n== {step.show()}", flush=True)
        left = TOTAL_SECONDS - STOP_SECONDS - (time.monotonic() - started)
        reason = run_step(python, step, min(step.seconds, left)) if left > 0 else "had no time left"
        if reason is not None:
            failures[step.name] = reason
    print(f"\n{time.monotonic() - started:.0f} seconds in all.")
    for name, reason in failures.items():
        print(f"{name} {reason}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
