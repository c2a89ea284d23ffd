"""Gathers: a tensor read at the places that another tensor says.

`index` counts negative places from the end, as eager does; `embedding`, `gather` and `index_select` know
none. A place outside of the tensor is an error in eager, and in a kernel: it asserts that places exist, and
does not read where they do not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from fxopt.codegen.elementwise import cast, formula_of, register_type
from fxopt.codegen.indexing import Index, broadcast, offset, sizes_of
from fxopt.codegen.print_index import print_index
from fxopt.codegen.statements import Condition, Load, Place, Statement
from fxopt.codegen.view_index import readers_of, shape_of, view_base
from fxopt.ir.cost import hint
from fxopt.ir.facts import is_tensor

if TYPE_CHECKING:
    from fxopt.codegen.trace import Tracer

aten = torch.ops.aten

GATHERS = (aten.embedding.default, aten.index.Tensor, aten.gather.default, aten.index_select.default)
_PLACES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Lookup:
    """A dimension of the source that is read at the element `index` of `places`."""

    dim: int
    places: fx.Node
    index: Index
    wraps: bool = False


@dataclass(frozen=True)
class Gather:
    """Which element of `source` one of the result is: `index` where no lookup says so."""

    source: fx.Node
    index: Index
    lookups: tuple[Lookup, ...]


def is_gather(node: fx.Node) -> bool:
    """Whether `node` reads a strided tensor at places of one that holds integers."""
    if node.target not in GATHERS:
        return False
    source, dims, places = _parts(node)
    known = [one.meta["val"] for one in places if is_tensor(one)]
    if not is_tensor(source) or not known or len(known) != len(places):
        return False
    adjacent = dims == list(range(dims[0], dims[0] + len(dims)))
    return adjacent and all(one.dtype in _PLACES for one in known)


def entries_of(node: fx.Node) -> int | None:
    """How many entries the smallest dimension has that is looked up at the places in `node`, of two at most
    where others are computed of them; None where they are no places."""
    found: list[int] = []
    values = [node]
    for value in values:
        most = sys.maxsize if value is node else 2
        for reader in readers_of(value):
            if is_gather(reader):
                found += [min(most, size) for size in _sizes_looked_up(reader, value)]
            elif _is_whole(reader) and reader not in values:
                values.append(reader)
    return min(found, default=None)


def _sizes_looked_up(node: fx.Node, at: fx.Node) -> list[int]:
    source, dims, places = _parts(node)
    sizes, base = source.meta["val"].shape, view_base(at)
    return [hint(sizes[dim]) for dim, one in zip(dims, places, strict=True) if view_base(one) is base]


def _is_whole(node: fx.Node) -> bool:
    """Whether an operator computes numbers without a fraction."""
    return formula_of(node) is not None and not node.meta["val"].dtype.is_floating_point


def gather_of(node: fx.Node, index: Index) -> Gather:
    """What a gather reads for element `index` of its result."""
    source, dims, places = _parts(node)
    rank, first = len(shape_of(source)), dims[0]
    if node.target is aten.gather.default:
        return Gather(source, index, (Lookup(first, places[0], index),))
    wide = max(len(shape_of(one)) for one in places)
    inner = index[first : first + wide]
    wraps = node.target is aten.index.Tensor
    lookups = tuple(
        Lookup(dim, one, broadcast(inner, shape_of(one)), wraps)
        for dim, one in zip(dims, places, strict=True)
    )
    own = (*index[:first], *(sympy.Integer(0) for _ in dims), *index[first + wide :])
    assert len(own) == rank
    return Gather(source, own, lookups)


def _parts(node: fx.Node) -> tuple[fx.Node, list[int], Sequence[fx.Node]]:
    """Source, its dimensions that are looked up, and the tensors with the places."""
    given: Any = node.args
    if node.target is aten.embedding.default:
        return given[0], [0], given[1:2]
    if node.target is aten.index.Tensor:
        dims = [dim for dim, one in enumerate(given[1]) if one is not None]
        return given[0], dims, [given[1][dim] for dim in dims]
    return given[0], [given[1] % max(1, len(shape_of(given[0])))], given[2:3]


def looked_up(tracer: Tracer, node: fx.Node, found: Gather, conditions: tuple[Condition, ...]) -> Statement:
    """The load of `found`, and what it takes to know its places."""
    sizes, value = shape_of(found.source), found.source.meta["val"]
    strides, places = sizes_of(value.stride()), []
    for one in found.lookups:
        at, size = tracer.value(one.places, one.index, conditions), sizes[one.dim]
        name = cast(at.name, at.dtype, torch.int64)
        text = f"tl.where({name} < 0, {name} + {print_index(size)}, {name})" if one.wraps else name
        place = tracer.compute(node, (at.name,), text, torch.int64)
        places.append(Place(place.name, size, strides[one.dim]))
    looked = {one.dim for one in found.lookups}
    rest = [dim for dim in range(len(sizes)) if dim not in looked]
    at_rest = offset([found.index[dim] for dim in rest], tuple(strides[dim] for dim in rest))
    uses, dtype = tuple(one.name for one in places), register_type(value.dtype)
    more = {"tensor": found.source, "offset": at_rest, "conditions": conditions, "places": tuple(places)}
    return tracer.add(Load, found.source, uses, dtype, **more)
