"""What two figures allow to be said, given how far the same candidate is from itself.

In every comparison one candidate runs twice. How far the ratio of the two is from 1, its interval included,
is the noise of that row: a difference below it is no difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
# Two builds of the same code differ by so much through where the linker puts things.
LEAST = 0.02
# Above it a row says nothing of a difference of some percent.
TOO_NOISY = 0.10

FASTER, SLOWER, EQUAL, NOISY = "faster", "slower", "equal", "too noisy"


def floor(row: Row) -> float:
    """The noise of a row, as a part of 1; at least `LEAST`.

    The row's `noise` is the ratio of a candidate to itself: its median and the interval that holds it.
    """
    noise = row["noise"]
    ends = (noise["median"] - 1, 1 - noise["median"], noise["high"] - 1, 1 - noise["low"])
    return max(LEAST, *(float(end) for end in ends))


def verdict(row: Row) -> str:
    """`faster`, `slower` or `equal`, of fxopt beside Inductor; `too noisy` when that cannot be told.

    A difference that is larger than much noise is still one.
    """
    ratio, noise = row["ratio"], floor(row)
    if ratio["median"] > 1 + noise and ratio["low"] > 1:
        return FASTER
    if ratio["median"] < 1 - noise and ratio["high"] < 1:
        return SLOWER
    return NOISY if noise > TOO_NOISY else EQUAL


def summarize(rows: Iterable[Row], keys: Sequence[str]) -> dict[str, Any]:
    """Geometric means, the slowest row, the rows by verdict, and the spread of Inductor against itself.

    Args:
        keys: the fields of a row that name it.
    """
    rows = list(rows)
    good = [row for row in rows if "ratio" in row]
    found: dict[str, Any] = {"rows": len(good), "errors": sum("error" in row for row in rows)}
    if not good:
        return found
    ratios, noise = ([row[kind]["median"] for row in good] for kind in ("ratio", "noise"))
    worst = min(good, key=lambda row: row["ratio"]["median"])
    others = sorted({name for row in good for name in row.get("over", {})})
    return found | {
        "geomean": _mean(ratios),
        "geomean_best": _mean(row["ratio"]["best"] for row in good),
        "over": {name: _over(good, name) for name in others},
        "min": round(min(ratios), 4),
        "min_row": name_of(worst, keys),
        **{each.replace(" ", "_"): _named(good, each, keys) for each in (SLOWER, NOISY)},
        "faster": len(_named(good, FASTER, keys)),
        "noise_geomean": _mean(noise),
        "noise_min": round(min(noise), 4),
        "noise_max": round(max(noise), 4),
        "conclusive": 2 * len(_named(good, NOISY, keys)) <= len(good),
        "wrong": [name_of(row, keys) for row in rows if row.get("accepted") is False],
    }


def name_of(row: Row, keys: Sequence[str]) -> str:
    """A row in words: the values of the fields that name it."""
    return " ".join(_word(key, row[key]) for key in keys if row.get(key) not in (None, "", False))


def _word(key: str, value: Any) -> str:
    """A flag is its name, a number has its name beside it."""
    if value is True:
        return key
    return f"{key} {value}" if isinstance(value, int | float) else str(value)


def _named(rows: Iterable[Row], which: str, keys: Sequence[str]) -> list[str]:
    return [name_of(row, keys) for row in rows if verdict(row) == which]


def _over(rows: Iterable[Row], name: str) -> float:
    return _mean(row["over"][name]["median"] for row in rows if name in row.get("over", {}))


def _mean(ratios: Iterable[float]) -> float:
    return round(statistics.geometric_mean(ratios), 4)
