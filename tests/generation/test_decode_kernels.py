"""Steps of `generate` through kernels over caches, in Triton's interpreter, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.programs import findings

ROTATED = "new keys are rotated, written and attended to by one kernel"


def run(*arguments: object) -> Any:
    return findings("support.decoding_models", *arguments)


@pytest.mark.parametrize(
    "name",
    [
        "static",
        "unpadded",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("growing", "int8", "capped", "replayed")),
    ],
)
def test_tokens_are_those_of_eager(name: str, tmp_path: Path) -> None:
    found = run(name, str(tmp_path))
    assert found["tokens"]
    assert found["kernels"] > 0
    assert "cached" in found["providers"]
    assert found["failures"] == 0
    # One of them for a layer of a step: it rotates, appends and attends. Rows of 8 bits have none.
    assert found["appending"] == (0 if name == "int8" else 1)
    assert found["reasons"] == ([] if name == "int8" else [ROTATED])
