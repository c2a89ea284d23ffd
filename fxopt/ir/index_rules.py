"""How ATen ops act on tensors that are functions of their indices, one rule for each op.

A rule gives the value of a call from the values of its arguments (`known_value`); shape and dtype of the
result are the ones that were recorded. `RULES` is the list of all rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch import fx

from fxopt.ir.cone import cone, outer_of
from fxopt.ir.elementwise_rules import Rule, cast, elementwise_rules, linear_sum, stored
from fxopt.ir.facts import PLAIN_FLOATS, argument, dtype, location, val
from fxopt.ir.formula import capture, real_capture
from fxopt.ir.linear import Unsupported
from fxopt.ir.predicate import (
    INDEX,
    Case,
    Sizes,
    Value,
    box,
    broadcast,
    combine,
    keep,
    known_value,
    made,
)
from fxopt.ir.tables import tabulated

aten = torch.ops.aten


def _result(sizes: Sizes, node: fx.Node, cases: Iterable[Case]) -> Value:
    return made(sizes, sizes.shape(val(node)), dtype(node), cases)


def _reindexed(sizes: Sizes, node: fx.Node, source: Value, indices: Sequence[sympy.Expr]) -> Value:
    """A view of `source`, or a copy of one."""
    if dtype(node) != source.dtype:
        raise Unsupported(f"{node.target} from {source.dtype} to {dtype(node)}")
    domain = box(sizes.shape(val(node)))
    return _result(sizes, node, (_floored(sizes, domain, case) for case in source.at(indices)))


def _floored(sizes: Sizes, domain: Boolean, case: Case) -> Case:
    """``b`` for ``b + h//4``, where h is less than 4: dimensions that were merged, and are split again."""
    guard, number = case.guard, case.number
    parts = guard.atoms(sympy.floor) | (
        number.atoms(sympy.floor) if isinstance(number, sympy.Expr) else set()
    )
    zeros = {part: sympy.Integer(0) for part in parts if _is_zero(sizes, domain, part)}
    if not zeros:
        return case
    return Case(guard.xreplace(zeros), number.xreplace(zeros) if isinstance(number, sympy.Expr) else number)


def _is_zero(sizes: Sizes, domain: Boolean, part: sympy.Expr) -> bool:
    over, under = part.args[0].as_numer_denom()
    return bool(under.is_Integer) and sizes.implies(domain, sympy.And(over >= 0, over < under))


def _dim(dim: Any, rank: int) -> int:
    if not isinstance(dim, int):
        raise Unsupported(f"dimension {dim}")
    return dim % rank if rank else 0


# Creation


def _arange(sizes: Sizes, node: fx.Node) -> Value:
    start, step = argument(node, "start", 0), argument(node, "step", 1)
    kind = dtype(node)
    if kind not in (torch.int64, torch.int32) and not kind.is_floating_point:
        raise Unsupported(f"arange of {kind}")
    number = sizes.size(start) + sizes.size(step) * INDEX[0]
    constant = number.is_Integer and kind.is_floating_point
    return _result(sizes, node, [Case(sympy.true, float(number) if constant else number)])


def _filled(fill: float | None = None) -> Rule:
    """A constant: `fill`, or what the call names."""

    def rule(sizes: Sizes, node: fx.Node) -> Value:
        number = fill if fill is not None else argument(node, "fill_value", argument(node, "s"))
        if not isinstance(number, (int, float)):
            raise Unsupported(f"the fill {number}")
        return _result(sizes, node, [Case(sympy.true, stored(number, dtype(node)))])

    return rule


# Views and copies


def _as_is(sizes: Sizes, node: fx.Node) -> Value:
    return _reindexed(sizes, node, known_value(node.args[0]), INDEX)


def _broadcast(sizes: Sizes, node: fx.Node) -> Value:
    source = known_value(node.args[0])
    return _reindexed(sizes, node, source, broadcast(source.shape, sizes.shape(val(node))))


def _same_order(sizes: Sizes, node: fx.Node) -> Value:
    """view, reshape, squeeze and the like: dimensions of size one come and go, others are split or merged."""
    source, shape = known_value(node.args[0]), sizes.shape(val(node))
    wide = [dim for dim, size in enumerate(source.shape) if size != 1]
    target = [dim for dim, size in enumerate(shape) if size != 1]
    indices: list[sympy.Expr] = [sympy.Integer(0)] * len(source.shape)
    while wide:
        split = _taken(source.shape[wide[0]], shape, target)
        if split is not None:
            places, target = target[:split], target[split:]
            indices[wide.pop(0)] = _joint_index(shape, places)
            continue
        merged = _taken(shape[target[0]], source.shape, wide) if target else None
        if merged is None:
            raise Unsupported(f"{node.target} from {source.shape} to {shape}")
        parts = _parts(INDEX[target.pop(0)], [source.shape[dim] for dim in wide[:merged]])
        indices = [dict(zip(wide, parts, strict=False)).get(dim, index) for dim, index in enumerate(indices)]
        wide = wide[merged:]
    if target:
        raise Unsupported(f"{node.target} from {source.shape} to {shape}")
    return _reindexed(sizes, node, source, indices)


