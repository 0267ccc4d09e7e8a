"""Times several things by turns, and measures memory and first use in processes of their own."""

import ctypes
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmark_cases import Case, Entry, Runner, draw_inputs, make_runner, reason_against
from benchmark_checks import Checker
from hf_neural_attention.ops.native_build import BuildError, load_library
from memory import peak_memory


SHORTEST_SAMPLE = 0.01  # seconds; quicker calls are timed several at a time


class Limits(NamedTuple):
    """How long to measure, and what not to try."""

    repeats: int = 30  # turns, at most
    fewest: int = 5  # turns, at least
    seconds: float = 10.0  # after which no further turn begins, once there are `fewest`
    memory: float = 8.0  # GiB that a provider may hold for its pairs
    call: float = 10.0  # seconds of a call that is worth its time


class Spread(NamedTuple):
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def fields(self, name: str) -> dict[str, float]:
        return {name: self.median, f"{name}_25%": self.low, f"{name}_75%": self.high}


def ratio_of(times: list[float], baseline: list[float]) -> Spread:
    """How many times as long as the baseline, turn by turn."""
    return Spread.of([ours / theirs for ours, theirs in zip(times, baseline, strict=True)])


def sample(runner: Runner, calls: int) -> float:
    """Mean seconds of a call, over `calls` of them."""
    prepared = [runner.prepare() for _ in range(calls)]
    if runner.device == "cpu":
        started = time.perf_counter()
        for item in prepared:
            runner.run(item)
        return (time.perf_counter() - started) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for item in prepared:
        runner.run(item)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def time_by_turns(runners: list[Runner], limits: Limits) -> list[list[float]]:
    """Seconds of each runner in each turn. In a turn every runner has one sample, so that noise of the machine hits all
    alike; every other turn goes backwards."""
    calls = []
    for runner in runners:
        first = sample(runner, 1)  # warms up
        typical = sample(runner, 1) if first < 1 else first
        calls.append(max(1, min(runner.most_calls, math.ceil(SHORTEST_SAMPLE / max(typical, 1e-9)))))
    times: list[list[float]] = [[] for _ in runners]
    started = time.perf_counter()
    for turn in range(limits.repeats):
        if turn >= limits.fewest and time.perf_counter() - started > limits.seconds:
            break
        order = range(len(runners)) if turn % 2 == 0 else reversed(range(len(runners)))
        for index in order:
            times[index].append(sample(runners[index], calls[index]))
    return times


class Timing(NamedTuple):
    times: list[float]  # seconds, by turns; none if it was refused
    note: str  # on what the check passed, or why it was refused


def time_entries(entries: list[Entry], checker: Checker, limits: Limits) -> dict[Entry, Timing]:
    """Times by turns all entries that can run here and match the reference on the inputs that are timed."""
    timings: dict[Entry, Timing] = {}
    allowed = []
    for entry in dict.fromkeys(entries):
        reason = reason_against(entry, limits.memory)
        if reason is None:
            check = checker.check(entry)
            timings[entry] = Timing([], check.message)
            if check.passed:
                allowed.append(entry)
        else:
            timings[entry] = Timing([], reason)
    checker.forget_references()
    inputs = {case: draw_inputs(case) for case in {entry.case for entry in allowed}}
    runners = [make_runner(entry, inputs[entry.case]) for entry in allowed]
    for entry, times in zip(allowed, time_by_turns(runners, limits), strict=True):
        timings[entry] = timings[entry]._replace(times=times)
    return timings


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Result of the function in a process that did nothing before, with as many threads.

    Raises:
        RuntimeError: if the process is killed, as the system does with one that takes all memory.
    """
    context = multiprocessing.get_context("forkserver")
    # what takes seconds to import; the processes are copies of one that did
    context.set_forkserver_preload(["torch", "hf_neural_attention.models.neural_attention_scorer"])
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise RuntimeError("the process that measured it was killed") from error


def own_peak_bytes(entry: Entry) -> int:
    """`peak_bytes` of this very process."""
    provider, case = entry
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: larger tensors go back to the system when they are freed
    if case.phase == "backward":
        case = replace(case, phase="both")
    small = replace(case, length=16)
    warm_up = make_runner(Entry(provider, small), draw_inputs(small))
    warm_up.run(warm_up.prepare())  # libraries and threads are not counted
    runner = make_runner(Entry(provider, case), draw_inputs(case))
    with peak_memory(case.device) as peak:
        runner.run(None)
    return peak.size


def peak_bytes(entry: Entry) -> int:
    """What a call needs beyond its inputs, at its peak: of the process (CPU) or of torch's allocator (GPU).

    `backward` counts like `both`: its forward's memory is part of it.
    """
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
