"""Builds the operands of ``fxopt::attention`` from a spelled-out site: rank 4, one dtype, one mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.facts import is_call, val

from .attention_sites import Mask, Scores

aten = torch.ops.aten

# where(condition, a, b): (a is a tensor, b is a tensor) -> the overload for it
_WHERE: dict[tuple[bool, ...], Any] = {
    (False, False): aten.where.Scalar,
    (True, False): aten.where.ScalarOther,
    (False, True): aten.where.ScalarSelf,
}


@dataclass
class SiteBuilder:
    """Inserts nodes at the graph's insertion point. `dtype` is that of the result."""

    graph: fx.Graph
    scores: Scores
    dtype: torch.dtype

    def operand(self, node: fx.Node) -> fx.Node:
        """Q or V as (B, H, S, D) in the result's dtype."""
        if facts.dtype(node) != self.dtype:
            node = self._call(aten.to.dtype, node, self.dtype)
        return self._rank4(node, val_rank=3 if self._flat else 4)

    def untransposed(self, key_t: fx.Node) -> fx.Node:
        """K as (B, H, Skv, D), from the transpose that the product reads."""
        source = _transposed(key_t)
        if source is not None:
            return self.operand(source)
        return self._call(aten.transpose.int, self.operand(key_t), -2, -1)

    def mask(self) -> fx.Node | None:
        """The sum of all masks, of rank 4, in float32 or the result's dtype; None when there is none."""
        total: fx.Node | None = None
        for mask in self.scores.masks:
            term = self._term(mask)
            total = term if total is None else self._call(aten.add.Tensor, total, term)
        return total

    def exact_mask(self, finite: bool) -> fx.Node:
        """All steps of masking in the model's order and dtypes: the sum overflows where the model's does."""
        total: fx.Node | None = None
        for mask in self.scores.masks:
            node = self._broadcastable(mask.node, mask)
            if mask.fill is None:
                node = self._scaled(node, mask)
                total = node if total is None else self._call(aten.add.Tensor, total, node)
            else:
                rest = 0.0 if total is None else total
                chosen = (mask.fill, rest) if mask.where else (rest, mask.fill)
                total = self._call(_WHERE[tuple(isinstance(each, fx.Node) for each in chosen)], node, *chosen)
            total = self._call(aten.to.dtype, total, mask.dtype)
        if total is None:
            raise ValueError("a site without masks")
        return self._narrow(total, self.scores.masks[-1].dtype) if finite else total

    def like_root(self, result: fx.Node, out: torch.Tensor) -> fx.Node:
        """(B, H, Sq, Dv) in the shape of the replaced product."""
        if out.dim() == 4:
            return result
        if len(self.scores.shape) == 3:
            return self._call(aten.squeeze.dim, result, 0)
        return self._call(aten.flatten.using_ints, result, 0, 1)

    @property
    def _flat(self) -> bool:
        """The product is of rank 3: batch and heads are one dimension."""
        return len(val(self.scores.query).shape) == 3

    def _rank4(self, node: fx.Node, val_rank: int) -> fx.Node:
        if val_rank == 4:
            return node
        if len(self.scores.shape) == 3:
            return self._call(aten.unsqueeze.default, node, 0)
        return self._call(aten.unflatten.int, node, 0, [-1, self.scores.shape[1]])

    def _term(self, mask: Mask) -> fx.Node:
        node = self._filled(mask) if mask.fill is not None else mask.node
        if mask.fill is None:
            node = self._scaled(self._narrow(node, facts.dtype(mask.node)), mask)
        return self._broadcastable(node, mask)

    def _scaled(self, node: fx.Node, mask: Mask) -> fx.Node:
        if mask.factor.is_one:
            return node
        return self._call(aten.mul.Scalar, node, mask.factor.build(self.graph))

    def _broadcastable(self, node: fx.Node, mask: Mask) -> fx.Node:
        """A mask as the site has it, with four dimensions."""
        rank = val(mask.node).dim()
        if rank == 3 and mask.rank == 3 and not facts.same_size(val(mask.node).shape[0], 1):
            return self._rank4(node, val_rank=3)
        for _ in range(4 - rank):
            node = self._call(aten.unsqueeze.default, node, 0)
        return node

    def _filled(self, mask: Mask) -> fx.Node:
        lowest = torch.finfo(self.dtype).min
        fill = max(mask.fill or 0.0, lowest)
        values = (fill, 0.0) if mask.where else (0.0, fill)
        chosen = self._call(aten.where.Scalar, mask.node, *values)
        return self._call(aten.to.dtype, chosen, self.dtype)

    def _narrow(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """float32 masks stay on the CPU, whose kernels take them; elsewhere a mask has the dtype of Q."""
        on_cpu = val(self.scores.query).device.type == "cpu"
        if dtype == self.dtype or (on_cpu and dtype == torch.float32):
            return node
        low = self._call(aten.clamp.default, node, torch.finfo(self.dtype).min)
        return self._call(aten.to.dtype, low, self.dtype)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)


def _transposed(node: fx.Node) -> fx.Node | None:
    """The source of a transposition of the last two dimensions."""
    rank = val(node).dim()
    if is_call(node, aten.transpose.int):
        dims = {int(dim) % rank for dim in node.args[1:3]}  # type: ignore[arg-type]
        return node.args[0] if dims == {rank - 2, rank - 1} else None  # type: ignore[return-value]
    if is_call(node, aten.permute.default):
        order = [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr, arg-type]
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        return node.args[0] if order == swapped else None  # type: ignore[return-value]
    if is_call(node, aten.mT.default, aten.adjoint.default):
        return node.args[0]  # type: ignore[return-value]
    return None
