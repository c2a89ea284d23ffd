"""How much of a matrix product one program computes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from fxopt.codegen.kernel_file import Products
from fxopt.codegen.matmul import MatmulBody
from fxopt.codegen.print_index import print_index
from fxopt.codegen.product_model import LEAST, best_tile, number_of_programs
from fxopt.codegen.product_operands import MOST_ROWS
from fxopt.codegen.split_products import can_split_products
from fxopt.codegen.statements import Load
from fxopt.codegen.tile_sizes import power_of_two, sms_of, warps_of
from fxopt.ir.target import Target

_THREADS = 128  # of a program with few rows
_BYTES = 16384  # of weights that these hold at once: eight loads of 16 bytes each
_SUMMANDS = 8192  # of codes that these hold at once, widened
_ELEMENTS = 2048  # of a block of weights on its way to the matrix units
_SPAN = 4096
MOST_PIECES = 16
SECOND_LAUNCH = 3e-6  # seconds
_LINE = 256  # bytes of a column of weights that such a block has at most
_LARGEST = 256
_BYTES_OF_INSTRUCTION = 32  # of a row, that matrix units multiply at once
GROUP = 8  # tiles of rows that follow each other with the same columns: what they share stays in L2


@dataclass(frozen=True)
class MatmulTile:
    """How much a program has at once, and how it runs.

    Attributes:
        rows: of the left operand. columns: of each result. depth: of what is summed over. span: of a row when
            it is reduced before. group: tiles of rows that are computed side by side; zero where there is one
            tile of rows alone. why: for the head of the kernel's file.
    """

    rows: int
    columns: int
    depth: int
    span: int
    group: int = 0
    warps: int = 4
    stages: int = 3
    why: str = ""

    @property
    def constants(self) -> tuple[tuple[str, int], ...]:
        own = (("ROWS", self.rows), ("COLUMNS", self.columns), ("DEPTH", self.depth), ("SPAN", self.span))
        return (*own, ("GROUP", self.group)) if self.group else own

    def grid(self, body: MatmulBody) -> tuple[str, ...]:
        """Tiles of all parts, one after the other, by tiles of rows; then pieces of the depth."""
        tiles = " + ".join(f"triton.cdiv({print_index(part.columns.size)}, COLUMNS)" for part in body.parts)
        pieces = () if body.piece is None else (print_index(body.piece.size),)
        if self.group and body.rows is not None:
            down = f"triton.cdiv({print_index(body.rows.size)}, ROWS)"
            stacks = f"{_factor(body.batch.size)} * " if body.batch is not None else ""
            return (f"{stacks}{down} * ({tiles})", *pieces)
        rows = () if body.rows is None else (f"triton.cdiv({print_index(body.rows.size)}, ROWS)",)
        return (tiles, *rows, *pieces)

    def adjustable(self, body: MatmulBody) -> tuple[tuple[str, int, int, int], ...]:
        """Name, extent, least and most of the constants that may have other values: those with which no mask
        becomes necessary that the text does not have."""
        columns = [part.columns.size for part in body.parts]
        pair = _pair(body) or _LARGEST
        depth = [body.summed.size, *([sympy.Integer(body.length)] if body.piece is not None else [])]
        least = 1 if body.rows is None else LEAST
        found = [
            (
                "COLUMNS",
                sum(map(_number, columns)),
                _least_columns(body),
                min(pair, _most(columns, self.columns)),
            ),
            ("DEPTH", _number(body.summed.size), min(self.depth, max(least, 32)), _most(depth, self.depth)),
        ]
        if self.group and body.rows is not None:
            rows = [body.rows.size]
            found.append(("ROWS", _number(rows[0]), LEAST, _most(rows, self.rows)))
        return tuple(found)


def _factor(size: sympy.Expr) -> str:
    return print_index(size) if size.is_Integer else f"({print_index(size)})"


def _most(sizes: list[sympy.Expr], block: int) -> int:
    """The largest block that divides all the sizes that `block` divides."""
    whole = [int(one) for one in sizes if one.is_Integer and int(one) % block == 0]
    return min([_LARGEST, *(one & -one for one in whole)])


def products_of(body: MatmulBody) -> Products:
    """What the model of a launch's time knows of its products."""
    return Products(
        batch=_number(body.batch.size) if body.batch is not None else 1,
        rows=_number(body.rows.size) if body.rows is not None else 1,
        columns=tuple(_number(part.columns.size) for part in body.parts),
        depth=_number(body.summed.size),
        pieces=_number(body.piece.size) if body.piece is not None else 1,
        together=max(len(part.products) for part in body.parts),
        dtype=str(body.dtype).removeprefix("torch."),
        on_matrix_units=body.on_matrix_units,
        pairs=any(part.distance for part in body.parts),
        summands=body.columns_of_step,
        stored=body.bytes_of_step if body.widens else 0,
        looked_up=body.looks_up,
    )


