"""A body with matrix products as the text of one Triton function.

A program computes a tile of one part: `COLUMNS` columns of all rows, or of `ROWS` of them; in the latter case
programs that follow each other go down `GROUP` tiles of rows before they go on to the next columns, so that
what they read is still in L2. First come the
reductions over the rows of the left operand, each level in one pass, then for the part that the program is
for one pass over what is summed, then what follows the products. A single row is multiplied and added up in
float32, in blocks of columns by depth; more rows use the matrix units. Each axis runs either down or across
in blocks of two dimensions: the depth across in the left operand, down in the right one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sympy
import torch

from fxopt.codegen.elementwise import HALVES, TRITON_TYPES
from fxopt.codegen.indexing import Axis
from fxopt.codegen.matmul import MatmulBody, Part, axes_of
from fxopt.codegen.matmul_tile import MatmulTile
from fxopt.codegen.print_index import print_index
from fxopt.codegen.render import (
    COMBINE,
    Rendered,
    condition_text,
    helpers_of,
    over_row,
    signature,
)
from fxopt.codegen.statements import (
    Choose,
    Compute,
    Exchange,
    Load,
    Position,
    Product,
    Reduce,
    Repeat,
    Statement,
    Store,
    identity_of,
)

_DOWN, _ACROSS = "[:, None]", "[None, :]"


def render_matmul(name: str, body: MatmulBody, tile: MatmulTile, wide: bool = False) -> Rendered:
    """`body` as a Triton function called `name`. `wide`: offsets do not fit into 32 bits."""
    return _Renderer(name, body, tile, wide).render()


class _Renderer:
    def __init__(self, name: str, body: MatmulBody, tile: MatmulTile, wide: bool) -> None:
        self.name, self.body, self.tile, self.wide = name, body, tile, wide
        self.single = body.rows is None
        self.row = frozenset() if body.rows is None else frozenset([body.rows.symbol])
        self.along = axes_of(body)
        self.by_name = {one.name: one for one in body.statements}
        self.behind = _behind_products(body)
        self.raw = set() if self.single else _operands_alone(body)
        self.masked: set[sympy.Symbol] = set()
        self.lines: list[str] = []

    def render(self) -> Rendered:
        body = self.body
        if self.tile.group:
            self._place()
        else:
            self._line(1, f"tile = {self._program(0)}")
            if body.rows is not None:
                self._axis(1, body.rows, f"{self._program(1)} * ROWS + ", "ROWS", _DOWN)
        if body.piece is not None:
            self._line(1, f"piece = {self._program(1 if self.single or self.tile.group else 2)}")
        self._in_front()
        if len(body.parts) == 1:
            self._part(body.parts[0], 1, "tile")
        else:
            self._side_by_side()
        read = dict.fromkeys(f"{body.names[one.tensor]}_ptr" for one in body.loads)
        pointers = [*read, *(f"{body.names[one.tensor]}_ptr" for one in body.stores)]
        own = {one.symbol for one in body.axes} | ({body.piece.symbol} if body.piece else set())
        expressions = [*body.expressions(), *(one.size for one in body.axes)]
        sizes = tuple(sorted({s for expr in expressions for s in expr.free_symbols} - own, key=str))
        constants = [f"{name}: tl.constexpr" for name, _ in self.tile.constants]
        head = signature(self.name, [*pointers, *map(str, sizes), *constants])
        text = "\n".join([*helpers_of(self.lines), "@triton.jit", *head, *self.lines])
        return Rendered(text + "\n", tuple(pointers), sizes)

    def _place(self) -> None:
        """Which tile of rows and which of columns: `GROUP` tiles of rows for each of columns, so that the
        programs that run at the same time share what they read."""
        body = self.body
        assert body.rows is not None
        self._line(1, f"tiles = {' + '.join(_tiles(part) for part in body.parts)}")
        self._line(1, f"row_tiles = ({print_index(body.rows.size)} + ROWS - 1) // ROWS")
        self._line(1, f"program = {self._program(0)}")
        if body.batch is not None:
            self._line(1, f"{body.batch.symbol} = program // (row_tiles * tiles)")
            self._line(1, "program = program % (row_tiles * tiles)")
        self._line(1, "first_row = program // (GROUP * tiles) * GROUP")
        self._line(1, "height = tl.minimum(row_tiles - first_row, GROUP)")
        self._line(1, "row_tile = first_row + program % (GROUP * tiles) % height")
        self._line(1, "tile = program % (GROUP * tiles) // height")
        self._axis(1, body.rows, "row_tile * ROWS + ", "ROWS", _DOWN)

    def _side_by_side(self) -> None:
        """The tiles of one part after those of the other."""
        before = ""
        for part in self.body.parts:
            end = f"end_{part.columns.symbol}"
            self._line(1, f"{end} = {before and before + ' + '}{_tiles(part)}")
            here = f"(tile >= {before}) & (tile < {end})" if before else f"tile < {end}"
            self._line(1, f"if {here}:")
            self._part(part, 2, f"(tile - {before})" if before else "tile")
            before = end

    def _line(self, depth: int, text: str) -> None:
        self.lines.append("    " * depth + text)

    def _program(self, axis: int) -> str:
        return f"tl.program_id({axis})" + (".to(tl.int64)" if self.wide else "")

    def _axis(self, depth: int, one: Axis, start: str, block: str, shape: str) -> None:
        """The positions of a block along an axis, and which of them exist, where not all do."""
        wide = ".to(tl.int64)" if self.wide else ""
        self._line(depth, f"{one.symbol} = {start}tl.arange(0, {block}){shape}{wide}")
        size = dict(self.tile.constants)[block]
        self.masked.discard(one.symbol)
        if not (one.size.is_Integer and int(one.size) % size == 0):
            self.masked.add(one.symbol)
            self._line(depth, f"inside_{one.symbol} = {one.symbol} < {print_index(one.size)}")

    # In front of the products

    def _in_front(self) -> None:
        """What all parts share: reductions over rows, and results that need no product, shared out."""
        shared = [one for one in self.body.statements if not self._is_of_parts(one)]
        for level in range(max(one.level for one in self.body.statements) + 1):
            for one in shared:
                if one.level == level and not one.on_r and not isinstance(one, Reduce):
                    self._line(1, f"{one.name} = {self._value(one)}")
            sums = [one for one in shared if isinstance(one, Reduce) and one.level == level + 1]
            if sums:
                self._reduce(sums)
        stores = [one for one in self.body.stores if not self._is_of_parts(self.by_name[one.source])]
        if not stores:
            return
        along = [store for store in stores if store.on_r]
        if len(along) < len(stores):
            self._line(1, "if tile == 0:")
        for store in stores:
            if not store.on_r:
                self._store(2, store)
        if along:
            tiles = "tiles" if self.tile.group else "tl.num_programs(0)"
            self._open_span("tile * SPAN", f"{tiles} * SPAN", [one.source for one in along])
            for store in along:
                self._store(2, store)

    def _is_of_parts(self, one: Statement) -> bool:
        columns = {part.columns.symbol for part in self.body.parts}
        down = self.body.down.symbol in self.along[one.name] and not self.single
        return one.name in self.behind or bool(self.along[one.name] & columns) or down

    def _reduce(self, sums: Sequence[Reduce]) -> None:
        for one in sums:
            shape = f"[{'ROWS' if self.row & self.along[one.name] else 1}, SPAN]"
            zero = f"tl.full({shape}, {identity_of(one)}, {TRITON_TYPES[one.dtype]})"
            self._line(1, f"{one.name}_partial = {zero}")
        self._open_span("0", "SPAN", [one.uses[0] for one in sums])
        for one in sums:
            value = one.uses[0]
            if self.body.depth.symbol in self.masked:
                value = f"tl.where(inside_{self.body.depth.symbol}, {value}, {identity_of(one)})"
            self._line(2, f"{one.name}_partial = {COMBINE[one.how].format(f'{one.name}_partial', value)}")
        for one in sums:
            self._line(1, f"{one.name} = {over_row(one.how, f'{one.name}_partial')}")

    def _open_span(self, first: str, step: str, wanted: Iterable[str]) -> None:
        """A loop over rows, and in it the values that `wanted` need."""
        self._line(1, f"for start in range({first}, {print_index(self.body.depth.size)}, {step}):")
        self._axis(2, self.body.depth, "start + ", "SPAN", _ACROSS)
        self._statements(2, self.body.needed_along(wanted))

    # One part

    def _part(self, part: Part, depth: int, start: str) -> None:
        own = self._statements_of(part)
        shape = _DOWN if self.single else _ACROSS
        if part.distance <= 1:
            self._axis(depth, part.columns, f"{start} * COLUMNS + ", "COLUMNS", shape)
        else:
            self._pairs(depth, part, start, shape)
        products = [one for one in own if isinstance(one, Product)]
        outside = {one.name for one in own if not one.on_r} - {one.name for one in products}
        early = outside & self.body.needed_for(name for one in products for name in one.uses)
        self._statements(depth, early)
        self._sum(depth, products)
        self._statements(depth, outside - early)
        for store in self.body.stores:
            if store.source in {one.name for one in own}:
                self._store(depth, store)

    def _pairs(self, depth: int, part: Part, start: str, shape: str) -> None:
        """Columns such that the second half of a tile is `distance` behind the first: all of them exist."""
        wide = ".to(tl.int64)" if self.wide else ""
        both = 2 * part.distance
        self._line(depth, f"column = {start} * COLUMNS + tl.arange(0, COLUMNS){shape}{wide}")
        first = f"column // {both} * {both} + column % {both} // COLUMNS * (COLUMNS // 2)"
        self._line(depth, f"first = {first} + column % (COLUMNS // 2)")
        second = f"column // (COLUMNS // 2) % 2 * {part.distance}"
        self._line(depth, f"{part.columns.symbol} = first + {second}")
        self.masked.discard(part.columns.symbol)

    def _statements_of(self, part: Part) -> list[Statement]:
        """Those that only this part needs."""
        found = set[str]()
        for one in self.body.statements:
            product = isinstance(one, Product) and one.origin in part.products
            if product or found & set(one.uses) or part.columns.symbol in self.along[one.name]:
                found.add(one.name)
        return [one for one in self.body.statements if one.name in found]

    def _sum(self, depth: int, products: Sequence[Product]) -> None:
        for one in products:
            name, shape = (
                (f"{one.name}_partial", "COLUMNS, DEPTH") if self.single else (one.name, "ROWS, COLUMNS")
            )
            self._line(depth, f"{name} = tl.zeros([{shape}], {TRITON_TYPES[one.dtype]})")
        self._line(depth, f"for start in range({self._extent()}, DEPTH):")
        self._axis(depth + 1, self.body.summed, "start + ", "DEPTH", _ACROSS)
        if not self.single:
            self._axis(depth + 1, self.body.down, "start + ", "DEPTH", _DOWN)
        for group, size in self.body.groups:
            self._groups(depth + 1, group, size)
        wanted = [name for one in products for name in one.uses]
        self._statements(depth + 1, self.body.needed_along(wanted))
        for one in products:
            for text in self._added(one):
                self._line(depth + 1, text)
        for one in products:
            if self.single:
                self._line(depth, f"{one.name} = tl.sum({one.name}_partial, axis=1, keep_dims=True)")

    def _extent(self) -> str:
        """Which part of the depth a program sums."""
        size, length = print_index(self.body.summed.size), self.body.length
        if self.body.piece is None:
            return f"0, {size}"
        return f"piece * {length}, tl.minimum(piece * {length} + {length}, {size})"

    def _groups(self, depth: int, group: Axis, size: int) -> None:
        """The groups of `size` steps that a block has: several, or one that may be longer than it."""
        wide = ".to(tl.int64)" if self.wide else ""
        shape = _ACROSS if self.single else _DOWN
        count = f"tl.arange(0, (DEPTH + {size - 1}) // {size})"
        self._line(depth, f"{group.symbol} = start // {size} + {count}{shape}{wide}")
        self.masked.discard(group.symbol)
        if self.body.down.symbol in self.masked:
            self.masked.add(group.symbol)
            self._line(depth, f"inside_{group.symbol} = {group.symbol} < {print_index(group.size)}")

    def _added(self, one: Product) -> list[str]:
        """One step of a sum."""
        pairs = list(zip(one.uses[::2], one.uses[1::2], strict=True))
        if self.single:
            return [f"{one.name}_partial += {' + '.join(self._multiplied(one, *pair) for pair in pairs)}"]
        more = ", out_dtype=tl.int32" if one.dtype is torch.int32 else ""
        if self.body.dtype is torch.float32:
            more = f', input_precision="{"tf32" if self.body.tf32 else "ieee"}"'
        across, down = self.body.summed, self.body.down
        texts = [
            (self._operand(left, across, "ROWS, DEPTH"), self._operand(right, down, "DEPTH, COLUMNS"))
            for left, right in pairs
        ]
        return [f"{one.name} = tl.dot({left}, {right}, {one.name}{more})" for left, right in texts]

    def _multiplied(self, one: Product, left: str, right: str) -> str:
        """The product of two values of a single row."""
        value = f"{left} * {right}"
        if one.dtype is torch.int32:
            value = f"{left}.to(tl.int32) * {right}"
        if self.body.summed.symbol in self.masked and not all(map(self._is_zero_outside, (left, right))):
            value = f"tl.where(inside_{self.body.summed.symbol}, {value}, 0)"
        return value

    def _is_zero_outside(self, name: str) -> bool:
        """Whether a value is read from memory, and so is zero where the axis that is summed has ended."""
        summed, one = {self.body.summed.symbol, self.body.down.symbol}, self.by_name[name]
        return isinstance(one, Load) and not one.places and bool(summed & self.along[name])

    def _operand(self, name: str, axis: Axis, shape: str) -> str:
        """A value as a block of the matrix units: of all of `shape`, in the dtype of memory."""
        dtype = self.body.dtype
        text = name
        if axis.symbol in self.masked and not self._is_zero_outside(name):
            text = f"tl.where(inside_{axis.symbol}, {text}, 0)"
        if dtype in HALVES and name not in self.raw:
            text = f"{text}.to({TRITON_TYPES[dtype]})"
        return text if len(self.along[name]) == 2 else f"tl.broadcast_to({text}, [{shape}])"

    # Statements

    def _statements(self, depth: int, names: set[str]) -> None:
        for one in self.body.statements:
            if one.name in names:
                self._line(depth, f"{one.name} = {self._value(one)}")

    def _value(self, one: Statement) -> str:
        if isinstance(one, Load):
            return self._load(one)
        if isinstance(one, Position):
            return f"({print_index(one.expr)} + tl.full([1, 1], 0, tl.int64))"
        if isinstance(one, Choose):
            return f"tl.where({condition_text(one.condition)}, {one.uses[0]}, {one.uses[1]})"
        if isinstance(one, Exchange):
            return self._exchanged(one)
        if isinstance(one, Repeat):
            return self._repeated(one)
        assert isinstance(one, Compute)
        return one.text

    def _repeated(self, one: Repeat) -> str:
        """A column of groups, or a row of them, for each step of theirs."""
        if self.single:
            return f"repeated_across({one.uses[0]}, COLUMNS, DEPTH)"
        return f"repeated_down({one.uses[0]}, DEPTH, COLUMNS)"

    def _exchanged(self, one: Exchange) -> str:
        """The halves of a tile, or neighbours, change places."""
        halves = ["COLUMNS // 2", "2"] if one.distance == 1 else ["2", "COLUMNS // 2"]
        rows = [] if self.single else ["ROWS"]
        flipped = f"tl.reshape({one.uses[0]}, [{', '.join([*rows, *halves])}])"
        place = len(rows) + halves.index("2")
        whole = "[COLUMNS, 1]" if self.single else "[ROWS, COLUMNS]"
        return f"tl.reshape(tl.flip({flipped}, {place}), {whole})"

    def _load(self, one: Load) -> str:
        along = self.along[one.name]
        masks = [*self._masks(along), *(f"({condition_text(c)})" for c in one.conditions)]
        text = f"{self.body.names[one.tensor]}_ptr + {self._shaped(one.offset, along)}"
        if one.places:  # codes, all of which the table has
            masks, text = (
                [],
                " + ".join([f"{self.body.names[one.tensor]}_ptr", *(p.name for p in one.places)]),
            )
        text = f"tl.load({text}, mask={' & '.join(masks)}, other=0)" if masks else f"tl.load({text})"
        dtype = one.tensor.meta["val"].dtype
        if dtype is torch.bool:
            return f"{text} != 0"
        as_stored = one.dtype == dtype or one.name in self.raw
        return text if as_stored else f"{text}.to({TRITON_TYPES[one.dtype]})"

    def _store(self, depth: int, store: Store) -> None:
        along = self.along[store.source] | (
            store.offset.free_symbols & {one.symbol for one in self.body.axes}
        )
        masks = self._masks(along)
        mask = f", mask={' & '.join(masks)}" if masks else ""
        where = f"{self.body.names[store.tensor]}_ptr + {self._shaped(store.offset, along)}"
        if store.added:
            self._line(depth, f'tl.atomic_add({where}, {store.source}{mask}, sem="relaxed")')
        else:
            self._line(depth, f"tl.store({where}, {store.source}{mask})")

    def _masks(self, along: Iterable[sympy.Symbol]) -> list[str]:
        return [f"inside_{one.symbol}" for one in self.body.axes if one.symbol in self.masked & set(along)]

    def _shaped(self, offset: sympy.Expr, along: Iterable[sympy.Symbol]) -> str:
        """An offset as a block along all of `along`, also where it is the same along some."""
        rest = [one.symbol for one in self.body.axes if one.symbol in set(along) - offset.free_symbols]
        added = [f" + 0 * {one}" for one in rest]
        if not along:
            added.append(" + tl.zeros([1, 1], tl.int32)")
        return (print_index(offset) + "".join(added)).removeprefix("0 + ")


def _tiles(part: Part) -> str:
    """How many tiles the columns of a part have."""
    return f"({print_index(part.columns.size)} + COLUMNS - 1) // COLUMNS"


def _behind_products(body: MatmulBody) -> set[str]:
    found: set[str] = set()
    for one in body.statements:
        if isinstance(one, Product) or found & set(one.uses):
            found.add(one.name)
    return found


def _operands_alone(body: MatmulBody) -> set[str]:
    """Loads of what is multiplied as it is, and that only products use: they need not be widened."""
    others = {name for one in body.statements if not isinstance(one, Product) for name in one.uses}
    others |= {store.source for store in body.stores}
    operands = {name for one in body.products for name in one.uses}
    as_stored = [one for one in body.loads if one.tensor.meta["val"].dtype == body.dtype]
    return {one.name for one in as_stored if one.name in operands - others}
