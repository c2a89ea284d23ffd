"""Rotary embedding, append to a cache, attention over it -> ``fxopt::append_attention``.

A decoding step rotates queries and new keys, writes keys and values into a cache, and attends to all of it.
One op for that is one kernel: the rotated rows and the queries never reach memory on their own, and the new
keys are attended to from registers.

The op is the composition of the three, so nothing has to be true of the write but where it goes: behind one
another, wherever the first row is, and attention reads all rows as its mask says. What is found in the graph
is that the write can be done later, at the place of the attention. Where queries and new keys are not rotated
alike, or somebody else reads the rotated keys, they are rotated in front and the op appends and attends. Of
caches of 8 bits there are four writes, and the op rounds the new rows as `fxopt.ir.row_codes` does.

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
from fxopt.ir.ops.cached_attention import cached_pays, cached_rows_pay
from fxopt.ir.ops.quantized_attention import QUANTIZED_ATTENTION
from fxopt.ir.views import viewed

from .cache_writes import CacheWrite
from .rotary_embedding import Angles, Rotation, rotation_of
from .stored_rows import StoredRows, rows_before

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
        query: Any = node.args[0]
        if argument(node, "key_rest") is not None:
            return Miss("keys of one part", "latents with a rest")
        keys, values = (
            rows_before(node, argument(node, name), argument(node, f"{name}_scale"))
            for name in ("key", "value")
        )
        for found in (keys, values):
            if isinstance(found, Miss):
                return found
        assert isinstance(keys, StoredRows)
        assert isinstance(values, StoredRows)
        if not keys.same_rows(values):
            writes = f"{keys.rows.write} and {values.rows.write}"
            return Miss("keys and values written to the same rows", writes)
        rows = facts.shape(keys.source)[2], facts.shape(values.source)[2]
        if not facts.same_shape(rows, facts.shape(query)[2:3] * 2):
            return Miss("as many new rows as queries", f"{rows} and {facts.shape(query)[2]}")
        rotations, why = _rotations(query, keys)
        found_parts = {"keys": keys, "values": values, "rotations": rotations, "why": why}
        return Match(node, (*(each.write for each in _writes(keys, values)), node), found_parts)

    def legal(self, match: Match, ctx: Context) -> Verdict:
        keys, values, node = match["keys"], match["values"], match.anchor
        writes = _writes(keys, values)
        caches = {ctx.facts.alias_class(each.cache) for each in writes}
        if len(caches) < len(writes):
            return Verdict.no("wanted keys and values in memory of their own")
        reader = _reader_between(match, ctx, caches)
        if reader is not None:
            return Verdict.no(f"{reader.name} uses a cache between the write and attention")
        for pair in _twins(match):
            different = _may_differ(*pair, ctx)
            if different:
                return Verdict.no(different)
        operands = _operands(match)
        for each in operands:
            if ctx.facts.alias_class(each) in caches:
                return Verdict.no(f"{each.name} shares memory with a cache")
            stale = ctx.facts.unsafe_read([each], each, node)
            if stale:
                return Verdict.no(stale)
        query: Any = node.args[0]
        wanted = facts.dtype(query if keys.scales else keys.rows.cache)
        for each in (keys.source, values.source, *(one.source for one in match["rotations"])):
            if facts.dtype(each) != wanted:
                return Verdict.no(f"wanted rows of {wanted}, saw {facts.dtype(each)}")
            if val(each).stride(3) != 1 and not facts.same_size(facts.shape(each)[3], 1):
                return Verdict.no(f"wanted rows whose numbers are neighbours in memory, saw {each.name}")
        return Verdict.yes()

    def profit(self, match: Match, ctx: Context) -> Verdict:
        kernels, stored = ctx.facts.kernels, facts.dtype(match["keys"].rows.cache)
        pays = (cached_rows_pay if match["keys"].scales else cached_pays)(match.anchor, ctx.facts)
        if not pays or kernels is None:
            return Verdict.no(pays.reason or "no kernels are made here")
        if stored is torch.float8_e4m3fn and not kernels.float8:
            return Verdict.no("the target has no instructions for float8, as from sm_89 on")
        what = "rotated, " if match["rotations"] else ""
        what += "rounded to 8 bits, " if match["keys"].scales else ""
        what = f"new keys are {what.removesuffix(', ')}{', ' if what else ''}written and attended to"
        return Verdict.yes(f"{what} by one kernel{match['why'] and '; '}{match['why']}")

    def replace(self, match: Match, graph: fx.Graph) -> tuple[fx.Node, ...]:
        keys, values, node = match["keys"], match["values"], match.anchor
        query, cos, sin, interleaved = node.args[0], None, None, False
        k_new = keys.source
        if match["rotations"]:
            turned, rotated = match["rotations"]
            query, k_new, interleaved = turned.source, rotated.source, turned.interleaved
            cos, sin = (_angles(graph, each, interleaved) for each in (turned.cos, turned.sin))
        length, others = keys.rows.index, node.args[3:]
        if keys.rows.first is not None:
            made = {"dtype": torch.int64, "device": val(keys.rows.cache).device}
            length = graph.call_function(aten.full.default, ([1], keys.rows.first), made)
        given = {**node.kwargs, "interleaved": interleaved}
        if keys.scales and values.scales:
            others = node.args[5:]
            given |= {"key_scale": keys.scales.cache, "value_scale": values.scales.cache}
        caches = keys.rows.cache, values.rows.cache
        args = (query, k_new, values.source, *caches, cos, sin, length, *others)
        out = graph.call_function(APPEND_ATTENTION.overload, args, given)
        return (*(_written(each) for each in _writes(keys, values)), out)


def _writes(keys: StoredRows, values: StoredRows) -> list[CacheWrite]:
    """As they follow one another."""
    return sorted([*keys.writes, *values.writes], key=lambda one: one.write)


def _twins(match: Match) -> list[tuple[Any, Any]]:
    """Tensors that are computed alike, of which one is to stand for both."""
    first, *others = _writes(match["keys"], match["values"])
    pairs = [(first.index, each.index) for each in others]
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


def _rotations(query: Any, keys: StoredRows) -> tuple[tuple[Rotation, ...], str]:
    """How queries and new keys are rotated, in this order; none where the op is not to do it, and why."""
    turned, rotated = rotation_of(query), rotation_of(keys.source)
    if turned is None and rotated is None:
        return (), ""
    if turned is None or rotated is None or not turned.same_angles(rotated):
        return (), "queries and keys, which are not rotated alike, come as they are"
    others = keys.readers()
    if others:
        return (), f"keys are rotated in front, for {others[0].name} as well"
    rows = facts.shape(query)[2]
    for each, whole in ((turned, query), (rotated, keys.source)):
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
    found: list[Any] = [values.source, *keys.rows.index_nodes()]
    if not match["rotations"]:
        found.append(keys.source)
    for each in match["rotations"]:
        found += [each.source, each.cos.node, each.sin.node]
    return found


def _reader_between(match: Match, ctx: Context, caches: set[Any]) -> fx.Node | None:
    """Who reads or writes a cache while its new rows are not written yet."""
    own, between = set(match.roots), _between(match.roots[0], match.anchor)
    return next((node for node in between if node not in own and _uses(node, caches, ctx)), None)


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
