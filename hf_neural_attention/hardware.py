"""What this machine computes with, in words: for bug reports, and beside every figure that was measured."""

import os
import platform
from pathlib import Path

import torch


# Lists flags of x86 and ARM processors from which the kernels, or the libraries they are compared with, profit
INSTRUCTION_SETS = (
    *("sse2", "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512_bf16", "amx_tile"),
    *("asimd", "sve", "sve2"),
)


def processor() -> str:
    """Name of the CPU, its logical cores, and those of its instruction sets that matter for speed."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in reversed(lines))}
    flags = {*facts.get("flags", "").split(), *facts.get("Features", "").split()}
    known = " ".join(name for name in INSTRUCTION_SETS if name in flags)
    return f"{facts.get('model name', platform.machine())}, {os.cpu_count()} cores ({known or 'instruction sets unknown'})"


def devices() -> dict[str, str]:
    """Names of the machine's devices by the type that tensors have on them."""
    found = {"cpu": processor()}
    if torch.cuda.is_available():
        found["cuda"] = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    if torch.xpu.is_available():
        found["xpu"] = ", ".join(torch.xpu.get_device_name(index) for index in range(torch.xpu.device_count()))
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found
