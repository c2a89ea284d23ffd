"""Caches that hand-written models return, in tuples and lists: left as they are, with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.ir.contract import Status
from support.compiled import all_handled, compile_fxopt


def tuples(past: Any, new: torch.Tensor) -> Any:
    keys, values = torch.cat([past[0], new], 2), torch.cat([past[1], new + 1], 2)
    return (keys * values).amax(-2), (keys, values)


def lists(past: Any, new: torch.Tensor) -> Any:
    past[0] = torch.cat([past[0], new], 2)
    past[1] = torch.cat([past[1], new + 1], 2)
    return (past[0] * past[1]).amax(-2), past


@pytest.mark.parametrize("function", [tuples, lists])
def test_caches_in_tuples_and_lists_are_left_with_a_reason(function: Callable[..., Any]) -> None:
    torch.compiler.reset()
    compiled = compile_fxopt(function)
    past: Any = [torch.zeros(2, 3, 5, 4), torch.ones(2, 3, 5, 4)]
    twin = list(past)
    with all_handled() as records, torch.no_grad():
        for _ in range(3):
            new = torch.randn(2, 3, 1, 4)
            (seen, past), (want, twin) = compiled(past, new), function(twin, new)
            assert torch.equal(seen, want)
            past, twin = list(past), list(twin)
    entries = [entry for record in records for entry in record.evidence if entry.rewrite == "append-kv-cache"]
    assert len(entries) == 2 * len(records)
    assert all(entry.status is Status.ILLEGAL and "saw it returned" in entry.reason for entry in entries)
