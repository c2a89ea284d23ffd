"""Calls of compiled graphs whose caches grow: what goes in and out around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxopt.runtime.holders import references
from fxopt.runtime.kv_growth import Append, Begin, Growth
from fxopt.runtime.kv_state import STATE, will_grow


@dataclass
class Plan:
    """What is to be done around the calls of one graph."""

    appends: list[Append] = field(default_factory=list)
    begins: list[Begin] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.appends or self.begins)


def with_growing_caches(
    compiled: Callable[..., Any], plan: Plan, instead: Callable[[Sequence[Any]], Callable[..., Any] | None]
) -> Callable[..., Any]:
    """`compiled`, which takes tensors with room for new rows, as a function of the caches as they are.

    Args:
        instead: another function for a call with such inputs, or None.
    """
    appends = sorted(plan.appends, key=lambda each: each.output)
    places = [each.source for each in appends]
    growth = Growth(appends)
    shares = [number / max(len(plan.begins) - 1, 1) for number in range(len(plan.begins))]

    def run(*inputs: Any) -> Any:
        other = instead(inputs)
        if other is not None:
            return other(*inputs)
        grown, handed_out = growth.of(inputs, references(inputs, places))
        given = list(inputs)
        for place, tensor in zip(places, grown, strict=True):
            given[place] = tensor
        del grown
        results = list(compiled(*given))
        for append, tensor in zip(appends, handed_out, strict=True):
            results.insert(append.output, tensor)
        for each, share in zip(plan.begins, shares, strict=True) if will_grow() else ():
            results[each.output] = STATE.begin(results[each.output], each.dim, share, bounded=each.bounded)
        return tuple(results)

    return run
