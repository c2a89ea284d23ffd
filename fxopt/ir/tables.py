"""Elementwise functions of one linear expression of the indices, as tables over its values.

``bucket(k - q)`` of Sq x Skv entries is a table of Sq + Skv - 1 entries, read at ``k - q + Sq - 1``.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from fxopt.ir.facts import val
from fxopt.ir.formula import capture, real_capture
from fxopt.ir.linear import Unsupported
from fxopt.ir.predicate import INDEX, Case, Value, known_value
from fxopt.ir.sizes import can_compute, same_size, size_node

aten = torch.ops.aten

_LIKE = (aten.full_like.default, aten.zeros_like.default, aten.ones_like.default)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)
PREFIX = "table:"


@dataclass(frozen=True)
class Table:
    """What makes `root` of `base`, whose entries are ``index + low`` at the place `index` of the table.

    Attributes:
        steps: the operations from `base` to `root`, in order. low, high: the ends of base's values.
    """

    root: fx.Node
    base: fx.Node
    steps: tuple[fx.Node, ...]
    low: sympy.Expr
    high: sympy.Expr

    @property
    def name(self) -> str:
        """That of the captured function; no node has it."""
        return PREFIX + self.root.name

    def build(self, graph: fx.Graph) -> fx.Node:
        """The table as a tensor of one dimension, computed at the graph's insertion point."""
        value = val(self.base)
        made = {"dtype": torch.int64, "device": value.device}
        ends = (size_node(self.low, graph), size_node(self.high + 1, graph))
        env = {self.base: graph.call_function(aten.arange.start, ends, made)}
        for step in self.steps:
            env[step] = graph.node_copy(step, lambda node: env.get(node, node))
            env[step].meta = {}
        return env[self.root]


def tabulated(root: fx.Node, shape: tuple[sympy.Expr, ...]) -> tuple[Table, Value]:
    """The table that `root` is, and its value.

    Args:
        shape: that of `root`.

    Raises:
        Unsupported: it is no elementwise function of one linear expression of two indices or more.
    """
    bases: dict[fx.Node, None] = {}
    steps: dict[fx.Node, None] = {}
    _walk(root, bases, steps)
    if len(bases) != 1 or not steps:
        raise Unsupported(f"{root.name}, a function of {len(bases)} expressions of the indices")
    base = next(iter(bases))
    found = known_value(base)
    if found.shape != shape:
        raise Unsupported(f"{root.name}, which broadcasts")
    number = found.cases[0].number
    low, high = _ends(number, shape)
    if not (can_compute(low, base.graph) and can_compute(high, base.graph)):
        raise Unsupported(f"a table from {low} to {high}, sizes that no input has")
    table = Table(root, base, tuple(steps), low, high)
    dtype = val(root).dtype
    make = real_capture if dtype.is_floating_point else capture
    entry = make(table.name)(sympy.expand(number - low))
    if dtype is not torch.bool:
        return table, Value(shape, dtype, (Case(sympy.true, entry),))
    true = sympy.Ne(entry, 0)
    cases = (Case(true, sympy.Integer(1)), Case(sympy.Not(true), sympy.Integer(0)))
    return table, Value(shape, dtype, cases)


def _walk(node: fx.Node, bases: dict[fx.Node, None], steps: dict[fx.Node, None]) -> None:
    if node in steps or node in bases:
        return
    if not isinstance(val(node), torch.Tensor):
        raise Unsupported(f"{node.name}, which is no tensor")
    inner = [arg for arg in node.all_input_nodes if isinstance(val(arg), torch.Tensor)]
    if _is_linear(node) and not (_is_elementwise(node) and any(_is_linear(arg) for arg in inner)):
        bases[node] = None
        return
    if not inner and same_size(val(node).numel(), 1) and node.op == "call_function":
        return  # a constant
    if not _is_elementwise(node):
        raise Unsupported(f"{node.target}, which is not elementwise")
    for arg in inner:
        _walk(arg, bases, steps)
    steps[node] = None


def _is_linear(node: fx.Node) -> bool:
    """An integer that is linear in two indices or more, in one case."""
    try:
        found = known_value(node)
    except (Unsupported, KeyError):
        return False
    if found.dtype is not torch.int64 or len(found.cases) != 1:
        return False
    number = found.cases[0].number
    if number.has(AppliedUndef):
        return False
    linear = all(bool(number.coeff(index).is_Integer) for index in number.free_symbols)
    return linear and len(number.free_symbols & set(INDEX)) > 1


def _is_elementwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or node.target in (*_LIKE, *_CASTS)


def _ends(number: sympy.Expr, shape: tuple[sympy.Expr, ...]) -> tuple[sympy.Expr, sympy.Expr]:
    """The least and the largest value, where no dimension is empty."""
    low = high = sympy.expand(number).xreplace(dict.fromkeys(INDEX, sympy.Integer(0)))
    for index, size in zip(INDEX, shape, strict=False):
        span = number.coeff(index) * (size - 1)
        low, high = low + sympy.Min(span, 0), high + sympy.Max(span, 0)
    return sympy.expand(low), sympy.expand(high)
