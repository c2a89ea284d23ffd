"""The stopwatch, with a clock that the test turns."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from fxopt.measure.timing import Timings, interleave
from fxopt.runtime.native_code import in_background


class Clock:
    """Time passes only when a candidate runs; `pace` is how slow the machine is at the moment."""

    def __init__(self, pace: Callable[[float], float] = lambda now: 1.0) -> None:
        self.now = 0.0
        self.pace = pace
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def candidate(self, name: str, seconds: float) -> Callable[[], None]:
        def step() -> None:
            self.order.append(name)
            self.now += seconds * self.pace(self.now)

        return step


def test_ratio() -> None:
    clock = Clock()
    candidates = {"slow": clock.candidate("slow", 0.03), "fast": clock.candidate("fast", 0.01)}
    times = interleave(candidates, clock=clock)
    ratio = times.ratio("slow", "fast")
    assert ratio.median == pytest.approx(3.0)
    assert ratio.low == pytest.approx(3.0)
    assert ratio.best == pytest.approx(3.0)
    assert times.median("fast") == pytest.approx(0.01)


def test_a_machine_that_becomes_slower_does_not_matter() -> None:
    clock = Clock(pace=lambda now: 1.0 + now / 20)
    candidates = {"a": clock.candidate("a", 0.011), "b": clock.candidate("b", 0.01)}
    ratio = interleave(candidates, clock=clock, budget_seconds=30).ratio("a", "b")
    assert ratio.median == pytest.approx(1.1, rel=0.01)


def test_an_outlier_does_not_matter() -> None:
    clock = Clock(pace=lambda now: 50.0 if 0.2 < now < 0.25 else 1.0)
    candidates = {"a": clock.candidate("a", 0.01), "b": clock.candidate("b", 0.01)}
    assert interleave(candidates, clock=clock).ratio("a", "b").median == pytest.approx(1.0)


def test_every_candidate_runs_at_every_place() -> None:
    clock = Clock()
    names = ("a", "b", "c")
    interleave(
        {name: clock.candidate(name, 0.02) for name in names}, rounds=12, block_seconds=0.02, clock=clock
    )
    rounds = [clock.order[start : start + 3] for start in range(9, len(clock.order), 3)]
    assert len(rounds) == 12
    for place in range(3):
        assert {row[place] for row in rounds} == set(names)
    assert all(sorted(row) == list(names) for row in rounds)


def test_short_candidates_are_repeated_within_a_block() -> None:
    clock = Clock()
    candidates = {"short": clock.candidate("short", 0.001), "long": clock.candidate("long", 0.1)}
    times = interleave(candidates, rounds=5, block_seconds=0.02, budget_seconds=100, clock=clock)
    assert clock.order.count("short") == 3 + 5 * (1 + 20)  # one call in front of each block is not timed
    assert clock.order.count("long") == 3 + 5
    assert times.median("short") == pytest.approx(0.001)


def test_equal_candidates_are_equal_whoever_is_called_first() -> None:
    """A call behind that of another candidate takes longer, and the very first one longer still."""
    clock = Clock()
    last: list[str] = []

    def candidate(name: str) -> Callable[[], None]:
        def step() -> None:
            clock.now += 0.01 if not last else 0.002 if last[-1] != name else 0.001
            last.append(name)

        return step

    times = interleave({name: candidate(name) for name in "abc"}, block_seconds=0.01, clock=clock)
    assert times.ratio("a", "b").median == times.ratio("a", "c").median == pytest.approx(1.0)


def test_what_compiles_in_the_background_is_waited_for() -> None:
    built: list[bool] = []

    def build() -> None:
        time.sleep(0.2)
        built.append(True)

    in_background("test", build)
    found: list[bool] = []
    interleave({"one": lambda: found.append(bool(built))}, rounds=5, budget_seconds=0.01, block_seconds=0.001)
    assert found and all(found)


def test_budget_limits_the_rounds_but_not_below_five() -> None:
    clock = Clock()
    times = interleave({"a": clock.candidate("a", 2.0)}, budget_seconds=0.1, clock=clock)
    assert len(times.seconds["a"]) == 5


def test_interval_encloses_the_median_and_leaves_out_the_tails() -> None:
    seconds = [1.0 + index / 100 for index in range(41)]
    ratio = Timings({"a": seconds, "b": [1.0] * 41}).ratio("a", "b")
    assert ratio.median == pytest.approx(1.2)
    assert 1.0 < ratio.low < ratio.median < ratio.high < 1.4
