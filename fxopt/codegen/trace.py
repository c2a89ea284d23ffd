"""From the nodes of a region to the body of its kernel.

Values are pulled from the results, at the index where they are needed, through any views.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fxopt.codegen.dequantize import is_dequantized, widened
from fxopt.codegen.elementwise import (
    TRITON_TYPES,
    cast,
    expression,
    formula_of,
    literal,
    operands_of,
    register_type,
)
from fxopt.codegen.gather import GATHERS, gather_of, looked_up
from fxopt.codegen.helpers import RESERVED
from fxopt.codegen.indexing import Index, flatten, floor_divide, offset, ranges_of, sizes_of
from fxopt.codegen.loops import REDUCTIONS, Loop, is_moment
from fxopt.codegen.reduce import moments, reduced
from fxopt.codegen.statements import (
    Body,
    Choose,
    Compute,
    Condition,
    Load,
    Position,
    Product,
    Reduce,
    Statement,
    Store,
)
from fxopt.codegen.view_index import (
    broadcast_to,
    keeps_strides,
    shape_of,
    spelling_of,
    view_base,
    view_source,
)
from fxopt.ir.ops.uniform import is_uniform
from fxopt.ir.sizes import size_of

aten, prims = torch.ops.aten, torch.ops.prims

Conditions = tuple[Condition, ...]
# operators that make a tensor of one number, and the position of that number
FILLS: dict[Any, int] = {aten.full.default: 1, aten.full_like.default: 1, aten.scalar_tensor.default: 0}


class CannotEmit(Exception):
    """A region cannot be one kernel. `reason` goes into the evidence."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def trace(members: Iterable[fx.Node], outputs: Sequence[fx.Node], loop: Loop) -> Body:
    """The body that computes and stores `outputs`.

    Raises:
        CannotEmit: an output has no place in the loop, or a value is needed where the loop does not have it.
    """
    tracer = Tracer(frozenset(members), loop)
    for node in outputs:
        tracer.store(node)
    return Body(loop.axes, tracer.names, tracer.statements, tracer.stores)


