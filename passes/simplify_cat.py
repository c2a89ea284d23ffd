"""A concatenation of one tensor with nothing else -> a contiguous copy of it.

A growing cache begins as an empty tensor, so the first step of every decoder joins nothing with the keys. The
copy is what that means. It also keeps eager's layout, where the result of ``cat`` is contiguous whatever its
operands are: Inductor's reading of a concatenation with an empty operand keeps the other one's strides, which
then differ in the outputs of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Verdict
from fxopt.ir.facts import argument, val

aten = torch.ops.aten


@dataclass(frozen=True)
class SimplifyCat:
    """A copy instead of a concatenation of one tensor."""

    name: ClassVar[str] = "simplify-cat"
    anchors: ClassVar[tuple[OpOverload, ...]] = (aten.cat.default,)
    after: ClassVar[tuple[str, ...]] = ()

    def match(self, node: fx.Node) -> Match | None:
        operands = argument(node, "tensors")
        if not isinstance(operands, (list, tuple)) or not all(facts.is_tensor(each) for each in operands):
            return None
        present = [each for each in operands if not _is_empty(each)]
        if len(present) != 1:
            return None
        return Match(node, (node,), {"source": present[0]})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        result, source = val(match.anchor), val(match["source"])
        if not all(isinstance(size, int) for size in result.shape):
            return Verdict.no("wanted sizes that are known, saw symbols")
        if source.dtype != result.dtype or not facts.same_shape(source.shape, result.shape):
            return Verdict.no(f"wanted {result.dtype} of the same shape, saw {source.dtype}")
        if not result.is_contiguous():
            return Verdict.no(f"wanted a contiguous result, saw strides {tuple(result.stride())}")
        return Verdict.yes("all other operands are empty")

    def profit(self, match: Match, ctx: Context) -> Verdict:
        return Verdict.yes()

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        return graph.call_function(
            aten.clone.default, (match["source"],), {"memory_format": torch.contiguous_format}
        )


def _is_empty(node: fx.Node) -> bool:
    """Known to have no entries. A size that is a symbol may be anything."""
    return any(isinstance(size, int) and size == 0 for size in val(node).shape)
