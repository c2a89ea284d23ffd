"""Matrix products as loops: what is in front of them and behind them, pulled into one body.

Programs run over tiles of columns. Each computes its rows of the left operand for itself, reductions over
them included, so that a norm in front of a product costs no memory traffic; the product is one more kind of
reduction, and what follows it is computed at its element. Products of the same left operand share a body:
those that meet in one result have their columns in common, the others run over tiles of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from fxopt.codegen.dequantize import reads_codes, reads_nibbles, reads_table
from fxopt.codegen.elementwise import formula_of, operations_of
from fxopt.codegen.homes import homes_from, same_shape
from fxopt.codegen.indexing import Axis, Index, axis, ranges_of, same
from fxopt.codegen.loops import Loop
from fxopt.codegen.matmul_tracer import MatmulTracer
from fxopt.codegen.product_operands import in_kernel, is_skinny, known_operands, left_operand
from fxopt.codegen.statements import Body, Compute, Product, Reduce, Repeat
from fxopt.codegen.trace import CannotEmit
from fxopt.codegen.view_index import readers_of, shape_of, view_base
from fxopt.ir.cost import hint
from fxopt.ir.target import all_targets, least_balance

aten = torch.ops.aten

MOST_PARTS = 6
TYPICAL_COLUMNS = 16  # that a program computes of a product with few rows
LARGE_COLUMNS = 128  # of one with many


@dataclass(frozen=True)
class Part:
    """Products that have their columns in common, and the axis of those.

    Attributes:
        distance: between the two columns of a pair, where what follows needs both, as rotary embeddings do;
            else zero.
    """

    columns: Axis
    products: tuple[fx.Node, ...]
    distance: int = 0


@dataclass
class MatmulBody(Body):
    """A body with products.

    Attributes:
        batch: the axis of products of stacks of matrices; None for those of matrices.
        rows: the axis of rows; None for a single row. depth: the axis that is summed over. summed: what a
            program steps over to do so, as the left operand reads it: the depth, or the bytes that hold two
            of its codes each. down: the same as the right one reads it; with a single row the same axis.
        groups: axes of groups of columns of weights with scales in common, with the groups' sizes in steps.
        parts: what has columns of its own, in the order of the graph.
        piece: which piece of the depth a program sums; None when it sums all of it. length: of a piece.
        tf32: whether float32 is multiplied with ten bits of precision, as torch is allowed to.
    """

    batch: Axis | None = None
    rows: Axis | None = None
    depth: Axis = axis("k", sympy.Integer(1), reduced=True)
    summed: Axis = axis("k", sympy.Integer(1), reduced=True)
    down: Axis = axis("d", sympy.Integer(1))
    groups: tuple[tuple[Axis, int], ...] = ()
    parts: tuple[Part, ...] = ()
    piece: Axis | None = None
    length: int = 0
    tf32: bool = False

    @property
    def products(self) -> list[Product]:
        return [one for one in self.statements if isinstance(one, Product)]

    @property
    def on_matrix_units(self) -> bool:
        return self.rows is not None and (self.tf32 or self.dtype is not torch.float32)

    @property
    def dtype(self) -> torch.dtype:
        """Of the operands."""
        found: torch.dtype = left_operand(self.products[0].origin).meta["val"].dtype
        return found

    @property
    def bytes_of_step(self) -> int:
        """What a step reads of a column of weights: an element, or a byte of codes."""
        return 1 if self.widens else self.dtype.itemsize

    @property
    def widens(self) -> bool:
        """Whether a weight is codes that are widened in registers."""
        return any(reads_codes(known_operands(one.origin).right) for one in self.products)

    @property
    def looks_up(self) -> bool:
        """Whether what a weight's codes stand for is in a table."""
        return any(reads_table(known_operands(one.origin).right) for one in self.products)

    @property
    def columns_of_step(self) -> int:
        """How many columns of a weight a step multiplies: two, where two codes lie in a byte."""
        return len(self.products[0].uses) // 2

    @property
    def is_large(self) -> bool:
        """Whether the product has tiles of rows as well as of columns."""
        return not is_skinny(self.products[0].origin)


