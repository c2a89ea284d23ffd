"""New rows that are written into a cache: which write it is, and in which row the first of them goes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt.ir import facts
from fxopt.ir.contract import Miss
from fxopt.ir.facts import argument, is_call, is_number, val
from fxopt.ir.same_value import same_value
from fxopt.ir.views import views_of
from fxopt.ir.writes import COUNTED_ROWS

aten = torch.ops.aten

_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_WANTED = "new rows written behind one another"


@dataclass(frozen=True)
class CacheWrite:
    """``cache[:, :, first + i] = new[:, :, i]``.

    Attributes:
        write: the op that does it. index: int64 (rows,), the rows; None where they begin with `first`, or,
            where that is None too, are the last ones.
    """

    cache: fx.Node
    write: fx.Node
    new: fx.Node
    index: fx.Node | None = None
    first: Any = None

    def index_nodes(self) -> list[fx.Node]:
        """Tensors that say where the rows go."""
        return [] if self.index is None else [self.index]

    def same_rows(self, other: CacheWrite) -> bool:
        """Both go to the same rows, of caches that are equally long, where nothing is written in between."""
        return same_value(self.index, other.index) and str(val(self.first)) == str(val(other.first))


def write_before(reader: fx.Node, read: Any) -> CacheWrite | Miss:
    """The last write, before `reader`, into the cache that it reads as `read`, (B, H, rows, D)."""
    if is_call(read, aten.index_copy_.default, aten.index_put_.default):
        read = read.args[0]
    if not isinstance(read, fx.Node) or read.op != "placeholder":
        return Miss("keys and values that are a cache among the inputs", str(read))
    users = [user for view in views_of(read) for user in view.users if facts.is_write(user) and user < reader]
    if not users:
        return Miss("a cache that is written to in front of attention", f"none of {read.name}")
    write = max(users)
    found = _indexed(read, write) or _put(read, write) or _copied(read, write)
    if found is None:
        return Miss(_WANTED, f"{write.format_node()}")
    if isinstance(found, Miss):
        return found
    new = found.new
    if _is_rows(new) and facts.dtype(new) != facts.dtype(read):
        return Miss(f"new rows of {facts.dtype(read)}", str(facts.dtype(new)))
    shapes = [[*facts.shape(each)[:2], facts.shape(each)[3]] for each in (new, read)] if _is_rows(new) else []
    if not shapes or not facts.same_shape(*shapes):
        return Miss(f"new rows of the form of {facts.shape(read)}", str(val(new)))
    return found


def _is_rows(node: Any) -> bool:
    return facts.is_tensor(node) and facts.rank(node) == 4


def _indexed(cache: fx.Node, write: fx.Node) -> CacheWrite | Miss | None:
    """``cache.index_copy_(2, index, new)``, of bytes where the dtype has no kernel of its own."""
    if not is_call(write, aten.index_copy_.default) or _as_stored(write.args[0]) is not cache:
        return None
    dim, index, new = *write.args[1:3], _as_stored(write.args[3])
    if int(dim) % 4 != 2 or facts.rank(index) != 1 or facts.dtype(index) is not torch.int64:  # type: ignore[arg-type]
        return None
    refusal = _obstacle(index)
    return Miss(_WANTED, refusal) if refusal else CacheWrite(cache, write, new, index=index)  # type: ignore[arg-type]


def _as_stored(rows: Any) -> Any:
    """What another dtype of as many bits is a view of."""
    while is_call(rows, aten.view.dtype) and facts.dtype(rows).itemsize == facts.dtype(rows.args[0]).itemsize:
        rows = rows.args[0]
    return rows


def _put(cache: fx.Node, write: fx.Node) -> CacheWrite | Miss | None:
    """``cache[:, :, index] = new``, where a negative index would count from the end."""
    if not is_call(write, aten.index_put_.default) or write.args[0] is not cache:
        return None
    indices: Any = write.args[1]
    if argument(write, "accumulate") or len(indices) != 3 or indices[:2] != [None, None]:
        return None
    index = indices[2]
    if facts.rank(index) != 1 or facts.dtype(index) is not torch.int64:
        return None
    refusal = _obstacle(index)
    if not refusal and not write.meta.get(COUNTED_ROWS):
        refusal = f"{index.name}, which may count from the end"
    return Miss(_WANTED, refusal) if refusal else CacheWrite(cache, write, write.args[2], index=index)  # type: ignore[arg-type]


def _obstacle(index: Any) -> str:
    """Why the entries of an index are not known to follow one another; empty where they do."""
    if facts.same_size(facts.shape(index)[0], 1) or _ascends(index):
        return ""
    return f"rows at {index.format_node()}"


def _ascends(index: Any) -> bool:
    """A range of integers, to which the same number is added everywhere."""
    if is_call(index, aten.add.Tensor):
        pairs = facts.commuted(index)
        return is_number(argument(index, "alpha"), 1) and any(
            _ascends(a) and _is_one_number(b) for a, b in pairs
        )
    if is_call(index, *_RANGES):
        return is_number(argument(index, "step", 1), 1)
    return is_call(index, aten.clone.default, aten.alias.default) and _ascends(index.args[0])


def _is_one_number(value: Any) -> bool:
    return facts.is_scalar(value) or facts.is_tensor(value) and facts.same_size(val(value).numel(), 1)


def _copied(cache: fx.Node, write: fx.Node) -> CacheWrite | Miss | None:
    """``cache[:, :, first:end].copy_(new)``"""
    part: Any = write.args[0]
    if not is_call(write, aten.copy_.default) or not is_call(part, aten.slice.Tensor):
        return None
    first, end = argument(part, "start"), val(argument(part, "end"))
    if part.args[0] is not cache or int(argument(part, "dim")) % 4 != 2 or argument(part, "step") != 1:
        return None
    new: Any = write.args[1]
    rows = facts.shape(cache)[2]
    if not _is_rows(new) or not facts.same_shape(facts.shape(new), facts.shape(part)):
        return Miss("as many new rows as are written", str(val(new)))
    if end is None or end == sys.maxsize or statically_known_true(end >= rows):
        return CacheWrite(cache, write, new)
    if first is None or not statically_known_true(val(first) >= 0):
        return Miss(_WANTED, f"rows from {val(first)} on, which may count from the end")
    return CacheWrite(cache, write, new, first=first)
