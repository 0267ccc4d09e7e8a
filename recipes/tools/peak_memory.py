"""How much memory something needs: of the process on a CPU, of torch's allocator on an accelerator.

psutil says what a process holds now, and not the most that it has held since some moment. On Linux the kernel's own files say
that; elsewhere there is only the most of its whole life. The standard library's `ru_maxrss` cannot stand in for Linux's files:
it cannot be reset, and a process inherits it from the one that started it.
"""

import ctypes
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """The most that was held at once, beyond what was held before, in bytes."""

    size: int = 0


def return_large_tensors() -> None:
    """Lets what is freed go back to the system, in this process from now on: glibc keeps ever larger pieces, which would then
    count for less when they are taken again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 16)  # sets M_MMAP_THRESHOLD, in bytes


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Fills in a `Peak` at its end. Not to be nested: there is one high-water mark.

    Args:
        device: the type of the device that computes: that of the machine need not be used.
    """
    peak = Peak()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.size = torch.cuda.max_memory_allocated() - before
    else:
        before = reset_high_water_mark()
        yield peak
        peak.size = max(0, high_water_mark() - before)


def reset_high_water_mark() -> int:
    """Lets `high_water_mark` begin anew where that can be done; returns what it then is, in bytes."""
    psutil.heap_trim()  # gives back what is free inside the process, which would hide what is taken next
    if not CLEAR.exists():
        return high_water_mark()
    CLEAR.write_text("5", encoding="utf-8")
    return psutil.Process().memory_info().rss


def high_water_mark() -> int:
    """The most that this process has held, in bytes: since `reset_high_water_mark`, or, but on Linux, in its whole life."""
    if match := re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(encoding="utf-8") if STATUS.exists() else "", re.MULTILINE):
        return int(match[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
