"""A body of statements as the text of one Triton function.

A program computes a tile: `x` runs down over the outer axes and `r` across over the reduced ones. Where a row
fits into a tile there is one pass over it. Otherwise each level of reductions is one loop over the row, which
reads again what it needs, and a last loop stores what differs along the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import sympy
import torch

from fxopt.codegen.elementwise import TRITON_TYPES
from fxopt.codegen.helpers import HELPERS
from fxopt.codegen.indexing import Axis, axis, product, unflatten
from fxopt.codegen.print_index import print_index
from fxopt.codegen.statements import (
    Body,
    Choose,
    Compute,
    Condition,
    Load,
    Place,
    Position,
    Reduce,
    Statement,
    Store,
    identity_of,
)

COMBINE = {"sum": "{0} + {1}", "max": "maximum({0}, {1})", "min": "minimum({0}, {1})"}


@dataclass(frozen=True)
class Tile:
    """How many elements of the outer and of the reduced axes a program has at once.

    Attributes:
        rows: along `x`. columns: along `r`; zero when nothing is reduced. looped: `columns` may be fewer than
            a row has.
    """

    rows: int
    columns: int = 0
    looped: bool = False


@dataclass(frozen=True)
class Rendered:
    """The text of one kernel.

    Attributes:
        text: its helpers and the function. pointers: the names of its pointers, loads first. sizes: the
            symbols it takes.
    """

    text: str
    pointers: tuple[str, ...]
    sizes: tuple[sympy.Symbol, ...]


def render(name: str, body: Body, tile: Tile, wide: bool = False) -> Rendered:
    """`body` as a Triton function called `name`. `wide`: offsets do not fit into 32 bits."""
    return _Renderer(name, _plainly_named(body), tile, wide).render()


def _plainly_named(body: Body) -> Body:
    """An axis that is alone is called as the tile's: there is nothing to compute its index from."""
    names = {}
    for flat, axes in (("x", body.outer), ("r", body.reduced)):
        if len(axes) == 1:
            names[axes[0].symbol] = axis(flat, axes[0].size).symbol
    renamed = tuple(replace(one, symbol=names.get(one.symbol, one.symbol)) for one in body.axes)
    return body.with_indices(lambda expr: expr.subs(names, simultaneous=True), renamed)


