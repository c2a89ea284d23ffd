"""The body of a kernel before it is text: what is loaded, computed, reduced and stored, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import sympy
import torch
from torch import fx

from fxopt.codegen.indexing import Axis


@dataclass(frozen=True)
class Condition:
    """``lhs < bound``: where it does not hold, a load must not happen."""

    lhs: sympy.Expr
    bound: sympy.Expr


@dataclass(frozen=True)
class Statement:
    """One value.

    Attributes:
        name: of the value. uses: the values that it reads. dtype: in registers.
        level: how many reductions, one behind the other, have to be complete before it can be computed.
        on_r: whether it differs along the reduced axes. origin: the node that it stands for.
    """

    name: str
    uses: tuple[str, ...]
    dtype: torch.dtype
    level: int
    on_r: bool
    origin: fx.Node


@dataclass(frozen=True)
class Load(Statement):
    """Of the element at `offset` of `tensor`, where all conditions hold."""

    tensor: fx.Node
    offset: sympy.Expr
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Compute(Statement):
    """An expression over the values in `uses`."""

    text: str


@dataclass(frozen=True)
class Position(Statement):
    """An index as a value."""

    expr: sympy.Expr


@dataclass(frozen=True)
class Choose(Statement):
    """The first value where the condition holds, else the second: one joint of a concatenation."""

    condition: Condition


@dataclass(frozen=True)
class Reduce(Statement):
    """Over all reduced axes, by ``"sum"``, ``"max"`` or ``"min"``."""

    how: str


@dataclass(frozen=True)
class Store:
    """Of value `source` to the element at `offset` of the result `tensor`."""

    tensor: fx.Node
    offset: sympy.Expr
    source: str
    on_r: bool


@dataclass
class Body:
    """A loop nest and what happens in it.

    Attributes:
        names: of the tensors that are read and written. They depend on the loop alone, not on the graph that
            it is from, so that equal loops give equal texts.
    """

    axes: tuple[Axis, ...]
    names: dict[fx.Node, str] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)

    @property
    def outer(self) -> tuple[Axis, ...]:
        """The axes that programs and their rows run over."""
        return tuple(one for one in self.axes if not one.reduced)

    @property
    def reduced(self) -> tuple[Axis, ...]:
        """The axes that reductions run over, and results of their size too."""
        return tuple(one for one in self.axes if one.reduced)

    @property
    def loads(self) -> list[Load]:
        return [one for one in self.statements if isinstance(one, Load)]

    def expressions(self) -> list[sympy.Expr]:
        """Every index expression."""
        found: list[sympy.Expr] = [store.offset for store in self.stores]
        for one in self.statements:
            if isinstance(one, Load):
                found += [one.offset, *(part for c in one.conditions for part in (c.lhs, c.bound))]
            elif isinstance(one, Position):
                found.append(one.expr)
            elif isinstance(one, Choose):
                found += [one.condition.lhs, one.condition.bound]
        return found

    def with_indices(self, change: Callable[[sympy.Expr], sympy.Expr], axes: tuple[Axis, ...]) -> Body:
        """The same body over other axes."""
        statements = [_changed(one, change) for one in self.statements]
        return Body(
            axes, self.names, statements, [replace(one, offset=change(one.offset)) for one in self.stores]
        )


def _changed(one: Statement, change: Callable[[sympy.Expr], sympy.Expr]) -> Statement:
    def condition(c: Condition) -> Condition:
        return Condition(change(c.lhs), change(c.bound))

    if isinstance(one, Load):
        return replace(one, offset=change(one.offset), conditions=tuple(map(condition, one.conditions)))
    if isinstance(one, Position):
        return replace(one, expr=change(one.expr))
    if isinstance(one, Choose):
        return replace(one, condition=condition(one.condition))
    return one


def merged(body: Body) -> Body:
    """Neighbouring axes made one wherever every index reads them together, so that none is divided."""
    position = 0
    while position + 1 < len(body.axes):
        joined = _joined(body, position)
        body, position = (body, position + 1) if joined is None else (joined, position)
    return body


def _joined(body: Body, position: int) -> Body | None:
    slow, fast = body.axes[position], body.axes[position + 1]
    if slow.reduced != fast.reduced:
        return None
    if not all(_together(expr, slow, fast) for expr in body.expressions()):
        return None
    size = sympy.expand(slow.size * fast.size)
    one = Axis(slow.symbol, size, slow.reduced)

    def change(expr: sympy.Expr) -> sympy.Expr:
        return sympy.expand(expr.subs({slow.symbol: 0}, simultaneous=True)).subs({fast.symbol: slow.symbol})

    return body.with_indices(change, (*body.axes[:position], one, *body.axes[position + 2 :]))


def _together(expr: sympy.Expr, slow: Axis, fast: Axis) -> bool:
    """Whether `expr` reads both only as ``slow * fast.size + fast``."""
    terms = sympy.expand(expr)
    a, b = terms.coeff(slow.symbol), terms.coeff(fast.symbol)
    rest = sympy.expand(terms - a * slow.symbol - b * fast.symbol)
    symbols = {slow.symbol, fast.symbol}
    if (rest.free_symbols | a.free_symbols | b.free_symbols) & symbols:
        return False
    return bool(sympy.expand(a - b * fast.size) == 0)
