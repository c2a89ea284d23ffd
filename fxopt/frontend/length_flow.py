"""Who reads a length that grows, in a graph that is to be called with another number in its place.

Called with the room of a cache as its length, a graph has tensors with rows behind those that are live. It
computes the same as before where

- those rows stay rows: no operator mixes them with live ones, but for attention, which can be told how many
  there are;
- the length is not read as a number, but for numbers that can be read from a tensor instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxopt.ir import facts
from fxopt.ir.facts import argument, is_call, val

aten = torch.ops.aten

# Where the argument with this name is a size: rows of the result.
SIZES: dict[OpOverload, str] = {
    aten.arange.default: "end",
    aten.expand.default: "size",
    aten.view.default: "size",
    aten.reshape.default: "shape",
    aten._unsafe_view.default: "size",
    aten.unflatten.int: "sizes",
    aten.slice.Tensor: "end",
    aten.full.default: "size",
    aten.zeros.default: "size",
    aten.ones.default: "size",
    aten.new_zeros.default: "size",
    aten.new_ones.default: "size",
    aten.new_full.default: "size",
}
_MERGING = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int,
    aten.flatten.using_ints,
)  # fmt: skip
# Each row of the result is made of that row of the operands, or of those before it.
_ROW_BY_ROW = (
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.cumsum.default,
    aten.unsqueeze.default, aten.transpose.int, aten.permute.default, aten.t.default, aten.alias.default,
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.to.dtype, aten.to.device,
    aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.lift_fresh_copy.default,
    aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor, aten.expand.default, aten.arange.default,
    aten.full.default, aten.zeros.default, aten.ones.default, aten.new_zeros.default, aten.new_ones.default,
    aten.new_full.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
)  # fmt: skip


class Refusal(Exception):  # noqa: N818 - becomes evidence
    """Why lengths have to stay numbers of the host."""


def symbols_of(value: Any) -> set[sympy.Symbol]:
    """The symbols in a number, or in the sizes of a tensor."""
    if isinstance(value, torch.Tensor):
        return set().union(*(symbols_of(size) for size in value.shape))
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return set(value.node.expr.free_symbols)
    return set()


def is_symbolic(arg: Any) -> bool:
    """A node that is a number, not a tensor."""
    return isinstance(arg, fx.Node) and isinstance(val(arg), torch.SymInt | torch.SymFloat | torch.SymBool)


def nodes_in(arg: Any) -> Iterator[fx.Node]:
    """The nodes in an argument, which may be a list."""
    return (each for each in pytree.tree_leaves(arg) if isinstance(each, fx.Node))


def is_pointwise(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.pointwise in target.tags


class Lengths:
    """Symbols that stand for lengths which grow, and who may read them."""

    def __init__(self, symbols: set[sympy.Symbol]) -> None:
        self.symbols = symbols

    def are_in(self, value: Any) -> bool:
        return not self.symbols.isdisjoint(symbols_of(value))

    def dims(self, node: Any) -> list[int]:
        """The dimensions of a tensor that have rows behind those that are live."""
        if not facts.is_tensor(node):
            return []
        return [dim for dim, size in enumerate(val(node).shape) if self.are_in(size)]

    def touches(self, node: fx.Node) -> bool:
        """The node reads a length, or a tensor of such a size, or makes one."""
        values = [val(arg) for arg in node.all_input_nodes]
        return any(map(self.are_in, [*values, val(node)]))

    def check(self, node: fx.Node) -> None:
        """Raises `Refusal` where a node that `touches` lengths is none of those that may."""
        if not any(isinstance(v, torch.Tensor) for v in (val(node), *map(val, node.all_input_nodes))):
            return  # numbers made of numbers
        if is_call(node, aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default):
            return
        if not self._keeps_apart(node):
            raise Refusal(f"wanted rows that only attention mixes, saw {node.target} of them")
        self._check_numbers(node)

    def _keeps_apart(self, node: fx.Node) -> bool:
        """No row is made of those behind it."""
        if is_pointwise(node) or is_call(node, *_ROW_BY_ROW):
            return True
        if is_call(node, *_MERGING):
            return self._keeps_rows(node)
        if is_call(node, aten.slice.Tensor):
            return self._keeps_first(node)
        if is_call(node, aten.select.int, aten.squeeze.dim):
            return self._leaves_rows(node)
        return is_call(node, aten.linear.default) and self._is_linear_of_rows(node)

    def _check_numbers(self, node: fx.Node) -> None:
        """What is no size is a number that can be read from a tensor: an integer of a pointwise operator."""
        target: Any = node.target
        names = [formal.name for formal in target._schema.arguments if formal.name != SIZES.get(target)]
        for name in names:
            numbers = [val(arg) for arg in nodes_in(argument(node, name)) if is_symbolic(arg)]
            for number in filter(self.are_in, numbers):
                if not is_pointwise(node) or not isinstance(number, torch.SymInt):
                    raise Refusal(f"wanted lengths as sizes or integers, saw {number} in {target}")

    def _keeps_rows(self, node: fx.Node) -> bool:
        """Of a view: these dimensions are not merged with others, and not split."""
        before, after = (list(val(each).shape) for each in (node.args[0], node))
        places = [(self.dims(node.args[0]), before), (self.dims(node), after)]
        behind = [[math.prod(shape[dim:]) for dim in dims] for dims, shape in places]
        sizes = [[shape[dim] for dim in dims] for dims, shape in places]
        return facts.same_shape(sizes[0], sizes[1]) and facts.same_shape(behind[0], behind[1])

    def _keeps_first(self, node: fx.Node) -> bool:
        """Of a slice: along these dimensions, it begins with the first row."""
        dim = int(argument(node, "dim", 0)) % facts.rank(node)
        if dim not in {*self.dims(node), *self.dims(node.args[0])}:
            return True
        starts, step = argument(node, "start") in (None, 0), argument(node, "step", 1)
        return starts and step == 1 and dim in self.dims(node.args[0]) and dim in self.dims(node)

    def _leaves_rows(self, node: fx.Node) -> bool:
        source: Any = node.args[0]
        return int(argument(node, "dim")) % facts.rank(source) not in self.dims(source)

    def _is_linear_of_rows(self, node: fx.Node) -> bool:
        rows, last = self.dims(node.args[0]), facts.rank(node) - 1
        return last not in rows and not any(self.dims(arg) for arg in node.args[1:])
