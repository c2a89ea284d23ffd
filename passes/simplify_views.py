"""``x.reshape_as(y)`` and its kind -> the same with sizes: the shape of a tensor is known without it.

``bias.reshape_as(scores)`` reads the scores in the graph, though in truth nothing of them. That keeps them
alive, and makes them look like values that two parts of a model need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Verdict

aten = torch.ops.aten

SIZED: dict[OpOverload, OpOverload] = {
    aten.reshape_as.default: aten.reshape.default,
    aten.view_as.default: aten.view.default,
    aten.expand_as.default: aten.expand.default,
}


@dataclass(frozen=True)
class SimplifyViews:
    """A view by sizes, instead of one by the shape of another tensor."""

    name: ClassVar[str] = "simplify-views"
    anchors: ClassVar[tuple[OpOverload, ...]] = tuple(SIZED)
    after: ClassVar[tuple[str, ...]] = ()

    def match(self, node: fx.Node) -> Match | None:
        if not all(facts.is_tensor(arg) for arg in node.args[:2]):
            return None
        return Match(node, (node,), {"sizes": facts.shape(node)})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        symbols = [size for size in match["sizes"] if not isinstance(size, int)]
        if not symbols:
            return Verdict.yes("sizes that are known")
        return Verdict.no(f"wanted sizes that are known, saw {symbols[0]}")

    def profit(self, match: Match, ctx: Context) -> Verdict:
        return Verdict.yes()

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        node: fx.Node = match.anchor
        return graph.call_function(SIZED[node.target], (node.args[0], list(match["sizes"])))  # type: ignore[index]
