"""Ops that write into their first operand, and those that return what it would hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir.facts import is_call

aten = torch.ops.aten

# None of them is an op that autocast casts for.
_AS_THEY_ARE: dict[OpOverload, OpOverload] = {
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
    aten.clamp_min_.default: aten.clamp_min.default,
    aten.clamp_max_.default: aten.clamp_max.default,
    aten.abs_.default: aten.abs.default,
    aten.sqrt_.default: aten.sqrt.default,
    aten.gelu_.default: aten.gelu.default,
    aten.nan_to_num_.default: aten.nan_to_num.default,
    aten.tril_.default: aten.tril.default,
    aten.triu_.default: aten.triu.default,
    aten.logical_not_.default: aten.logical_not.default,
    aten.logical_and_.default: aten.logical_and.default,
    aten.logical_or_.default: aten.logical_or.default,
    aten.bitwise_and_.Tensor: aten.bitwise_and.Tensor,
    aten.bitwise_or_.Tensor: aten.bitwise_or.Tensor,
    aten.__iand__.Tensor: aten.__and__.Tensor,
    aten.__ior__.Tensor: aten.__or__.Tensor,
    aten.__iand__.Scalar: aten.__and__.Scalar,
    aten.__ior__.Scalar: aten.__or__.Scalar,
}
# Of these autocast converts the operands, on one device or another, and of those that write it does not.
CAST_BY_AUTOCAST: dict[OpOverload, OpOverload] = {
    aten.exp_.default: aten.exp.default,
    aten.log_.default: aten.log.default,
    aten.rsqrt_.default: aten.rsqrt.default,
    aten.reciprocal_.default: aten.reciprocal.default,
    aten.pow_.Scalar: aten.pow.Tensor_Scalar,
    aten.pow_.Tensor: aten.pow.Tensor_Tensor,
    aten.baddbmm_.default: aten.baddbmm.default,
}
PURE: dict[OpOverload, OpOverload] = _AS_THEY_ARE | CAST_BY_AUTOCAST

# These replace what was there: only masks that are written through views gain from doing without them.
FILLS = (aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default, aten.copy_.default)

SLICE_IN = aten.slice_scatter.default
# A tensor with another part in the place of a view -> that view. The arguments after the part are the same.
SCATTERS: dict[OpOverload, OpOverload] = {
    SLICE_IN: aten.slice.Tensor,
    aten.select_scatter.default: aten.select.int,
}

# Marks what stands for a write, with the key of a node's metadata.
STANDS_FOR_WRITE = "fxopt_write"


# Marks a write whose places are counted from the front, never from the end, with the key of its metadata.
COUNTED_ROWS = "fxopt_counted_rows"


def part_of(node: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """What a scatter puts into its first argument, through a view, a view of that view, and so on.

    Returns one scatter for each of these views, the outermost first, and the part.
    """
    steps = [node]
    while True:
        part: Any = steps[-1].args[1]
        if not is_call(part, *SCATTERS) or len(part.users) > 1 or not is_replaced(part.args[0], steps[-1]):
            return steps, part
        steps.append(part)


def is_replaced(view: Any, scatter: fx.Node) -> bool:
    """`scatter` puts its part in the place of `view`."""
    base, _, *place = scatter.args
    return is_call(view, SCATTERS[scatter.target]) and view.args == (base, *place)  # type: ignore[index]
