"""What a kernel for a few queries over a cache has to know of its operands, and how it is tiled for them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from fxopt.codegen.attention_program import Capture
from fxopt.codegen.tile_sizes import power_of_two, sms_of
from fxopt.ir.cost import hint
from fxopt.ir.formula import H, Q, numbered
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.target import Target

# Matrix units take at least so many rows and columns.
SMALLEST_TILE = 16
# Programs that share an SM, so that some read while others compute.
PROGRAMS_PER_SM = 2
MOST_SPLITS = 128
# Of the time that one program would take for all keys: what a program does besides its keys (it reads the
# queries and writes its sums), and what adding one more part's sums to the others takes.
TIME_OF_A_PROGRAM = 1 / 512
TIME_OF_A_SUM = 1 / 16384
# Bytes of K in one step of the loop, which is what keeps an SM's share of the memory busy; bytes of K of 8
# bits are counted as they are converted, in registers.
STEP_BYTES = 16384
# Of K and V, in flight.
STAGED_BYTES = 96 * 1024
# Numbers of the result that a program sums up in registers, and those for which it takes twice the warps.
MOST_SUMS, MANY_SUMS = 16384, 8192
# Rows of a tile; of products in full float32, which are done without matrix units, fewer of both.
MOST_ROWS, MOST_KEYS, FLOAT32_ROWS, FLOAT32_KEYS = 128, 128, 32, 32


@dataclass(frozen=True)
class Problem:
    """The operands of an attention over a cache, as fake tensors, and its attributes.

    Attributes:
        tensors: by name: query, key, value, and where they are given key_scale, value_scale, query_rest,
            key_rest, span, sinks. captures, sizes: of the formulas, in order.
        shared: value is key. native: float8_e4m3fn is a type for the kernel, whose instructions convert it;
            else it gets bytes. Of a cache that is written: what is a view of it as bytes could not be written
            in place by TorchInductor.
    """

    tensors: Mapping[str, torch.Tensor]
    captures: tuple[torch.Tensor, ...]
    sizes: tuple[Any, ...]
    scale: float
    dead_rows: str
    mask: MaskProgram
    score: ScoreProgram
    shared: bool = False
    native: bool = False

    def has(self, name: str) -> bool:
        return name in self.tensors

    def size(self, name: str, dim: int) -> int:
        """A size, as seen while tracing."""
        return hint(self.tensors[name].shape[dim])

    @property
    def query(self) -> torch.Tensor:
        return self.tensors["query"]

    @functools.cached_property
    def kv_heads(self) -> int:
        return int(self.tensors["key"].shape[1])

    @functools.cached_property
    def group(self) -> int:
        return int(self.query.shape[1]) // self.kv_heads

    @functools.cached_property
    def queries(self) -> int:
        return int(self.query.shape[2])

    @property
    def rows(self) -> int:
        """That share a key head."""
        return self.group * self.queries

    @functools.cached_property
    def captured(self) -> tuple[Capture, ...]:
        return tuple(Capture.of(name, each) for name, each in numbered("c", self.captures).items())

    @property
    def size_names(self) -> tuple[str, ...]:
        return tuple(numbered("n", self.sizes))

    @property
    def live(self) -> Boolean:
        """The mask's formula; with one query, q is 0."""
        zero = {Q: sympy.Integer(0)} if self.queries == 1 else {}
        formula: Boolean = self.mask.live.xreplace(zero)
        return formula

    def k_tail(self, tiling: Tiling) -> bool:
        """The second part of Q and K is in the same tensors as the first."""
        return tiling.k.parts[1] > 0 and not self.has("key_rest")

    @property
    def is_uniform(self) -> bool:
        """All rows see the same keys."""
        return not self.live.free_symbols & {H, Q}


@dataclass(frozen=True)
class Widths:
    """A width as the widths of two tiles, `blocks`, that hold `parts` numbers of it; the second may be 0."""

    parts: tuple[int, int]
    blocks: tuple[int, int]

    @staticmethod
    def of(width: int, rest: int = 0) -> Widths:
        """Of one tensor, or of two."""
        if rest:
            return Widths((width, rest), (_block(width), _block(rest)))
        first = max(SMALLEST_TILE, 1 << (width.bit_length() - 1))
        if first >= width:
            return Widths((width, 0), (first, 0))
        return Widths((first, width - first), (first, _block(width - first)))


