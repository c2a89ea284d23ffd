"""A mask that is made from nothing but sizes and equals the causal one -> ``is_causal=True``, and no mask.

Compiled decoders that get no mask build one: B x 1 x S x S entries out of ``arange``, equal to the lower
triangle. A mask that lets every query see every key is dropped likewise. Assumed: scores are far from the
lowest number of their dtype, so that a key masked by it counts as excluded in a row that has another key.

Proven, not assumed: that the mask depends on no data, and what it holds at each index, for all values of the
sizes. The proof is symbolic; the mask is also computed at small sizes and compared. Where the symbolic
proof does not reach and all sizes are known, computing the mask is the proof.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir.cone import cone, data_in
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.cost import numel
from fxopt.ir.facts import argument, val
from fxopt.ir.linear import Unsupported
from fxopt.ir.ops.attention import ATTENTION
from fxopt.ir.ops.masking import NAN, NONE

from .mask_program import in_words, recover, written
from .mask_proof import show

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldCausalMask:
    """``is_causal`` instead of a causal mask."""

    name: ClassVar[str] = "fold-causal-mask"
    after: ClassVar[tuple[str, ...]] = ("rewrite-attention",)

    @property
    def anchors(self) -> tuple[OpOverload, ...]:
        return (ATTENTION.overload, aten.scaled_dot_product_attention.default)

    def match(self, node: fx.Node) -> Match | Miss | None:
        mask = argument(node, "attn_mask")
        if mask is None:
            return None
        if argument(node, "is_causal"):
            return Miss("one mask", "is_causal and a mask")
        try:
            made_by = cone(mask)
        except Unsupported as refusal:
            return Miss("a mask made by few operations", str(refusal))
        data = data_in(made_by)
        if data is not None:
            return Miss("a mask made from sizes alone", _program(mask, node) or f"it depends on {data.name}")
        return Match(node, (node,), {"mask": mask, "made_by": made_by})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        stale = written(match["made_by"], match.anchor, ctx)
        if stale:
            return Verdict.no(stale)
        try:
            shown = show(match["mask"], match["made_by"], match.anchor)
        except Unsupported as refusal:
            saw = _program(match["mask"], match.anchor) or refusal
            return Verdict.no(f"wanted a mask proven causal, saw {saw}")
        return Verdict.yes(f"{'causal' if shown.causal else 'masks nothing'}, {shown.how}")

    def profit(self, match: Match, ctx: Context) -> Verdict:
        mask = val(match["mask"])
        return Verdict.yes(f"a mask of {numel(mask)} entries is not read")

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        node = match.anchor
        shown = show(match["mask"], match["made_by"], node)
        names = [formal.name for formal in node.target._schema.arguments]  # type: ignore[union-attr]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        given |= {"attn_mask": None, "is_causal": shown.causal}
        if given.get("dead_rows") == NAN:
            given["dead_rows"] = NONE  # each query sees a key
        given.pop("mask_replaces", None)
        positional = tuple(given.pop(name) for name in ("query", "key", "value"))
        return graph.call_function(node.target, positional, given)  # type: ignore[arg-type]


def _program(mask: fx.Node, attention: fx.Node) -> str | None:
    """The mask as a formula, where it is one."""
    try:
        return in_words(recover(mask, attention), argument(attention, "score") or "")
    except Unsupported:
        return None
