"""Faults that must be seen, and roundings that must pass."""

from __future__ import annotations

import math

import pytest
import torch

from fxopt.measure.accuracy import (
    allowed_error,
    comparable,
    dashboard_passes,
    float64_everywhere,
    max_error,
)


def test_float64_everywhere_widens_written_casts() -> None:
    x = torch.tensor([1.0], dtype=torch.float64) / 3
    with float64_everywhere():
        for lowered in (x.float(), x.to(torch.float32), x.to(dtype=torch.bfloat16)):
            assert torch.equal(lowered, x)
        assert torch.softmax(x, -1, dtype=torch.float32).dtype == torch.float64
        assert torch.zeros(1).dtype == torch.float64
    assert torch.zeros(1).dtype == torch.float32
    assert x.float().dtype == torch.float32


@pytest.mark.parametrize("fault", ["shape", "nan", "missing"])
def test_what_cannot_be_compared_is_infinitely_wrong(fault: str) -> None:
    exact = [torch.ones(3, dtype=torch.float64)]
    results = {"shape": [torch.ones(4)], "nan": [torch.tensor([1.0, math.nan, 1.0])], "missing": []}
    assert max_error(results[fault], exact) == math.inf


def test_the_rule() -> None:
    exact = torch.linspace(1, 2, 100, dtype=torch.float64) / 3
    eager = exact.float()
    allowed = allowed_error(eager, exact)
    rounding = eager * (1 + 2.0**-24)
    assert max_error(rounding, exact) <= allowed
    assert max_error(eager + 1e-6, exact) > allowed
    wrong_row = eager.clone()
    wrong_row[7] = eager[8]
    assert max_error(wrong_row, exact) > allowed


def test_another_computation_is_not_comparable() -> None:
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    assert comparable(exact.float(), exact)
    assert not comparable(exact.float() * 1.01, exact)


def test_mask_fills_are_not_compared() -> None:
    exact = torch.tensor([1.0, torch.finfo(torch.float64).min], dtype=torch.float64)
    assert max_error(torch.tensor([1.0, torch.finfo(torch.float32).min]), exact) == 0.0


@pytest.mark.parametrize("training", [False, True])
def test_the_rule_of_the_dashboard(training: bool) -> None:
    exact = [torch.randn(64, 64, dtype=torch.float64), torch.randn(8, dtype=torch.float64)]
    eager = [each.float() for each in exact]
    assert dashboard_passes(eager, eager, exact, training=training)
    assert dashboard_passes([each + 1e-5 for each in eager], eager, exact, training=training)
    faults = [
        [eager[0] * 1.1, eager[1]],
        [eager[0], eager[1].roll(1)],
        [eager[0].bfloat16(), eager[1]],
        eager[:1],
        [eager[0], torch.full((8,), math.nan)],
    ]
    assert not any(dashboard_passes(fault, eager, exact, training=training) for fault in faults)


def test_training_has_the_wider_tolerance() -> None:
    exact = [torch.randn(64, 64, dtype=torch.float64)]
    eager = [each.float() for each in exact]
    moved = [each + 5e-4 for each in eager]
    far = [each + 3e-3 for each in eager]
    assert dashboard_passes(moved, eager, exact, training=False)
    assert not dashboard_passes(far, eager, exact, training=False)
    assert dashboard_passes(far, eager, exact, training=True)