def _block(width: int) -> int:
    return max(SMALLEST_TILE, power_of_two(width))


@dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
        k, v: of the widths of K and of V. rows, keys: of a tile. splits: parts of the keys of one head.
        why: for the head of the kernel's file.
    """

    k: Widths
    v: Widths
    rows: int
    keys: int
    splits: int
    warps: int
    stages: int
    why: tuple[str, ...] = field(default=())


def tiling_of(
    problem: Problem, target: Target | None, most_rows: int = MOST_ROWS, most_keys: int = MOST_KEYS
) -> Tiling:
    """The tiles of a problem on a target, of at most `most_rows` rows and `most_keys` keys."""
    rest = int(problem.tensors["key_rest"].shape[3]) if problem.has("key_rest") else 0
    k, v = Widths.of(int(problem.query.shape[3]), rest), Widths.of(int(problem.tensors["value"].shape[3]))
    sums = sum(v.blocks)
    wide = problem.query.dtype is torch.float32
    most_rows = min(FLOAT32_ROWS if wide else most_rows, power_of_two(MOST_SUMS // sums + 1) // 2)
    rows = max(SMALLEST_TILE, min(power_of_two(problem.rows), most_rows))
    if problem.rows > rows and problem.rows % rows:  # of rows that are left over many would be idle
        rows = max(SMALLEST_TILE, rows // 2)
    bytes_of_key = sum(k.blocks) * max(2, problem.tensors["key"].element_size())
    most_keys = FLOAT32_KEYS if wide else most_keys
    keys = max(SMALLEST_TILE, min(most_keys, power_of_two(STEP_BYTES // bytes_of_key + 1) // 2))
    warps = 8 if wide or rows * max(sums, keys) > MANY_SUMS else 4
    step = keys * (bytes_of_key + (0 if problem.shared else sums * problem.tensors["value"].element_size()))
    stages = max(2, min(4, STAGED_BYTES // step))
    row_blocks = -(-problem.rows // rows)
    programs = problem.size("query", 0) * problem.kv_heads * row_blocks
    columns = problem.tensors["key"].shape[2]
    splits = splits_of(programs, columns if isinstance(columns, int) else None, keys, target)
    slots = PROGRAMS_PER_SM * sms_of(target)
    why = (
        f"{problem.rows} rows share each head of K and V, in tiles of {rows}: {row_blocks} read it",
        f"{keys} keys a step, {stages} steps in flight",
        f"{programs} programs would leave {slots} places ({PROGRAMS_PER_SM} on each of {sms_of(target)} SMs) "
        f"idle, so that the live keys are cut into {splits} parts",
    )
    return Tiling(k, v, rows, keys, splits, warps, stages, why)


def tilings_beside(tiling: Tiling) -> tuple[Tiling, ...]:
    """What else to try: tiles that need fewer registers, and one of more keys; the parts are the same."""
    rows, keys = max(SMALLEST_TILE, tiling.rows // 2), max(SMALLEST_TILE, tiling.keys // 2)
    wider = min(8, 2 * tiling.warps)
    found = (
        replace(tiling, keys=keys),
        replace(tiling, warps=wider),
        replace(tiling, rows=rows),
        replace(tiling, rows=rows, keys=keys),
        replace(tiling, rows=rows, keys=keys, warps=wider),
        replace(tiling, keys=2 * tiling.keys),
    )
    return tuple(
        replace(one, why=(f"tiles of {one.rows} rows and {one.keys} keys, {one.warps} warps",))
        for one in dict.fromkeys(found)
        if one != tiling
    )


def splits_of(programs: int, columns: int | None, keys: int, target: Target | None) -> int:
    """The number of parts that the keys are cut into.

    The one for which the waves of programs, times the length of a part, take the least time: by the number
    of programs and the SMs, not by a length, which is not known. No more than there are tiles in the cache.

    Args:
        columns: keys that the cache has room for; None where it grows.
    """
    slots = PROGRAMS_PER_SM * sms_of(target)
    most = MOST_SPLITS if columns is None else max(1, min(MOST_SPLITS, -(-columns // keys)))

    def time(splits: int) -> float:
        waves = -(-programs * splits // slots)
        return waves * (1 / splits + TIME_OF_A_PROGRAM) + splits * TIME_OF_A_SUM

    return min(range(1, most + 1), key=time)
