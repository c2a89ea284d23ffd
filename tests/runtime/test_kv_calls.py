"""What goes in and out around the calls of a graph whose caches grow."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from fxopt.runtime.kv_calls import Plan, with_growing_caches
from fxopt.runtime.kv_growth import Begin
from fxopt.runtime.kv_state import STATE, expected_length


def test_a_cache_that_begins_never_exists_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are copied one after the other, and each goes before the next one is copied."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    begin = STATE.begin

    def watched(tensor: torch.Tensor, *given: Any, **how: Any) -> torch.Tensor:
        alive.append(sum(each() is not None for each in made))
        return begin(tensor, *given, **how)

    def compiled(*inputs: Any) -> tuple[torch.Tensor, ...]:
        tensors = tuple(torch.full((1, 2, 5, 4), float(number)) for number in range(4))
        made.extend(map(weakref.ref, tensors))
        return tensors

    monkeypatch.setattr(STATE, "begin", watched)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))  # Python's calls then keep their arguments
    plan = Plan(begins=[Begin(place, 2, bounded=False, part=None) for place in range(4)])
    run = with_growing_caches(compiled, plan, lambda inputs: None)
    with expected_length(20), torch.no_grad():
        results = run()
    assert alive == [4, 3, 2, 1]
    assert [float(tensor.mean()) for tensor in results] == [0, 1, 2, 3]
