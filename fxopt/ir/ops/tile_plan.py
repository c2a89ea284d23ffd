"""Into which blocks the queries of an attention are cut, and which keys each block reads.

Small blocks skip more keys, large ones make fewer calls: the size is chosen by the estimated time of all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from fxopt.ir.bounds import Interval, is_full, live_columns
from fxopt.ir.formula import AXES, numbered, size
from fxopt.ir.program import MaskProgram
from fxopt.ir.tile_values import TileValues

# Queries of the smallest block, and how often that is doubled at most.
SMALLEST, DOUBLED = 32, 5
# Bounds are found for at most so many blocks.
MOST_BLOCKS = 64
# Measured on one core, float32: a tile costs some 200 microseconds besides its scores, and a score of depth
# 64 some 4 nanoseconds.
SECONDS_OF_A_TILE = 2e-4
SECONDS_OF_A_PRODUCT = 4e-9 / 64


@dataclass(frozen=True)
class Block:
    """A block of queries, and the bounds of its keys.

    Attributes:
        full: within the bounds places alone exclude no key. known: nor do they exclude all keys of a row.
    """

    rows: Interval
    low: int
    high: int
    full: bool
    known: bool = False

    @property
    def scores(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.high - self.low)


@functools.lru_cache(maxsize=256)
def plan(
    mask: MaskProgram, sizes: tuple[int, ...], rows: int, columns: int, heads: int, depth: int, most: int
) -> tuple[Block, ...]:
    """The blocks of all queries, from the formula alone.

    Args:
        sizes: the numbers ``n0, n1, ...``. heads: of all sequences together. most: scores that a tile
        may have.
    """
    formula = with_sizes(mask, sizes)
    smallest = SMALLEST
    while rows > smallest * MOST_BLOCKS:
        smallest *= 2
    starts = range(0, rows, smallest)
    fine = [_bounded(formula, (first, min(first + smallest, rows)), columns) for first in starts]
    plans = [_joined(fine, 2**power) for power in range(DOUBLED)]
    fitting = [each for each in plans if max((b.scores for b in each), default=0) * heads <= most]
    best = min(fitting or plans[:1], key=lambda blocks: seconds(blocks, heads, depth))
    return tuple(_finished(of_places(formula), block) for block in best)


@functools.lru_cache(maxsize=256)
def of_places(formula: Boolean) -> Boolean:
    """What the places of a query and a key alone say; with `of_data` it is the formula."""
    return sympy.And(*(each for each in sympy.And.make_args(formula) if not _is_data(each)))


@functools.lru_cache(maxsize=256)
def of_data(formula: Boolean) -> Boolean:
    """What depends on captured tensors, sequences and heads."""
    return sympy.And(*(each for each in sympy.And.make_args(formula) if _is_data(each)))


def _is_data(formula: Boolean) -> bool:
    return bool(formula.has(AppliedUndef, *AXES[:2]))


@functools.lru_cache(maxsize=256)
def is_of_distance(formula: Boolean) -> bool:
    """Whether a formula of places is the same for all that lie equally far apart, as a window is."""
    step = sympy.Dummy(integer=True)
    moved = {axis: axis + step for axis in AXES[2:]}
    differences = [each.lhs - each.rhs for each in formula.atoms(sympy.core.relational.Relational)]
    return all(sympy.expand(each.xreplace(moved) - each) == 0 for each in differences)


def seconds(blocks: tuple[Block, ...], heads: int, depth: int) -> float:
    """An estimate of the time that the blocks take."""
    scores = sum(block.scores for block in blocks) * heads
    return len(blocks) * SECONDS_OF_A_TILE + seconds_of(scores, depth)


def seconds_of(scores: int, depth: int) -> float:
    """An estimate of the time that scores take in one call."""
    return scores * depth * SECONDS_OF_A_PRODUCT


def with_sizes(mask: MaskProgram, sizes: tuple[int, ...]) -> Boolean:
    """The formula with numbers in the place of ``n0, n1, ...``."""
    numbers = {size(name): sympy.Integer(number) for name, number in numbered("n", sizes).items()}
    return mask.live.xreplace(numbers)


@functools.lru_cache(maxsize=256)
def live_scores(mask: MaskProgram, sizes: tuple[int, ...], rows: int, columns: int) -> int:
    """How many scores of a head the formula leaves, never too few: of each block of queries those of the keys
    that some of them may see."""
    formula, step = with_sizes(mask, sizes), -(-rows // MOST_BLOCKS)
    blocks = [(first, min(first + step, rows)) for first in range(0, rows, step)]
    found = [(block, live_columns(formula, block, columns)) for block in blocks]
    return sum((last - first) * (high - low) for (first, last), keys in found for low, high in keys)


def _bounded(formula: Boolean, rows: Interval, columns: int) -> Block:
    found = live_columns(formula, rows, columns)
    return Block(rows, found[0][0], found[-1][1], full=False) if found else Block(rows, 0, 0, full=False)


def _joined(blocks: list[Block], count: int) -> tuple[Block, ...]:
    """Each `count` neighbours as one block."""
    parts = [blocks[first : first + count] for first in range(0, len(blocks), count)]
    return tuple(_union(part) for part in parts)


def _union(blocks: list[Block]) -> Block:
    rows = (blocks[0].rows[0], blocks[-1].rows[1])
    reading = [block for block in blocks if block.low < block.high]
    if not reading:
        return Block(rows, 0, 0, full=False)
    return Block(rows, min(b.low for b in reading), max(b.high for b in reading), full=False)


def _finished(formula: Boolean, block: Block) -> Block:
    """With what is known of all its scores."""
    if block.low == block.high:
        return block
    columns = (block.low, block.high)
    if is_full(formula, block.rows, columns):
        return Block(block.rows, *columns, full=True, known=True)
    ranges = ((0, 1), (0, 1), block.rows, columns)
    live = TileValues(ranges, {}, {}, torch.device("cpu")).condition(formula)
    if bool(live.any(-1).all()):
        return Block(block.rows, *columns, full=bool(live.all()), known=True)
    return block