def operator_name(node: fx.Node) -> str:
    """What `node` computes in one word: ``"mul"``."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet).rpartition(".")[2] if packet is not None else getattr(node.target, "__name__", node.op)


def needed_for(wanted: Iterable[fx.Node], known: Collection[fx.Node] = ()) -> set[fx.Node]:
    """What `wanted` are computed from, themselves included, up to what is known."""
    found: set[fx.Node] = set()
    todo = list(wanted)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += () if node in known else node.all_input_nodes
    return found


def is_created(node: fx.Node) -> bool:
    """Whether `node` makes a tensor from nothing: every kernel makes it for itself."""
    if node.target is prims.iota.default:
        return all(isinstance(node.kwargs.get(key, 0), int) for key in ("start", "step"))
    return node.target in FILLS and not isinstance(node.args[FILLS[node.target]], fx.Node)


@dataclass(frozen=True)
class Piece:
    """From `begin` to `end` along a dimension a result is `source`, further back by `shift`."""

    source: fx.Node
    shift: sympy.Expr
    begin: sympy.Expr
    end: sympy.Expr


def scattered_slice(node: fx.Node) -> tuple[fx.Node, fx.Node, int, sympy.Expr]:
    """Base, source, dimension and first index of a ``slice_scatter``.

    Raises:
        CannotEmit: its elements are not side by side, or where they begin depends on a size.
    """
    given = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    named: dict[str, Any] = dict(zip(given, node.args, strict=False)) | node.kwargs
    base, source, start = named["self"], named["src"], named.get("start")
    if named.get("step", 1) != 1 or not isinstance(start, int | None):
        raise CannotEmit("wanted a slice of neighbours from a known index on")
    dim = named.get("dim", 0) % len(shape_of(base))
    size = shape_of(base)[dim]
    begin = sympy.Integer(start or 0)
    return base, source, dim, begin if begin >= 0 else size + begin


class Tracer:
    """Collects the statements of one body, each value once."""

    def __init__(self, members: frozenset[fx.Node], loop: Loop) -> None:
        self.members, self.loop = members, loop
        self.ranges = ranges_of(loop.axes)
        self.along = {one.symbol for one in loop.axes if one.reduced}
        self.statements: list[Statement] = []
        self.stores: list[Store] = []
        self._known: dict[tuple[Any, ...], Statement] = {}
        self._reduced_at: dict[fx.Node, Index] = {}
        self._spelled: dict[tuple[Any, ...], fx.Node] = {}
        self.names: dict[fx.Node, str] = {}
        self._named: dict[str, Statement] = {}

    def store(self, node: fx.Node) -> None:
        """Store `node` where the loop has it."""
        index = self.loop.home(node)
        if index is None:
            raise CannotEmit(
                f"{node.name} of {list(node.meta['val'].shape)} does not have the loop's elements"
            )
        value = self.value(node, index, ())
        at = offset(index, sizes_of(node.meta["val"].stride()))
        on_r = bool(at.free_symbols & self.along)
        if value.on_r and not on_r:
            raise CannotEmit(f"{node.name} differs along the axes that are reduced")
        self.names[node] = f"out_{len(self.stores)}"
        self.stores.append(Store(node, at, value.name, on_r))

    def value(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        """What `node` has at `index`.

        `conditions` say for which iterations the element exists. Along axes that `index` does not depend on
        it is the same element for all of them.
        """
        conditions = tuple(one for one in conditions if _symbols(one) & _symbols(index))
        if is_created(node):
            return self._created(node, index)
        if node not in self.members:
            found = view_source(node, index, self.ranges)
            if found is not None and (keeps_strides(node) or view_base(node) in self.members):
                return self.value(*found, conditions)
            if view_base(node) in self.members:
                raise CannotEmit(f"{node.name} is a view whose index is not understood")
            return self._load(node, index, conditions)
        key = (node, index, conditions)
        if key not in self._known:
            self._known[key] = self.member(node, index, conditions)
        return self._known[key]

    def _load(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return self.add(Position, node, (), torch.int64, expr=size_of(value))
        alike, node = node, self._spelled.setdefault(spelling_of(node), node)
        at = offset(index, sizes_of(value.stride()))
        key = ("load", node, at, conditions)
        if key not in self._known:
            self.names.setdefault(node, f"in_{len(self.names)}")
            dtype = register_type(value.dtype)
            self._known[key] = self.add(Load, node, (), dtype, tensor=node, offset=at, conditions=conditions)
        self.names[alike] = self.names[node]
        return self._known[key]

    def member(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        """What one operator of the region computes."""
        if formula_of(node) is not None:
            return self._pointwise(node, index, conditions)
        if node.target is aten.cat.default:
            return self._cat(node, index, conditions)
        if node.target is aten.slice_scatter.default:
            return self._slice_scatter(node, index, conditions)
        if node.target in REDUCTIONS:
            return reduced(self, node, self._inside(node, index, conditions))
        if is_moment(node):
            return self._moment(node, index, conditions)
        if is_uniform(node.target):
            return self._uniform(node, index)
        if node.target in GATHERS:
            return self.gathered(node, index, conditions)
        if is_dequantized(node):
            return widened(self, node, index, conditions)
        raise CannotEmit(f"{node.target} is not emitted")

    def group_of(self, column: sympy.Expr, size: int, numbers: fx.Node) -> sympy.Expr:
        """The group of `size` columns that a column of a weight is in; `numbers` (N, groups) has theirs."""
        alone = shape_of(numbers)[1] == 1
        return sympy.Integer(0) if alone else floor_divide(column, sympy.Integer(size), self.ranges)

    def spread(self, node: fx.Node, of_group: Statement) -> Statement:
        """The value of a group for each of its columns."""
        return of_group

    def _pointwise(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        uses: list[str] = []

        def operand(argument: Any, dtype: torch.dtype) -> str:
            if not isinstance(argument, fx.Node):
                return literal(argument)
            is_tensor = isinstance(argument.meta["val"], torch.Tensor)
            value = self.value(argument, broadcast_to(index, argument) if is_tensor else (), conditions)
            uses.append(value.name)
            return cast(value.name, value.dtype, dtype)

        formula = formula_of(node)
        assert formula is not None
        text = expression(node, formula, operand, operands_of(node))
        return self.compute(node, tuple(uses), text)

    def _cat(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        parts: Any = node.args[0]
        dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        dim %= len(index)
        pieces, begin = [], sympy.Integer(0)
        for part in parts:
            end = sympy.expand(begin + shape_of(part)[dim])
            pieces.append(Piece(part, begin, begin, end))
            begin = end
        return self._joined(node, index, dim, pieces, conditions)

    def _slice_scatter(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        """The base with `source` in the place of one of its slices: the gradient of a slice, for one."""
        base, source, dim, begin = scattered_slice(node)
        size, end = shape_of(base)[dim], sympy.expand(begin + shape_of(source)[dim])
        zero = sympy.Integer(0)
        pieces = [
            Piece(base, zero, zero, begin),
            Piece(source, begin, begin, end),
            Piece(base, zero, end, size),
        ]
        own = [one for one in pieces if one.begin != one.end]
        return self._joined(node, index, dim, own, conditions)

    def _joined(
        self, node: fx.Node, index: Index, dim: int, pieces: Sequence[Piece], conditions: Conditions
    ) -> Statement:
        """What lies side by side along a dimension."""
        at = index[dim]
        chosen: Statement | None = None
        for one in reversed(pieces):
            here: Conditions = (Condition(one.begin - 1, at),) if one.begin != 0 else ()
            here += (Condition(at, one.end),) if chosen is not None else ()
            inner = (*index[:dim], at - one.shift, *index[dim + 1 :])
            value = self.converted(node, self.value(one.source, inner, conditions + here))
            if chosen is None:
                chosen = value
            else:
                uses = (value.name, chosen.name)
                chosen = self.add(Choose, node, uses, value.dtype, condition=Condition(at, one.end))
        assert chosen is not None
        return chosen

    def gathered(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        """A tensor in memory, read at places that are data."""
        found = gather_of(node, index)
        if view_base(found.source) in self.members:
            raise CannotEmit(f"{node.name} reads anywhere in {found.source.name}, which has to be in memory")
        self.names.setdefault(found.source, f"in_{len(self.names)}")
        return looked_up(self, node, found, conditions)

    def _uniform(self, node: fx.Node, index: Index) -> Statement:
        source: Any = node.args[1]
        seed = self.value(source, (), ())
        place = self.add(Position, node, (), torch.int64, expr=flatten(index, shape_of(node)))
        return self.compute(
            node, (seed.name, place.name), f"uniform({seed.name}, {place.name}, {node.args[2]})"
        )

    def _created(self, node: fx.Node, index: Index) -> Statement:
        if node.target is prims.iota.default:
            start, step = (sympy.sympify(node.kwargs.get(key, 0)) for key in ("start", "step"))
            position = self.add(Position, node, (), torch.int64, expr=start + step * index[0])
            return self.converted(node, position)
        fill: Any = node.args[FILLS[node.target]]
        dtype = register_type(node.meta["val"].dtype)
        fill = bool(fill) if dtype is torch.bool else fill
        return self.compute(node, (), f"tl.full([1], {literal(fill)}, {TRITON_TYPES[dtype]})")

    def _inside(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        """The operand of a reduction, along the axes that are reduced."""
        if conditions:
            raise CannotEmit(f"{node.name} is reduced inside of a part of a concatenation of rows")
        if any(at.free_symbols & self.along for at in index):
            raise CannotEmit(f"{node.name} is needed along the axes that it is reduced over")
        if self._reduced_at.setdefault(node, index) != index:
            raise CannotEmit(f"{node.name} is needed at two places of the loop")
        inner = self.loop.inside(node, index)
        if inner is None:
            raise CannotEmit(f"{node.name} is reduced over other axes than the loop's")
        source: Any = node.args[0]
        return self.value(source, inner, ())

    def _moment(self, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
        """The variance or the mean, whichever `node` takes."""
        parent: Any = node.args[0]
        if (parent, index, 0) not in self._known:
            operand = self._inside(parent, index, conditions)
            for which, value in enumerate(moments(self, parent, operand)):
                self._known[(parent, index, which)] = value
        return self._known[(parent, index, node.args[1])]

    def converted(self, node: fx.Node, value: Statement) -> Statement:
        """`value` in the registers' dtype of `node`."""
        wanted = register_type(node.meta["val"].dtype)
        if value.dtype == wanted:
            return value
        return self.compute(node, (value.name,), cast(value.name, value.dtype, wanted))

    def compute(
        self,
        node: fx.Node,
        uses: tuple[str, ...],
        text: str,
        dtype: torch.dtype | None = None,
        name: str = "",
    ) -> Statement:
        """An expression over `uses`; the value itself where it is nothing else. With a `name`, one value for
        all of one text."""
        if text in uses:
            return self._named[text]
        dtype = dtype or register_type(node.meta["val"].dtype)
        key = ("text", text, dtype)
        if not name or key not in self._known:
            self._known[key] = self.add(Compute, node, uses, dtype, name, text=text)
        return self._known[key]

    def add(
        self,
        kind: Any,
        node: fx.Node,
        uses: tuple[str, ...],
        dtype: torch.dtype,
        wanted: str = "",
        **rest: Any,
    ) -> Statement:
        """A statement of `kind`, called as is `wanted`, or else after the node."""
        used = [self._named[name] for name in uses]
        symbols = {symbol for part in rest.values() for symbol in _symbols(part)}
        on_r = bool(symbols & self.along) or any(one.on_r for one in used)
        level = max((one.level for one in used), default=0)
        if issubclass(kind, (Product, Reduce)):
            on_r, level = False, level + 1
        base = wanted or (self.names[node] if kind is Load else operator_name(node))
        name = f"{base}_{rest['how']}" if "how" in rest else base
        added: Statement = kind(self._name(name), uses, dtype, level, on_r, node, **rest)
        self.statements.append(added)
        self._named[added.name] = added
        return added

    def _name(self, wanted: str) -> str:
        name, count = wanted, 0
        while name in self._named or name in RESERVED:
            count += 1
            name = f"{wanted}_{count}"
        return name


def _symbols(part: Any) -> set[Any]:
    if isinstance(part, sympy.Expr):
        return set(part.free_symbols)
    if isinstance(part, Condition):
        return _symbols(part.lhs) | _symbols(part.bound)
    if isinstance(part, tuple):
        return {symbol for one in part for symbol in _symbols(one)}
    return set()
