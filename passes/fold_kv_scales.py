"""Attention over ``rows.to(dtype) * scale`` -> ``fxopt::quantized_attention``, which reads the rows.

A quantized cache gives out keys and values that it computes from rows of 8 bits and their scales.
Where a few queries read them, the op computes a block of them at a time, and the whole is not made. Assumed:
nothing; conversions that round the products to the dtype of the query are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.cost import numel
from fxopt.ir.facts import is_call, val
from fxopt.ir.ops.attention import ATTENTION
from fxopt.ir.ops.quantized_attention import QUANTIZED_ATTENTION, ROW_DTYPES, kernel_pays, rows_pay

aten = torch.ops.aten

_COPIES = (aten.contiguous.default, aten.clone.default)
_ARITHMETIC = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)
# Steps of arithmetic between rows and attention that are looked through for the evidence.
_DEPTH = 3


@dataclass(frozen=True)
class Rows:
    """``node`` is ``rows * scale``; `transposed`: attention reads it with dimensions 1 and 2 swapped."""

    node: fx.Node
    rows: fx.Node
    scale: fx.Node
    transposed: bool


@dataclass(frozen=True)
class FoldKvScales:
    """Attention that reads quantized rows."""

    name: ClassVar[str] = "fold-kv-scales"
    after: ClassVar[tuple[str, ...]] = ("rewrite-attention", "remove-repeat-kv")

    @property
    def anchors(self) -> tuple[OpOverload, ...]:
        return (ATTENTION.overload,)

    def match(self, node: fx.Node) -> Match | Miss | None:
        found = {name: read_rows(node.args[place]) for name, place in (("K", 1), ("V", 2))}
        for name, each in found.items():
            if isinstance(each, Miss):
                return Miss(f"{each.wanted} in {name}", each.saw)
        if not any(found.values()):
            return None
        if not all(found.values()):
            return Miss("K and V of 8 bits", f"only {'K' if found['K'] else 'V'}")
        if facts.argument(node, "key_rest") is not None:
            return Miss("keys of one part", "latents with a rest")
        return Match(node, (node,), found)

    def legal(self, match: Match, ctx: Context) -> Verdict:
        for name in ("K", "V"):
            each = match[name]
            stale = ctx.facts.unsafe_read([each.rows, each.scale], each.node, match.anchor)
            if stale:
                return Verdict.no(stale)
        return Verdict.yes()

    def profit(self, match: Match, ctx: Context) -> Verdict:
        pays = rows_pay(match.anchor, ctx.facts)
        if not pays:
            pays = kernel_pays(match.anchor, ctx.facts) or pays
        if not pays:
            return pays
        size = sum(numel(val(match[name].node)) for name in ("K", "V"))
        wide = facts.dtype(match["K"].node).itemsize
        return Verdict.yes(f"{pays.reason}, and {size * wide} B of keys and values are not made")

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        query, _, _, *others = match.anchor.args
        key, value = (_operands(graph, match[name]) for name in ("K", "V"))
        args = (query, *key, *value, *others)
        return graph.call_function(QUANTIZED_ATTENTION.overload, args, match.anchor.kwargs)


def read_rows(node: Any) -> Rows | Miss | None:
    """Rows and scale of a (B, H, S, D) tensor; None where it has nothing to do with 8 bits."""
    transposed = False
    while True:
        if is_call(node, aten.transpose.int) and {dim % 4 for dim in node.args[1:]} == {1, 2}:
            transposed = not transposed
        elif not (is_call(node, *_COPIES) or facts.is_float_cast(node)):
            break
        node = node.args[0]
    if not _is_made_of_rows(node):
        return None
    if not is_call(node, aten.mul.Tensor):
        return Miss("rows times a scale", str(node.target))
    for product, scale in facts.commuted(node):
        rows = _widened(product)
        if rows is None:
            continue
        if not facts.is_tensor(scale) or not facts.is_floating(scale):
            return Miss("a scale that is a tensor of floating dtype", str(scale))
        sizes = (1, 1, 1, 1, *facts.shape(scale))[-4:]
        if not any(facts.same_size(sizes[dim], 1) for dim in (1 if transposed else 2, 3)):
            return Miss("a scale for each row or channel", f"scales of shape {facts.shape(scale)}")
        if facts.rank(rows) != 4 or not facts.same_shape(facts.shape(rows), facts.shape(node)):
            return Miss("rows of the shape of their product", f"{facts.shape(rows)}")
        return Rows(node, rows, scale, transposed)
    return Miss("rows times a scale", f"arithmetic with {', '.join(map(str, node.args))}")


def _is_made_of_rows(node: Any, depth: int = _DEPTH) -> bool:
    """Whether a value comes from 8 bits by casts and little arithmetic."""
    if _widened(node) is not None:
        return True
    if depth == 0 or not is_call(node, *_ARITHMETIC, *facts.CASTS, aten.cat.default):
        return False
    return any(_is_made_of_rows(each, depth - 1) for each in node.all_input_nodes)


def _widened(node: Any) -> fx.Node | None:
    """The rows that were converted to a dtype that models compute in."""
    while facts.is_cast(node) and facts.dtype(node) in facts.PLAIN_FLOATS:
        node = node.args[0]
        if facts.dtype(node) in ROW_DTYPES:
            found: fx.Node = node
            return found
    return None


def _operands(graph: fx.Graph, found: Rows) -> tuple[fx.Node, fx.Node]:
    rows, scale = found.rows, found.scale
    if not found.transposed:
        return rows, scale
    for _ in range(4 - facts.rank(scale)):
        scale = graph.call_function(aten.unsqueeze.default, (scale, 0))
    return tuple(graph.call_function(aten.transpose.int, (each, 1, 2)) for each in (rows, scale))  # type: ignore[return-value]
