"""Attention of a copy of K or V -> attention of what was copied.

The first step of a cache copies its keys and values, as they are results of the model, into eager's layout.
Attention does not need that copy: it reads any strides between rows. Without it the copy is nobody's operand,
and what makes the keys can be one kernel with what makes the queries. Assumed: nothing; values are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.cost import hint
from fxopt.ir.facts import argument, is_call, val
from fxopt.ir.ops.attention import ATTENTION

aten = torch.ops.aten

_COPIES = (aten.contiguous.default, aten.clone.default)
# Each block of queries reads all keys of its head. On a CPU, strides cost nothing where those stay in the
# first cache; measured with heads of 64 and 128 entries, rows further apart take up to 7 % longer beyond it.
_FIRST_CACHE = 16 * 1024


@dataclass(frozen=True)
class SkipKvCopies:
    """Keys and values read where they were copied from."""

    name: ClassVar[str] = "skip-kv-copies"
    after: ClassVar[tuple[str, ...]] = ("rewrite-attention", "remove-repeat-kv")

    @property
    def anchors(self) -> tuple[OpOverload, ...]:
        return (ATTENTION.overload,)

    def match(self, node: fx.Node) -> Match | Miss | None:
        copies = [arg for arg in node.args[1:3] if is_call(arg, *_COPIES)]
        if not copies:
            return None
        for copy in copies:
            strides = val(argument(copy, "self")).stride()  # type: ignore[arg-type]
            if strides[-1] != 1 or any(facts.same_size(stride, 0) for stride in strides):
                return Miss("rows of adjoining entries, each its own", f"strides {tuple(strides)}")
        return Match(node, (node,), {"copies": copies})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        for copy in match["copies"]:
            if ctx.facts.mode_at(copy)[0] != ctx.facts.mode_at(match.anchor)[0]:
                return Verdict.no("wanted one grad mode, saw a copy that is cut from autograd")
            if ctx.facts.in_inference_mode(copy) != ctx.facts.in_inference_mode(match.anchor):
                return Verdict.no("wanted one mode, saw a copy out of inference mode")
            stale = ctx.facts.unsafe_read([copy.args[0]], copy, match.anchor)
            if stale:
                return Verdict.no(stale)
        return Verdict.yes("the same values, written by nobody")

    def profit(self, match: Match, ctx: Context) -> Verdict:
        keys = val(match["copies"][0])
        head = hint(keys.shape[-2]) * hint(keys.shape[-1]) * keys.element_size()
        if keys.device.type == "cpu" and head > _FIRST_CACHE:
            return Verdict.no(f"{head} B of keys per head are read faster from one place")
        return Verdict.yes(f"{len(match['copies'])} copies that attention does not wait for")

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        node: fx.Node = match.anchor
        operands = [arg.args[0] if arg in match["copies"] else arg for arg in node.args]  # type: ignore[union-attr]
        return graph.call_function(node.target, tuple(operands), dict(node.kwargs))  # type: ignore[arg-type]
