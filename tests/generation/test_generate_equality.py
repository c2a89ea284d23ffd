"""The table of equal tokens: some of its ways in short, all of them as slow tests, and the committed page."""

from __future__ import annotations

import pytest
import torch

from benchmarks.equality_models import MODELS, writer
from benchmarks.equality_page import render
from benchmarks.equality_scenarios import SCENARIOS
from benchmarks.generate_equality import PAGE, RESULTS, compiled, grow, measure, read

SLIDING = {"mistral", "gemma2", "gemma3_text", "phi3", "gpt_oss"}


@pytest.mark.parametrize(
    ("name", "scenario"), [("qwen3", "shared"), ("bart", "continue"), ("whisper", "crop")]
)
def test_tokens(name: str, scenario: str) -> None:
    one = writer(name)
    with torch.no_grad():
        row = measure(one, compiled(one), scenario, 24)
    assert row["equal"] == row["tokens"] > 24
    assert row["graphs"] > 0
    assert row["in_place"] > row["copied"]
    assert not row["faults"]


def test_a_difference_is_seen() -> None:
    one = writer("llama")
    with torch.no_grad():
        row = measure(one, one.draft, "padded", 8)
    assert row["equal"] < row["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_all_tokens_of(name: str) -> None:
    one = writer(name)
    model = compiled(one)
    with torch.no_grad():
        growth = grow(one, model)
        rows = [measure(one, model, scenario) for scenario in SCENARIOS]
    assert {row["scenario"]: row["tokens"] - row["equal"] for row in rows} == dict.fromkeys(SCENARIOS, 0)
    assert not [fault for row in (growth, *rows) for fault in row["faults"]]
    assert growth["graphs"][-1] == 0
    if name not in SLIDING:
        assert growth["graphs"][0] <= 3
        assert growth["graphs"][1] <= 1
        assert not any(growth["graphs"][2:])
        assert growth["in_place"] >= 0.995 * growth["appends"]


def test_the_page_is_what_the_rows_say() -> None:
    _, rows = read(RESULTS)
    assert PAGE.read_text() == render(*read(RESULTS))
    for name in MODELS:
        found = {row["scenario"] for row in rows if row["model"] == name and row["kind"] == "scenario"}
        assert (
            found == set(SCENARIOS)
            or name in PAGE.read_text().partition("Not compared")[2].partition("\n")[0]
        )
