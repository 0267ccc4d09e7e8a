"""Measures the entries that are right: their time by turns; memory and first use in processes of their own."""

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.cases import Case, Entry, draw_inputs, make_runner, reason_against
from benchmarks.correctness import Check, Checker
from hf_neural_attention.ops.native_build import BuildError, load_library
from tools.own_process import in_own_process
from tools.peak_memory import peak_memory, return_large_tensors
from tools.timing_by_turns import Name, Runner, time_by_turns


class Limits(NamedTuple):
    """How long to measure, and what not to try."""

    repeats: int = 30  # turns, at most
    fewest: int = 5  # turns, at least
    seconds: float = 10.0  # after which no further turn begins, once there are `fewest`
    memory: float = 8.0  # GiB that a provider may hold for its pairs
    call: float = 10.0  # seconds of a call that is worth its time

    def times_of(self, runners: Mapping[Name, Runner]) -> dict[Name, list[float]]:
        """`time_by_turns` within these limits."""
        return time_by_turns(runners, self.repeats, self.fewest, self.seconds)


class Timing(NamedTuple):
    times: list[float]  # seconds, by turns; none if it was refused
    note: str  # on what the check passed, or why it was refused


def check_or_reason(entry: Entry, checker: Checker) -> Check:
    """How the check went. FlexAttention may refuse to compile a network, and says so: that is no error of the benchmark's."""
    try:
        return checker.check(entry)
    except RuntimeError as error:
        if entry.provider != "flex":
            raise
        return Check(False, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")


def time_entries(entries: list[Entry], checker: Checker, limits: Limits) -> dict[Entry, Timing]:
    """Times by turns all entries that can run here and match the reference on the inputs that are timed."""
    timings: dict[Entry, Timing] = {}
    allowed = []
    for entry in dict.fromkeys(entries):
        reason = reason_against(entry, limits.memory)
        if reason is None:
            check = check_or_reason(entry, checker)
            timings[entry] = Timing([], check.message)
            if check.passed:
                allowed.append(entry)
        else:
            timings[entry] = Timing([], reason)
    checker.forget_references()
    inputs = {case: draw_inputs(case) for case in {entry.case for entry in allowed}}
    runners = {entry: make_runner(entry, inputs[entry.case]) for entry in allowed}
    for entry, times in limits.times_of(runners).items():
        timings[entry] = timings[entry]._replace(times=times)
    return timings


def own_peak_bytes(entry: Entry) -> int:
    """`peak_bytes` of this very process."""
    provider, case = entry
    return_large_tensors()
    if case.phase == "backward":
        case = replace(case, phase="both")
    small = replace(case, length=16)
    warm_up = make_runner(Entry(provider, small), draw_inputs(small))
    warm_up.run(warm_up.prepare())  # keeps libraries and threads from being counted
    runner = make_runner(Entry(provider, case), draw_inputs(case))
    with peak_memory(case.device) as peak:
        runner.run(None)
    return peak.size


def peak_bytes(entry: Entry) -> int:
    """What a call needs beyond its inputs, at its peak: of the process (CPU) or of torch's allocator (GPU).

    `backward` counts like `both`: its forward's memory is part of it.
    """
    if entry.case.device == "cuda":  # needs no process of its own, since torch's allocator counts its tensors alone
        return own_peak_bytes(entry)
    return in_own_process(own_peak_bytes, entry)


class FirstUse(NamedTuple):
    """Seconds of a process's first call of the native backend, and of the part that finds (or makes) and loads its library."""

    call: float
    load: float


def own_first_use(cache: str) -> FirstUse:
    os.environ["HF_NEURAL_ATTENTION_CACHE"] = cache
    entry = Entry("native", Case(length=128))
    inputs = draw_inputs(entry.case)
    started = time.perf_counter()
    library = load_library(torch.float32)
    loaded = time.perf_counter()
    if isinstance(library, BuildError):
        raise library
    make_runner(entry, inputs).run(None)
    return FirstUse(time.perf_counter() - started, loaded - started)


def measure_first_use() -> tuple[FirstUse, FirstUse]:
    """In a new cache, where the library is compiled, and in a later process, which finds it there."""
    with tempfile.TemporaryDirectory() as folder:
        return in_own_process(own_first_use, folder), in_own_process(own_first_use, folder)
