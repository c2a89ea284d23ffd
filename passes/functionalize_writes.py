"""An in-place op on a value that nobody else sees -> the op that returns its result.

``scores += bias`` and ``scores.masked_fill_(mask, low)`` are how many models save memory. The write orders
the graph around it, and hides from the passes below that the scores are an ordinary sum. On a value that the
graph made itself, and that nothing reads through another name after the write, both say the same.

Writes that can be seen (to inputs, parameters, buffers, caches, a view of something that is read later) stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Verdict
from fxopt.ir.facts import location, val
from fxopt.ir.propagate import equivalent

aten = torch.ops.aten

# In place, and what computes the same without writing. None of them is an op that autocast casts for.
PURE: dict[OpOverload, OpOverload] = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.add_.Scalar: aten.add.Scalar,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.sub_.Scalar: aten.sub.Scalar,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.mul_.Scalar: aten.mul.Scalar,
    aten.div_.Tensor: aten.div.Tensor,
    aten.div_.Scalar: aten.div.Scalar,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.masked_fill_.Tensor: aten.masked_fill.Tensor,
    aten.neg_.default: aten.neg.default,
    aten.tanh_.default: aten.tanh.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.relu_.default: aten.relu.default,
    aten.silu_.default: aten.silu.default,
    aten.clamp_.default: aten.clamp.default,
    aten.tril_.default: aten.tril.default,
    aten.triu_.default: aten.triu.default,
    aten.logical_and_.default: aten.logical_and.default,
    aten.bitwise_and_.Tensor: aten.bitwise_and.Tensor,
    aten.bitwise_or_.Tensor: aten.bitwise_or.Tensor,
    aten.__iand__.Tensor: aten.__and__.Tensor,
    aten.__ior__.Tensor: aten.__or__.Tensor,
}


@dataclass(frozen=True)
class FunctionalizeWrites:
    """The op that returns its result, instead of the one that writes it into its first operand."""

    name: ClassVar[str] = "functionalize-writes"
    anchors: ClassVar[tuple[OpOverload, ...]] = tuple(PURE)
    after: ClassVar[tuple[str, ...]] = ()

    def match(self, node: fx.Node) -> Match | None:
        written = node.args[0]
        if not facts.is_tensor(written):
            return None
        return Match(node, (node,), {"written": written, "pure": _pure(node)})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        node, written = match.anchor, match["written"]
        if ctx.facts.needs_grad and ctx.facts.mode_at(written) != ctx.facts.mode_at(node):
            return Verdict.no("wanted one grad mode, saw a value that is written in another than its own")
        for other in ctx.facts.sharing(written):
            if other.op != "call_function":
                return Verdict.no(f"wanted a value that the graph made, saw {other.name}, an input of it")
            reader = _reads_after(other, node)
            if reader is not None:
                return Verdict.no(
                    f"{reader.name} ({location(reader)}) reads what was written through {other.name}"
                )
        pure = match["pure"]
        if not equivalent(pure.to(facts.dtype(node)), val(node)):
            return Verdict.no("wanted a result in the layout of what is written, saw another")
        return Verdict.yes("made in the graph, read through nothing else")

    def profit(self, match: Match, ctx: Context) -> Verdict:
        return Verdict.yes()

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        node: fx.Node = match.anchor
        result = graph.call_function(PURE[node.target], node.args, node.kwargs)  # type: ignore[index]
        wanted = facts.dtype(node)
        if match["pure"].dtype != wanted:
            result = graph.call_function(aten.to.dtype, (result, wanted))
        return result


def _reads_after(value: fx.Node, write: fx.Node) -> fx.Node | None:
    """Who reads `value`, made before `write`, after it."""
    return next((user for user in value.users if write < user), None) if value < write else None


def _pure(node: fx.Node) -> torch.Tensor:
    """What the op that does not write gives. The one that writes computes in its dtype, and rounds once."""
    with val(node.args[0]).fake_mode:
        arguments = [val(arg) if isinstance(arg, fx.Node) else arg for arg in node.args]
        result: torch.Tensor = PURE[node.target](*arguments, **node.kwargs)  # type: ignore[index]
    return result
