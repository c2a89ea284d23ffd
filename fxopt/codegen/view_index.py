"""Views as maps of indices: which element of its source an element of a view is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import fx

from fxopt.codegen.indexing import Index, Ranges, Sizes, broadcast, reshaped, sizes_of

aten = torch.ops.aten

Map = Callable[[fx.Node, Index, Ranges], Index | None]


def view_source(node: fx.Node, index: Index, ranges: Ranges) -> tuple[fx.Node, Index] | None:
    """The source of a view and the index of the same element there; None when `node` is no view we know."""
    found = _MAPS.get(node.target)
    if found is None or not isinstance(node.args[0], fx.Node):
        return None
    at = found(node, index, ranges)
    return None if at is None else (node.args[0], at)


def is_view(node: fx.Node) -> bool:
    """Whether `node` is one of the views whose index is understood."""
    return node.op == "call_function" and node.target in _MAPS


def view_base(node: fx.Node) -> fx.Node:
    """What `node` is a view of, through all views that are understood."""
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def readers_of(node: fx.Node) -> Iterator[fx.Node]:
    """What reads `node`, through views."""
    for user in node.users:
        yield from readers_of(user) if is_view(user) else (user,)


def keeps_strides(node: fx.Node) -> bool:
    """Whether indices are mapped dimension by dimension, without division."""
    return node.target not in _RESHAPES


def shape_of(node: fx.Node) -> Sizes:
    """The sizes of a node's tensor, as sympy has them."""
    return sizes_of(node.meta["val"].shape)


def _dimension(node: fx.Node, position: int, default: int, rank: int) -> int:
    given = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    return int(given) % rank if rank else 0  # type: ignore[arg-type]


def _same(node: fx.Node, index: Index, ranges: Ranges) -> Index:
    return index


def _reshaped(node: fx.Node, index: Index, ranges: Ranges) -> Index:
    return reshaped(index, shape_of(node), _source_shape(node), ranges)


def _source_shape(node: fx.Node) -> Sizes:
    source: Any = node.args[0]
    return shape_of(source)


def _expanded(node: fx.Node, index: Index, ranges: Ranges) -> Index:
    return broadcast(index, _source_shape(node))


def _permuted(node: fx.Node, index: Index, ranges: Ranges) -> Index:
    order: Any = node.args[1]
    found = [sympy.Integer(0)] * len(index)
    for at, dim in zip(index, order, strict=True):
        found[dim % len(index)] = at
    return tuple(found)


def _transposed(node: fx.Node, index: Index, ranges: Ranges) -> Index:
    rank = len(index)
    first, second = _dimension(node, 1, 0, rank), _dimension(node, 2, 1, rank)
    found = list(index)
    found[first], found[second] = found[second], found[first]
    return tuple(found)


def _turned(node: fx.Node, index: Index, ranges: Ranges) -> Index:
    return tuple(reversed(index))


def _unsqueezed(node: fx.Node, index: Index, ranges: Ranges) -> Index:
    dim = _dimension(node, 1, 0, len(index))
    return index[:dim] + index[dim + 1 :]


def _selected(node: fx.Node, index: Index, ranges: Ranges) -> Index | None:
    source = _source_shape(node)
    dim = _dimension(node, 1, 0, len(source))
    position: Any = node.args[2]
    if not isinstance(position, int):
        return None
    at = position if position >= 0 else source[dim] + position
    return (*index[:dim], sympy.sympify(at), *index[dim:])


def _sliced(node: fx.Node, index: Index, ranges: Ranges) -> Index | None:
    dim = _dimension(node, 1, 0, len(index))
    start = node.args[2] if len(node.args) > 2 else node.kwargs.get("start", 0)
    step = node.args[4] if len(node.args) > 4 else node.kwargs.get("step", 1)
    if not isinstance(start or 0, int) or not isinstance(step, int):
        return None
    size = _source_shape(node)[dim]
    begin = sympy.sympify(start or 0)
    if begin < 0:
        begin = sympy.Max(size + begin, 0)
    if not (size - begin).is_nonnegative:
        return None
    return (*index[:dim], begin + step * index[dim], *index[dim + 1 :])


_RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
_MAPS: dict[Any, Map] = {
    **dict.fromkeys(_RESHAPES, _reshaped),
    aten.expand.default: _expanded,
    aten.permute.default: _permuted,
    aten.transpose.int: _transposed,
    aten.t.default: _turned,
    aten.unsqueeze.default: _unsqueezed,
    aten.select.int: _selected,
    aten.slice.Tensor: _sliced,
    aten.alias.default: _same,
    aten.detach.default: _same,
}


def broadcast_to(index: Index, node: fx.Node) -> Index:
    """The index of an operand of an operator whose result is indexed by `index`."""
    return broadcast(index, shape_of(node))


def spelling_of(node: fx.Node) -> tuple[Any, ...]:
    """The same for views of one tensor that are made alike."""
    if not is_view(node) or not isinstance(node.args[0], fx.Node):
        return (node,)
    return (node.target, *spelling_of(node.args[0]), repr(node.args[1:]), repr(node.kwargs))
