"""Sizes that are not known while compiling: when two are equal, and the nodes that compute one."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import FloorDiv, Max

aten = torch.ops.aten

Size = int | torch.SymInt


def size_of(value: Size) -> sympy.Expr:
    """A size as sympy has it."""
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)


def same_size(a: Size, b: Size) -> bool:
    """Known to be equal for all values of the symbols. Adds no guard."""
    if a is b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(statically_known_true(a == b)) or _equal_by_guards(a, b)


def _equal_by_guards(a: Size, b: Size) -> bool:
    """A guard of the trace says so of a multiple of both, as that of a view says of all its entries."""
    if not isinstance(a, torch.SymInt) or not isinstance(b, torch.SymInt):
        return False
    left, right = a.node.expr, b.node.expr
    if left.is_Symbol and right.is_Symbol:
        return False
    difference = left - right
    relations = (guard.expr for guard in a.node.shape_env.guards if isinstance(guard.expr, sympy.Eq))
    return any(
        difference.free_symbols <= relation.free_symbols and _follows(relation, difference)
        for relation in relations
    )


@functools.lru_cache(maxsize=1024)
def _follows(relation: sympy.Eq, difference: sympy.Expr) -> bool:
    """Where `relation` holds, `difference` is zero: the two sides differ by a positive multiple of it."""
    factor = sympy.cancel((relation.lhs - relation.rhs) / difference)
    return bool(factor.is_positive or factor.is_negative)


def newest_of(start: torch.SymInt, rows: Size) -> sympy.Expr | None:
    """How many of `rows` rows there are from `start` on, at most: n, where that is ``max(rows - n, 0)``.

    None where it is another expression, and where n may be less than 1.
    """
    first = start.node.expr
    if not isinstance(first, (Max, sympy.Max)) or len(first.args) != 2 or sympy.S.Zero not in first.args:
        return None
    most = sympy.expand(size_of(rows) - sum(first.args))
    return most if start.node.shape_env.bound_sympy(most).lower >= 1 else None


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
}


def can_compute(size: sympy.Expr, graph: fx.Graph) -> bool:
    """Whether `size_node` finds the symbols of `size` in the inputs, and has its operations."""
    if size.is_Symbol:
        return input_of(size, graph) is not None
    if size.is_Integer:
        return True
    return size.func in _OPERATIONS and all(can_compute(part, graph) for part in size.args)


def size_node(size: sympy.Expr, graph: fx.Graph) -> fx.Node | int:
    """`size` as a number, or as a node that is made at the graph's insertion point. See `can_compute`."""
    if size.is_Integer:
        return int(size)
    if not size.is_Symbol:
        parts = [size_node(part, graph) for part in size.args]
        call = functools.partial(graph.call_function, _OPERATIONS[size.func])
        return functools.reduce(lambda a, b: call((a, b)), parts)
    found = input_of(size, graph)
    if found is None:
        raise LookupError(f"no input has the size {size}")
    node, dim = found
    return node if dim is None else graph.call_function(aten.sym_size.int, (node, dim))


def input_of(size: sympy.Expr, graph: fx.Graph) -> tuple[fx.Node, int | None] | None:
    """An input that is `size`, and None, or one of whose sizes is, and its dimension; None without any."""
    return next(inputs_of(size, graph), None)


def inputs_of(size: sympy.Expr, graph: fx.Graph) -> Iterator[tuple[fx.Node, int | None]]:
    """All that `input_of` chooses from, in the order of the inputs."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for dim, each in enumerate(sizes):
            if isinstance(each, torch.SymInt) and each.node.expr == size:
                yield node, dim if isinstance(value, torch.Tensor) else None
