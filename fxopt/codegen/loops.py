"""The loop nest of a region: which axes it has, and which element of each result an iteration stores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from fxopt.codegen.elementwise import formula_of
from fxopt.codegen.homes import homes_from
from fxopt.codegen.indexing import Axis, Index, Sizes, axis, product, ranges_of, reshaped, same
from fxopt.codegen.view_index import shape_of
from fxopt.ir.cost import hint, numel

aten = torch.ops.aten

# reductions and how their values are combined
REDUCTIONS: dict[Any, str] = {
    aten.sum.dim_IntList: "sum",
    aten.sum.default: "sum",
    aten.mean.dim: "mean",
    aten.mean.default: "mean",
    aten.amax.default: "max",
    aten.amin.default: "min",
    aten.any.dim: "any",
    aten.any.dims: "any",
    aten.any.default: "any",
    aten.all.dim: "all",
    aten.all.dims: "all",
    aten.all.default: "all",
    aten.var_mean.correction: "moments",
}


@dataclass(frozen=True)
class Loop:
    """All iterations of a region.

    Attributes:
        axes: slowest first, in the order of memory. index: of the element of a tensor of `sizes` that an
            iteration stands for. rows: the same for what is reduced, over `row_sizes`.
        homes: the index of tensors that are connected to the one that the loop is made for.
    """

    axes: tuple[Axis, ...]
    index: Index
    sizes: Sizes
    rows: Index
    row_sizes: Sizes
    homes: Mapping[fx.Node, Index] = field(default_factory=dict)

    def home(self, node: fx.Node) -> Index | None:
        """The index at which an iteration stores `node`; None when its elements are not those of the loop."""
        if node in self.homes:
            return self.homes[node]
        shape, ranges = shape_of(node), ranges_of(self.axes)
        if same(product(shape), product(self.sizes)):
            return reshaped(self.index, self.sizes, shape, ranges)
        if same(product(shape), product(self.row_sizes)):
            return reshaped(self.rows, self.row_sizes, shape, ranges)
        return None

    def inside(self, node: fx.Node, index: Index) -> Index | None:
        """The index of the operand of the reduction `node` whose result is wanted at `index`."""
        source: Any = node.args[0]
        shape, dims = shape_of(source), reduced_dims(node)
        reduced = [one for one in self.axes if one.reduced]
        wanted = tuple(shape[dim] for dim in dims)
        if not same(product(wanted), product(one.size for one in reduced)):
            return None
        symbols = tuple(sympy.Integer(0) if one.size == 1 else one.symbol for one in reduced)
        ranges = ranges_of(self.axes)
        along = dict(
            zip(dims, reshaped(symbols, tuple(one.size for one in reduced), wanted, ranges), strict=True)
        )
        kept = iter(
            index if not keeps_dims(node) else [at for dim, at in enumerate(index) if dim not in dims]
        )
        return tuple(along[dim] if dim in along else next(kept) for dim in range(len(shape)))


def reduced_dims(node: fx.Node) -> tuple[int, ...]:
    """The dimensions that a reduction runs over, in order."""
    source: Any = node.args[0]
    rank = source.meta["val"].dim()
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if given is None or given == []:
        return tuple(range(rank))
    return tuple(sorted(dim % rank for dim in ([given] if isinstance(given, int) else given)))


def is_moment(node: fx.Node) -> bool:
    """Whether `node` takes the variance or the mean of a ``var_mean``."""
    parent = node.args[0] if node.op == "call_function" and node.args else None
    return isinstance(parent, fx.Node) and parent.target is aten.var_mean.correction


def keeps_dims(node: fx.Node) -> bool:
    """Whether reduced dimensions stay, with size one."""
    position = 3 if node.target is aten.var_mean.correction else 2
    given = node.args[position] if len(node.args) > position else node.kwargs.get("keepdim", False)
    return bool(given)


def loop_of(members: Sequence[fx.Node], outputs: Iterable[fx.Node]) -> Loop:
    """The loop of a region: over the operand of a reduction if there is one, else over the largest result."""
    reductions = [node for node in members if node.target in REDUCTIONS]
    pointwise = frozenset(node for node in members if formula_of(node) is not None)
    if not reductions:
        start = max(outputs, key=lambda node: numel(node.meta["val"]))
        loop = pointwise_loop(start)
        return replace(loop, homes=homes_from(start, loop.index, pointwise, ranges_of(loop.axes)))
    loop = reduction_loop(reductions[0])
    ranges = ranges_of(loop.axes)
    operand: Any = reductions[0].args[0]
    homes = homes_from(operand, loop.index, pointwise, ranges)
    if reductions[0].target is not aten.var_mean.correction:
        homes = homes_from(reductions[0], _of_result(reductions[0], loop), pointwise, ranges) | homes
    return replace(loop, homes=homes)


def _of_result(node: fx.Node, loop: Loop) -> Index:
    """The index of a reduction's result."""
    if not keeps_dims(node):
        return loop.rows
    dims = reduced_dims(node)
    return tuple(sympy.Integer(0) if dim in dims else at for dim, at in enumerate(loop.index))


def reduction_loop(node: fx.Node) -> Loop:
    """The loop of a region in which `node` is reduced."""
    source: Any = node.args[0]
    sizes, dims = shape_of(source), reduced_dims(node)
    axes = [axis(f"{'r' if dim in dims else 'x'}{dim}", size, dim in dims) for dim, size in enumerate(sizes)]
    index = tuple(sympy.Integer(0) if one.size == 1 else one.symbol for one in axes)
    kept = [dim for dim in range(len(sizes)) if dim not in dims]
    rows, row_sizes = tuple(index[dim] for dim in kept), tuple(sizes[dim] for dim in kept)
    return Loop(_outer_first(axes), index, sizes, rows, row_sizes)


def pointwise_loop(node: fx.Node) -> Loop:
    """The loop over the elements of `node`, as they lie in memory."""
    value, sizes = node.meta["val"], shape_of(node)
    axes = [axis(f"x{dim}", size) for dim, size in enumerate(sizes)]
    index = tuple(sympy.Integer(0) if one.size == 1 else one.symbol for one in axes)
    order = sorted(range(len(axes)), key=lambda dim: (-hint(value.stride(dim)), dim))
    ordered = tuple(axes[dim] for dim in order if axes[dim].size != 1)
    return Loop(ordered, index, sizes, (), (sympy.Integer(-1),))


def _outer_first(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    real = [one for one in axes if one.size != 1 or one.reduced]
    return tuple(one for one in real if not one.reduced) + tuple(one for one in real if one.reduced)
