"""What is said of a ratio, beside that of a candidate to itself."""

from __future__ import annotations

from typing import Any

import pytest

from fxopt.measure.noise import EQUAL, FASTER, LEAST, NOISY, SLOWER, floor, name_of, summarize, verdict


def ratio(median: float, spread: float = 0.01) -> dict[str, float]:
    return {"median": median, "low": median - spread, "high": median + spread, "best": median}


def row(median: float, spread: float = 0.01, noise: float = 1.0, width: float = 0.01) -> dict[str, Any]:
    return {"ratio": ratio(median, spread), "noise": ratio(noise, width)}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (row(1.10), FASTER),
        (row(0.90), SLOWER),
        (row(1.005), EQUAL),
        (row(0.985), EQUAL),  # less than the least that two builds differ by
        (row(1.10, spread=0.2), EQUAL),  # its interval holds 1
        (row(0.90, noise=0.85), NOISY),
        (row(0.90, width=0.2), NOISY),
        (row(0.50, width=0.2), SLOWER),  # more than all that noise
        (row(3.00, width=0.5), FASTER),
    ],
)
def test_verdict(given: dict[str, Any], said: str) -> None:
    assert verdict(given) == said


def test_the_noise_of_a_quiet_machine_is_not_zero() -> None:
    assert floor(row(1.0, width=0.0)) == LEAST


def test_noise_counts_in_both_directions() -> None:
    assert floor(row(1.0, noise=0.9, width=0.05)) == pytest.approx(0.15)
    assert floor(row(1.0, noise=1.1, width=0.05)) == pytest.approx(0.15)


def test_a_summary_names_the_rows_by_verdict() -> None:
    rows = [
        {"model": "a", "train": True, **row(0.5), "over": {"eager": ratio(2.0)}},
        {"model": "b", "train": False, **row(2.0), "over": {"eager": ratio(8.0)}, "accepted": False},
        {"model": "c", "train": False, "error": "x"},
    ]
    found = summarize(rows, ("model", "train"))
    assert (found["rows"], found["errors"]) == (2, 1)
    assert (found["geomean"], found["over"]) == (1.0, {"eager": 4.0})
    assert (found["min"], found["min_row"], found["slower"]) == (0.5, "a train", ["a train"])
    assert (found["faster"], found["wrong"], found["conclusive"]) == (1, ["b"], True)


def test_a_run_of_noisy_rows_concludes_nothing() -> None:
    rows = [{"model": name, **row(1.0, width=0.3)} for name in "abc"]
    assert not summarize(rows, ("model",))["conclusive"]


def test_a_summary_of_nothing() -> None:
    assert summarize([{"error": "x"}], ()) == {"rows": 0, "errors": 1}


def test_names() -> None:
    given = {"model": "llama", "batch": 8, "padded": True, "training": False, "cache": None}
    assert name_of(given, list(given)) == "llama batch 8 padded"
