"""`python -m hf_neural_attention`: what is installed here, and whether every backend that can run gives right results.

Exit status: 0, or 1 if a backend that is available fails or differs from the reference.
"""

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__
from .functional import neural_attention
from .hardware import devices
from .models.neural_attention_backends import BACKENDS
from .models.neural_attention_pytorch import Inputs
from .models.neural_attention_scorer import NeuralScorer
from .ops.choice import ENVIRONMENT_VARIABLE, asked_backend
from .ops.native_build import BuildError, cache_folder, find_compiler, has_one_thread, is_compiled, library_name


PACKAGES = ("torch", "transformers", "triton", "accelerate", "datasets", "peft", "safetensors", "filelock")
VARIABLES = (
    ENVIRONMENT_VARIABLE,
    "HF_NEURAL_ATTENTION_CACHE",
    "HF_NEURAL_ATTENTION_CXXFLAGS",
    "CXX",
    "XDG_CACHE_HOME",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)


# Allows what rounding explains, in parts of the largest number of a result: float32 differs by about 1e-6, and a pair whose
# ReLU opens on one side only moves a gradient by a thousand times that
TOLERANCE = 1e-3
# Crosses the borders of every backend's blocks without taking long in an interpreter
LENGTH, HEAD_DIM = 150, 64


def packages() -> dict[str, str]:
    found = {"hf_neural_attention": __version__, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def native_kernel() -> dict[str, str]:
    """Where the native kernel is kept and what it is made with. Compiles nothing."""
    found = {}
    try:
        found["cache folder"] = str(cache_folder())
        compiler = find_compiler()
        said = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
        found["compiler"] = ", ".join([" ".join(compiler), *said[:1]])
        for dtype in (torch.float32, torch.float64):
            exists = is_compiled(cache_folder() / library_name(compiler, dtype))
            threads = ", without OpenMP: one thread" if exists and has_one_thread(dtype) else ""
            found[str(dtype)] = f"compiled{threads}" if exists else "not compiled yet"
    except BuildError as error:
        found["not to be had"] = str(error)
    return found


def results(backend: str, device: str) -> tuple[dict[str, torch.Tensor], float]:
    """Output and gradients of a small problem, always the same, on the CPU; and the seconds of a second run."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scorer = NeuralScorer(HEAD_DIM).to(device)
    shape = (2, 2, LENGTH, HEAD_DIM)
    query, key, value, direction = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
    mask = (torch.rand(2, 1, 1, LENGTH, generator=generator) < 0.8).to(device)
    wanted = {"query": query, "key": key, "value": value, "linear1.weight": scorer.linear1.weight}
    for tensor in wanted.values():
        tensor.requires_grad_()

    def run() -> list[torch.Tensor]:
        output = neural_attention(query, key, value, scorer, mask, is_causal=True, backend=backend)
        return [output, *torch.autograd.grad(output, list(wanted.values()), direction)]

    run()  # compiles, if it has to
    start = time.perf_counter()
    found = [tensor.detach().cpu() for tensor in run()]
    return dict(zip(("output", *wanted), found, strict=True)), time.perf_counter() - start


def health(backend: str, device: str, expected: dict[str, torch.Tensor]) -> tuple[bool, str]:
    """Whether nothing is wrong with a backend on a device, and a line about it."""
    reason = BACKENDS[backend].reason_against(Inputs(device, torch.float32, HEAD_DIM))
    if reason is not None:
        return True, f"unavailable: {reason}"
    try:
        ours, seconds = results(backend, device)
    except Exception as error:  # noqa: BLE001, reports it, whatever it is, so that the other backends are tried as well
        return False, f"FAILS: {type(error).__name__}: {error}"
    errors = {name: ((ours[name] - exact).abs().max() / exact.abs().max()).item() for name, exact in expected.items()}
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    is_right = errors[worst] <= TOLERANCE  # is false for NaN
    line = f"largest relative error {errors[worst]:.1e} ({worst}), {1000 * seconds:.1f} ms forward and backward"
    return is_right, f"{'ok' if is_right else 'WRONG'}: {line}"


def show(title: str, facts: dict[str, str]) -> None:
    width = max(map(len, facts), default=0)
    print(f"\n{title}")
    for name, text in facts.items():
        print(f"  {name.ljust(width)}  {text}")


def main() -> int:
    """Prints everything. Returns the exit status."""
    print("hf_neural_attention: what is here, and does it work")
    show("Versions", packages())
    show("Platform", {"system": platform.platform(), "threads": str(torch.get_num_threads()), **devices()})
    show("Environment variables", {name: os.environ.get(name, "(not set)") for name in VARIABLES})
    show("Native kernel", native_kernel())
    try:
        asked = asked_backend()
        print(f"\nBackend asked for: {asked.name!r}" + ("" if asked.name == "auto" else f", by {asked.source}"))
    except ValueError as error:
        print(f"\n{error}")
        return 1

    print(f"\nBackends (float32, {LENGTH} tokens, 2 examples and heads of {HEAD_DIM}, masked and causal)")
    expected, _ = results("reference", "cpu")
    all_right = True
    for name in BACKENDS:
        for device in devices():
            is_right, line = health(name, device, expected)
            all_right = all_right and is_right
            print(f"  {name.ljust(9)}  {device.ljust(4)}  {line}", flush=True)
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
