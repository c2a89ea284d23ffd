"""Builds the operands of ``fxopt::attention`` from a spelled-out site: rank 4, one dtype, one mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxopt.ir import facts
from fxopt.ir.facts import val
from fxopt.ir.sizes import size_node

from .attention_layout import Layout, Lead, Steps
from .attention_parts import Factor, Mask, Multiplier
from .attention_products import Operand, transposition
from .attention_site import Site
from .transpositions import swap

aten = torch.ops.aten

# where(condition, a, b): (a is a tensor, b is a tensor) -> the overload for it
_WHERE: dict[tuple[bool, bool], Any] = {
    (True, False): aten.where.ScalarOther,
    (False, True): aten.where.ScalarSelf,
}


@dataclass
class SiteBuilder:
    """Inserts nodes at the graph's insertion point. The site has been found to be legal."""

    graph: fx.Graph
    site: Site

    @property
    def dtype(self) -> torch.dtype:
        return self.site.dtype

    @property
    def _layout(self) -> Layout:
        return self.site.layout

    def query(self) -> fx.Node:
        """(B, H, Sq, D) in the result's dtype."""
        own = self.site.scores.query
        query = self._operand(own, self._layout.query_steps(own.lead, self.site.scores.product_lead))
        factors = self.site.factors_of_query
        scaled = self._multiplied(query, factors)
        wider = any(facts.dtype(each.node) != self.dtype for each in factors)
        return self._call(aten.to.dtype, scaled, self.dtype) if wider else scaled

    def key(self) -> fx.Node:
        """(B, Hkv, Skv, D)"""
        own = self.site.scores.key
        return self._operand(own, self._layout.key_steps(own.lead, self.site.scores.product_lead))

    def value(self) -> fx.Node:
        """(B, Hkv, Skv, Dv)"""
        own = self.site.weighted.value
        return self._operand(own, self._layout.key_steps(own.lead, self.site.weighted.lead))

    def _operand(self, operand: Operand, steps: Steps | None) -> fx.Node:
        node, order = operand.node, operand.order
        swapped = transposition(node) if order == swap(len(order)) else None
        if swapped is not None:
            node, order = swapped, tuple(range(len(order)))
        if facts.dtype(node) != self.dtype:
            node = self._call(aten.to.dtype, node, self.dtype)
        return self._run(self._ordered(node, order), steps)

    def _ordered(self, node: fx.Node, order: tuple[int | None, ...]) -> fx.Node:
        own = [dim for dim in order if dim is not None]
        if own == list(swap(len(own))):
            node = self._call(aten.transpose.int, node, -2, -1)
        elif own != sorted(own):
            node = self._call(aten.permute.default, node, own)
        for place, dim in enumerate(order):
            if dim is None:
                node = self._call(aten.unsqueeze.default, node, place)
        return node

    def sinks(self) -> fx.Node:
        """(Hq,)"""
        node = self.site.sinks
        if not isinstance(node, fx.Node):
            device = val(self.site.root).device
            return self._call(aten.full.default, [self._layout.heads], node, dtype=self.dtype, device=device)
        return node if val(node).dim() == 1 else self._call(aten.reshape.default, node, [-1])

    def captures(self) -> list[fx.Node]:
        """``c0, c1, ...``: factors of the scores, and False where a score is replaced."""
        factors = [self._factor(each) for each in self.site.factors_of_scores]
        return factors + [self._kept(mask) for mask in self.site.replaced]

    def _factor(self, factor: Multiplier) -> fx.Node:
        node = self._placed(factor.node, factor.at)
        if not factor.divides:
            return node
        wide = torch.float64 if facts.dtype(factor.node) is torch.float64 else torch.float32
        return self._call(aten.reciprocal.default, self._call(aten.to.dtype, node, wide))

    def _kept(self, mask: Mask) -> fx.Node:
        placed = self._placed(mask.node, mask.lead)
        return self._call(aten.logical_not.default, placed) if mask.where else placed

    def mask(self) -> fx.Node | None:
        """The sum of all masks, of rank 4, in float32 or the result's dtype; None when there is none."""
        total: fx.Node | None = None
        for mask in self.site.scores.masks:
            if total is not None and mask.fill is not None:
                total = self._filled_over(total, mask)
                continue
            term = self._term(mask)
            total = term if total is None else self._call(aten.add.Tensor, total, term)
        return total

    def _filled_over(self, total: fx.Node, mask: Mask) -> fx.Node:
        """A fill in the place of what was added before it, which gets no gradient there."""
        condition, lowest = self._placed(mask.node, mask.lead), torch.finfo(self.dtype).min
        if mask.where:
            return self._call(aten.where.ScalarSelf, condition, lowest, total)
        return self._call(aten.where.ScalarOther, condition, total, lowest)

    def exact_mask(self, finite: bool) -> fx.Node:
        """All steps of masking in the model's order and dtypes: the sum overflows where the model's does."""
        total: fx.Node | None = None
        for mask in self.site.scores.masks:
            node = self._placed(mask.node, mask.lead)
            if mask.fill is None:
                node = self._scaled(node, mask.factor)
                total = node if total is None else self._call(aten.add.Tensor, total, node)
            else:
                rest = 0.0 if total is None else total
                chosen = (mask.fill, rest) if mask.where else (rest, mask.fill)
                total = self._chosen(node, chosen, mask.dtype)
            total = self._call(aten.to.dtype, total, mask.dtype)
        if total is None:
            raise ValueError("a site without masks")
        return self._narrow(total, self.site.scores.masks[-1].dtype) if finite else total

    def excluding_mask(self) -> fx.Node:
        """All steps of masking, the last of which fills, with -inf for it."""
        *others, last = self.site.scores.masks
        scores = replace(self.site.scores, masks=[*others, replace(last, fill=-math.inf)])
        total = SiteBuilder(self.graph, replace(self.site, scores=scores)).exact_mask(False)
        on_cpu = val(self.site.scores.product).device.type == "cpu"
        return total if on_cpu else self._call(aten.to.dtype, total, self.dtype)

    def like_root(self, result: fx.Node) -> fx.Node:
        """(B, H, Sq, Dv) in the shape of the replaced product."""
        weighted = self.site.weighted
        result = self._run(result, self._layout.result_steps(weighted.lead))
        return self._ordered(result, weighted.order)

    def _term(self, mask: Mask) -> fx.Node:
        node = self._filled(mask) if mask.fill is not None else mask.node
        if mask.fill is None:
            node = self._narrow(node, facts.dtype(mask.node))
        placed = self._placed(node, mask.lead, like=mask.node)
        return self._scaled(placed, mask.factor) if mask.fill is None else placed

    def _scaled(self, node: fx.Node, factor: Factor) -> fx.Node:
        if not replace(factor, tensors=()).is_one:
            node = self._call(aten.mul.Scalar, node, factor.build(self.graph))
        return self._multiplied(node, factor.tensors)

    def _multiplied(self, node: fx.Node, tensors: Sequence[Multiplier]) -> fx.Node:
        for each in tensors:
            target = aten.div.Tensor if each.divides else aten.mul.Tensor
            node = self._call(target, node, self._placed(each.node, each.at))
        return node

    def _placed(self, node: fx.Node, at: Lead, like: fx.Node | None = None) -> fx.Node:
        """What broadcasts to scores with the lead `at`, with four dimensions. `like`: what has its shape."""
        sizes = val(node if like is None else like).shape
        for _ in range(2 - len(sizes)):
            node = self._call(aten.unsqueeze.default, node, 0)
        return self._run(node, self._layout.mask_steps(tuple(sizes[:-2]), at))

    def _filled(self, mask: Mask) -> fx.Node:
        lowest = torch.finfo(self.dtype).min
        return self._chosen(mask.node, (lowest, 0.0) if mask.where else (0.0, lowest), self.dtype)

    def _chosen(self, condition: fx.Node, values: tuple[Any, Any], dtype: torch.dtype) -> fx.Node:
        """The first value where `condition` holds, else the second: nodes, or numbers of `dtype`."""
        first, second = values
        if not isinstance(first, fx.Node) and not isinstance(second, fx.Node):
            # ATen would have them in torch's default dtype, which has not the lowest number of float64.
            options = {"dtype": dtype, "device": val(self.site.scores.product).device}
            first = self.graph.call_function(aten.full.default, ([], first), options)
        overload = _WHERE[isinstance(first, fx.Node), isinstance(second, fx.Node)]
        return self._call(overload, condition, first, second)

    def _narrow(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """float32 masks stay on the CPU, whose kernels take them; elsewhere a mask has the dtype of Q."""
        on_cpu = val(self.site.scores.product).device.type == "cpu"
        if dtype == self.dtype or (on_cpu and dtype == torch.float32):
            return node
        low = self._call(aten.clamp.default, node, torch.finfo(self.dtype).min)
        return self._call(aten.to.dtype, low, self.dtype)

    def _run(self, node: fx.Node, steps: Steps | None) -> fx.Node:
        if steps is None:
            raise ValueError("a layout that was not found to be legal")
        for target, args in steps:
            node = self._call(target, node, *pytree.tree_map_only(torch.SymInt, self._size, args))
        return node

    def _size(self, size: torch.SymInt) -> fx.Node | int:
        return size_node(size.node.expr, self.graph)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)
