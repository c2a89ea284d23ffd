"""How much of a matrix product one program computes."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch.utils._sympy.functions import FloorDiv

from fxopt.codegen.indexing import Axis
from fxopt.codegen.matmul import MOST_ROWS, MatmulBody
from fxopt.codegen.print_index import print_index
from fxopt.codegen.split_products import can_split_products
from fxopt.codegen.statements import Load
from fxopt.codegen.tile_sizes import power_of_two, sms_of
from fxopt.ir.target import Target

_BYTES = 16384  # of weights that the 128 threads of a program hold at once: eight loads of 16 bytes each
_ELEMENTS = 2048  # of a block of weights on its way to the matrix units
_SPAN = 4096
MOST_PIECES = 16
SECOND_LAUNCH = 3e-6  # seconds
_LINE = 256  # bytes of a column of weights that such a block has at most
_LEAST = 16  # of each dimension of a block for the matrix units


@dataclass(frozen=True)
class MatmulTile:
    """How much a program has at once.

    Attributes:
        rows: of the left operand. columns: of each result. depth: of what is summed over. span: of a row when
            it is reduced before. why: for the head of the kernel's file.
    """

    rows: int
    columns: int
    depth: int
    span: int
    why: str = ""

    @property
    def constants(self) -> tuple[tuple[str, int], ...]:
        return (("ROWS", self.rows), ("COLUMNS", self.columns), ("DEPTH", self.depth), ("SPAN", self.span))

    def side_by_side(self, columns: Axis) -> sympy.Expr:
        """How many programs share the columns of a part."""
        return FloorDiv(columns.size + self.columns - 1, sympy.Integer(self.columns))

    def grid(self, body: MatmulBody) -> tuple[str, ...]:
        """Tiles of all parts, one after the other, by tiles of rows."""
        tiles = [print_index(sympy.Add(*(self.side_by_side(part.columns) for part in body.parts)))]
        if body.rows is not None:
            tiles.append(f"triton.cdiv({print_index(body.rows.size)}, ROWS)")
        return tuple(tiles) if body.piece is None else (*tiles, print_index(body.piece.size))


def choose_matmul_tile(body: MatmulBody, target: Target | None) -> MatmulTile:
    """As many columns for each program as give every SM two, loaded by 16 bytes for each thread."""
    sms = sms_of(target)
    depth = power_of_two(_number(body.depth.size))
    columns = power_of_two(max(map(_number, _columns(body))))
    if body.rows is None:
        rows, elements = 1, _BYTES // _bytes_of_weight(body) // _products_at_once(body)
        deep, least = (min(512, depth), 1) if is_contiguous_along_depth(body) else (elements // 128, 32)
    else:
        rows, elements = MOST_ROWS, _ELEMENTS
        deep, least, depth = 64, _LEAST, max(_LEAST, min(depth, _LINE // _bytes_of_weight(body)))
    pair = _pair(body)
    wanted = max(least, min(columns, elements // deep, pair or columns))
    least = max(least, 2) if pair else least
    while wanted > least and _programs(body, wanted) < 2 * sms:
        wanted //= 2
    chosen = MatmulTile(rows, wanted, min(depth, elements // wanted), min(depth, _SPAN // rows))
    shape = f"ROWS={rows}, COLUMNS={wanted}, DEPTH={chosen.depth}"
    why = f"{shape}: {_programs(body, wanted)} programs, each reads its weights once"
    return MatmulTile(rows, wanted, chosen.depth, chosen.span, why)


def piece_of(body: MatmulBody, tile: MatmulTile, target: Target | None) -> int | None:
    """How much of the depth a program sums: less than all of it where SMs would be idle for longer than a
    second launch takes."""
    if target is None or not can_split_products(body):
        return None
    programs = _programs(body, tile.columns)
    depth = int(body.depth.size)
    weights = sum(_number(part.columns.size) * len(part.products) for part in body.parts) * depth
    idle = weights * _bytes_of_weight(body) / target.bandwidth * (target.sms / programs - 1)
    if idle < SECOND_LAUNCH:
        return None
    pieces = min(MOST_PIECES, 2 * target.sms // programs)
    return -(-depth // (pieces * tile.depth)) * tile.depth


def is_contiguous_along_depth(body: MatmulBody) -> bool:
    """Whether neighbours in memory are summed over, judged by most of the weights."""
    columns = {part.columns.symbol for part in body.parts}
    votes = 0
    for one in body.statements:
        if isinstance(one, Load) and one.offset.has(body.down.symbol) and one.offset.free_symbols & columns:
            step = one.offset.expand().coeff(body.down.symbol)
            votes += 1 if step == 1 else -1
    return votes >= 0


def _pair(body: MatmulBody) -> int:
    """The most columns whose halves are so far apart as all pairs are, or zero without any pairs."""
    apart = [2 * (part.distance & -part.distance) for part in body.parts if part.distance]
    return min(apart, default=0)


def _bytes_of_weight(body: MatmulBody) -> int:
    return int(body.products[0].origin.meta["val"].element_size())


def _products_at_once(body: MatmulBody) -> int:
    return 1 << (max(len(part.products) for part in body.parts) - 1).bit_length()


def _columns(body: MatmulBody) -> list[sympy.Expr]:
    return [part.columns.size for part in body.parts]


def _programs(body: MatmulBody, columns: int) -> int:
    return sum(-(-_number(size) // columns) for size in _columns(body))


def _number(size: sympy.Expr) -> int:
    return int(size) if size.is_number else 1 << 12
