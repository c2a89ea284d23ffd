"""Attention cut into tiles: a block of queries and the keys that one of them sees.

The formula of the mask bounds the keys of a block; what its captured tensors exclude (padding, other
documents) is looked up at run time. Only the scores of tiles are ever computed, and no mask is larger than
a tile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import sympy
import torch

from fxopt.ir.bounds import Interval
from fxopt.ir.formula import H, Q
from fxopt.ir.ops.attention_attributes import computed_in
from fxopt.ir.ops.tile_plan import Block, is_of_distance, of_data, of_places, plan
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.tile_values import TileValues

# Sequences that would read at most this much more together are computed together.
WORTH_A_SPLIT = 1.25


@dataclass(frozen=True)
class Problem:
    """The operands of one attention.

    Attributes:
        query: (B, Hq, Sq, D). key: (B, Hkv, Skv, D). value: (B, Hkv, Skv, Dv). captures, sizes: by name.
        mask, score: the programs. scale: of Q K^T.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    captures: Mapping[str, torch.Tensor]
    sizes: Mapping[str, int]
    mask: MaskProgram
    score: ScoreProgram
    scale: float
    wide_scores: bool = False

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    def values(self, tile: Tile, scores: torch.Tensor | None = None) -> TileValues:
        """What formulas give within a tile."""
        ranges = (tile.batch, (0, self.heads), tile.rows, tile.columns)
        return TileValues(
            ranges, self.captures, self.sizes, self.query.device, scores, computed_in(self.query.dtype)
        )


@dataclass(frozen=True)
class Band:
    """Scores that are live by the distance from their query to their key: a Toeplitz matrix.

    Attributes:
        steps: bool, (rows + columns - 1,): of the last query and the first key, to the first query and the
            last key. numbers: the same as numbers to add. backwards: rows - 1, ..., 0.
    """

    steps: torch.Tensor
    numbers: torch.Tensor
    columns: int
    backwards: torch.Tensor

    @functools.cached_property
    def live(self) -> torch.Tensor:
        """bool, (1, 1, rows, columns)."""
        return self._matrix(self.steps)

    @functools.cached_property
    def added(self) -> torch.Tensor:
        """The same as numbers to add to scores."""
        return self._matrix(self.numbers)

    def _matrix(self, steps: torch.Tensor) -> torch.Tensor:
        return steps.unfold(0, self.columns, 1).index_select(0, self.backwards)[None, None]


@dataclass(frozen=True)
class Tile:
    """Queries `rows` of the sequences `batch`, and the keys `columns`.

    Attributes:
        mask: what is live: a band; or bool, broadcastable to (batch, H, rows, columns); None where all are.
        known: no row is without a live key.
    """

    batch: Interval
    rows: Interval
    columns: Interval
    mask: torch.Tensor | Band | None = None
    known: bool = False

    @property
    def live(self) -> torch.Tensor | None:
        """bool, broadcastable to (batch, H, rows, columns); None where all scores take part."""
        return self.mask.live if isinstance(self.mask, Band) else self.mask

    @property
    def of_query(self) -> tuple[slice, slice, slice]:
        """Its part of what has a row for each query, (B, Hq, Sq, ...)."""
        return slice(*self.batch), slice(None), slice(*self.rows)

    @property
    def of_key(self) -> tuple[slice, slice, slice]:
        """Its part of what has a row for each key, (B, Hkv, Skv, ...)."""
        return slice(*self.batch), slice(None), slice(*self.columns)

    @property
    def is_empty(self) -> bool:
        return self.columns[0] == self.columns[1]

    @functools.cached_property
    def dead(self) -> torch.Tensor | None:
        """Rows without a live key: bool, broadcastable to (batch, H, rows, 1); None where there are none."""
        if self.live is None or self.known:
            return None
        alive = self.live.any(dim=-1, keepdim=True)
        return None if alive.all() else ~alive


def tiles(problem: Problem, most: int) -> Iterator[Tile]:
    """The tiles of a problem: every live score is in exactly one.

    Args:
        most: scores that a tile may have.
    """
    places, data = _Places(problem), _Data(problem)
    for block in plan_of(problem, most):
        tile = Tile((0, problem.query.shape[0]), block.rows, (block.low, block.high))
        seen = None if tile.is_empty else data.seen(tile)
        if tile.is_empty:
            yield _empty(tile, problem.query.device)
        elif seen is None or seen.all():
            yield places.tile(tile, block)
        elif data.is_of_keys:
            for part in _cropped(tile, seen):
                yield part if part.is_empty else _joined(part, places.tile(replace(part, mask=None), block))
        else:
            live = places.tile(tile, block).live
            yield from _cropped(tile, seen if live is None else seen & live)