def _taken(size: sympy.Expr, shape: Sequence[sympy.Expr], places: Sequence[int]) -> int | None:
    """How many of the next `places` in `shape` have `size` entries together."""
    reached = sympy.Integer(1)
    for count, place in enumerate(places, start=1):
        reached = sympy.expand(reached * shape[place])
        if reached == sympy.expand(size):
            return count
    return None


def _joint_index(shape: Sequence[sympy.Expr], places: Sequence[int]) -> sympy.Expr:
    """The index into a dimension that became `places`."""
    index = sympy.Integer(0)
    for place in places:
        index = index * shape[place] + INDEX[place]
    return sympy.expand(index)


def _parts(index: sympy.Expr, shape: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    """The indices into dimensions of `shape` that were merged into one."""
    found: list[sympy.Expr] = []
    for size in reversed(shape[1:]):
        if not size.is_Integer:
            raise Unsupported(f"merged dimensions of {tuple(shape)}")
        rest = sympy.floor(index / size)
        found.insert(0, index - size * rest)
        index = rest
    return [index, *found]


def _swapped(first: str | int, second: str | int) -> Rule:
    def rule(sizes: Sizes, node: fx.Node) -> Value:
        source = known_value(node.args[0])
        rank = len(source.shape)
        a, b = (_dim(d if isinstance(d, int) else argument(node, d), rank) for d in (first, second))
        indices = list(INDEX[:rank])
        if rank:
            indices[a], indices[b] = indices[b], indices[a]
        return _reindexed(sizes, node, source, indices)

    return rule


def _permute(sizes: Sizes, node: fx.Node) -> Value:
    source = known_value(node.args[0])
    order = [_dim(dim, len(source.shape)) for dim in argument(node, "dims")]
    return _reindexed(sizes, node, source, [INDEX[order.index(dim)] for dim in range(len(order))])


def _select(sizes: Sizes, node: fx.Node) -> Value:
    source = known_value(node.args[0])
    dim = _dim(argument(node, "dim"), len(source.shape))
    position = _from_start(sizes, argument(node, "index"), source.shape[dim])
    return _reindexed(sizes, node, source, [*INDEX[:dim], position, *INDEX[dim:]])


def _slice(sizes: Sizes, node: fx.Node) -> Value:
    source = known_value(node.args[0])
    dim = _dim(argument(node, "dim"), len(source.shape))
    start, step = argument(node, "start"), argument(node, "step")
    begin = _from_start(sizes, 0 if start is None else start, source.shape[dim])
    indices: list[sympy.Expr] = list(INDEX)
    indices[dim] = begin + sizes.size(step) * INDEX[dim]
    return _reindexed(sizes, node, source, indices)


def _from_start(sizes: Sizes, position: Any, size: sympy.Expr) -> sympy.Expr:
    """A position counted from the start, which Python may have counted from the end."""
    place = sizes.size(position)
    if sizes.implies(sympy.true, place >= 0):
        return place
    if sizes.implies(sympy.true, sympy.And(place < 0, place + size >= 0)):
        return place + size
    raise Unsupported(f"the position {place}, which may count from either end")


def _flip(sizes: Sizes, node: fx.Node) -> Value:
    source = known_value(node.args[0])
    indices: list[sympy.Expr] = list(INDEX)
    for dim in argument(node, "dims"):
        place = _dim(dim, len(source.shape))
        indices[place] = source.shape[place] - 1 - INDEX[place]
    return _reindexed(sizes, node, source, indices)


def _index(sizes: Sizes, node: fx.Node) -> Value:
    """Advanced indexing of neighbouring dimensions by integer tensors."""
    source, shape = known_value(node.args[0]), sizes.shape(val(node))
    places: list[Any] = list(argument(node, "indices"))
    first = next(dim for dim, place in enumerate(places) if place is not None)
    if any(place is None for place in places[first:]):
        raise Unsupported("an index that leaves out dimensions in between")
    rank = len(shape) - (len(source.shape) - len(places[first:]))  # that of the indices together
    last = first + rank
    moved = {INDEX[dim]: INDEX[first + dim] for dim in range(rank)}
    picked = [
        _picked(sizes, place, source.shape[first + dim], shape[first:last]).xreplace(moved)
        for dim, place in enumerate(places[first:])
    ]
    return _reindexed(sizes, node, source, [*INDEX[:first], *picked, *INDEX[last : len(shape)]])


def _picked(sizes: Sizes, place: Any, size: sympy.Expr, shape: Sequence[sympy.Expr]) -> sympy.Expr:
    index = known_value(place)
    if len(index.cases) > 1:
        index = _as_table(place, index.shape)
    if index.dtype is not torch.int64 or len(index.cases) != 1:
        raise Unsupported(f"an index of {index.dtype} in {len(index.cases)} cases")
    number = index.cases[0].number
    # Out of range, a captured index fails in the program as it does in the model.
    within = sympy.And(number >= 0, number < size)
    if not isinstance(number, AppliedUndef) and not sizes.implies(box(index.shape), within):
        raise Unsupported(f"the index {number} into {size} entries")
    moved = dict(zip(INDEX, broadcast(index.shape, shape), strict=False))
    return number.xreplace(moved)


def _embedding(sizes: Sizes, node: fx.Node) -> Value:
    """Rows of a table."""
    source, shape = known_value(node.args[0]), sizes.shape(val(node))
    row = _picked(sizes, node.args[1], source.shape[0], shape[:-1])
    return _reindexed(sizes, node, source, [row, INDEX[len(shape) - 1]])


# Joins and sums


def _cat(sizes: Sizes, node: fx.Node) -> Value:
    parts = [known_value(part) for part in argument(node, "tensors")]
    return _joined(sizes, parts, _dim(argument(node, "dim"), len(parts[0].shape)), node)


def _joined(sizes: Sizes, parts: Sequence[Value], dim: int, node: fx.Node) -> Value:
    if any(part.dtype != parts[0].dtype or len(part.shape) != len(parts[0].shape) for part in parts):
        raise Unsupported("parts of several dtypes or ranks")
    cases: list[Case] = []
    begin: sympy.Expr = sympy.Integer(0)
    for part in parts:
        indices: list[sympy.Expr] = list(INDEX)
        indices[dim] = INDEX[dim] - begin
        inside = sympy.And(INDEX[dim] >= begin, INDEX[dim] < begin + part.shape[dim])
        cases += [Case(sympy.And(inside, case.guard), case.number) for case in part.at(indices)]
        begin = begin + part.shape[dim]
    shape = list(parts[0].shape)
    shape[dim] = begin
    return made(sizes, shape, parts[0].dtype, cases)


def _diff(sizes: Sizes, node: fx.Node) -> Value:
    """The differences of neighbours along one dimension."""
    ends = [argument(node, "prepend"), node.args[0], argument(node, "append")]
    parts = [known_value(end) for end in ends if end is not None]
    if argument(node, "n") != 1 or parts[0].dtype is torch.bool:
        raise Unsupported("repeated differences, or differences of bools")
    dim = _dim(argument(node, "dim"), len(parts[0].shape))
    whole = _joined(sizes, parts, dim, node)
    later: list[sympy.Expr] = list(INDEX)
    later[dim] = INDEX[dim] + 1
    shape = sizes.shape(val(node))
    here, there = (Value(shape, whole.dtype, whole.at(indices)) for indices in (INDEX, later))
    return combine(sizes, [there, here], shape, dtype(node), lambda n: linear_sum(n[0], n[1], -1))


def _cumsum(sizes: Sizes, node: fx.Node) -> Value:
    """The running sum of something that does not change along the dimension."""
    source, shape = known_value(node.args[0]), sizes.shape(val(node))
    if not shape or dtype(node) is not torch.int64:
        raise Unsupported(f"a running sum of {dtype(node)}")
    index = INDEX[_dim(argument(node, "dim"), len(shape))]
    if len(source.cases) != 1 or not isinstance(source.cases[0].number, sympy.Expr):
        raise Unsupported("a running sum of several cases")
    number = source.cases[0].number
    if index in number.free_symbols:
        raise Unsupported(f"the running sum of {number}")
    return _result(sizes, node, [Case(sympy.true, sympy.expand(number * (index + 1)))])


def _triangle(keep: Callable[[sympy.Expr, sympy.Expr], Any]) -> Rule:
    def rule(sizes: Sizes, node: fx.Node) -> Value:
        source = known_value(node.args[0])
        row, column = INDEX[len(source.shape) - 2], INDEX[len(source.shape) - 1]
        kept = keep(column - row, sizes.size(argument(node, "diagonal")))
        zero = stored(0, source.dtype)
        inside = [Case(sympy.And(kept, case.guard), case.number) for case in source.cases]
        return _result(sizes, node, [*inside, Case(sympy.Not(kept), zero)])

    return rule


_AS_IS = (aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default,
          aten.lift_fresh.default, aten.lift_fresh_copy.default)  # fmt: skip
_SAME_ORDER = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
               aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.view_as.default,
               aten.reshape_as.default, aten.unflatten.int, aten.flatten.using_ints)  # fmt: skip
