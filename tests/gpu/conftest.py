"""Tests on a GPU. `FXOPT_REHEARSE_GPU=1 TRITON_INTERPRET=1 pytest tests/gpu` runs them on a CPU instead:
kernels in Triton's interpreter, on the eager host; what only a GPU has is skipped there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("FXOPT_REHEARSE_GPU"):
        return "cpu"
    pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def cuda(device: str) -> str:
    """For what an interpreter cannot stand in for."""
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture
def options(device: str, tmp_path: Path) -> dict[str, Any]:
    """Every region in a kernel of fxopt's, and no fault forgiven."""
    host = {"kernels": "always"} if device == "cuda" else {"host": "eager"}
    return {**host, "strict": True, "cache_dir": str(tmp_path)}
