"""A region as a kernel's file: its tile, its text, what it costs, and the same in plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch
from torch import fx

from fxopt.codegen.indexing import product, size_of
from fxopt.codegen.kernel_file import About, Argument, KernelFile, Launch, Output, Parameter
from fxopt.codegen.print_index import print_index
from fxopt.codegen.reference_text import example_text, reference_text
from fxopt.codegen.regions import Region
from fxopt.codegen.render import Rendered, Tile, render
from fxopt.codegen.statements import Body
from fxopt.codegen.trace import operator_name
from fxopt.ir.cost import numel, tensors_of
from fxopt.ir.facts import location
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
TILE = 1024  # elements that a program computes at once, for 128 threads with 8 each


def kernel_of(region: Region, target: Target | None) -> KernelFile:
    """The kernel of `region`, for `target`."""
    tile = choose_tile(region.body, target)
    name = _name(region)
    rendered = render(name, region.body, tile, is_wide(region))
    read = list(dict.fromkeys(one.tensor for one in region.body.loads))
    given = {str(symbol): _hint_of(symbol, region.outputs) for symbol in symbol_inputs(region)}
    names = region.body.names
    sizes = _sizes_of_tensors(rendered.sizes, read, names)
    return KernelFile(
        name=name,
        parameters=(*(Parameter(names[node]) for node in read), *(Parameter(one, "int") for one in given)),
        jit=rendered.text,
        launches=(_launch(name, region, rendered, read, tile),),
        outputs=tuple(_output(node, names[node]) for node in region.outputs),
        reference=reference_text(region.members, region.outputs, {n: names[n] for n in read}, sizes, given),
        example_inputs=example_text({node: names[node] for node in read}, given),
        sizes=tuple(sizes.items()),
        about=_about(region, tile, read, target),
    )


def symbol_inputs(region: Region) -> tuple[sympy.Symbol, ...]:
    """The sizes that the kernel needs and that no tensor that it reads has."""
    axes = {one.symbol for one in region.body.axes}
    found = {s for expr in region.body.expressions() for s in expr.free_symbols} - axes
    found |= {s for one in region.body.axes for s in one.size.free_symbols}
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
    """Of the operators that say most."""
    kinds = dict.fromkeys(operator_name(node) for node in region.members)
    told = [one for one in kinds if one not in ("add", "mul", "sub", "neg", "convert_element_type", "clone")]
    return "_".join(["fused", *(told or list(kinds))[:4]])


def choose_tile(body: Body, target: Target | None) -> Tile:
    """How much a program computes at once: whole rows while they fit into registers, several short ones."""
    rows = _number(product(one.size for one in body.outer))
    sms = target.sms if target is not None else 128
    if not body.reduced:
        return Tile(_power_of_two(min(TILE, max(128, rows // sms))))
    columns = product(one.size for one in body.reduced)
    if columns.is_number and columns <= LONGEST_ROW and _is_contiguous_along_rows(body):
        width = _power_of_two(int(columns))
        return Tile(max(1, min(TILE // width, _power_of_two(max(1, rows // sms)))), width)
    if _is_contiguous_along_rows(body):
        return Tile(1, 2048, looped=True)
    return Tile(64, 32, looped=True)


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


def _power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


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


def _launch(name: str, region: Region, rendered: Rendered, read: Sequence[fx.Node], tile: Tile) -> Launch:
    types = {
        f"{region.body.names[node]}_ptr": POINTERS[node.meta["val"].dtype]
        for node in (*read, *region.outputs)
    }
    arguments = [Argument(pointer, types[pointer]) for pointer in rendered.pointers]
    arguments += [Argument(str(symbol), "i64") for symbol in rendered.sizes]
    constants = (("ROWS", tile.rows), *((("COLUMNS", tile.columns),) if region.body.reduced else ()))
    rows = print_index(product(one.size for one in region.body.outer))
    elements = tile.rows * max(1, tile.columns)
    warps = 8 if elements >= 4096 else 4
    return Launch(name, tuple(arguments), (f"triton.cdiv({rows}, ROWS)",), constants, num_warps=warps)


def _output(node: fx.Node, name: str) -> Output:
    value = node.meta["val"]
    shape, strides = (
        tuple(print_index(size_of(one)) for one in part) for part in (value.shape, value.stride())
    )
    return Output(name, shape, str(value.dtype), strides)


def _hint_of(symbol: sympy.Symbol, nodes: Sequence[fx.Node]) -> int:
    for node in nodes:
        for size in node.meta["val"].shape:
            if isinstance(size, torch.SymInt) and symbol in size.node.expr.free_symbols:
                return int(size.node.shape_env.size_hint(symbol))
    return 1


def _about(region: Region, tile: Tile, read: Sequence[fx.Node], target: Target | None) -> About:
    lines = dict.fromkeys(line for node in region.members if (line := location(node)))
    return About(
        summary=f"{len(region.members)} operators in one pass over memory",
        lines=tuple(lines),
        replaces=tuple(dict.fromkeys(str(node.target) for node in region.members)),
        shapes=tuple(f"{region.body.names[node]}: {_shape(node)}" for node in (*read, *region.outputs)),
        configuration=_why(region, tile, target),
        moved=str(region.bytes_fused),
        flops=str(flops_of(region)),
    )


def _shape(node: fx.Node) -> str:
    value = node.meta["val"]
    return f"{POINTERS[value.dtype][1:]}{list(value.shape)}, strides {list(value.stride())}"


def flops_of(region: Region) -> int:
    """One operation for each element of each operator."""
    total = 0
    for node in region.members:
        values = [value for one in (node, *node.all_input_nodes) for value in tensors_of(one)]
        total += max(map(numel, values), default=0)
    return total


def _why(region: Region, tile: Tile, target: Target | None) -> tuple[str, ...]:
    saved = f"moves {region.bytes_fused} bytes where the operators apart move {region.bytes_apart}"
    where = f"chosen for {target.name} ({target.sms} SMs)" if target is not None else "chosen for any target"
    if not region.body.reduced:
        return (f"ROWS={tile.rows}: elements a program computes, {where}", saved)
    if tile.looped:
        return (
            f"ROWS={tile.rows}, COLUMNS={tile.columns}: a row does not fit and is read in pieces, {where}",
            saved,
        )
    return (f"ROWS={tile.rows}, COLUMNS={tile.columns}: {tile.rows} whole rows in registers, {where}", saved)
