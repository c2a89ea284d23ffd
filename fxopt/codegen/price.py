"""What a region costs, as its operators apart and as one kernel: expressions of the symbolic sizes.

A kernel reads each element of its inputs once, as far as its loads reach, and writes each result once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from fxopt.codegen.indexing import product, ranges_of, sizes_of
from fxopt.codegen.kernel_file import About
from fxopt.codegen.product_operands import operands_of_product
from fxopt.codegen.statements import Body
from fxopt.codegen.view_index import view_base
from fxopt.ir.cost import hint, tensors_of
from fxopt.ir.facts import Size
from fxopt.ir.sizes import size_of
from fxopt.ir.target import Target


@dataclass(frozen=True)
class Price:
    """Bytes of memory traffic, operations, and launches of kernels."""

    bytes: sympy.Expr
    flops: sympy.Expr
    launches: int


def prices_of(
    members: Sequence[fx.Node], computed: Sequence[fx.Node], outputs: Sequence[fx.Node], body: Body
) -> tuple[Price, Price]:
    """Of one kernel for each of `members`, and of the one that computes `computed` to store `outputs`."""
    apart = Price(_moved_apart(members), _flops(members), len(members))
    return apart, Price(_moved_fused(outputs, body), _flops(computed), 1)


def _moved_apart(members: Sequence[fx.Node]) -> sympy.Expr:
    moved = sympy.Integer(0)
    for node in members:
        read = dict.fromkeys(view_base(arg) for arg in node.all_input_nodes)
        moved += sum(stored_bytes(value) for one in (node, *read) for value in tensors_of(one))
    return sympy.expand(moved)


def _moved_fused(outputs: Sequence[fx.Node], body: Body) -> sympy.Expr:
    moved = sum((stored_bytes(node.meta["val"]) for node in outputs), sympy.Integer(0))
    ranges = ranges_of(body.axes)
    reach: dict[fx.Node, dict[object, sympy.Expr]] = {}
    along: dict[str, frozenset[sympy.Symbol]] = {}
    for one in body.statements:
        own = {symbol for expr in one.indices() for symbol in expr.free_symbols}
        along[one.name] = frozenset(own).union(*(along[name] for name in one.uses))
    for load in body.loads:
        places = frozenset().union(*(along[place.name] for place in load.places))
        symbols = load.offset.free_symbols | places
        over = product(ranges[symbol] for symbol in symbols if symbol in ranges)
        reach.setdefault(load.tensor, {})[load.offset, load.places] = over
    for tensor, loads in reach.items():
        value = tensor.meta["val"]
        touched = sympy.expand(sum(loads.values()) * value.element_size())
        moved += _smaller(touched, stored_bytes(value), (tensor, *outputs))
    return sympy.expand(moved)


def _smaller(a: sympy.Expr, b: sympy.Expr, nodes: Iterable[fx.Node]) -> sympy.Expr:
    if (a - b).is_number:
        return a if a < b else b
    return a if hinted(a, nodes) < hinted(b, nodes) else b


def stored_bytes(value: torch.Tensor) -> sympy.Expr:
    """Bytes of memory behind a tensor: an expanded dimension is stored once."""
    sizes = zip(sizes_of(value.shape), sizes_of(value.stride()), strict=True)
    return product(size for size, stride in sizes if stride != 0) * value.element_size()


def _flops(members: Iterable[fx.Node]) -> sympy.Expr:
    """One operation for each element of each operator, two for each summand of a product."""
    total = sympy.Integer(0)
    for node in members:
        operands = operands_of_product(node)
        if operands is not None:
            depth = sizes_of(operands.left.meta["val"].shape)[-1]
            total += 2 * product(sizes_of(node.meta["val"].shape)) * depth
            continue
        values = [value for one in (node, *node.all_input_nodes) for value in tensors_of(one)]
        counts = [product(sizes_of(value.shape)) for value in values]
        total += max(counts, key=lambda count: hinted(count, (node, *node.all_input_nodes)))
    return sympy.expand(total)


def least_seconds(about: About, target: Target, dtype: torch.dtype = torch.float32) -> float:
    """Seconds below which a kernel cannot come, at the sizes seen while tracing.

    The longest of three times, as a GPU does all three at once: of the bytes, of the matrix units, and of all
    other operations, which are of `dtype`.
    """
    moved, flops = about.seen
    multiplied, of = about.multiplied
    seconds = float(target.time(float(moved), float(flops - multiplied), dtype))
    if not multiplied:
        return seconds
    return max(seconds, multiplied / target.rate(getattr(torch, of), tensor_cores=True))


def multiplied(flops: int, dtype: torch.dtype) -> tuple[int, str]:
    """`About.multiplied` of products in full precision: matrix units have none of float32."""
    return (0, "") if dtype is torch.float32 else (flops, str(dtype).removeprefix("torch."))


def hinted(expr: sympy.Expr, nodes: Iterable[fx.Node]) -> int:
    """The value of an expression at the sizes that were seen while tracing."""
    if expr.is_number:
        return int(expr)
    sizes = [size for node in nodes for value in tensors_of(node) for size in value.shape]
    known: dict[Any, int] = {}
    # Whole sizes have the last word over parts of them.
    for size in sorted(sizes, key=lambda one: not size_of(one).has(FloorDiv)):
        known |= _symbol_of(size)
    value = expr.subs({symbol: known.get(symbol, 1) for symbol in expr.free_symbols})
    return int(math.floor(value))


def _symbol_of(size: Size) -> dict[Any, int]:
    """The symbol in a size such as ``2*s + 1`` or ``s // 4``, and its value while tracing."""
    expr = size_of(size)
    if len(expr.free_symbols) != 1:
        return {}
    (symbol,) = expr.free_symbols
    # Of a part of a size, ``s // 4``, what it was a part of, were it divided without a rest.
    parts = [one for one in expr.atoms(FloorDiv) if one.args[0] == symbol and one.args[1].is_number]
    base, scale = (parts[0], parts[0].args[1]) if parts else (symbol, 1)
    factor, rest = expr.coeff(base, 1), expr.coeff(base, 0)
    known = factor.is_number and rest.is_number and factor != 0
    if not known or sympy.expand(expr - factor * base - rest) != 0:
        return {}
    return {symbol: int((hint(size) - rest) // factor) * int(scale)}
