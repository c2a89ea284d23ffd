"""How ATen's views, and copies of views, act on tensors that are functions of their indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean
from torch import fx

from fxopt.ir.elementwise_rules import Rule
from fxopt.ir.facts import argument, dtype, val
from fxopt.ir.linear import Unsupported
from fxopt.ir.predicate import INDEX, Case, Sizes, Value, box, broadcast, known_value, made


def result_of(sizes: Sizes, node: fx.Node, cases: Iterable[Case]) -> Value:
    return made(sizes, sizes.shape(val(node)), dtype(node), cases)


def reindexed(sizes: Sizes, node: fx.Node, source: Value, indices: Sequence[sympy.Expr]) -> Value:
    """A view of `source`, or a copy of one."""
    if dtype(node) != source.dtype:
        raise Unsupported(f"{node.target} from {source.dtype} to {dtype(node)}")
    domain = box(sizes.shape(val(node)))
    return result_of(sizes, node, (_floored(sizes, domain, case) for case in source.at(indices)))


def _floored(sizes: Sizes, domain: Boolean, case: Case) -> Case:
    """``b`` for ``b + h//4``, where h is less than 4: dimensions that were merged, and are split again."""
    guard, number = case.guard, case.number
    whole = isinstance(number, sympy.Expr)
    parts = guard.atoms(sympy.floor) | (number.atoms(sympy.floor) if whole else set())
    moved = {part: found for part in parts if (found := _quotient(sizes, domain, part)) != part}
    return Case(guard.xreplace(moved), number.xreplace(moved) if whole else number) if moved else case


def _quotient(sizes: Sizes, domain: Boolean, part: sympy.Expr) -> sympy.Expr:
    """Without a remainder that is less than the divisor; `part` itself where there is none."""
    split = sympy.floor(sympy.expand(part.args[0]))
    rests = {rest: sympy.Integer(0) for rest in split.atoms(sympy.floor) if _is_zero(sizes, domain, rest)}
    return split.xreplace(rests) if rests else part


def _is_zero(sizes: Sizes, domain: Boolean, part: sympy.Expr) -> bool:
    over, under = part.args[0].as_numer_denom()
    return sizes.implies(domain, sympy.And(over >= 0, over < under))


def dimension(dim: Any, rank: int) -> int:
    if not isinstance(dim, int):
        raise Unsupported(f"dimension {dim}")
    return dim % rank if rank else 0


def as_is(sizes: Sizes, node: fx.Node) -> Value:
    return reindexed(sizes, node, known_value(node.args[0]), INDEX)


def broadcasted(sizes: Sizes, node: fx.Node) -> Value:
    source = known_value(node.args[0])
    return reindexed(sizes, node, source, broadcast(source.shape, sizes.shape(val(node))))


def same_order(sizes: Sizes, node: fx.Node) -> Value:
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
    return reindexed(sizes, node, source, indices)


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
        rest = sympy.floor(index / size)
        found.insert(0, index - size * rest)
        index = rest
    return [index, *found]


def swapped(first: str | int, second: str | int) -> Rule:
    def rule(sizes: Sizes, node: fx.Node) -> Value:
        source = known_value(node.args[0])
        rank = len(source.shape)
        a, b = (dimension(d if isinstance(d, int) else argument(node, d), rank) for d in (first, second))
        indices = list(INDEX[:rank])
        if rank:
            indices[a], indices[b] = indices[b], indices[a]
        return reindexed(sizes, node, source, indices)

    return rule


def permuted(sizes: Sizes, node: fx.Node) -> Value:
    source = known_value(node.args[0])
    order = [dimension(dim, len(source.shape)) for dim in argument(node, "dims")]
    return reindexed(sizes, node, source, [INDEX[order.index(dim)] for dim in range(len(order))])


def selected(sizes: Sizes, node: fx.Node) -> Value:
    source = known_value(node.args[0])
    dim = dimension(argument(node, "dim"), len(source.shape))
    position = from_start(sizes, argument(node, "index"), source.shape[dim])
    return reindexed(sizes, node, source, [*INDEX[:dim], position, *INDEX[dim:]])


def sliced(sizes: Sizes, node: fx.Node) -> Value:
    source = known_value(node.args[0])
    dim = dimension(argument(node, "dim"), len(source.shape))
    start, step = argument(node, "start"), argument(node, "step")
    begin = from_start(sizes, 0 if start is None else start, source.shape[dim])
    indices: list[sympy.Expr] = list(INDEX)
    indices[dim] = begin + sizes.size(step) * INDEX[dim]
    return reindexed(sizes, node, source, indices)


def narrowed(sizes: Sizes, node: fx.Node) -> Value:
    source = known_value(node.args[0])
    dim = dimension(argument(node, "dim"), len(source.shape))
    indices: list[sympy.Expr] = list(INDEX)
    indices[dim] = from_start(sizes, argument(node, "start"), source.shape[dim]) + INDEX[dim]
    return reindexed(sizes, node, source, indices)


def from_start(sizes: Sizes, position: Any, size: sympy.Expr) -> sympy.Expr:
    """A position counted from the start, which Python may have counted from the end."""
    place = sizes.size(position)
    if sizes.implies(sympy.true, place >= 0):
        return place
    if sizes.implies(sympy.true, sympy.And(place < 0, place + size >= 0)):
        return place + size
    raise Unsupported(f"the position {place}, which may count from either end")


def flipped(sizes: Sizes, node: fx.Node) -> Value:
    source = known_value(node.args[0])
    indices: list[sympy.Expr] = list(INDEX)
    for dim in argument(node, "dims"):
        place = dimension(dim, len(source.shape))
        indices[place] = source.shape[place] - 1 - INDEX[place]
    return reindexed(sizes, node, source, indices)
