"""Attention cut into tiles: a block of queries and the keys that one of them sees.

The formula of the mask bounds the keys of a block; what its captured tensors exclude (padding, other
documents) is looked up at run time. Only the scores of tiles are ever computed, and no mask is larger than
a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fxopt.ir.bounds import Interval
from fxopt.ir.ops.attention_attributes import computed_in
from fxopt.ir.ops.tile_plan import Block, plan
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
class Tile:
    """Queries `rows` of the sequences `batch`, and the keys `columns`.

    Attributes:
        live: bool, broadcastable to (batch, H, rows, columns); None where all take part.
        dead: bool, broadcastable to (batch, H, rows, 1): rows without a live key; None where there are none.
    """

    batch: Interval
    rows: Interval
    columns: Interval
    live: torch.Tensor | None = None
    dead: torch.Tensor | None = None

    @property
    def of_query(self) -> tuple[slice, slice, slice]:
        """Its part of what has a row for each query, (B, Hq, Sq, ...)."""
        return slice(*self.batch), slice(None), slice(*self.rows)

    @property
    def of_key(self) -> tuple[slice, slice, slice]:
        """Its part of what has a row for each key, (B, Hkv, Skv, ...)."""
        return slice(*self.batch), slice(None), slice(*self.columns)


def tiles(problem: Problem, most: int) -> Iterator[Tile]:
    """The tiles of a problem: every live score is in exactly one.

    Args:
        most: scores that a tile may have.
    """
    for block in plan_of(problem, most):
        whole = Tile((0, problem.query.shape[0]), block.rows, (block.low, block.high))
        if block.low == block.high:
            yield Tile(whole.batch, whole.rows, whole.columns, None, _all_dead(problem))
        elif block.full:
            yield whole
        elif block.known:
            live = problem.values(whole).condition(problem.mask.live)
            yield Tile(whole.batch, whole.rows, whole.columns, live)
        else:
            yield from _cropped(whole, problem.values(whole).condition(problem.mask.live))


def plan_of(problem: Problem, most: int) -> tuple[Block, ...]:
    """The blocks of queries of a problem."""
    batch, heads, rows, depth = problem.query.shape
    columns = problem.key.shape[-2]
    return plan(problem.mask, tuple(problem.sizes.values()), rows, columns, batch * heads, depth, most)


def _all_dead(problem: Problem) -> torch.Tensor:
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=problem.query.device)


def _cropped(tile: Tile, live: torch.Tensor) -> Iterator[Tile]:
    """The tile without the keys that no query sees, sequence by sequence where they differ much."""
    if live.shape[3] == 1:  # the same for all keys
        yield _tile(tile, tile.batch, (0, tile.columns[1] - tile.columns[0]), live)
        return
    seen = live.any(dim=1).any(dim=1)
    whole = _span(seen.any(dim=0))
    if len(seen) > 1:
        spans = [_span(each) for each in seen]
        widths = [high - low for low, high in spans]
        if len(seen) * (whole[1] - whole[0]) > WORTH_A_SPLIT * max(1, sum(widths)):
            for place, span in enumerate(spans):
                yield _tile(tile, (place, place + 1), span, live[place : place + 1])
            return
    yield _tile(tile, tile.batch, whole, live)


def _span(seen: torch.Tensor) -> Interval:
    """The first and behind the last place that is true; (0, 0) without one."""
    places = seen.nonzero()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def _tile(tile: Tile, batch: Interval, span: Interval, live: torch.Tensor) -> Tile:
    """The part `span` of a tile's keys."""
    start = tile.columns[0]
    columns = (start + span[0], start + span[1])
    if span[0] == span[1]:
        return Tile(batch, tile.rows, columns, None, live.new_ones(1, 1, 1, 1))
    live = live if live.shape[3] == 1 else live[..., span[0] : span[1]]
    if live.all():
        return Tile(batch, tile.rows, columns)
    alive = live.any(dim=-1, keepdim=True)
    return Tile(batch, tile.rows, columns, live, None if alive.all() else ~alive)
