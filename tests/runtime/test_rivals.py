"""A library's op stays where it is the faster one: timed once per process."""

from __future__ import annotations

import time

import pytest
import torch

from fxopt.ir.ops import register_ops
from fxopt.ir.quantize import quantize
from fxopt.ir.sources.found import Found
from fxopt.runtime import rivals

FOUND = Found(quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), "nf4"), "a library")


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    register_ops()
    monkeypatch.setattr(rivals, "_measured", {})


def test_a_faster_op_stays() -> None:
    reason = rivals.faster_rival("library::op", lambda x: x, FOUND, torch.float32)
    assert reason is not None and reason.startswith("library::op took 0.")


def test_a_slower_op_is_replaced() -> None:
    def slow(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return x

    assert rivals.faster_rival("library::op", slow, FOUND, torch.float32) is None


def test_it_is_timed_once() -> None:
    calls: list[int] = []

    def noted(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape[0])
        return x

    for _ in range(3):
        rivals.faster_rival("library::op", noted, FOUND, torch.float32)
    assert len(calls) == len(rivals.TOKENS) * rivals._RUNS
