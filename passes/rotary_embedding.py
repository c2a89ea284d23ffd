"""Whether a tensor is another one with its columns rotated by angles, however that is spelled.

What is asked of each column of the last dimension is the sum that it is: of columns of other tensors and of
products of two of them. Concatenations, slices, signs, sums and products are followed; what else there is
stands for itself. The result is a rotary embedding when of R columns the one at d is

    x[d] * cos[d] - x[partner] * sin[d]     in front of its partner, + behind it

with partners R / 2 apart or neighbours, and all columns behind R are those of x. Angles may be half as wide.

Source: Su et al., "RoFormer", 2021, eq. 34.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.facts import argument, is_call, is_number, val
from fxopt.ir.same_value import same_value

aten = torch.ops.aten

# A sign, and the columns of tensors that are multiplied.
Term: TypeAlias = tuple[int, tuple[tuple[fx.Node, int], ...]]
Column: TypeAlias = tuple[Term, ...]
# More than a rotation has.
_MOST_TERMS, _MOST_FACTORS = 2, 2
_DEPTH = 16


@dataclass(frozen=True)
class Angles:
    """A tensor of cosines or sines.

    Attributes:
        node: what has them. repeated: how often its columns are read, one behind the other, or each of them
            several times where pairs are neighbours.
    """

    node: fx.Node
    repeated: int

    def same(self, other: Angles) -> bool:
        """The same angles, or angles that are computed alike."""
        return self.repeated == other.repeated and same_value(self.node, other.node)


@dataclass(frozen=True)
class Rotation:
    """``source`` with its first `width` columns turned by the angles of `cos` and `sin`."""

    source: fx.Node
    cos: Angles
    sin: Angles
    width: int
    interleaved: bool

    def same_angles(self, other: Rotation) -> bool:
        """Both are rotated alike, where nothing is written in between."""
        mine, theirs = ((one.width, one.interleaved) for one in (self, other))
        return mine == theirs and self.cos.same(other.cos) and self.sin.same(other.sin)


class _TooMuch(Exception):  # noqa: N818 - it is then a tensor that stands for itself
    """More than a rotation is made of."""


def rotation_of(node: fx.Node) -> Rotation | None:
    """The rotary embedding that `node` is; None where it is none."""
    whole = _Columns()
    found = _rotation(whole.of(node))
    # What is rotated may be a sum or a product itself.
    inner = [each for each in whole.seen if len(each.users) > 1 and each is not node]
    for each in inner if found is None else ():
        if facts.same_shape(facts.shape(each), facts.shape(node)):
            found = found or _rotation(_Columns(each).of(node))
    return found


def _rotation(columns: list[Column] | None) -> Rotation | None:
    if columns is None:
        return None
    width = sum(len(column) == 2 for column in columns)
    source = _source(columns)
    if source is None or width % 2 or width == 0:
        return None
    kept = [((1, ((source, place),)),) for place in range(width, len(columns))]
    if [*columns[width:]] != kept:
        return None
    for interleaved in (False, True):
        found = [_angles_at(columns[place], source, place, width, interleaved) for place in range(width)]
        angles = [_angles([each[part] for each in found if each], width, interleaved) for part in (0, 1)]
        if all(found) and angles[0] is not None and angles[1] is not None:
            return Rotation(source, angles[0], angles[1], width, interleaved)
    return None


def _source(columns: Sequence[Column]) -> fx.Node | None:
    """The one tensor that all terms of the first two columns have in common."""
    common = [{node for node, _ in factors} for column in columns[:2] for _, factors in column]
    shared = set.intersection(*common) if common else set()
    return shared.pop() if len(shared) == 1 else None


def _angles_at(
    column: Column, source: fx.Node, place: int, width: int, interleaved: bool
) -> tuple[tuple[fx.Node, int], tuple[fx.Node, int]] | None:
    """The columns of cosines and of sines in a column of a rotation; None where it is none."""
    half = width // 2
    first = place % 2 == 0 if interleaved else place < half
    partner = place ^ 1 if interleaved else (place + half) % width
    wanted = {place: 1, partner: -1 if first else 1}
    found: dict[int, tuple[fx.Node, int]] = {}
    for sign, factors in column:
        own = [column for node, column in factors if node is source]
        other = [each for each in factors if each[0] is not source]
        if len(own) != 1 or len(other) != 1 or wanted.get(own[0]) != sign:
            return None
        found[own[0]] = other[0]
    return (found[place], found[partner]) if len(found) == 2 else None


def _angles(found: Sequence[tuple[fx.Node, int]], width: int, interleaved: bool) -> Angles | None:
    """The tensor whose columns these are, in order or each of them twice."""
    nodes = {node for node, _ in found}
    if len(nodes) != 1 or len(found) != width:
        return None
    node, places = nodes.pop(), [place for _, place in found]
    if facts.shape(node)[-1] == width and places == [*range(width)]:
        return Angles(node, 1)
    halves = [place // 2 if interleaved else place % (width // 2) for place in range(width)]
    return Angles(node, 2) if facts.shape(node)[-1] == width // 2 and places == halves else None


class _Columns:
    """What the columns of tensors are made of; those of `whole` stand for themselves."""

    def __init__(self, whole: fx.Node | None = None) -> None:
        self._known: dict[fx.Node, list[Column]] = {}
        if whole is not None:
            self._known[whole] = self._itself(whole)

    @property
    def seen(self) -> list[fx.Node]:
        """What was looked at."""
        return list(self._known)

    def of(self, node: Any, depth: int = _DEPTH) -> list[Column] | None:
        """The columns of a tensor; None where their number is not known."""
        if not facts.is_tensor(node) or not facts.is_floating(node) or facts.rank(node) == 0:
            return None
        if not isinstance(facts.shape(node)[-1], int):
            return None
        if node not in self._known:
            self._known[node] = self._followed(node, depth) or self._itself(node)
        return self._known[node]

    def _itself(self, node: fx.Node) -> list[Column]:
        return [((1, ((node, place),)),) for place in range(int(facts.shape(node)[-1]))]

    def _followed(self, node: fx.Node, depth: int) -> list[Column] | None:
        rule = _RULES.get(node.target) if node.op == "call_function" and depth else None
        if rule is None:
            return None
        try:
            found = rule(node, lambda each: self._needed(each, depth - 1))
        except _TooMuch:
            return None
        return found if found is not None and len(found) == facts.shape(node)[-1] else None

    def _needed(self, node: Any, depth: int) -> list[Column]:
        found = self.of(node, depth)
        if found is None:
            raise _TooMuch
        return found


_Of: TypeAlias = Callable[[Any], list[Column]]


def _checked(column: Column) -> Column:
    if len(column) > _MOST_TERMS or any(len(factors) > _MOST_FACTORS for _, factors in column):
        raise _TooMuch
    return column


def _negative(columns: list[Column]) -> list[Column]:
    return [tuple((-sign, factors) for sign, factors in column) for column in columns]


def _sum(node: fx.Node, of: _Of) -> list[Column]:
    if argument(node, "alpha", 1) != 1:
        raise _TooMuch
    a, b = of(node.args[0]), of(node.args[1])
    b = _negative(b) if is_call(node, aten.sub.Tensor) else b
    return [_checked((*x, *y)) for x, y in zip(a, b, strict=True)] if len(a) == len(b) else []


def _product(node: fx.Node, of: _Of) -> list[Column]:
    if any(is_number(each, -1) for each in node.args):
        return _negative(of(next(each for each in node.args if not is_number(each))))
    a, b = of(node.args[0]), of(node.args[1])
    if len(a) != len(b):
        raise _TooMuch
    return [
        _checked(tuple((i * j, (*x, *y)) for i, x in first for j, y in second))
        for first, second in zip(a, b, strict=True)
    ]


def _parts(node: fx.Node, of: _Of) -> list[Column]:
    dim = int(argument(node, "dim", 0))
    tensors = argument(node, "tensors")
    if not facts.is_last_dim(node, dim):
        raise _TooMuch
    return [column for each in tensors for column in of(each)]


def _slice(node: fx.Node, of: _Of) -> list[Column]:
    bounds = [argument(node, name) for name in ("start", "end", "step")]
    if not facts.is_last_dim(node, int(argument(node, "dim", 0))):
        raise _TooMuch
    if any(isinstance(each, fx.Node) for each in bounds):
        raise _TooMuch
    return of(node.args[0])[slice(*bounds)]


def _item(node: fx.Node, of: _Of) -> list[Column]:
    """One of the parts that a tensor is split into."""
    whole: Any = node.args[0]
    if not is_call(whole, *_SPLITS) or not facts.is_last_dim(
        whole.args[0], int(argument(whole, "dim", 0)) % facts.rank(whole.args[0])
    ):
        raise _TooMuch
    widths, place = [each.shape[-1] for each in val(whole)], int(node.args[1])  # type: ignore[arg-type]
    first = sum(widths[:place])
    return of(whole.args[0])[first : first + widths[place]]


def _merged(node: fx.Node, of: _Of) -> list[Column]:
    """Columns of two tensors in turns: stacked behind the last dimension, which is then one with it."""
    stacked: Any = node.args[0]
    parts = _stacked(stacked)
    shape, before = facts.shape(node), facts.shape(stacked)
    if not parts or not facts.same_shape(shape[:-1], before[:-2]):
        raise _TooMuch
    return [column for several in zip(*map(of, parts), strict=True) for column in several]


def _stacked(node: Any) -> list[Any]:
    """What a tensor has as its columns; empty where that is not known."""
    if is_call(node, aten.stack.default):
        return list(argument(node, "tensors")) if facts.is_last_dim(node, argument(node, "dim", 0)) else []
    if not is_call(node, aten.cat.default) or not facts.is_last_dim(node, int(argument(node, "dim", 0))):
        return []
    parts = argument(node, "tensors")
    single = [is_call(each, aten.unsqueeze.default) and facts.shape(each)[-1] == 1 for each in parts]
    last = all(single) and all(facts.is_last_dim(each, int(each.args[1])) for each in parts)
    return [each.args[0] for each in parts] if last else []


def _same(node: fx.Node, of: _Of) -> list[Column]:
    if facts.is_cast(node) and not facts.is_float_cast(node):
        raise _TooMuch
    return of(node.args[0])


_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.tensor_split.sections)
_MERGES = (aten.flatten.using_ints, aten.view.default, aten.reshape.default)
_RULES: dict[Any, Callable[[fx.Node, _Of], list[Column]]] = {
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _sum,
    aten.mul.Tensor: _product,
    aten.mul.Scalar: _product,
    aten.neg.default: lambda node, of: _negative(of(node.args[0])),
    aten.cat.default: _parts,
    aten.slice.Tensor: _slice,
    operator.getitem: _item,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.alias.default: _same,
    **dict.fromkeys(_MERGES, _merged),
    **dict.fromkeys(facts.CASTS, _same),
}