def allows_tf32() -> bool:
    """Whether torch multiplies float32 on CUDA in tf32 (`torch.set_float32_matmul_precision`)."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def matmul_body(members: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> MatmulBody:
    """The body that computes and stores `outputs`, of which some are products or depend on them.

    Raises:
        CannotEmit: the members are more than products of one operand with what belongs to them.
    """
    products = [node for node in members if in_kernel(node)]
    left = left_operand(products[0])
    if len({len(shape_of(left_operand(node))) for node in products}) > 1:
        raise CannotEmit("products of different operands are different kernels")
    batch, rows, depth = _row_axes(left, is_skinny(products[0]))
    summed = depth
    if any(reads_nibbles(known_operands(node).right) for node in products):
        summed = axis("j", depth.size / 2)
    down = axis("d", summed.size) if rows is not None else summed
    through = _dependences(members, products)
    parts = _parts(products, through)
    for node in outputs:
        if not through[node] and not any(user in through for user in readers_of(node)):
            raise CannotEmit(f"{node.name} has no part in a product")
    stacked = len(shape_of(left)) > 2
    row = (*((_index(batch),) if stacked else ()), _index(rows))
    places = {node: (*row, _index(part.columns)) for part in parts for node in part.products}
    axes = (*(one for one in (batch, rows) if one), *(part.columns for part in parts), depth)
    axes += tuple(one for one in dict.fromkeys((summed, down)) if one is not depth)
    homes = _homes(left, places, through, (*row, depth.symbol), ranges_of(axes))
    loop = Loop(axes, (), (sympy.Integer(-1),), row, shape_of(left)[:-1], homes)
    tracer = MatmulTracer(frozenset(members), loop, places, summed, down)
    for node in outputs:
        tracer.store(node)
    parts = tuple(replace(part, distance=tracer.distances.get(part.columns.symbol, 0)) for part in parts)
    groups = tuple((one, size) for size, one in tracer.groups.items())
    found = ((*axes, *tracer.groups.values()), tracer.names, tracer.statements, tracer.stores)
    body = MatmulBody(*found, batch, rows, depth, summed, down, groups, parts, tf32=allows_tf32())
    _check(body)
    return body


def _index(one: Axis | None) -> sympy.Expr:
    return sympy.Integer(0) if one is None or one.size == 1 else one.symbol


def _row_axes(left: fx.Node, skinny: bool) -> tuple[Axis | None, Axis | None, Axis]:
    """Of the batch, of rows and of depth. The single row of a product with few needs no axis."""
    *batch, rows, depth = shape_of(left)
    stacks = axis("b", batch[0]) if batch and batch[0] != 1 else None
    return stacks, None if skinny and rows == 1 else axis("m", rows), axis("k", depth, reduced=True)


def _dependences(
    members: Sequence[fx.Node], products: Sequence[fx.Node]
) -> dict[fx.Node, frozenset[fx.Node]]:
    """Which products each member is behind, itself included; what is in front of all has none."""
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in members:
        before = [found.get(view_base(arg), frozenset()) for arg in node.all_input_nodes]
        found[node] = frozenset([node]) if node in products else frozenset().union(*before)
    return found


def _parts(products: Sequence[fx.Node], through: Mapping[fx.Node, frozenset[fx.Node]]) -> tuple[Part, ...]:
    """Products that meet in a member, together."""
    groups = [frozenset([node]) for node in products]
    for behind in through.values():
        met = [one for one in groups if one & behind]
        if len(met) > 1:
            groups = [one for one in groups if one not in met] + [frozenset().union(*met)]
    groups.sort(key=lambda group: min(map(products.index, group)))
    if len(groups) > MOST_PARTS:
        raise CannotEmit(f"wanted at most {MOST_PARTS} products side by side, saw {len(groups)}")
    names = [f"n{place}" if len(groups) > 1 else "n" for place in range(len(groups))]
    return tuple(_part(name, products, group) for name, group in zip(names, groups, strict=True))


def _part(name: str, products: Sequence[fx.Node], group: frozenset[fx.Node]) -> Part:
    own = tuple(node for node in products if node in group)
    columns = [shape_of(node)[-1] for node in own]
    if not all(same(one, columns[0]) for one in columns):
        raise CannotEmit(f"{own[0].name} and {own[-1].name} have different numbers of columns")
    return Part(axis(name, columns[0]), own)


def _homes(
    left: fx.Node,
    places: Mapping[fx.Node, Index],
    through: Mapping[fx.Node, frozenset[fx.Node]],
    index: Index,
    ranges: Mapping[sympy.Symbol, sympy.Expr],
) -> dict[fx.Node, Index]:
    """Where results lie: behind a product at its element, in front of all at those of the left operand."""
    pointwise = {node for node in through if formula_of(node) is not None}
    before = frozenset(node for node in pointwise if not through[node])
    homes = homes_from(left, index, before, ranges)
    for product, place in places.items():
        behind = frozenset(node for node in pointwise if product in through[node])
        own = homes_from(product, place, behind, ranges)
        for node in through:
            if product in through[node] and node not in own:
                like = next((one for one in own if same_shape(one, node)), None)
                # Which element an iteration stores is free, as long as every element is stored once.
                own |= homes_from(node, own[like], behind, ranges) if like is not None else {}
        homes |= own
    return {**homes, **places}


def axes_of(body: MatmulBody) -> dict[str, frozenset[sympy.Symbol]]:
    """Along which axes of a tile each value differs: a program has one matrix of a batch."""
    own = {one.symbol for one in body.axes if one is not body.batch}
    row = {body.rows.symbol} if body.rows is not None else set()
    columns = {node: part.columns.symbol for part in body.parts for node in part.products}
    found: dict[str, frozenset[sympy.Symbol]] = {}
    for one in body.statements:
        along = {symbol for expr in one.indices() for symbol in expr.free_symbols} & own
        along = along.union(*(found[name] for name in one.uses))
        if isinstance(one, Product):
            along = row | {columns[one.origin]}
        elif isinstance(one, Reduce):
            along -= {body.depth.symbol}
        elif isinstance(one, Repeat):
            along -= {one.group}
        found[one.name] = frozenset(along)
    return found


def _check(body: MatmulBody) -> None:
    """That there is one left operand, and that no value differs along more axes than a tile has."""
    if len({one.uses[::2] for one in body.products}) > 1:
        raise CannotEmit("products of different operands are different kernels")
    along = axes_of(body)
    columns = {part.columns.symbol for part in body.parts}
    row = {body.rows.symbol} if body.rows is not None else set()
    for product in body.products:
        left, right = (
            frozenset().union(*(along[name] for name in names))
            for names in (product.uses[::2], product.uses[1::2])
        )
        if left & columns or right & row:
            raise CannotEmit(f"{product.origin.name} is of operands that differ along rows and columns")
    for one in body.statements:
        if isinstance(one, Reduce) and along[one.uses[0]] & columns:
            raise CannotEmit(f"{one.origin.name} is reduced for every column")
        if not isinstance(one, (Reduce, Product)) and len(along[one.name]) > 2:
            raise CannotEmit(f"{one.origin.name} differs along rows, columns and what is summed")
    _refuse_repetition(body, along)


def _refuse_repetition(body: MatmulBody, along: Mapping[str, frozenset[sympy.Symbol]]) -> None:
    """Each program computes the left operand again: that must take less time than what limits the product,
    which is reading the weights with few rows, and the matrix units with many."""
    columns = {part.columns.symbol for part in body.parts}
    again = [one for one in body.statements if one.on_r and not along[one.name] & columns]
    computed = [one for one in again if isinstance(one, (Compute, Reduce))]
    # Of a step in two columns each operator of theirs stands twice, for half of the elements.
    twice = {one.symbol for one in (body.summed, body.down) if one is not body.depth}
    operations = sum(operations_of(one.origin) / (2 if along[one.name] & twice else 1) for one in computed)
    value = left_operand(body.parts[0].products[0]).meta["val"]
    if body.is_large:
        if operations > _spare(value.dtype):
            raise CannotEmit(
                f"what is in front of the product takes {operations:.0f} operations for each element, "
                f"wanted at most {_spare(value.dtype):.0f}"
            )
        return
    each = operations * hint(value.shape[0]) / (TYPICAL_COLUMNS * value.element_size())
    if each > least_balance():
        raise CannotEmit(
            f"what is in front of the product takes {each:.0f} operations for each byte of weights, "
            f"wanted at most {least_balance():.0f}"
        )


@functools.cache
def _spare(dtype: torch.dtype) -> float:
    """Operations that every target does while its matrix units multiply an element by a tile's columns."""
    shares = [
        one.rate(dtype, tensor_cores=False) / one.rate(dtype, tensor_cores=True) for one in all_targets()
    ]
    return 2 * LARGE_COLUMNS * min(shares)
