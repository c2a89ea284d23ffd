"""Matrix products with few rows as loops: what is in front of them and behind them, pulled into one body.

Programs run over tiles of columns. Each computes all rows of the left operand for itself, reductions over its
rows included, so that a norm in front of a product costs no memory traffic; the product is one more kind of
reduction, and what follows it is computed at its element. Products of the same left operand share a body:
those that meet in one result have their columns in common, the others run over tiles of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import Mod

from fxopt.codegen.elementwise import cast, formula_of, operations_of, rounded
from fxopt.codegen.homes import homes_from, same_shape
from fxopt.codegen.indexing import Axis, Index, axis, ranges_of, same
from fxopt.codegen.loops import Loop
from fxopt.codegen.statements import Body, Compute, Exchange, Product, Reduce, Statement
from fxopt.codegen.trace import CannotEmit, Conditions, Tracer, view_base
from fxopt.codegen.view_index import broadcast_to, readers_of, shape_of
from fxopt.ir.cost import hint
from fxopt.ir.target import least_balance

aten = torch.ops.aten

MOST_ROWS = 16  # of the left operand: what the smallest tile of a matrix unit has
MOST_PARTS = 6
TYPICAL_COLUMNS = 16  # that a program computes
LEAST_PAIR = 8  # columns in the half of a tile that is exchanged with the other
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Operands:
    """Of ``left @ right + bias``."""

    left: fx.Node
    right: fx.Node
    bias: fx.Node | None = None


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
        rows: the axis of rows; None for a single row. depth: the axis that is summed over, as the left
            operand reads it. down: the same as the right one reads it; with a single row it is the same axis.
        parts: what has columns of its own, in the order of the graph.
        piece: which piece of the depth a program sums; None when it sums all of it. length: of a piece.
    """

    rows: Axis | None = None
    depth: Axis = axis("k", sympy.Integer(1), reduced=True)
    down: Axis = axis("d", sympy.Integer(1))
    parts: tuple[Part, ...] = ()
    piece: Axis | None = None
    length: int = 0

    @property
    def products(self) -> list[Product]:
        return [one for one in self.statements if isinstance(one, Product)]


def operands_of_product(node: fx.Node) -> Operands | None:
    """The operands of a product that a kernel may compute; None for everything else."""
    given: Any = node.args
    if node.target is aten.mm.default:
        found = Operands(*given)
    elif node.target is aten.addmm.default and all(value == 1 for value in node.kwargs.values()):
        found = Operands(given[1], given[2], given[0])
    else:
        return None
    used = (node, found.left, found.right)
    if len({one.meta["val"].dtype for one in used}) > 1 or node.meta["val"].dtype not in _DTYPES:
        return None
    return found


def is_skinny(node: fx.Node) -> bool:
    """Whether `node` is a product with few rows, as the decoding of few sequences has."""
    found = operands_of_product(node)
    if found is None:
        return False
    rows, depth = found.left.meta["val"].shape
    return hint(rows) <= MOST_ROWS and hint(depth) > 1


def left_operand(product: fx.Node) -> fx.Node:
    """What a product has the rows of."""
    return _operands(product).left