class _Data:
    """What captured tensors say of scores; of keys alone, such as padding, it is computed once for all."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.formula = of_data(problem.mask.live)
        self.is_of_keys = not self.formula.free_symbols & {H, Q}

    def seen(self, tile: Tile) -> torch.Tensor | None:
        """bool, broadcastable to the tile's scores; None where there is nothing to say."""
        if self.formula == sympy.true:
            return None
        if not self.is_of_keys:
            return self.problem.values(tile).condition(self.formula)
        found = self._of_keys
        return found if found.shape[3] == 1 else found[..., slice(*tile.columns)]

    @functools.cached_property
    def _of_keys(self) -> torch.Tensor:
        whole = Tile((0, self.problem.query.shape[0]), (0, 1), (0, self.problem.key.shape[-2]))
        return self.problem.values(whole).condition(self.formula)


class _Places:
    """What the places of tiles say of their scores; by distance it is computed once for all."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.formula = of_places(problem.mask.live)
        self.backwards: dict[int, torch.Tensor] = {}

    def tile(self, tile: Tile, block: Block) -> Tile:
        """With the scores that are live by their places, all or a part of the block's."""
        if block.full:
            return tile
        moves = is_of_distance(self.formula)
        live = self._band(tile) if moves else self.problem.values(tile).condition(self.formula)
        return replace(tile, mask=live, known=block.known and tile.columns == (block.low, block.high))

    def _band(self, tile: Tile) -> Band:
        (first, end), (low, high) = tile.rows, tile.columns
        rows, columns, start = end - first, high - low, low - end + self.problem.query.shape[-2]
        if rows not in self.backwards:
            self.backwards[rows] = torch.arange(rows - 1, -1, -1, device=self.problem.query.device)
        steps, numbers = (each[start : start + rows + columns - 1] for each in self._distances)
        return Band(steps, numbers, columns, self.backwards[rows])

    @functools.cached_property
    def _distances(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As one query sees keys, from the farthest before it to the farthest behind."""
        rows, columns = self.problem.query.shape[-2], self.problem.key.shape[-2]
        tile = Tile((0, 1), (0, 1), (1 - rows, columns))
        steps = self.problem.values(tile).condition(self.formula).flatten()
        return steps, torch.where(steps, 0.0, -math.inf).to(computed_in(self.problem.query.dtype))


def _joined(tile: Tile, other: Tile) -> Tile:
    """What is live in both."""
    if tile.live is None or other.live is None:
        return other if tile.live is None else tile
    return replace(tile, mask=tile.live & other.live)


def _empty(tile: Tile, device: torch.device) -> Tile:
    """No key is live for any of its rows."""
    return replace(tile, mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device))


def plan_of(problem: Problem, most: int) -> tuple[Block, ...]:
    """The blocks of queries of a problem."""
    batch, heads, rows, depth = problem.query.shape
    columns = problem.key.shape[-2]
    return plan(problem.mask, tuple(problem.sizes.values()), rows, columns, batch * heads, depth, most)


def _cropped(tile: Tile, live: torch.Tensor) -> Iterator[Tile]:
    """The tile without the keys that no query sees, sequence by sequence where they differ much."""
    if live.shape[3] == 1:  # the same for all keys
        yield _part(tile, tile.batch, (0, tile.columns[1] - tile.columns[0]), live)
        return
    seen = live.any(dim=1).any(dim=1)
    whole = _span(seen.any(dim=0))
    if len(seen) > 1:
        spans = [_span(each) for each in seen]
        widths = [high - low for low, high in spans]
        if len(seen) * (whole[1] - whole[0]) > WORTH_A_SPLIT * max(1, sum(widths)):
            for place, span in enumerate(spans):
                yield _part(tile, (place, place + 1), span, live[place : place + 1])
            return
    yield _part(tile, tile.batch, whole, live)


def _span(seen: torch.Tensor) -> Interval:
    """The first and behind the last place that is true; (0, 0) without one."""
    places = seen.nonzero()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def _part(tile: Tile, batch: Interval, span: Interval, live: torch.Tensor) -> Tile:
    """The part `span` of a tile's keys."""
    start = tile.columns[0]
    part = Tile(batch, tile.rows, (start + span[0], start + span[1]))
    if part.is_empty:
        return _empty(part, live.device)
    live = live if live.shape[3] == 1 else live[..., span[0] : span[1]]
    return part if live.all() else replace(part, mask=live)
