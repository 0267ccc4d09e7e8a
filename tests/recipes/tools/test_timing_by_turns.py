"""What is timed by turns: in which order, how often, and what comes of it."""

from types import SimpleNamespace

import pytest

from tools import timing_by_turns
from tools.timing_by_turns import Runner, Spread, ratio_of, time_by_turns


def test_medians_quartiles_and_ratios():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(low=2.0, median=3.0, high=4.0)
    assert Spread.of([7.0]) == (7.0, 7.0, 7.0)
    # takes ratios turn by turn: the ratio of the medians would be 2
    assert ratio_of([1.0, 4.0, 9.0], [2.0, 1.0, 3.0]) == Spread(low=1.75, median=3.0, high=3.5)
    assert Spread(1.0, 2.0, 3.0).fields("a") == {"a": 2.0, "a_25%": 1.0, "a_75%": 3.0}


def test_turns_go_back_and_forth_and_end_in_time(monkeypatch):
    order: list[str] = []
    now = 0.0
    monkeypatch.setattr(timing_by_turns, "time", SimpleNamespace(perf_counter=lambda: now))

    def runner(name: str, seconds: float) -> Runner:
        def run(item: str) -> None:
            nonlocal now
            assert item == "prepared"
            order.append(name)
            now += seconds * (1 + 0.1 * len(order))  # slows the machine down call by call

        def prepare() -> str:
            nonlocal now
            now += 100.0  # takes long, but must not count
            return "prepared"

        return Runner(run, prepare)

    short, long = time_by_turns({"a": runner("a", 1.0), "b": runner("b", 3.0)}, 4, fewest=2, seconds=10000).values()
    assert "".join(order) == "ab" + "abbaabba", "after a call of each"
    assert short == pytest.approx([1.3, 1.6, 1.7, 2.0]) and long == pytest.approx([4.2, 4.5, 5.4, 5.7])
    assert len(time_by_turns({"a": runner("a", 1.0)}, 50, fewest=3, seconds=0.0)["a"]) == 3
    assert len(time_by_turns({"a": runner("a", 1.0)}, 7, seconds=0.0)["a"]) == 7, "without `fewest`, all"
    order.clear()
    (times,) = time_by_turns({"a": runner("a", 0.002)}, 1).values()
    assert len(order) == 2 + 5, "short calls are timed several at a time"
    assert times == pytest.approx([0.002 * (1 + 0.1 * 5)])
    order.clear()
    slow = runner("a", 2.0)
    slow.fewest_calls = 3
    (times,) = time_by_turns({"a": slow}, 1).values()
    assert len(order) == 3 + 3, "long calls too, where a runner asks for it"
    assert times == pytest.approx([2.0 * (1 + 0.1 * 5)])
