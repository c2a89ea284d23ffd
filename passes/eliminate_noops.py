"""Operations that return what they are given -> their input.

Two kinds. *Views of everything*: `to` without a change, `contiguous` of contiguous, dropout in eval or with
p = 0, expand and reshape to the same shape, slices of all: their result shares memory with the input, in
the same layout, so whoever writes to one writes to the other before and after. *Copies of the same values*:
a product or quotient by 1, an integer plus 0, `and` with True, `clone`: eliminating
them makes an alias of what was a copy, which is legal only when neither is written later and the copy does
not leave the graph. ``x + 0`` on floats is kept: it turns -0.0 into 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Verdict
from fxopt.ir.facts import argument, is_call, is_number, val
from fxopt.ir.propagate import equivalent

aten = torch.ops.aten

VIEWS = (
    *facts.CASTS[:4],
    aten.contiguous.default,
    aten.alias.default,
    aten.expand.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.flatten.using_ints,
)
COPIES = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.__and__.Tensor,
    aten.bitwise_and.Tensor,
    aten.logical_and.default,
    aten.clone.default,
)


@dataclass(frozen=True)
class EliminateNoops:
    """Removes operations that compute nothing."""

    name: ClassVar[str] = "eliminate-noops"
    anchors: ClassVar[tuple[OpOverload, ...]] = (*VIEWS, *COPIES, aten.dropout.default)
    after: ClassVar[tuple[str, ...]] = ()

    def match(self, node: fx.Node) -> Match | None:
        copies = node.target in COPIES
        source = _copied(node) if copies else _passed_on(node)
        if not facts.is_tensor(source) or not equivalent(val(source), val(node)):
            return None
        if not copies and argument(node, "copy"):
            return None
        return Match(node, (node,), {"source": source, "copies": copies})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        node, source = match.anchor, match["source"]
        if any(user.op == "output" for user in node.users):
            return Verdict.no(
                "wanted a value that stays in the graph, saw an output: identity is part of the answer"
            )
        if facts.is_floating(node) and ctx.facts.needs_grad and not ctx.facts.differentiates(node):
            return Verdict.no(
                "wanted one grad mode, saw no_grad: the result is cut from autograd, its input is not"
            )
        if not match["copies"]:
            return Verdict.yes("a view of everything")
        if ctx.facts.in_inference_mode(node) != ctx.facts.in_inference_mode(source):
            return Verdict.no("wanted one mode, saw a copy that makes a tensor for autograd of one without")
        for value in (node, source):
            writer = ctx.facts.written_after(value, node)
            if writer is not None:
                return Verdict.no(
                    f"{value.name} is written later by {writer.name}, its copy must not see that"
                )
        if ctx.facts.leaves_graph(node):
            return Verdict.no("wanted a copy that stays in the graph, saw one that aliases an output")
        return Verdict.yes("the same values, written by nobody")

    def profit(self, match: Match, ctx: Context) -> Verdict:
        return Verdict.yes()

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        source: fx.Node = match["source"]
        return source


def _passed_on(node: fx.Node) -> Any:
    """The operand that the op returns in eager if it changes nothing. A trace makes a copy in dropout."""
    return None if facts.drops(node) else node.args[0]


def _copied(node: fx.Node) -> Any:
    """The operand whose values the op repeats, or None."""
    if is_call(node, aten.clone.default):
        return None if argument(node, "memory_format") is not None else node.args[0]
    if is_call(node, aten.mul.Tensor):
        return next((x for x, one in facts.commuted(node) if is_number(one, 1)), None)
    if is_call(node, aten.div.Tensor):
        return node.args[0] if is_number(node.args[1], 1) else None
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        return _plus_zero(node)
    return next((x for x, true in facts.commuted(node) if _is_true(true)), None)


def _plus_zero(node: fx.Node) -> Any:
    value = val(node)
    if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex():
        return None
    operands = (
        facts.commuted(node) if is_call(node, aten.add.Tensor) else iter([(node.args[0], node.args[1])])
    )
    return next((x for x, zero in operands if is_number(zero, 0)), None)


def _is_true(node: Any) -> bool:
    """A bool tensor known to be True everywhere."""
    if not facts.is_tensor(node) or facts.dtype(node) is not torch.bool:
        return False
    if is_call(node, aten.new_ones.default, aten.ones.default):
        return True
    return is_call(node, aten.full.default) and node.args[1] is True
