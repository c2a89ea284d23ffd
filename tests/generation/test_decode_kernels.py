"""Steps of `generate` through kernels over caches, in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fxopt.options import environment_without

ROTATED = "new keys are rotated, written and attended to by one kernel"
TESTS = Path(__file__).parent.parent


def run(*arguments: str) -> Any:
    environment = environment_without("PYTHONPATH")
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    command = [sys.executable, "-m", "support.decoding_models", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


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
