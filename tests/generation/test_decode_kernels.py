"""Steps of `generate` through kernels over caches, in Triton's interpreter, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.programs import findings

ROTATED = "new keys are rotated, written and attended to by one kernel"
ROUNDED = "new keys are rotated, rounded to 8 bits, written and attended to by one kernel"

SLOW = ("growing", "int8", "static int8", "fp8", "capped", "replayed")


def run(*arguments: object) -> Any:
    return findings("support.decoding_models", *arguments)


@pytest.mark.parametrize(
    "name",
    [
        "static",
        "unpadded",
        "static fp8",
        *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW),
    ],
)
def test_tokens_are_those_of_eager(name: str, tmp_path: Path) -> None:
    found = run(name, str(tmp_path))
    assert found["tokens"]
    assert found["kernels"] > 0
    assert "cached" in found["providers"]
    assert found["failures"] == 0
    # One of them for a layer of a step: it rotates, appends and attends.
    assert found["appending"] == 1
    assert found["reasons"] == [ROUNDED if "8" in name else ROTATED]
