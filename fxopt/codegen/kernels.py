"""A region as a kernel's file: its tile, its text, what it costs, and the same in plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from fxopt.codegen.indexing import product
from fxopt.codegen.kernel_file import About, Argument, KernelFile, Launch, Output, Parameter, Products
from fxopt.codegen.matmul import MatmulBody
from fxopt.codegen.matmul_tile import MatmulTile, choose_matmul_tile, pieces_worth_while, products_of
from fxopt.codegen.price import Price, hinted
from fxopt.codegen.print_index import print_index
from fxopt.codegen.product_operands import flops_of_product
from fxopt.codegen.reference_text import example_text, reference_text
from fxopt.codegen.region import Region
from fxopt.codegen.render import Rendered, Tile, render
from fxopt.codegen.render_matmul import render_matmul
from fxopt.codegen.split import Split, can_split, split
from fxopt.codegen.split_products import split_products
from fxopt.codegen.statements import Body
from fxopt.codegen.tile_sizes import power_of_two, sms_of, warps_of
from fxopt.codegen.trace import operator_name
from fxopt.ir.facts import location
from fxopt.ir.sizes import size_of
from fxopt.ir.target import Target

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
LONGEST_ROW = 8192  # elements of a row that one program holds in registers
PIECE = 8192  # elements that make a program of their own worth while
FEWEST_PIECES = 4  # that make the second launch worth while
MOST_SPLITS = 2  # forms of a product that are cut into pieces
REGISTERS = 64  # of a thread, for elements and their addresses while a column is summed
TILE = 1024  # elements that a program computes at once, for 128 threads with 8 each


@dataclass(frozen=True)
class Pass:
    """One launch of a kernel: its name, what it does, and its tile, with the reason for it."""

    name: str
    body: Body
    rendered: Rendered
    grid: tuple[str, ...]
    constants: tuple[tuple[str, int], ...]
    warps: int
    why: str
    adjustable: tuple[tuple[str, int], ...] = ()
    stages: int = 3
    bounds: tuple[tuple[str, int, int], ...] = ()
    products: Products | None = None


def kernel_of(region: Region, target: Target | None, split_k: str = "deterministic") -> KernelFile:
    """The kernel of `region`, for `target`, with its alternatives.

    Args:
        split_k: how the pieces of a product are added up that is cut along what it sums over, as in
            `fxopt.options.Options`.
    """
    first, *others = (_kernel(region, target, *one) for one in _forms(region, target, split_k))
    return replace(first, alternatives=tuple(others))


def _kernel(
    region: Region, target: Target | None, passes: Sequence[Pass], scratch: tuple[Output, ...]
) -> KernelFile:
    read = list(dict.fromkeys(one.tensor for one in region.body.loads))
    given = {str(symbol): hinted(symbol, region.outputs) for symbol in symbol_inputs(region)}
    names = region.body.names
    symbols = dict.fromkeys(symbol for one in passes for symbol in one.rendered.sizes)
    symbols |= dict.fromkeys(region.fused.bytes.free_symbols | region.fused.flops.free_symbols)
    sizes = _sizes_of_tensors(tuple(symbols), read, names)
    return KernelFile(
        name=passes[-1].name,
        parameters=(*(Parameter(names[node]) for node in read), *(Parameter(one, "int") for one in given)),
        jit="\n\n".join(one.rendered.text for one in passes),
        launches=tuple(map(_launch, passes)),
        outputs=tuple(_output(node, names[node]) for node in region.outputs),
        reference=reference_text(region.members, region.outputs, _parameters(read, names), sizes, given),
        example_inputs=example_text({node: names[node] for node in read}, given),
        sizes=tuple(sizes.items()),
        scratch=scratch,
        about=_about(region, passes, read, target),
    )


def _parameters(read: Sequence[fx.Node], names: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    """The tensors that are read, also as views that are alike, with their names; in the order of `launch`."""
    order = {names[node]: place for place, node in enumerate(read)}
    own = [(node, name) for node, name in names.items() if name in order]
    return dict(sorted(own, key=lambda pair: order[pair[1]]))


Form = tuple[list[Pass], tuple[Output, ...]]


def _forms(region: Region, target: Target | None, split_k: str) -> list[Form]:
    """What is launched, in order, and what the launches hand on; the most promising form first."""
    name, body, wide = _name(region), region.body, is_wide(region)
    if isinstance(body, MatmulBody):
        return _product_forms(name, body, wide, target, split_k)
    tile = choose_tile(body, target)
    length = _piece(region, tile, target)
    if length is None:
        return [([_loop_pass(name, body, tile, wide, target)], ())]
    cut = split(body, length)
    first = _loop_pass(f"{name}_pieces", cut.partial, tile, wide, target)
    return [_in_two_launches(name, first, cut, wide, target)]


def _product_forms(
    name: str, body: MatmulBody, wide: bool, target: Target | None, split_k: str
) -> list[Form]:
    """The whole depth by each program, or pieces of it: in which order depends on how many SMs are idle."""
    tile = choose_matmul_tile(body, target)
    whole: Form = ([_product_pass(name, body, tile, wide)], ())
    atomic = split_k == "atomic" and not torch.are_deterministic_algorithms_enabled()
    lengths = pieces_worth_while(body, tile, target) if split_k != "never" else []
    forms: list[Form] = []
    for length in lengths[:MOST_SPLITS]:
        cut = split_products(body, length, atomic=atomic)
        first = _product_pass(f"{name}_pieces", cut.partial, tile, wide)
        forms.append(_in_two_launches(name, first, cut, wide, target, "0" if atomic else None))
    return [*forms[:1], whole, *forms[1:]]


def _in_two_launches(
    name: str, first: Pass, cut: Split, wide: bool, target: Target | None, fill: str | None = None
) -> Form:
    tile = choose_tile(cut.total, target)
    shape = tuple(map(print_index, cut.shape))
    scratch = tuple(Output(one.name, shape, str(one.meta["val"].dtype), fill=fill) for one in cut.scratch)
    return [first, _loop_pass(name, cut.total, tile, wide, target)], scratch


def _loop_pass(name: str, body: Body, tile: Tile, wide: bool, target: Target | None) -> Pass:
    rows = print_index(product(axis.size for axis in body.outer))
    constants = (("ROWS", tile.rows), *((("COLUMNS", tile.columns),) if body.reduced else ()))
    elements = tile.rows * max(1, tile.columns)
    warps = warps_of(512 if elements >= 8192 else 256 if elements >= 4096 else 128, target)
    grid, rendered = (f"triton.cdiv({rows}, ROWS)",), render(name, body, tile, wide)
    return Pass(name, body, rendered, grid, constants, warps, _why_tile(body, tile), _adjustable(body, tile))


def _adjustable(body: Body, tile: Tile) -> tuple[tuple[str, int], ...]:
    """The constants that may have other values, with the sizes that they divide."""
    nodes = [*(load.tensor for load in body.loads), *(store.tensor for store in body.stores)]
    sizes = {"ROWS": body.outer} | ({"COLUMNS": body.reduced} if tile.looped else {})
    return tuple((name, hinted(product(a.size for a in axes), nodes)) for name, axes in sizes.items())


def _product_pass(name: str, body: Body, tile: MatmulTile, wide: bool) -> Pass:
    assert isinstance(body, MatmulBody)
    found = tile.adjustable(body)
    return Pass(
        name,
        body,
        render_matmul(name, body, tile, wide),
        tile.grid(body),
        tile.constants,
        tile.warps,
        tile.why,
        adjustable=tuple((name, extent) for name, extent, _, _ in found),
        stages=tile.stages,
        bounds=tuple((name, least, most) for name, _, least, most in found),
        products=products_of(body),
    )


def _piece(region: Region, tile: Tile, target: Target | None) -> int | None:
    """How much of the slowest reduced axis a program reduces, where whole columns would leave SMs idle."""
    body = region.body
    if not tile.looped or not can_split(body):
        return None
    nodes = (*region.outputs, *(one.tensor for one in body.loads))
    rows, columns = (hinted(product(a.size for a in axes), nodes) for axes in (body.outer, body.reduced))
    pieces = 2 * sms_of(target) * tile.rows // max(1, rows)
    inner = columns // hinted(body.reduced[0].size, nodes)
    length = power_of_two(max(PIECE // tile.rows, columns // max(1, pieces)) // inner)
    return length if FEWEST_PIECES * length * inner <= columns and pieces >= FEWEST_PIECES else None


def symbol_inputs(region: Region) -> tuple[sympy.Symbol, ...]:
    """The sizes that the kernel needs and that no tensor that it reads has."""
    axes = {one.symbol for one in region.body.axes}
    found = {s for expr in region.body.expressions() for s in expr.free_symbols} - axes
    found |= {s for one in region.body.axes for s in one.size.free_symbols}
    found |= region.fused.bytes.free_symbols | region.fused.flops.free_symbols
    for node in region.outputs:
        found |= {s for part in _extents(node) for s in part.free_symbols}
    known = _sizes_of_tensors(tuple(found), [one.tensor for one in region.body.loads], region.body.names)
    return tuple(sorted((symbol for symbol in found if str(symbol) not in known), key=str))


def _extents(node: fx.Node) -> list[sympy.Expr]:
    value = node.meta["val"]
    return [size_of(one) for one in (*value.shape, *value.stride())]


def _sizes_of_tensors(
    symbols: Sequence[sympy.Symbol], read: Sequence[fx.Node], names: Mapping[fx.Node, str]
) -> dict[str, str]:
    """Where a tensor has the size: symbol -> ``x.shape[0]``."""
    found: dict[str, str] = {}
    for symbol in sorted(symbols, key=str):
        for node in read:
            for dim, size in enumerate(node.meta["val"].shape):
                if size_of(size) == symbol:
                    found.setdefault(str(symbol), f"{names[node]}.shape[{dim}]")
    return found


def _name(region: Region) -> str:
    """After the operators that say most."""
    kinds = dict.fromkeys(operator_name(node) for node in region.members)
    told = [one for one in kinds if one not in ("add", "mul", "sub", "neg", "convert_element_type", "clone")]
    return "_".join(["fused", *(told or list(kinds))[:4]])


def choose_tile(body: Body, target: Target | None) -> Tile:
    """How much a program computes at once: whole rows while they fit into registers, several short ones."""
    rows = _number(product(one.size for one in body.outer))
    sms = sms_of(target)
    if not body.reduced:
        return Tile(power_of_two(min(TILE, max(128, rows // sms))))
    columns = product(one.size for one in body.reduced)
    if columns.is_number and columns <= LONGEST_ROW and _is_contiguous_along_rows(body):
        width = power_of_two(int(columns))
        return Tile(max(1, min(TILE // width, power_of_two(max(1, rows // sms)))), width)
    if _is_contiguous_along_rows(body):
        return Tile(1, 2048, looped=True)
    # Where a load is not contiguous, each of its elements takes registers for its address, too.
    deep = 2 * REGISTERS // (3 * max(1, len(body.loads)))
    return Tile(64, max(8, min(32, power_of_two(deep + 1) // 2)), looped=True)


def _is_contiguous_along_rows(body: Body) -> bool:
    """Whether neighbours in memory are neighbours along the reduced axes, judged by most of what is read."""
    along = {one.symbol for one in body.reduced}
    outer = {one.symbol for one in body.outer}
    votes = 0
    for load in body.loads:
        steps = {symbol: sympy.expand(load.offset).coeff(symbol) for symbol in load.offset.free_symbols}
        votes += any(steps.get(symbol) == 1 for symbol in along)
        votes -= any(steps.get(symbol) == 1 for symbol in outer)
    return votes >= 0


def _number(size: sympy.Expr) -> int:
    return int(size) if size.is_number else 1 << 16


def is_wide(region: Region) -> bool:
    """Whether an offset may not fit into 32 bits: a size that is not known may be any."""
    for node in (*(one.tensor for one in region.body.loads), *region.outputs):
        value = node.meta["val"]
        reach = 1
        for size, stride in zip(value.shape, value.stride(), strict=True):
            if isinstance(size, torch.SymInt) or isinstance(stride, torch.SymInt):
                return True
            reach += (size - 1) * stride
        if reach >= 1 << 31:
            return True
    return False


def _launch(one: Pass) -> Launch:
    body = one.body
    tensors = (*(load.tensor for load in body.loads), *(store.tensor for store in body.stores))
    types = {f"{body.names[node]}_ptr": POINTERS[node.meta["val"].dtype] for node in tensors}
    arguments = [Argument(pointer, types[pointer]) for pointer in one.rendered.pointers]
    arguments += [Argument(str(symbol), "i64") for symbol in one.rendered.sizes]
    return Launch(
        one.name,
        tuple(arguments),
        one.grid,
        one.constants,
        num_warps=one.warps,
        num_stages=one.stages,
        adjustable=one.adjustable,
        bounds=one.bounds,
        products=one.products,
    )


def _output(node: fx.Node, name: str) -> Output:
    value = node.meta["val"]
    shape, strides = (
        tuple(print_index(size_of(one)) for one in part) for part in (value.shape, value.stride())
    )
    return Output(name, shape, str(value.dtype), strides)


def _about(region: Region, passes: Sequence[Pass], read: Sequence[fx.Node], target: Target | None) -> About:
    fused = region.fused
    lines = dict.fromkeys(line for node in region.members if (line := location(node)))
    return About(
        summary=f"{len(region.members)} operators in one pass over memory",
        lines=tuple(lines),
        replaces=tuple(dict.fromkeys(str(node.target) for node in region.members)),
        shapes=tuple(f"{region.body.names[node]}: {_shape(node)}" for node in (*read, *region.outputs)),
        configuration=_why(region, passes, target),
        moved=print_index(fused.bytes),
        flops=print_index(fused.flops),
        seen=_seen(fused, region),
        multiplied=_multiplied(region.body),
    )


def _seen(price: Price, region: Region) -> tuple[int, int]:
    """Bytes and operations at the sizes of tracing."""
    nodes = (*region.outputs, *(one.tensor for one in region.body.loads))
    return hinted(price.bytes, nodes), hinted(price.flops, nodes)


def _multiplied(body: Body) -> tuple[int, str]:
    """How many operations matrix units do, and the dtype that they multiply."""
    if not isinstance(body, MatmulBody) or not body.on_matrix_units:
        return 0, ""
    flops = sum(flops_of_product(one.origin) for one in body.products)
    return flops, str(body.dtype).removeprefix("torch.")


def _shape(node: fx.Node) -> str:
    value = node.meta["val"]
    return f"{POINTERS[value.dtype][1:]}{list(value.shape)}, strides {list(value.stride())}"


def _why(region: Region, passes: Sequence[Pass], target: Target | None) -> tuple[str, ...]:
    (fused, _), (apart, _) = (_seen(one, region) for one in (region.fused, region.apart))
    saved = f"moves {fused} bytes where the operators apart move {apart}"
    where = f"chosen for {target.name} ({target.sms} SMs)" if target is not None else "chosen for any target"
    return (*(f"{one.why}, {where}" for one in passes), saved)


def _why_tile(body: Body, tile: Tile) -> str:
    if not body.reduced:
        return f"ROWS={tile.rows}: elements a program computes"
    sizes = f"ROWS={tile.rows}, COLUMNS={tile.columns}"
    if any(axis.symbol.name == "piece" for axis in body.outer):
        return f"{sizes}: too few rows for all SMs, so that pieces of them are reduced first"
    if tile.looped:
        return f"{sizes}: a row does not fit and is read in pieces"
    return f"{sizes}: {tile.rows} whole rows in registers"
