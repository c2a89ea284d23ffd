"""The table of bytes and operations of attention's kernels: what it says, and that it is what is counted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.attention_traffic import PAGE, RESULTS, counted
from benchmarks.attention_traffic_page import MOST_OF_A_CACHE, render

ROWS: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"]


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text() == render(json.loads(RESULTS.read_text()))


@pytest.mark.parametrize("case", ["window of 200, group 4"])
def test_the_results_are_what_is_counted(case: str) -> None:
    assert counted([case]) == [row for row in ROWS if row["case"] == case]


@pytest.mark.slow
def test_all_results_are_what_is_counted() -> None:
    assert counted([]) == ROWS


def test_decoding_reads_what_is_live() -> None:
    steps = [row for row in ROWS if row["kernel"] == "decode_attention"]
    assert len(steps) >= 5
    assert all(row["least"] <= row["memory"] <= MOST_OF_A_CACHE * row["least"] for row in steps)


def test_the_forward_touches_operands_once_and_skips_what_is_masked() -> None:
    forwards = {row["case"]: row for row in ROWS if row["kernel"] == "attention_forward"}
    assert len(forwards) >= 7
    assert all(row["memory"] <= 1.01 * row["least"] for row in forwards.values())
    # Tiles are of 32 queries and 64 keys: of a window of 64 half of the scores in them are masked.
    assert all(row["flops"] <= 2 * row["least_flops"] for row in forwards.values())


def test_no_launch_of_the_backward_moves_more_than_its_operands() -> None:
    """Three launches or more, of which each reads at most all operands once."""
    backwards = [row for row in ROWS if row["kernel"] == "attention_backward"]
    assert len(backwards) >= 7
    assert all(row["memory"] <= row["launches"] * row["least"] for row in backwards)
