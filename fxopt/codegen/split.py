"""A long reduction in two launches: many programs reduce pieces of it, and a second launch what they found.

Each piece has a place of its own in a scratch tensor and they are combined in one order, so that the same
input gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from fxopt.codegen.elementwise import TRITON_TYPES
from fxopt.codegen.indexing import Axis, axis, flatten, product, same
from fxopt.codegen.statements import (
    Body,
    Choose,
    Compute,
    Condition,
    Load,
    Reduce,
    Statement,
    Store,
    identity_of,
)


@dataclass(frozen=True)
class Split:
    """Two bodies, run one behind the other.

    Attributes:
        partial: reduces the pieces into `scratch`. total: the rest.
        shape: of each scratch tensor: pieces, results.
    """

    partial: Body
    total: Body
    scratch: tuple[fx.Node, ...]
    shape: tuple[sympy.Expr, sympy.Expr]


def can_split(body: Body) -> bool:
    """Whether all that `body` does along the reduced axes is one level of reductions."""
    return (
        bool(body.reduced)
        and not any(one.on_r for one in body.stores)
        and max(one.level for one in body.statements) == 1
    )


def split(body: Body, length: int) -> Split:
    """`body` with its slowest reduced axis cut into pieces of `length`."""
    reduces = [one for one in body.statements if isinstance(one, Reduce)]
    scratch = tuple(scratch_tensor(place, one.dtype) for place, one in enumerate(reduces))
    names = body.names | {node: node.name for node in scratch}
    pieces = FloorDiv(body.reduced[0].size + length - 1, sympy.Integer(length))
    partial = _partial(body, names, list(zip(scratch, reduces, strict=True)), pieces, length)
    total = total_of(body, names, list(zip(scratch, reduces, strict=True)), pieces)
    return Split(partial, total, scratch, (pieces, product(one.size for one in body.outer)))


def scratch_tensor(place: int, dtype: torch.dtype) -> fx.Node:
    """A tensor that no graph has: bodies call tensors by nodes."""
    node = fx.Graph().placeholder(f"partial_{place}")
    node.meta["val"] = torch.empty((), dtype=dtype, device="meta")
    return node


Partials = list[tuple[fx.Node, Reduce]]


def _partial(
    body: Body, names: dict[fx.Node, str], partials: Partials, pieces: sympy.Expr, length: int
) -> Body:
    cut = body.reduced[0]
    piece = axis("piece", pieces)
    within = cut.symbol if length > 1 else sympy.Integer(0)  # an axis of one element has no index
    position = piece.symbol * length + within
    whole = same(pieces * length, cut.size)
    inside = () if whole else (Condition(position, cut.size),)
    axes = tuple(replace(one, size=sympy.Integer(length)) if one is cut else one for one in body.axes)
    moved = body.with_indices(lambda expr: expr.subs(cut.symbol, position), (piece, *axes))
    needed = body.needed_for(one.name for _, one in partials)
    statements: list[Statement] = []
    for one in moved.statements:
        if isinstance(one, Reduce) and inside:
            statements += _ended(one, inside[0])
        elif one.name in needed:
            statements.append(_limited(one, inside))
    at = place_of(piece, body.outer)
    stores = [Store(node, at, one.name, False) for node, one in partials]
    return Body((piece, *axes), names, statements, stores)


def _limited(one: Statement, inside: tuple[Condition, ...]) -> Statement:
    """A load along the axis that is cut: only inside of it."""
    if isinstance(one, Load) and one.on_r:
        return replace(one, conditions=(*inside, *one.conditions))
    return one


def _ended(one: Reduce, inside: Condition) -> list[Statement]:
    """The reduction, of what changes nothing where the axis has ended."""
    nothing = f"tl.full([1], {identity_of(one)}, {TRITON_TYPES[one.dtype]})"
    fill = Compute(f"{one.name}_nothing", (), one.dtype, 0, False, one.origin, nothing)
    uses = (one.uses[0], fill.name)
    chosen = Choose(f"{one.name}_operand", uses, one.dtype, 0, True, one.origin, inside)
    return [fill, chosen, replace(one, uses=(chosen.name,))]


def total_of(body: Body, names: dict[fx.Node, str], partials: Partials, pieces: sympy.Expr) -> Body:
    """What `body` does with its reductions, whose pieces lie in scratch tensors."""
    along = axis("r", pieces, reduced=True)
    at = place_of(along, body.outer)
    statements: list[Statement] = []
    for node, one in partials:
        load = Load(f"{one.name}_pieces", (), one.dtype, 0, True, one.origin, node, at)
        statements += [load, replace(one, uses=(load.name,))]
    known = frozenset(one.name for _, one in partials)
    needed = body.needed_for({one.source for one in body.stores}, known) - known
    statements += [one for one in body.statements if one.name in needed]
    return Body((*body.outer, along), names, statements, body.stores)


def place_of(piece: Axis, outer: tuple[Axis, ...]) -> sympy.Expr:
    """Where the result of a piece lies in its scratch tensor."""
    axes = (piece, *outer)
    return flatten(tuple(one.symbol for one in axes), tuple(one.size for one in axes))
