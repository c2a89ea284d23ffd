"""Steps of `generate` through kernels over caches, in Triton's interpreter, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.programs import findings


def run(*arguments: object) -> Any:
    return findings("support.decoding_models", *arguments)


@pytest.mark.parametrize(
    "name",
    ["static", *(pytest.param(each, marks=pytest.mark.slow) for each in ("growing", "int8", "capped"))],
)
def test_tokens_are_those_of_eager(name: str, tmp_path: Path) -> None:
    found = run(name, str(tmp_path))
    assert found["tokens"]
    assert found["kernels"] > 0
    assert "cached" in found["providers"]
    assert found["failures"] == 0
