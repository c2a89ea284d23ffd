"""A new tensor that is written part by part -> the concatenation of the parts.

``k = x.new_empty(..., n + m); k[..., :n].copy_(a); k[..., n:].copy_(b)`` is ``cat([a, b], -1)``. The writes
order the graph around them, and hide from the passes below what the tensor is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.facts import argument, is_call, val

aten = torch.ops.aten

NEW = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)
COPY = aten.copy_.default


@dataclass(frozen=True)
class Part:
    """``tensor[start:start + size].copy_(source)``, along one dimension."""

    write: fx.Node
    dim: int
    start: int
    size: int

    @property
    def source(self) -> fx.Node:
        return self.write.args[1]  # type: ignore[return-value]


@dataclass(frozen=True)
class ConcatenateParts:
    """A concatenation instead of copies into the parts of a new tensor."""

    name: ClassVar[str] = "concatenate-parts"
    anchors: ClassVar[tuple[OpOverload, ...]] = (COPY,)
    after: ClassVar[tuple[str, ...]] = ("functionalize-writes",)

    def match(self, node: fx.Node) -> Match | Miss | None:
        tensor = _written(node)
        if tensor is None or any(node < user for view in tensor.users for user in _copies(view)):
            return None
        views = [user for user in tensor.users if user < node]
        found = [_part(view) for view in views]
        parts = sorted((part for part in found if part is not None), key=lambda part: part.start)
        if len(parts) < 2:
            return None
        if len(parts) < len(views):
            other = views[found.index(None)]
            return Miss("a tensor that is read when it is whole", f"{other.name}, made of it before")
        if not _tile(parts, val(tensor)):
            places = ", ".join(f"[{part.start}, {part.start + part.size})" for part in parts)
            return Miss("parts that fill the tensor along one dimension", places)
        writes = sorted(part.write for part in parts)
        return Match(node, (tensor, *writes), {"parts": parts}, since=node)

    def legal(self, match: Match, ctx: Context) -> Verdict:
        for part in match["parts"]:
            stale = ctx.facts.unsafe_read([part.source], part.write, match.anchor)
            if stale:
                return Verdict.no(stale)
            if val(part.source).device != val(part.write).device:
                return Verdict.no(f"wanted parts on one device, saw one of {val(part.source).device}")
            if _widened(part) is None:
                return Verdict.no(f"wanted parts of known size, saw {part.source.name}, which is repeated")
        return Verdict.yes(f"{len(match['parts'])} parts fill the tensor")

    def profit(self, match: Match, ctx: Context) -> Verdict:
        return Verdict.yes()

    def replace(self, match: Match, graph: fx.Graph) -> tuple[fx.Node, ...]:
        parts: Sequence[Part] = match["parts"]
        made = {part.write: _as_written(graph, part) for part in parts}
        joined = graph.call_function(aten.cat.default, (list(made.values()), parts[0].dim))
        return (joined, *(made[write] for write in match.roots[1:]))


def _written(copy: fx.Node) -> fx.Node | None:
    """The new tensor into a slice of which a copy goes."""
    view: Any = copy.args[0]
    return view.args[0] if is_call(view, aten.slice.Tensor) and is_call(view.args[0], *NEW) else None


def _copies(view: fx.Node) -> list[fx.Node]:
    return [user for user in view.users if is_call(user, COPY) and user.args[0] is view]


def _part(view: fx.Node) -> Part | None:
    """The part that a slice of the tensor is, of which nothing is done but writing it once."""
    write = facts.only_user(view)
    if not is_call(view, aten.slice.Tensor) or write is None or write not in _copies(view) or write.users:
        return None
    dim = argument(view, "dim") % facts.rank(view)
    start, whole, size = argument(view, "start"), val(view.args[0]).shape[dim], val(view).shape[dim]
    start = 0 if start is None else start
    if argument(view, "step") != 1 or not all(isinstance(number, int) for number in (start, whole, size)):
        return None
    return Part(write, dim, min(start % whole if start < 0 else start, whole), size)


def _tile(parts: Sequence[Part], whole: torch.Tensor) -> bool:
    ends = [0, *(part.start + part.size for part in parts)]
    dims = {part.dim for part in parts}
    return len(dims) == 1 and ends == [*(part.start for part in parts), whole.shape[parts[0].dim]]


def _widened(part: Part) -> list[int] | None:
    """The sizes that bring the source to the shape of its part, by `expand`; None where they are symbols."""
    source, wanted = facts.shape(part.source), facts.shape(part.write)
    source = (1,) * (len(wanted) - len(source)) + source
    sizes = [-1 if facts.same_size(own, size) else size for own, size in zip(source, wanted, strict=True)]
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


def _as_written(graph: fx.Graph, part: Part) -> fx.Node:
    """What the copy leaves in the tensor."""
    found, sizes = part.source, _widened(part)
    if not facts.same_shape(facts.shape(found), facts.shape(part.write)):
        found = graph.call_function(aten.expand.default, (found, sizes))
    if facts.dtype(part.source) != facts.dtype(part.write):
        found = graph.call_function(aten.to.dtype, (found, facts.dtype(part.write)))
    return found
