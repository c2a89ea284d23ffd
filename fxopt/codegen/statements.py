"""The body of a kernel before it is text: what is loaded, computed, reduced and stored, in order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
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

    def indices(self) -> tuple[sympy.Expr, ...]:
        """The index expressions that it depends on by itself."""
        return ()


@dataclass(frozen=True)
class Place:
    """The value `name` says which of `size` entries, `stride` elements apart."""

    name: str
    size: sympy.Expr
    stride: sympy.Expr


@dataclass(frozen=True)
class Load(Statement):
    """Of the element at `offset` of `tensor`, and at `places` of it, where all conditions hold."""

    tensor: fx.Node
    offset: sympy.Expr
    conditions: tuple[Condition, ...] = ()
    places: tuple[Place, ...] = ()

    def indices(self) -> tuple[sympy.Expr, ...]:
        limits = (part for one in self.conditions for part in (one.lhs, one.bound))
        return (self.offset, *limits, *(part for one in self.places for part in (one.size, one.stride)))


@dataclass(frozen=True)
class Compute(Statement):
    """An expression over the values in `uses`."""

    text: str


@dataclass(frozen=True)
class Position(Statement):
    """An index as a value."""

    expr: sympy.Expr

    def indices(self) -> tuple[sympy.Expr, ...]:
        return (self.expr,)


@dataclass(frozen=True)
class Choose(Statement):
    """The first value where the condition holds, else the second: one joint of a concatenation."""

    condition: Condition

    def indices(self) -> tuple[sympy.Expr, ...]:
        return (self.condition.lhs, self.condition.bound)


@dataclass(frozen=True)
class Reduce(Statement):
    """Over all reduced axes, by ``"sum"``, ``"max"`` or ``"min"``."""

    how: str


def identity_of(one: Reduce) -> str:
    """What changes nothing when it is combined, as Triton text."""
    if one.how == "sum":
        return "0"
    if one.dtype.is_floating_point:
        return "float('-inf')" if one.how == "max" else "float('inf')"
    limits = torch.iinfo(one.dtype)
    return str(limits.min if one.how == "max" else limits.max)


@dataclass(frozen=True)
class Product(Statement):
    """One element of a matrix product in float32: its two operands multiplied, over the reduced axis."""


@dataclass(frozen=True)
class Exchange(Statement):
    """The value `distance` columns further in the first half of a pair of that width, back in the second."""

    distance: int


@dataclass(frozen=True)
class Repeat(Statement):
    """The value of a group, for each of the `size` neighbours along `place` that it has.

    Attributes:
        group: which group it is.
    """

    place: sympy.Expr
    group: sympy.Expr
    size: int

    def indices(self) -> tuple[sympy.Expr, ...]:
        return (self.place,)


@dataclass(frozen=True)
class Store:
    """Of value `source` to the element at `offset` of the result `tensor`; `added`: to what is there."""

    tensor: fx.Node
    offset: sympy.Expr
    source: str
    on_r: bool
    added: bool = False


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

    def needed_for(self, wanted: Iterable[str], known: Collection[str] = ()) -> set[str]:
        """The values that `wanted` are computed from, themselves included, up to those that are known."""
        by_name = {one.name: one for one in self.statements}
        found: set[str] = set()
        todo = list(wanted)
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo += () if name in known else by_name[name].uses
        return found

    def needed_along(self, wanted: Iterable[str]) -> set[str]:
        """Those of `needed_for` that differ along the reduced axes, up to the first that do not."""
        along = {one.name for one in self.statements if one.on_r}
        return self.needed_for(wanted, {one.name for one in self.statements} - along) & along

    def expressions(self) -> list[sympy.Expr]:
        """Every index expression."""
        stored = [store.offset for store in self.stores]
        return stored + [expr for one in self.statements for expr in one.indices()]

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
