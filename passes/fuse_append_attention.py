"""Rotary embedding, append to a cache, attention over it -> ``fxopt::append_attention``.

A decoding step rotates queries and new keys, writes keys and values into a cache, and attends to all of it.
One op for that is one kernel: the rotated rows and the queries never reach memory on their own, and the new
keys are attended to from registers.

The op is the composition of the three, so nothing has to be true of the write but where it goes: behind one
another, wherever the first row is, and attention reads all rows as its mask says. What is found in the graph
is that the write can be done later, at the place of the attention. Where queries and new keys are not rotated
alike, or somebody else reads the rotated keys, they are rotated in front and the op appends and attends.

It runs for hosts that put kernels in the place of attention, after steps have got their form (lengths on the
device, room in the caches), and last of all: everything else sees writes and attention as they were.
Elsewhere the graph stays as it is, op by op what it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.cone import cone
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.facts import argument, val
from fxopt.ir.linear import Unsupported
from fxopt.ir.ops.append_attention import APPEND_ATTENTION
from fxopt.ir.ops.attention import ATTENTION
from fxopt.ir.ops.cached_attention import cached_pays
from fxopt.ir.ops.quantized_attention import QUANTIZED_ATTENTION
from fxopt.ir.views import viewed

from .cache_writes import CacheWrite, write_before
from .rotary_embedding import Angles, Rotation, rotation_of

aten = torch.ops.aten

_SIZES = (aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default)


@dataclass(frozen=True)
class FuseAppendAttention:
    """One op for what a layer does with its cache."""

    name: ClassVar[str] = "fuse-append-attention"
    after: ClassVar[tuple[str, ...]] = ("rewrite-attention", "remove-repeat-kv", "recover-mask")

    @property
    def anchors(self) -> tuple[OpOverload, ...]:
        return (ATTENTION.overload, QUANTIZED_ATTENTION.overload)

    def match(self, node: fx.Node) -> Match | Miss | None:
        if node.target is QUANTIZED_ATTENTION.overload:
            return Miss("keys and values in the dtype of queries", "rows of 8 bits")
        query, key, value = node.args[:3]
        if argument(node, "key_rest") is not None:
            return Miss("keys of one part", "latents with a rest")
        keys, values = (write_before(node, read) for read in (key, value))
        for found in (keys, values):
            if isinstance(found, Miss):
                return found
        assert isinstance(keys, CacheWrite)
        assert isinstance(values, CacheWrite)
        if not keys.same_rows(values):
            return Miss("keys and values written to the same rows", f"{keys.write} and {values.write}")
        rows = facts.shape(keys.new)[2], facts.shape(values.new)[2]
        if not facts.same_shape(rows, facts.shape(query)[2:3] * 2):  # type: ignore[arg-type]
            return Miss("as many new rows as queries", f"{rows} and {facts.shape(query)[2]}")  # type: ignore[arg-type]
        rotations, why = _rotations(query, keys)
        values_of_match = {"keys": keys, "values": values, "rotations": rotations, "why": why}
        return Match(node, (*sorted((keys.write, values.write)), node), values_of_match)

    def legal(self, match: Match, ctx: Context) -> Verdict:
        keys, values, node = match["keys"], match["values"], match.anchor
        if ctx.facts.alias_class(keys.cache) == ctx.facts.alias_class(values.cache):
            return Verdict.no("wanted keys and values in memory of their own")
        first = min(keys.write, values.write)
        reader = _reader_between(match, ctx, first)
        if reader is not None:
            return Verdict.no(f"{reader.name} uses a cache between the write and attention")
        for pair in _twins(match):
            different = _may_differ(*pair, ctx)
            if different:
                return Verdict.no(different)
        operands = _operands(match)
        for each in operands:
            if ctx.facts.alias_class(each) in map(ctx.facts.alias_class, (keys.cache, values.cache)):
                return Verdict.no(f"{each.name} shares memory with a cache")
            stale = ctx.facts.unsafe_read([each], each, node)
            if stale:
                return Verdict.no(stale)
        for each in (keys.new, values.new, *(one.source for one in match["rotations"])):
            if facts.dtype(each) != facts.dtype(keys.cache):
                return Verdict.no(f"wanted rows of {facts.dtype(keys.cache)}, saw {facts.dtype(each)}")
            if val(each).stride(3) != 1 and not facts.same_size(facts.shape(each)[3], 1):
                return Verdict.no(f"wanted rows whose numbers are neighbours in memory, saw {each.name}")
        return Verdict.yes()

    def profit(self, match: Match, ctx: Context) -> Verdict:
        pays = cached_pays(match.anchor, ctx.facts)
        if not pays:
            return Verdict.no(pays.reason or "no kernels are made here")
        what = "rotated, written and attended to" if match["rotations"] else "written and attended to"
        return Verdict.yes(f"new keys are {what} by one kernel{match['why'] and '; '}{match['why']}")

    def replace(self, match: Match, graph: fx.Graph) -> tuple[fx.Node, ...]:
        keys, values, node = match["keys"], match["values"], match.anchor
        query, cos, sin, interleaved = node.args[0], None, None, False
        k_new = keys.new
        if match["rotations"]:
            turned, rotated = match["rotations"]
            query, k_new, interleaved = turned.source, rotated.source, turned.interleaved
            cos, sin = (_angles(graph, each, interleaved) for each in (turned.cos, turned.sin))
        length = keys.index
        if keys.first is not None:
            made = {"dtype": torch.int64, "device": val(keys.cache).device}
            length = graph.call_function(aten.full.default, ([1], keys.first), made)
        args = (query, k_new, values.new, keys.cache, values.cache, cos, sin, length, *node.args[3:])
        out = graph.call_function(
            APPEND_ATTENTION.overload, args, {**node.kwargs, "interleaved": interleaved}
        )
        return (*(_written(each) for each in sorted((keys, values), key=lambda one: one.write)), out)


def _twins(match: Match) -> list[tuple[Any, Any]]:
    """Tensors that are computed alike, of which one is to stand for both."""
    pairs = [(match["keys"].index, match["values"].index)]
    if match["rotations"]:
        turned, rotated = match["rotations"]
        pairs += [(turned.cos.node, rotated.cos.node), (turned.sin.node, rotated.sin.node)]
    return [(a, b) for a, b in pairs if a is not b]


def _may_differ(a: fx.Node, b: fx.Node, ctx: Context) -> str | None:
    """Why the results of two computations that are alike may differ; None where they do not."""
    try:
        made_by = [*cone(a), *cone(b)]
    except Unsupported as refusal:
        return f"{b.name} is made by {refusal}"
    return ctx.facts.unsafe_read(made_by, min(made_by), max(made_by))


def _rotations(query: Any, keys: CacheWrite) -> tuple[tuple[Rotation, ...], str]:
    """How queries and new keys are rotated, in this order; none where the op is not to do it, and why."""
    turned, rotated = rotation_of(query), rotation_of(keys.new)
    if turned is None and rotated is None:
        return (), ""
    if turned is None or rotated is None or not turned.same_angles(rotated):
        return (), "queries and keys, which are not rotated alike, come as they are"
    others = [user for user in keys.new.users if user is not keys.write]
    if others:
        return (), f"keys are rotated in front, for {others[0].name} as well"
    rows = facts.shape(query)[2]
    for each, whole in ((turned, query), (rotated, keys.new)):
        if not facts.same_shape(facts.shape(each.source), facts.shape(whole)):
            return (), f"{each.source.name} is not as wide as what is rotated"
    for angles in (turned.cos, turned.sin):
        if not _is_by_position(angles.node, rows):
            return (), f"rotated in front, by angles of shape {facts.shape(angles.node)}"
    return (turned, rotated), ""


def _is_by_position(angles: fx.Node, rows: facts.Size) -> bool:
    """(B or 1, 1, rows, R), without leading dimensions perhaps; the numbers of a row are neighbours."""
    shape = facts.shape(angles)
    if val(angles).stride(-1) != 1 or len(shape) < 2 or not facts.same_size(shape[-2], rows):
        return False
    over_heads = {2: 1, 3: shape[0], 4: shape[1]}.get(len(shape), 0)
    return facts.same_size(over_heads, 1)


def _angles(graph: fx.Graph, angles: Angles, interleaved: bool) -> fx.Node:
    """(B or 1, rows, R)"""
    node, rank = angles.node, facts.rank(angles.node)
    if rank == 4:
        node = graph.call_function(aten.select.int, (node, 1, 0))
    elif rank == 2:
        node = graph.call_function(aten.unsqueeze.default, (node, 0))
    if angles.repeated == 1:
        return node
    if interleaved:
        return graph.call_function(aten.repeat_interleave.self_int, (node, angles.repeated, 2))
    return graph.call_function(aten.cat.default, ([node] * angles.repeated, 2))


def _written(one: CacheWrite) -> fx.Node:
    """What the write returned: the cache, or the part of it that was written."""
    written: fx.Node = one.write.args[0]  # type: ignore[assignment]
    return written


def _operands(match: Match) -> list[fx.Node]:
    """What is read later than before, or in another form."""
    keys, values = match["keys"], match["values"]
    found: list[Any] = [values.new, *keys.index_nodes()]
    if not match["rotations"]:
        found.append(keys.new)
    for each in match["rotations"]:
        found += [each.source, each.cos.node, each.sin.node]
    return found


def _reader_between(match: Match, ctx: Context, first: fx.Node) -> fx.Node | None:
    """Who reads or writes a cache while its new rows are not written yet."""
    keys, values = match["keys"], match["values"]
    caches = {ctx.facts.alias_class(each.cache) for each in (keys, values)}
    own = {keys.write, values.write, match.anchor}
    return next(
        (node for node in _between(first, match.anchor) if node not in own and _uses(node, caches, ctx)), None
    )


def _between(first: fx.Node, last: fx.Node) -> Iterable[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _uses(node: fx.Node, caches: set[Any], ctx: Context) -> bool:
    """More than another view of the memory."""
    if node.op != "call_function" or node.target in _SIZES:
        return False
    if viewed(node) is not None and not facts.is_write(node):
        return False
    return any(
        facts.is_tensor(each) and ctx.facts.alias_class(each) in caches for each in node.all_input_nodes
    )