class _Renderer:
    def __init__(self, name: str, body: Body, tile: Tile, wide: bool) -> None:
        self.name, self.body, self.tile, self.wide = name, body, tile, wide
        self.rows = product(one.size for one in body.outer)
        self.columns = product(one.size for one in body.reduced)
        self.has_r = bool(body.reduced)
        self.along = {one.name for one in body.statements if one.on_r}
        self.lines: list[str] = []
        self.asserted: set[str] = set()

    def render(self) -> Rendered:
        self._head()
        if not self.has_r:
            self._emit(self.body.statements, self.body.stores, "inside", 1)
        elif self.tile.looped:
            self._passes()
        else:
            self._columns("", 1)
            self._emit(self.body.statements, self.body.stores, "inside", 1)
        pointers = self._pointers()
        sizes = self._sizes()
        arguments = [*pointers, *(str(one) for one in sizes), "ROWS: tl.constexpr"]
        arguments += ["COLUMNS: tl.constexpr"] if self.has_r else []
        head = signature(self.name, arguments)
        text = "\n".join([*helpers_of(self.lines), "@triton.jit", *head, *self.lines])
        return Rendered(text + "\n", tuple(pointers), sizes)

    def _pointers(self) -> list[str]:
        read = dict.fromkeys(f"{self.body.names[one.tensor]}_ptr" for one in self.body.loads)
        written = [f"{self.body.names[one.tensor]}_ptr" for one in self.body.stores]
        return [*read, *written]

    def _sizes(self) -> tuple[sympy.Symbol, ...]:
        axes = {one.symbol for one in self.body.axes}
        found = {s for expr in self.body.expressions() for s in expr.free_symbols} - axes
        found |= self.rows.free_symbols | self.columns.free_symbols
        return tuple(sorted(found, key=str))

    def _line(self, depth: int, text: str) -> None:
        self.lines.append("    " * depth + text)

    def _head(self) -> None:
        program = "tl.program_id(0).to(tl.int64)" if self.wide else "tl.program_id(0)"
        shape = "[:, None]" if self.has_r else ""
        self._line(1, f"x = {program} * ROWS + tl.arange(0, ROWS){shape}")
        self._line(1, f"{'inside_x' if self.has_r else 'inside'} = x < {print_index(self.rows)}")
        self._axes("x", self.body.outer, 1)

    def _axes(self, flat: str, axes: tuple[Axis, ...], depth: int) -> None:
        """The index of each axis, from the flat one."""
        symbol = sympy.Symbol(flat, integer=True, nonnegative=True)
        size = product(one.size for one in axes)
        index = unflatten(symbol, tuple(one.size for one in axes), {symbol: size})
        for one, at in zip(axes, index, strict=True):
            if str(one.symbol) != flat and one.size != 1:
                self._line(depth, f"{one.symbol} = {print_index(at)}")

    def _columns(self, start: str, depth: int) -> None:
        own = "tl.arange(0, COLUMNS)[None, :]" + (".to(tl.int64)" if self.wide else "")
        self._line(depth, f"r = {start}{own}")
        self._line(depth, f"inside_r = r < {print_index(self.columns)}")
        self._line(depth, "inside = inside_x & inside_r")
        self._axes("r", self.body.reduced, depth)

    def _passes(self) -> None:
        """One loop for each level of reductions, and one for what is stored along the row."""
        highest = max((one.level for one in self.body.statements), default=0)
        for level in range(highest + 1):
            own = [one for one in self.body.statements if one.level == level and not one.on_r]
            self._emit([one for one in own if not isinstance(one, Reduce)], [], "inside_x", 1)
            reduces = [
                one for one in self.body.statements if isinstance(one, Reduce) and one.level == level + 1
            ]
            stores = [one for one in self.body.stores if one.on_r] if level == highest else []
            if reduces or stores:
                wanted = [*(r.uses[0] for r in reduces), *(s.source for s in stores)]
                needed = self.body.needed_along(wanted)
                self._one_pass([one for one in self.body.statements if one.name in needed], reduces, stores)
        self._emit([], [one for one in self.body.stores if not one.on_r], "inside_x", 1)

    def _one_pass(self, needed: list[Statement], reduces: list[Reduce], stores: list[Store]) -> None:
        for one in reduces:
            zero = f"tl.full([ROWS, COLUMNS], {identity_of(one)}, {TRITON_TYPES[one.dtype]})"
            self._line(1, f"{one.name}_partial = {zero}")
        self._line(1, f"for start in range(0, {print_index(self.columns)}, COLUMNS):")
        self._columns("start + ", 2)
        self._emit(needed, stores, "inside", 2)
        for one in reduces:
            value = f"tl.where(inside_r, {one.uses[0]}, {identity_of(one)})"
            self._line(2, f"{one.name}_partial = {COMBINE[one.how].format(f'{one.name}_partial', value)}")
        for one in reduces:
            self._line(1, f"{one.name} = {over_row(one.how, f'{one.name}_partial')}")

    def _emit(
        self, statements: Iterable[Statement], stores: Iterable[Store], inside: str, depth: int
    ) -> None:
        for one in statements:
            if isinstance(one, Load):
                self._assert(one, inside, depth)
            self._line(depth, f"{one.name} = {self._value(one)}")
        for store in stores:
            mask = inside if store.on_r or not self.has_r else "inside_x"
            where = f"{self.body.names[store.tensor]}_ptr + {self._shaped(store.offset, True, store.on_r)}"
            self._line(depth, f"tl.store({where}, {store.source}, mask={mask})")

    def _assert(self, one: Load, inside: str, depth: int) -> None:
        """That the places of a load exist, wherever its value is asked for. Said in the first pass over a row
        alone: later ones ask for the same, and around a second call the assembler spills registers."""
        if one.name in self.asserted:
            return
        self.asserted.add(one.name)
        asked = " & ".join([inside, *(f"({condition_text(c)})" for c in one.conditions)])
        for place in one.places:
            self._line(depth, f'tl.device_assert({within(place)}, "index out of bounds", {asked})')

    def _value(self, one: Statement) -> str:
        if isinstance(one, Load):
            return self._load(one)
        if isinstance(one, Compute):
            return one.text
        if isinstance(one, Position):
            return f"({print_index(one.expr)} + tl.full([1], 0, tl.int64))"
        if isinstance(one, Choose):
            return f"tl.where({condition_text(one.condition)}, {one.uses[0]}, {one.uses[1]})"
        assert isinstance(one, Reduce)
        if self.columns == self.tile.columns and one.uses[0] in self.along:
            return over_row(one.how, one.uses[0])
        return over_row(one.how, f"tl.where(inside_r, {one.uses[0]}, {identity_of(one)})")

    def _load(self, one: Load) -> str:
        masks = [f"({condition_text(c)})" for c in one.conditions]
        masks += [within(place) for place in one.places]
        limits = [part for c in one.conditions for part in (c.lhs, c.bound)]
        outer, along = self._reads(one.offset, *limits)
        if outer or along:
            masks.insert(0, _mask(outer, along, self.has_r))
        pointer = f"{self.body.names[one.tensor]}_ptr + {self._shaped(one.offset, outer, along)}"
        pointer += "".join(f" + {place.name} * {print_index(place.stride)}" for place in one.places)
        loaded = f"tl.load({pointer}, mask={' & '.join(masks)}, other=0)" if masks else f"tl.load({pointer})"
        dtype = one.tensor.meta["val"].dtype
        if dtype is torch.bool:
            return f"{loaded} != 0"
        return loaded if one.dtype == dtype else f"{loaded}.to({TRITON_TYPES[one.dtype]})"

    def _reads(self, *expressions: sympy.Expr) -> tuple[bool, bool]:
        """Whether they differ along the outer and along the reduced axes."""
        symbols = {symbol for expr in expressions for symbol in expr.free_symbols}
        outer, along = ({axis.symbol for axis in axes} for axes in (self.body.outer, self.body.reduced))
        return bool(symbols & outer), bool(symbols & along)

    def _shaped(self, offset: sympy.Expr, outer: bool, along: bool) -> str:
        """An offset as a block of the shape of its mask, also where it is the same along it."""
        own_outer, own_along = self._reads(offset)
        added = [" + 0 * x"] * (outer and not own_outer) + [" + 0 * r"] * (along and not own_along)
        if not (outer or along):
            added.append(" + tl.zeros([1], tl.int32)")
        text = print_index(offset) + "".join(added)
        return text.removeprefix("0 + ")


