"""The mask tensor of an attention -> its formulas beside it: ``k <= q and c0[b, k]``, ``c1[h]*k``.

The formulas say which keys a query sees and what is added to their scores. Whoever computes the attention can
then leave out keys and need not build the mask, which is the largest tensor around; the tensor stays an
operand for those who read it, and is not computed when nobody does. A mask that is no formula is captured
whole.

Assumed: scores and biases are far from the lowest number of their dtype, so that a key masked by it counts as
excluded in a row that has another key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.errors import FormulaDiffers
from fxopt.ir.cone import inside
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.facts import argument, may_train, val
from fxopt.ir.linear import Unsupported
from fxopt.ir.ops.attention import ATTENTION
from fxopt.ir.ops.masking import MEAN, ZERO
from fxopt.ir.propagate import storage_of
from fxopt.ir.sizes import can_compute, size_node
from fxopt.ir.tables import Table

from .mask_check import difference
from .mask_gradient import bias_is_replaced
from .mask_program import Recovered, in_words, recover, written

aten = torch.ops.aten


@dataclass(frozen=True)
class RecoverMask:
    """The programs of a mask, beside its tensor."""

    name: ClassVar[str] = "recover-mask"
    after: ClassVar[tuple[str, ...]] = ("rewrite-attention", "fold-causal-mask")

    @property
    def anchors(self) -> tuple[OpOverload, ...]:
        return (ATTENTION.overload,)

    def match(self, node: fx.Node) -> Match | Miss | None:
        mask = argument(node, "attn_mask")
        if mask is None or argument(node, "mask"):
            return None
        try:
            recovered = recover(mask, node)
        except Unsupported as refusal:
            return Miss("a mask that can be written as a formula", str(refusal))
        outside = tuple(each for each in _nodes(recovered) if each.graph is not node.graph)
        return Match(node, (node,), {"recovered": recovered}, outside)

    def legal(self, match: Match, ctx: Context) -> Verdict:
        node, recovered = match.anchor, match["recovered"]
        tables = [each for each in recovered.captures.values() if isinstance(each, Table)]
        outside = next((each.base for each in tables if each.base.graph is not node.graph), None)
        if outside is not None:
            return Verdict.no(f"wanted tables of this graph, saw {outside.name} outside of it")
        stale = written(recovered.made_by, node, ctx)
        if stale:
            return Verdict.no(stale)
        unknown = [symbol for symbol in recovered.sizes.values() if not can_compute(symbol, node.graph)]
        if unknown:
            return Verdict.no(f"wanted sizes that an input has, saw {unknown[0]}")
        found = _checked(match, ctx) if ctx.options.verify == "masks" else ""
        same = _same_rows(recovered, node)
        return Verdict(bool(same), same.reason + found)

    def profit(self, match: Match, ctx: Context) -> Verdict:
        return Verdict.yes()

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        node, recovered = match.anchor, match["recovered"]
        before = list(argument(node, "captures") or ())
        renamed = recovered.renumbered(len(before))
        captures = [
            source.build(graph) if isinstance(source, Table) else _kept(inside(graph, source), graph)
            for source in recovered.captures.values()
        ]
        sizes = [size_node(symbol, graph) for symbol in recovered.sizes.values()]
        given = {"bias": renamed.bias_text, "captures": [*before, *captures], "sizes": sizes}
        kwargs: dict[str, Any] = {**node.kwargs, "mask": str(renamed.program)}
        kwargs |= {name: value for name, value in given.items() if value}
        replaced = bias_is_replaced(argument(node, "attn_mask")) if may_train(graph) else None
        if recovered.bias != 0 and replaced is not None:
            kwargs["bias_replaced"] = replaced
        if any(math.isfinite(fill) for fill in recovered.fills):
            kwargs["dead_rows"] = MEAN
        made = graph.call_function(ATTENTION.overload, node.args, kwargs)
        made.meta["val"] = val(node)  # the attributes say the same in other words
        return made


def _kept(source: fx.Node, graph: fx.Graph) -> fx.Node:
    """`source` for a backward pass: what is made of an input by views may be written before that runs."""
    if not may_train(graph):
        return source
    inputs = graph.find_nodes(op="placeholder")
    own = {storage_of(val(node)) for node in inputs if not node.meta.get("fxopt_parameter")}
    if val(source).dim() > 2 or val(source).is_floating_point() or storage_of(val(source)) not in own:
        return source
    return graph.call_function(torch.ops.fxopt.snapshot.default, (source,))


def _checked(match: Match, ctx: Context) -> str:
    """In words, that the formulas were compared with the mask.

    Raises:
        FormulaDiffers: they are not the same.
    """
    node, recovered = match.anchor, match["recovered"]
    try:
        found = difference(recovered, argument(node, "attn_mask"), node)
    except Unsupported as reason:
        return f"; not compared: {reason}"
    if found is not None:
        raise FormulaDiffers(formula=in_words(recovered, ""), found=found)
    return "; compared entry by entry"


def _nodes(recovered: Recovered) -> list[fx.Node]:
    return [source for source in recovered.captures.values() if isinstance(source, fx.Node)]


def _sources(recovered: Recovered) -> list[fx.Node]:
    return [source.base if isinstance(source, Table) else source for source in recovered.captures.values()]


def _same_rows(recovered: Recovered, node: fx.Node) -> Verdict:
    """Rows without a live key give what they gave before."""
    fills = recovered.fills
    if len(fills) > 1:
        return Verdict.no(f"wanted one number that excludes keys, saw {sorted(fills)}")
    if val(node.args[0]).dtype is torch.float16 and any(math.isfinite(fill) for fill in fills):
        return Verdict.no("wanted a fill that absorbs every score, saw float16's lowest number")
    halves = [source for source in _sources(recovered) if val(source).dtype is torch.float16]
    if halves and argument(node, "dead_rows") != ZERO:
        # Added in float16 by the model, where its lowest number absorbs a score; in float32 it does not.
        return Verdict.no(
            f"wanted captured numbers that may be added in float32, saw float16 in {halves[0].name}"
        )
    before = list(argument(node, "captures") or ())
    words = in_words(recovered.renumbered(len(before)), argument(node, "score"))
    return Verdict.yes("; ".join([words, *(f"c{place} is {each.name}" for place, each in enumerate(before))]))