def matmul_body(members: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> MatmulBody:
    """The body that computes and stores `outputs`, of which some are products or depend on them.

    Raises:
        CannotEmit: the members are more than products of one operand with what belongs to them.
    """
    products = [node for node in members if is_skinny(node)]
    left = left_operand(products[0])
    rows, depth = _row_axes(left)
    down = axis("d", depth.size) if rows is not None else depth
    through = _dependences(members, products)
    parts = _parts(products, through)
    for node in outputs:
        if not through[node] and not any(user in through for user in readers_of(node)):
            raise CannotEmit(f"{node.name} has no part in a product")
    places = {node: (_index(rows), _index(part.columns)) for part in parts for node in part.products}
    axes = (*([rows] if rows else []), *(part.columns for part in parts), depth)
    axes += (down,) if down is not depth else ()
    homes = _homes(left, places, through, (_index(rows), depth.symbol), ranges_of(axes))
    loop = Loop(axes, (), (sympy.Integer(-1),), (_index(rows),), shape_of(left)[:1], homes)
    tracer = _MatmulTracer(frozenset(members), loop, places, depth, down)
    for node in outputs:
        tracer.store(node)
    parts = tuple(replace(part, distance=tracer.distances.get(part.columns.symbol, 0)) for part in parts)
    body = MatmulBody(
        axes, tracer.names, tracer.statements, tracer.stores, rows=rows, depth=depth, down=down, parts=parts
    )
    _check(body)
    return body


def _operands(node: fx.Node) -> Operands:
    found = operands_of_product(node)
    assert found is not None
    return found


def _index(one: Axis | None) -> sympy.Expr:
    return sympy.Integer(0) if one is None or one.size == 1 else one.symbol


def _row_axes(left: fx.Node) -> tuple[Axis | None, Axis]:
    rows, depth = shape_of(left)
    return None if rows == 1 else axis("m", rows), axis("k", depth, reduced=True)


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
    columns = [shape_of(node)[1] for node in own]
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


class _MatmulTracer(Tracer):
    def __init__(
        self,
        members: frozenset[fx.Node],
        loop: Loop,
        places: Mapping[fx.Node, Index],
        depth: Axis,
        down: Axis,
    ) -> None:
        super().__init__(members, loop)
        self.along.add(down.symbol)
        self.places, self.depth, self.down = places, depth, down
        self.distances: dict[sympy.Symbol, int] = {}

    def member(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        if node not in self.places:
            return super().member(node, index, conditions)
        place = self.places[node]
        if index != place:
            return self._exchanged(node, index, conditions)
        return self.value(node, index, ()) if conditions else self._product(node, _operands(node), index)

    def gathered(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        raise CannotEmit(f"{node.name} reads at places that are data, which every program would have to find")

    def _exchanged(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        """The other column of a pair."""
        (row, column), (other_row, other) = self.places[node], index
        distance = other - column
        paired = distance.is_Integer and column.is_Symbol and row == other_row
        if not paired or not _is_pair(column, int(distance), shape_of(node)[1], conditions):
            raise CannotEmit(f"{node.name} is needed at another element than the one that is computed")
        if self.distances.setdefault(column, abs(int(distance))) != abs(int(distance)):
            raise CannotEmit(f"{node.name} is needed at columns of several distances")
        value = self.value(node, self.places[node], ())
        return self.add(Exchange, node, (value.name,), value.dtype, distance=abs(int(distance)))

    def _product(self, node: fx.Node, given: Operands, index: Index) -> Statement:
        row, column = index
        left = self.value(given.left, (row, self.depth.symbol), ())
        right = self.value(given.right, (self.down.symbol, column), ())
        dtype = node.meta["val"].dtype
        total = self.add(Product, node, (left.name, right.name), torch.float32)
        if given.bias is None:
            return self.compute(node, (total.name,), rounded(total.name, torch.float32, dtype))
        bias = self.value(given.bias, broadcast_to(index, given.bias), ())
        text = f"({total.name} + {cast(bias.name, bias.dtype, torch.float32)})"
        return self.compute(node, (total.name, bias.name), rounded(text, torch.float32, dtype))


def _is_pair(column: sympy.Symbol, distance: int, columns: sympy.Expr, conditions: Conditions) -> bool:
    """Whether, where `conditions` hold, `distance` leads to the other half of a pair of columns: from the
    first half of each ``2 * abs(distance)`` columns to the second, or back."""
    half = abs(distance)
    if half % LEAST_PAIR or not columns.is_Integer or columns % (2 * half):
        return False
    below = {(one.lhs, one.bound) for one in conditions}
    places = [one for pair in below for one in pair if _period(one, column, columns) % (2 * half) == 0]
    if distance > 0:
        return any((place, half) in below for place in places)
    return any(
        (half - 1, place) in below
        and (_period(place, column, columns) == 2 * half or (place, 2 * half) in below)
        for place in places
    )


def _period(place: sympy.Expr, column: sympy.Symbol, columns: sympy.Expr) -> int:
    """After how many columns `place` starts again from zero; of what is no place in a period, one."""
    if place == column:
        return int(columns)
    found = isinstance(place, Mod) and place.args[0] == column and place.args[1].is_Integer
    return int(place.args[1]) if found else 1


def axes_of(body: MatmulBody) -> dict[str, frozenset[sympy.Symbol]]:
    """Along which axes each value differs."""
    own = {one.symbol for one in body.axes}
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
        found[one.name] = frozenset(along)
    return found


def _check(body: MatmulBody) -> None:
    """That there is one left operand, and that no value differs along more axes than a tile has."""
    if len({one.uses[0] for one in body.products}) > 1:
        raise CannotEmit("products of different operands are different kernels")
    along = axes_of(body)
    columns = {part.columns.symbol for part in body.parts}
    row = {body.rows.symbol} if body.rows is not None else set()
    for product in body.products:
        left, right = (along[name] for name in product.uses)
        if left & columns or right & row:
            raise CannotEmit(f"{product.origin.name} is of operands that differ along rows and columns")
    for one in body.statements:
        if isinstance(one, Reduce) and along[one.uses[0]] & columns:
            raise CannotEmit(f"{one.origin.name} is reduced for every column")
        if not isinstance(one, (Reduce, Product)) and len(along[one.name]) > 2:
            raise CannotEmit(f"{one.origin.name} differs along rows, columns and what is summed")
    _refuse_repetition(body, along)


def _refuse_repetition(body: MatmulBody, along: Mapping[str, frozenset[sympy.Symbol]]) -> None:
    """Each program computes the left operand again: that must take less time than reading its weights."""
    columns = {part.columns.symbol for part in body.parts}
    again = [one for one in body.statements if one.on_r and not along[one.name] & columns]
    operations = sum(operations_of(one.origin) for one in again if isinstance(one, (Compute, Reduce)))
    value = left_operand(body.parts[0].products[0]).meta["val"]
    each = operations * hint(value.shape[0]) / (TYPICAL_COLUMNS * value.element_size())
    if each > least_balance():
        raise CannotEmit(
            f"what is in front of the product takes {each:.0f} operations for each byte of weights, "
            f"wanted at most {least_balance():.0f}"
        )
