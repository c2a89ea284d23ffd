"""Times several candidates side by side, in many short blocks that take turns.

On a machine that others use too, a block of one candidate now and of another a minute later measure the
neighbours. Here the candidates are timed within milliseconds of each other, the order changes every round, a
ratio is formed within each round, and the median is taken over the rounds. A candidate that is given twice
shows what a ratio of 1 looks like: its spread is the noise floor.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fxopt.runtime.native_code import wait_for_builds

Step = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """A ratio of two times: the median over rounds, and an interval that holds it 19 times of 20.

    Attributes:
        best: ratio of the fastest blocks, which is nearly free of what other programs do.
    """

    median: float
    low: float
    high: float
    best: float

    def as_dict(self) -> dict[str, float]:
        return {name: round(getattr(self, name), 4) for name in ("median", "low", "high", "best")}


@dataclass(frozen=True)
class Timings:
    """Seconds per call, one figure for each round, by candidate."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> list[float]:
        """Seconds between which half of the rounds lie: the first and the third quartile."""
        first, _, third = statistics.quantiles(self.seconds[name], n=4, method="inclusive")
        return [first, third]

    def ratio(self, over: str, under: str) -> Ratio:
        """Time of `over` divided by time of `under`: more than 1 when `under` is the faster."""
        above, below = self.seconds[over], self.seconds[under]
        rounds = [a / b for a, b in zip(above, below, strict=True)]
        middle = statistics.median(rounds)
        low, high = _interval(sorted(rounds))
        return Ratio(middle, low, high, min(above) / min(below))


def interleave(
    candidates: Mapping[str, Step],
    *,
    rounds: int = 40,
    block_seconds: float = 0.02,
    budget_seconds: float = 4.0,
    clock: Callable[[], float] | None = None,
) -> Timings:
    """Time the candidates, which must be warm: compiled, and called once.

    Args:
        rounds: at most; fewer when `budget_seconds` would not suffice, but at least five.
        block_seconds: a block repeats its candidate until about this much time is spent.
        clock: seconds; None picks by `default_clock`.
    """
    wait_for_builds()
    names = list(candidates)
    now = clock or default_clock()
    once = {name: _block(candidates[name], 1, now) for name in names}
    # A first call finds cold caches; fewer repeats in its blocks would keep a candidate slower.
    for name, first in once.items():
        if first < 10 * block_seconds:
            once[name] = min(first, *(_block(candidates[name], 1, now) for _ in range(2)))
    repeats = {name: max(1, round(block_seconds / max(once[name], 1e-7))) for name in names}
    one_round = sum(once[name] * repeats[name] for name in names)
    rounds = max(5, min(rounds, int(budget_seconds / max(one_round, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    try:
        for number in range(rounds):
            gc.collect(0)
            gc.disable()
            for name in _order(names, number):
                seconds[name].append(_block(candidates[name], repeats[name], now))
            if was_enabled:
                gc.enable()
    finally:
        if was_enabled:
            gc.enable()
    return Timings(seconds)


def default_clock() -> Callable[[], float]:
    """Processor time when computing on one core, since other programs cannot lengthen it; else wall time.

    A GPU works beside the processor, and with several threads a wait of one for another is time too.
    """
    if torch.cuda.is_available():
        return _synchronized
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def clock_name() -> str:
    """Which clock `default_clock` picks, in words for a report."""
    return {"process_time": "processor time", "perf_counter": "wall time"}.get(
        default_clock().__name__, "wall time, GPU synchronized"
    )


def _synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _block(step: Step, repeats: int, now: Callable[[], float]) -> float:
    """Seconds of a call. Where there are several, one comes before them: caches are the last candidate's."""
    if repeats > 1:
        step()
    start = now()
    for _ in range(repeats):
        step()
    return (now() - start) / repeats


def _order(names: list[str], number: int) -> list[str]:
    """Every candidate comes first, last and in between equally often, and after every other."""
    shift = (number // 2) % len(names)
    turned = names[shift:] + names[:shift]
    return turned[::-1] if number % 2 else turned


def _interval(ordered: list[float]) -> tuple[float, float]:
    """The order statistics that enclose the median with 95 % probability (binomial, normal approximation)."""
    count = len(ordered)
    half = 0.98 * math.sqrt(count)
    low, high = math.floor(count / 2 - half), math.ceil(count / 2 + half) - 1
    return ordered[max(0, low)], ordered[min(count - 1, high)]