_BROADCAST = (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default,
          aten.type_as.default)  # fmt: skip
_ONES = (aten.ones.default, aten.new_ones.default, aten.ones_like.default)
_ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
_FULL = (aten.full.default, aten.new_full.default, aten.full_like.default, aten.scalar_tensor.default)


RULES: dict[Any, Rule] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    **dict.fromkeys(_ONES, _filled(1)),
    **dict.fromkeys(_ZEROS, _filled(0)),
    **dict.fromkeys(_FULL, _filled()),
    **dict.fromkeys(_AS_IS, _as_is),
    **dict.fromkeys(_SAME_ORDER, _same_order),
    **dict.fromkeys(_BROADCAST, _broadcast),
    **dict.fromkeys(_CASTS, cast),
    aten.transpose.int: _swapped("dim0", "dim1"),
    aten.t.default: _swapped(-2, -1),
    aten.mT.default: _swapped(-2, -1),
    aten.permute.default: _permute,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.flip.default: _flip,
    aten.index.Tensor: _index,
    aten.embedding.default: _embedding,
    aten.cat.default: _cat,
    aten.diff.default: _diff,
    aten.cumsum.default: _cumsum,
    aten.tril.default: _triangle(lambda offset, diagonal: offset <= diagonal),
    aten.triu.default: _triangle(lambda offset, diagonal: offset >= diagonal),
    **elementwise_rules(),
}


