"""How much of its scores a kernel of attention computes: counted from the bounds of its loops.

What captured data leaves out (padding, documents) is known only when a kernel runs, and counts as read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from fxopt.codegen.attention_bounds import EXTENT, FIRST, LAST, Span
from fxopt.codegen.attention_spec import Spec
from fxopt.codegen.attention_tiles import Tiles
from fxopt.ir.formula import size


@dataclass(frozen=True)
class Walk:
    """Of one head of keys and one sequence.

    Attributes:
        tiles: of scores, that programs compute. masked: those of them in which the mask is evaluated.
        programs: tiles of (query, head) pairs.
    """

    tiles: int
    masked: int
    programs: int

    def scores(self, tiles: Tiles) -> int:
        """That are computed."""
        return self.tiles * tiles.rows * tiles.columns

    def flops(self, spec: Spec, tiles: Tiles) -> int:
        """Of the two products of the forward."""
        return 2 * self.scores(tiles) * (spec.width + spec.width_v)

    def bytes_read(self, spec: Spec, tiles: Tiles) -> int:
        """Of K and V, by all programs: from memory once, if the L2 cache holds what neighbours share."""
        return self.tiles * tiles.columns * (spec.width + spec.width_v) * spec.dtype.itemsize


def forward_walk(
    spec: Spec, tiles: Tiles, rows: int, columns: int, sizes: Mapping[str, int] | None = None
) -> Walk:
    """What the programs of the forward walk over for one head of keys.

    Args:
        rows, columns: queries and keys. sizes: the numbers ``n0, n1, ...``.
    """
    total = masked = programs = 0
    for start in range(0, rows * spec.group, tiles.rows):
        first, last = start // spec.group, min((start + tiles.rows - 1) // spec.group, rows - 1)
        programs += 1
        edge = 0
        for low, full_low, full_high, high in _pieces(spec.columns, first, last, columns, sizes or {}):
            begin, whole, end, edge = _whole_tiles(low, full_low, full_high, high, edge, tiles.columns)
            total += (edge - begin) // tiles.columns
            masked += (edge - begin - (end - whole)) // tiles.columns
    return Walk(total, masked, programs)


def _pieces(
    found: tuple[Span, ...], first: int, last: int, extent: int, sizes: Mapping[str, int]
) -> Iterator[tuple[int, int, int, int]]:
    """``low, full_low, full_high, high`` of each piece, as `attention_bounds.bounds_function` has them."""
    given = {FIRST: first, LAST: last, EXTENT: extent, **{size(name): one for name, one in sizes.items()}}
    values = {symbol: sympy.Integer(number) for symbol, number in given.items()}

    def of(formulas: Any) -> list[int]:
        return [int(each.xreplace(values)) for each in formulas or () if not each.has(AppliedUndef)]

    ends = []
    for span in found:
        low = min(max([0, *of(span.lows)]), extent)
        live = all(number > 0 for number in of(span.live_if))
        high = max(min([extent, *of(span.highs)]), low) if live else low
        full_low = full_high = high
        if span.has_full:
            full_low = min(max([low, *of(span.full_lows)]), high)
            full = all(number > 0 for number in of(span.full_if))
            full_high = max(min([high, *of(span.full_highs)]), full_low) if full else full_low
        ends.append((low, full_low, full_high, high))
    reached = 0
    for low, full_low, full_high, high in sorted(ends, key=lambda each: each[0]):
        low = max(low, reached)
        high = max(high, low)
        full_low = min(max(full_low, low), high)
        yield low, full_low, max(full_high, full_low), high
        reached = high


def _whole_tiles(
    low: int, full_low: int, full_high: int, high: int, edge: int, block: int
) -> tuple[int, int, int, int]:
    """As the template's `whole_tiles`."""
    start = max(low // block * block, edge)
    behind = max(-(-high // block) * block, start) if high > low else start
    first = min(max(-(-full_low // block) * block, start), behind)
    end = min(max(full_high // block * block, first), behind)
    return start, first, end, behind
