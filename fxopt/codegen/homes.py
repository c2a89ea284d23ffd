"""Where each result of a region lies in its loop: the index that an iteration has to store it at.

Known of the tensor that the loop is made for, it follows for others through pointwise operators and through
views that keep every element, in both directions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx

from fxopt.codegen.indexing import Index, Ranges, Sizes, reshaped, same
from fxopt.codegen.view_index import is_view, keeps_strides, shape_of, view_source

aten = torch.ops.aten

_LOSES_ELEMENTS = (aten.slice.Tensor, aten.select.int, aten.expand.default)


def homes_from(
    start: fx.Node, index: Index, pointwise: frozenset[fx.Node], ranges: Ranges
) -> dict[fx.Node, Index]:
    """Index of every tensor with the elements of `start`, as far as `pointwise` operators connect them."""
    found = {start: index}
    todo = [start]
    while todo:
        node = todo.pop()
        for other, at in _neighbours(node, found[node], pointwise, ranges):
            if other not in found:
                found[other] = at
                todo.append(other)
    return found


def _neighbours(
    node: fx.Node, index: Index, pointwise: frozenset[fx.Node], ranges: Ranges
) -> Iterable[tuple[fx.Node, Index]]:
    if is_view(node) and node.target not in _LOSES_ELEMENTS:
        source = view_source(node, index, ranges)
        if source is not None:
            yield source
    if node in pointwise:
        yield from ((arg, index) for arg in node.all_input_nodes if same_shape(arg, node))
    for user in node.users:
        if user in pointwise and same_shape(user, node):
            yield user, index
        elif is_view(user) and user.target not in _LOSES_ELEMENTS:
            through = _through(user, node, index, ranges)
            if through is not None:
                yield user, through


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether both are tensors of the same sizes."""
    if not all(isinstance(one.meta.get("val"), torch.Tensor) for one in (a, b)):
        return False
    first, second = shape_of(a), shape_of(b)
    return len(first) == len(second) and all(map(same, first, second))


def _through(view: fx.Node, source: fx.Node, index: Index, ranges: Ranges) -> Index | None:
    """The index of element `index` of `source` in a view of it: `view_source`, the other way."""
    shape, sizes = shape_of(source), shape_of(view)
    if not keeps_strides(view):
        return reshaped(index, shape, sizes, ranges)
    probe = tuple(sympy.Symbol(f"_{dim}", integer=True, nonnegative=True) for dim in range(len(sizes)))
    back = view_source(view, probe, dict(zip(probe, sizes, strict=True)))
    return None if back is None else _inverted(back[1], index, probe, sizes)


def _inverted(back: Index, index: Index, probe: Index, sizes: Sizes) -> Index | None:
    """`back` says which dimension of the view each dimension of the source is; new dimensions are 0."""
    known: dict[Any, sympy.Expr] = dict(zip(back, index, strict=True))
    found = tuple(known.get(one, sympy.Integer(0)) for one in probe)
    new = [size for one, size in zip(probe, sizes, strict=True) if one not in known]
    return found if all(size == 1 for size in new) else None
