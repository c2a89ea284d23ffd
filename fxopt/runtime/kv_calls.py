"""Calls of compiled graphs whose caches grow: what goes in and out around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.runtime.holders import references, references_of_a_call
from fxopt.runtime.kv_state import STATE


@dataclass(frozen=True)
class Length:
    """A number of rows: `number`, or the input at `place`, or one of its sizes."""

    number: int
    place: int | None = None
    dim: int | None = None

    def of(self, inputs: Sequence[Any]) -> int:
        if self.place is None:
            return self.number
        given = inputs[self.place]
        return int(given) if self.dim is None else int(given.shape[self.dim])


@dataclass(frozen=True)
class Begin:
    """An output that is the first rows of a cache.

    Attributes:
        output: position among the outputs that the caller gets.
        dim: the dimension that is going to grow.
        bounded: the cache keeps only the newest rows, so that its length is known to end somewhere.
    """

    output: int
    dim: int
    bounded: bool


@dataclass(frozen=True)
class Append(Begin):
    """An output that is an input with rows behind it.

    Attributes:
        source: position of the input.
        new: how many rows.
        measured: a size, stride or offset of the input is an input, too.
        part: the slice of the rows that the cache keeps, where it does not keep all.
    """

    source: int
    new: Length
    measured: bool
    part: tuple[int, int] | None


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
    shares = [number / max(len(appends) - 1, 1) for number in range(len(appends))]
    first_shares = [number / max(len(plan.begins) - 1, 1) for number in range(len(plan.begins))]

    def run(*inputs: Any) -> Any:
        other = instead(inputs)
        if other is not None:
            return other(*inputs)
        grown = _grow(inputs, appends, references(inputs, places), shares)
        given = list(inputs)
        for place, tensor in zip(places, grown, strict=True):
            given[place] = tensor
        results = list(compiled(*given))
        for append, tensor in zip(appends, grown, strict=True):
            results.insert(
                append.output, tensor if append.part is None else _part(tensor, append.dim, append.part)
            )
        for each, share in zip(plan.begins, first_shares, strict=True):
            results[each.output] = STATE.begin(results[each.output], each.dim, share, bounded=each.bounded)
        return tuple(results)

    return run


def _grow(
    inputs: Sequence[Any], appends: Sequence[Append], held: Sequence[int], shares: Sequence[float]
) -> list[torch.Tensor]:
    return [
        STATE.extend(
            inputs[each.source], each.dim, each.new.of(inputs), share, bounded=each.bounded,
            alone=count <= references_of_a_call(each.measured),
        )
        for each, count, share in zip(appends, held, shares, strict=True)
    ]  # fmt: skip


def _part(tensor: torch.Tensor, dim: int, bounds: tuple[int, int]) -> torch.Tensor:
    part: torch.Tensor = torch.ops.aten.slice.Tensor(tensor, dim, *bounds)
    return part