def choose_matmul_tile(body: MatmulBody, target: Target | None) -> MatmulTile:
    """With few rows as many columns for each program as give every SM two, loaded by 16 bytes for each
    thread; with many what the model of the GPU takes for fastest."""
    if body.is_large:
        return _large_tile(body, target)
    sms = sms_of(target)
    depth = power_of_two(_number(body.summed.size))
    columns = power_of_two(max(map(_number, _columns(body))))
    if body.rows is None:
        rows, elements = 1, _BYTES // body.bytes_of_step // _products_at_once(body)
        elements = min(elements, _SUMMANDS // body.columns_of_step // _products_at_once(body))
        deep, least = elements // _THREADS, 32
        if is_contiguous_along_depth(body):
            # Codes are loaded by 16 bytes: then Triton lays them out as it does the row, which they meet.
            deep, least = min(_THREADS * 16 if body.bytes_of_step == 1 else 512, depth), 1
    else:
        rows, elements = MOST_ROWS, _ELEMENTS
        shortest = max(LEAST, _BYTES_OF_INSTRUCTION // body.dtype.itemsize)
        deep, least, depth = 64, LEAST, max(shortest, min(depth, _LINE // body.bytes_of_step))
    pair = _pair(body)
    wanted = max(least, min(columns, elements // deep, pair or columns))
    least = max(least, _least_columns(body))
    while wanted > least and _programs(body, wanted) < 2 * sms:
        wanted //= 2
    deep, span = min(depth, elements // wanted), min(depth, _SPAN // rows)
    chosen = MatmulTile(rows, wanted, deep, span, warps=warps_of(_THREADS, target))
    shape = f"ROWS={rows}, COLUMNS={wanted}, DEPTH={chosen.depth}"
    return replace(chosen, why=f"{shape}: {_programs(body, wanted)} programs, each reads its weights once")


def _large_tile(body: MatmulBody, target: Target | None) -> MatmulTile:
    operands = len({one.tensor for one in body.loads}) + len(body.stores)
    pair = _pair(body) or _LARGEST
    sizes = products_of(body)
    found = best_tile(sizes, operands, pair, target)
    shape = f"ROWS={found.rows}, COLUMNS={found.columns}, DEPTH={found.depth}"
    programs = number_of_programs(sizes, found)
    return MatmulTile(
        found.rows,
        found.columns,
        found.depth,
        max(LEAST, min(power_of_two(sizes.depth), _SPAN // found.rows)),
        GROUP,
        found.warps,
        found.stages,
        f"{shape}: {programs} programs, {GROUP} tiles of rows with the same columns at a time",
    )


def pieces_worth_while(body: MatmulBody, tile: MatmulTile, target: Target | None) -> list[int]:
    """Lengths of pieces of the depth with which SMs have work that would be idle, the most promising first;
    empty where they are not idle for as long as a second launch takes."""
    if target is None or not can_split_products(body):
        return []
    sizes = products_of(body)
    programs = _programs(body, tile.columns) * -(-sizes.rows // tile.rows) * sizes.batch
    weights = sum(sizes.columns) * sizes.together * sizes.depth * sizes.batch * body.bytes_of_step
    busy = weights / target.bandwidth
    if body.is_large:
        dtype = body.dtype
        flops = (
            2.0
            * body.columns_of_step
            * sizes.batch
            * sizes.rows
            * sum(sizes.columns)
            * sizes.together
            * sizes.depth
        )
        busy = max(busy, flops / target.rate(dtype, tensor_cores=sizes.on_matrix_units))
    if busy * (target.sms / programs - 1) < SECOND_LAUNCH:
        return []
    most = min(MOST_PIECES, max(1, 2 * target.sms // programs))
    counts = [most, *(one for one in (most // 2, most // 4) if one > 1)]
    return list(
        dict.fromkeys(-(-sizes.depth // (one * tile.depth)) * tile.depth for one in counts if one > 1)
    )


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
    """The most columns whose halves are so far apart as all pairs are, or zero without any such pairs: those
    of neighbours may be any number."""
    apart = [2 * (part.distance & -part.distance) for part in body.parts if part.distance > 1]
    return min(apart, default=0)


def _least_columns(body: MatmulBody) -> int:
    if body.rows is not None:
        return LEAST
    return 2 if any(part.distance for part in body.parts) else 1


def _products_at_once(body: MatmulBody) -> int:
    return 1 << (max(len(part.products) for part in body.parts) - 1).bit_length()


def _columns(body: MatmulBody) -> list[sympy.Expr]:
    return [part.columns.size for part in body.parts]


def _programs(body: MatmulBody, columns: int) -> int:
    return sum(-(-_number(size) // columns) for size in _columns(body))


def _number(size: sympy.Expr) -> int:
    return int(size) if size.is_number else 1 << 12