def value_of(root: fx.Node) -> Value:
    """The tensor that `root` computes, as a function of its indices.

    What comes from data, or is computed in a way that no rule covers, is captured: its value is an unknown
    function of the indices that bears the name of its node, or of a `Table`.

    Raises:
        Unsupported: it depends on something that is no tensor of bools, 64-bit integers or plain floats.
    """
    for node in cone(root):
        keep(node, _computed_or_captured)
    return known_value(root)


_CAPTURED = (torch.bool, torch.int64, *PLAIN_FLOATS)


def _computed_or_captured(node: fx.Node) -> Value:
    try:
        return _value_of(node)
    except Unsupported:
        value = val(node)
        if not isinstance(value, torch.Tensor) or value.dtype not in _CAPTURED:
            raise
    sizes = Sizes(_shape_env(value))
    try:
        return _as_table(node, sizes.shape(value))
    except Unsupported:
        return captured(sizes, node)


def _as_table(node: fx.Node, shape: tuple[sympy.Expr, ...]) -> Value:
    node.meta[TABLE], value = tabulated(node, shape)
    return value


# The key under which a node keeps the table that it is.
TABLE = "fxopt_table"


def captured(sizes: Sizes, node: fx.Node) -> Value:
    """A tensor of which nothing is known: at each index an unknown number, or an unknown truth."""
    shape = sizes.shape(val(node))
    places = [sympy.Integer(0) if size == 1 else index for size, index in zip(shape, INDEX, strict=False)]
    if dtype(node).is_floating_point:
        return Value(shape, dtype(node), (Case(sympy.true, real_capture(node.name)(*places)),))
    number = capture(node.name)(*places)
    if dtype(node) is not torch.bool:
        return Value(shape, torch.int64, (Case(sympy.true, number),))
    true = sympy.Ne(number, 0)
    return Value(shape, torch.bool, (Case(true, sympy.Integer(1)), Case(sympy.Not(true), sympy.Integer(0))))


def _value_of(node: fx.Node) -> Value:
    outer = outer_of(node)
    if outer is not None:
        return _outer(Sizes(_shape_env(val(node))), node, known_value(outer))
    if node.op == "placeholder":
        raise Unsupported(f"the input {node.name}")
    if node.op == "get_attr":
        raise Unsupported(f"the constant {node.name}")
    rule = RULES.get(node.target)
    if rule is None:
        raise Unsupported(f"{node.target} ({location(node)})")
    value = val(node)
    if not isinstance(value, torch.Tensor):
        raise Unsupported(f"{node.name}, which is no tensor")
    return rule(Sizes(_shape_env(value)), node)


def _outer(sizes: Sizes, node: fx.Node, source: Value) -> Value:
    """An input of a sub-graph."""
    if sizes.shape(val(node)) != source.shape:
        raise Unsupported(f"{node.name} of another shape inside of a sub-graph")
    return _reindexed(sizes, node, source, INDEX)


def _shape_env(value: Any) -> Any:
    return getattr(getattr(value, "fake_mode", None), "shape_env", None)
