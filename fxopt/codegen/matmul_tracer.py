"""The statements of products: their operands at each step, and what groups of a weight's columns share."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch
from torch import fx

from fxopt.codegen.column_pairs import column_distance
from fxopt.codegen.dequantize import halves
from fxopt.codegen.elementwise import cast, rounded
from fxopt.codegen.indexing import Axis, Index, axis
from fxopt.codegen.loops import Loop
from fxopt.codegen.product_operands import Operands, known_operands
from fxopt.codegen.statements import Exchange, Product, Repeat, Statement
from fxopt.codegen.trace import CannotEmit, Conditions, Tracer
from fxopt.codegen.view_index import broadcast_to, shape_of
from fxopt.ir.quantized_weight import BLOCK


class MatmulTracer(Tracer):
    """A tracer of loops with products.

    Attributes:
        distances: between the columns of pairs, by the axis of columns. groups: axes of groups of columns of
            weights, by the steps that each group has.
    """

    def __init__(
        self,
        members: frozenset[fx.Node],
        loop: Loop,
        places: Mapping[fx.Node, Index],
        summed: Axis,
        down: Axis,
    ) -> None:
        super().__init__(members, loop)
        self.along |= {summed.symbol, down.symbol}
        self.places, self.summed, self.down = places, summed, down
        self.in_pairs = not summed.reduced
        self.distances: dict[sympy.Symbol, int] = {}
        self.groups: dict[int, Axis] = {}

    def member(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        if node not in self.places:
            return super().member(node, index, conditions)
        place = self.places[node]
        if index != place:
            return self._exchanged(node, index, conditions)
        return self.value(node, index, ()) if conditions else self._product(node, known_operands(node), index)

    def gathered(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        raise CannotEmit(f"{node.name} reads at places that are data, which every program would have to find")

    def _exchanged(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        """The other column of a pair, or the same one in other words."""
        (*row, column), (*other_row, other) = self.places[node], index
        distance = None
        if row == other_row and column.is_Symbol:
            distance = column_distance(column, shape_of(node)[-1], other, conditions)
        if distance is None:
            raise CannotEmit(f"{node.name} is needed at another element than the one that is computed")
        if distance == 0:
            return self.value(node, self.places[node], ())
        if self.distances.setdefault(column, abs(distance)) != abs(distance):
            raise CannotEmit(f"{node.name} is needed at columns of several distances")
        value = self.value(node, self.places[node], ())
        return self.add(Exchange, node, (value.name,), value.dtype, distance=abs(distance))

    def group_of(self, column: sympy.Expr, size: int, numbers: fx.Node) -> sympy.Expr:
        """Groups are an axis of their own where a power of two of steps has each."""
        steps = size // 2 if self.in_pairs else size
        found = super().group_of(column, size, numbers)
        if not found.has(self.down.symbol) or size % 2 or steps & (steps - 1):
            return found
        if self.in_pairs and size % BLOCK:
            return found
        if steps not in self.groups:
            one = axis(f"g{len(self.groups)}", shape_of(numbers)[1])
            self.groups[steps] = one
            self.along.add(one.symbol)
            self.ranges[one.symbol] = one.size
        return self.groups[steps].symbol

    def spread(self, node: fx.Node, of_group: Statement) -> Statement:
        for steps, one in self.groups.items():
            if self.is_along(of_group, one.symbol):
                key = ("repeated", of_group.name)
                if key not in self._known:
                    more = {"place": self.down.symbol, "group": one.symbol, "size": steps}
                    name = f"{of_group.name}_each"
                    self._known[key] = self.add(Repeat, node, (of_group.name,), of_group.dtype, name, **more)
                return self._known[key]
        return of_group

    def is_along(self, value: Statement, symbol: sympy.Symbol) -> bool:
        """Whether a value differs along an axis."""
        if isinstance(value, Repeat):
            return bool(symbol == value.place)
        own = {one for expr in value.indices() for one in expr.free_symbols}
        return symbol in own or any(self.is_along(self._named[name], symbol) for name in value.uses)

    def _product(self, node: fx.Node, given: Operands, index: Index) -> Statement:
        *row, column = index
        steps: list[tuple[sympy.Expr, ...]] = [(self.summed.symbol,), (self.down.symbol,)]
        if self.in_pairs:
            steps = [halves(one.symbol) for one in (self.summed, self.down)]
        across, down = steps
        # First all of the left operand: Triton then lays out what is multiplied as it loads the right one.
        lefts = [self.value(given.left, (*row, one), ()) for one in across]
        rights = [self.value(given.right, (*row[:-1], one, column), ()) for one in down]
        uses = [one.name for pair in zip(lefts, rights, strict=True) for one in pair]
        dtype = node.meta["val"].dtype
        summed = torch.int32 if dtype is torch.int32 else torch.float32
        total = self.add(Product, node, tuple(uses), summed)
        if given.bias is None and dtype is torch.int32:
            return total
        if given.bias is None:
            return self.compute(node, (total.name,), rounded(total.name, torch.float32, dtype))
        bias = self.value(given.bias, broadcast_to(index, given.bias), ())
        text = f"({total.name} + {cast(bias.name, bias.dtype, torch.float32)})"
        return self.compute(node, (total.name, bias.name), rounded(text, torch.float32, dtype))
