"""How ATen ops act on tensors that are functions of their indices, one rule for each op.

A rule gives the value of a call from the values of its arguments (`known_value`); shape and dtype of the
result are the ones that were recorded. `RULES` is the list of all rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from fxopt.ir.cone import cone, outer_of, reads
from fxopt.ir.elementwise_rules import Rule, cast, elementwise_rules, linear_sum, stored
from fxopt.ir.facts import PLAIN_FLOATS, argument, dtype, is_call, location, val
from fxopt.ir.formula import capture, real_capture
from fxopt.ir.known import literal
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
from fxopt.ir.scatter_rules import put_in
from fxopt.ir.tables import tabulated
from fxopt.ir.view_rules import (
    as_is,
    broadcasted,
    dimension,
    flipped,
    narrowed,
    permuted,
    reindexed,
    result_of,
    same_order,
    selected,
    sliced,
    swapped,
)
from fxopt.ir.writes import SCATTERS, part_of

aten = torch.ops.aten


# Creation


def _arange(sizes: Sizes, node: fx.Node) -> Value:
    start, step = argument(node, "start", 0), argument(node, "step", 1)
    kind = dtype(node)
    if kind not in (torch.int64, torch.int32) and not kind.is_floating_point:
        raise Unsupported(f"arange of {kind}")
    number = sizes.size(start) + sizes.size(step) * INDEX[0]
    constant = number.is_Integer and kind.is_floating_point
    return result_of(sizes, node, [Case(sympy.true, float(number) if constant else number)])


def _filled(fill: float | None = None) -> Rule:
    """A constant: `fill`, or what the call names."""

    def rule(sizes: Sizes, node: fx.Node) -> Value:
        number = fill
        for name in ("fill_value", "s", "value"):
            number = argument(node, name, number) if number is None else number
        if not isinstance(number, (int, float)):
            raise Unsupported(f"the fill {number}")
        return result_of(sizes, node, [Case(sympy.true, stored(number, dtype(node)))])

    return rule


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
    return reindexed(sizes, node, source, [*INDEX[:first], *picked, *INDEX[last : len(shape)]])


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
    return reindexed(sizes, node, source, [row, INDEX[len(shape) - 1]])


# Joins and sums


def _cat(sizes: Sizes, node: fx.Node) -> Value:
    parts = [known_value(part) for part in argument(node, "tensors")]
    return _joined(sizes, parts, dimension(argument(node, "dim"), len(parts[0].shape)), node)


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
    dim = dimension(argument(node, "dim"), len(parts[0].shape))
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
    index = INDEX[dimension(argument(node, "dim"), len(shape))]
    if len(source.cases) != 1 or not isinstance(source.cases[0].number, sympy.Expr):
        raise Unsupported("a running sum of several cases")
    number = source.cases[0].number
    if index in number.free_symbols:
        raise Unsupported(f"the running sum of {number}")
    return result_of(sizes, node, [Case(sympy.true, sympy.expand(number * (index + 1)))])


def _triangle(keep: Callable[[sympy.Expr, sympy.Expr], Any]) -> Rule:
    def rule(sizes: Sizes, node: fx.Node) -> Value:
        source = known_value(node.args[0])
        row, column = INDEX[len(source.shape) - 2], INDEX[len(source.shape) - 1]
        kept = keep(column - row, sizes.size(argument(node, "diagonal")))
        zero = stored(0, source.dtype)
        inside = [Case(sympy.And(kept, case.guard), case.number) for case in source.cases]
        return result_of(sizes, node, [*inside, Case(sympy.Not(kept), zero)])

    return rule


_AS_IS = (aten.alias.default, aten.detach.default, aten.detach_.default, aten.clone.default,
          aten.contiguous.default, aten.lift_fresh.default, aten.lift_fresh_copy.default)  # fmt: skip
_SAME_ORDER = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
               aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.view_as.default,
               aten.reshape_as.default, aten.unflatten.int, aten.flatten.using_ints)  # fmt: skip
_BROADCAST = (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default,
          aten.type_as.default)  # fmt: skip
_ONES = (aten.ones.default, aten.new_ones.default, aten.ones_like.default)
_ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
_FULL = (aten.full.default, aten.new_full.default, aten.full_like.default, aten.scalar_tensor.default,
         aten.fill.Scalar)  # fmt: skip


RULES: dict[Any, Rule] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    **dict.fromkeys(_ONES, _filled(1)),
    **dict.fromkeys(_ZEROS, _filled(0)),
    **dict.fromkeys(_FULL, _filled()),
    **dict.fromkeys(_AS_IS, as_is),
    **dict.fromkeys(_SAME_ORDER, same_order),
    **dict.fromkeys(_BROADCAST, broadcasted),
    **dict.fromkeys(_CASTS, cast),
    aten.transpose.int: swapped("dim0", "dim1"),
    aten.t.default: swapped(-2, -1),
    aten.mT.default: swapped(-2, -1),
    aten.permute.default: permuted,
    aten.select.int: selected,
    aten.slice.Tensor: sliced,
    aten.narrow.default: narrowed,
    **dict.fromkeys(SCATTERS, put_in),
    aten.flip.default: flipped,
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
    for node in cone(root, _needed):
        keep(node, _computed_or_captured)
    return known_value(root)


def _needed(node: fx.Node) -> list[fx.Node]:
    """What the rule for a node asks for: of a part that is put into a tensor, not its way there."""
    return [node.args[0], part_of(node)[1]] if is_call(node, *SCATTERS) else reads(node)  # type: ignore[list-item]


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
        return _constant(node)
    rule = RULES.get(node.target)
    if rule is None:
        raise Unsupported(f"{node.target} ({location(node)})")
    value = val(node)
    if not isinstance(value, torch.Tensor):
        raise Unsupported(f"{node.name}, which is no tensor")
    return rule(Sizes(_shape_env(value)), node)


def _constant(node: fx.Node) -> Value:
    """A literal of the code."""
    held = literal(node)
    if held is None or isinstance(held.item(), complex):
        raise Unsupported(f"the constant {node.name}")
    return Value((), held.dtype, (Case(sympy.true, stored(held.item(), held.dtype)),))


def _outer(sizes: Sizes, node: fx.Node, source: Value) -> Value:
    """An input of a sub-graph."""
    if sizes.shape(val(node)) != source.shape:
        raise Unsupported(f"{node.name} of another shape inside of a sub-graph")
    return reindexed(sizes, node, source, INDEX)


def _shape_env(value: Any) -> Any:
    return getattr(getattr(value, "fake_mode", None), "shape_env", None)
