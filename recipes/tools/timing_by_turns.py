"""Times several things by turns, so that noise of the machine hits all alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch


SHORTEST_SAMPLE = 0.01  # seconds; quicker calls are timed several at a time

Name = TypeVar("Name")


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


@dataclass
class Runner:
    """One thing to time: `run` on what `prepare`, which is not timed, returns."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = field(default=lambda: None)
    fewest_calls: int = 1  # in one sample
    most_calls: int = 200
    device: str = "cpu"  # type of the device that computes


def synchronize(device: str) -> None:
    """Waits until a device of this type has done what it was given."""
    if device != "cpu":
        torch.accelerator.synchronize()


def sample(runner: Runner, calls: int) -> float:
    """Mean seconds of a call, over `calls` of them."""
    prepared = [runner.prepare() for _ in range(calls)]
    if runner.device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for item in prepared:
            runner.run(item)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / calls
    synchronize(runner.device)
    started = time.perf_counter()
    for item in prepared:
        runner.run(item)
    synchronize(runner.device)
    return (time.perf_counter() - started) / calls


def calls_of_a_sample(runner: Runner) -> int:
    """As many as take `SHORTEST_SAMPLE`, within the runner's bounds; warms up."""
    first = sample(runner, runner.fewest_calls)
    typical = sample(runner, runner.fewest_calls) if first < 1 else first
    return max(runner.fewest_calls, min(runner.most_calls, math.ceil(SHORTEST_SAMPLE / max(typical, 1e-9))))


def time_by_turns(
    runners: Mapping[Name, Runner], repeats: int, fewest: int | None = None, seconds: float = math.inf
) -> dict[Name, list[float]]:
    """Seconds of a call of each runner in each turn, by name. In a turn every runner has one sample; every other turn goes
    backwards.

    Args:
        repeats: turns, at most.
        fewest: turns, at least. Default: `repeats`.
        seconds: after which no further turn begins, once there are `fewest`.
    """
    calls = {name: calls_of_a_sample(runner) for name, runner in runners.items()}
    times: dict[Name, list[float]] = {name: [] for name in runners}
    started = time.perf_counter()
    for turn in range(repeats):
        if turn >= (repeats if fewest is None else fewest) and time.perf_counter() - started > seconds:
            break
        for name in runners if turn % 2 == 0 else reversed(list(runners)):
            times[name].append(sample(runners[name], calls[name]))
    return times
