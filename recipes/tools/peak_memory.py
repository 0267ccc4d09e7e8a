"""How much memory something needs: of the process on a CPU, of torch's allocator on an accelerator."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Peak:
    """The most that was held at once, beyond what was held before, in bytes."""

    size: int = 0


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
        reset_peak()
        before = resident_bytes()
        yield peak
        peak.size = max(0, resident_bytes(peak=True) - before)


def resident_bytes(peak: bool = False) -> int:
    """Memory of this process now, or the most since `reset_peak`."""
    name = "VmHWM" if peak else "VmRSS"
    status = Path("/proc/self/status")
    if not status.exists():  # the most of the whole life of the process then serves for both
        try:
            import resource
        except ImportError:  # Windows
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what is free inside the process would hide what is taken next
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")