def helpers_of(lines: Iterable[str]) -> list[str]:
    """The texts of the device functions that `lines` call."""
    joined = "\n".join(lines)
    return [text + "\n" for name, text in HELPERS.items() if re.search(rf"(?<![\w.]){name}\b", joined)]


def _mask(outer: bool, along: bool, has_r: bool) -> str:
    if not has_r or (outer and along):
        return "inside"
    return "inside_r" if along else "inside_x"


def signature(name: str, arguments: list[str]) -> list[str]:
    """The head of a function, on several lines where it is long."""
    one_line = f"def {name}({', '.join(arguments)}):"
    if len(one_line) <= 110:
        return [one_line]
    return [f"def {name}(", *(f"    {one}," for one in arguments), "):"]


def within(place: Place) -> str:
    """That a place exists."""
    return f"({place.name} >= 0) & ({place.name} < {print_index(place.size)})"


def condition_text(one: Condition) -> str:
    """As Triton reads it."""
    return f"{print_index(one.lhs)} < {print_index(one.bound)}"


def over_row(how: str, text: str) -> str:
    """A block reduced along its second axis, which stays."""
    if how == "sum":
        return f"tl.sum({text}, axis=1, keep_dims=True)"
    return f"tl.reduce({text}, 1, {how}imum, keep_dims=True)"
