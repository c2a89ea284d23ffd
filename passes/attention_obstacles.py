"""What stands between a softmax and the product of Q and K: the first thing that differs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Miss
from fxopt.ir.facts import is_call, val

from .attention_parts import readers, seen
from .attention_products import PRODUCTS
from .attention_steps import SINGLE, read_fill

aten = torch.ops.aten

_TWO_SIDED = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
# How far up a product is looked for; scores of real models have it within half of this.
REACH = 16


def obstacle(node: fx.Node) -> Miss:
    """Why `node` does not lead to a product, followed through all that may be between."""
    while True:
        operand = _operand(node)
        if operand is None:
            return Miss("scale, mask and casts between QK^T and softmax", seen(node))
        if len(operand.users) != 1:
            return Miss("scores that only the softmax reads", readers(operand))
        if is_call(operand, *PRODUCTS, aten.baddbmm.default):
            return Miss("scale, mask and casts between QK^T and softmax", seen(node))
        node = operand


def _operand(node: fx.Node) -> fx.Node | None:
    """The operand of a step that has a product nearest above it."""
    fill = read_fill(node)
    if fill is not None:
        return fill[0] if isinstance(fill[0], fx.Node) else None
    if is_call(node, *SINGLE):
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    if not is_call(node, *_TWO_SIDED):
        return None
    wide = [arg for arg in node.args[:2] if _is_as_large(arg, node)]
    near = [(_distance(arg), place) for place, arg in enumerate(wide)]  # type: ignore[arg-type]
    reached = [each for each in near if each[0] is not None]
    return wide[min(reached)[1]] if reached else None  # type: ignore[return-value]


def _is_as_large(arg: Any, node: fx.Node) -> bool:
    return (
        facts.is_tensor(arg) and facts.is_floating(arg) and facts.same_shape(val(arg).shape, val(node).shape)
    )


def _distance(node: fx.Node) -> int | None:
    """How many operations above the next product is; None when it is too far."""
    layer = [node]
    for distance in range(REACH):
        if any(is_call(each, *PRODUCTS, aten.baddbmm.default) for each in layer):
            return distance
        layer = list(dict.fromkeys(arg for each in layer for arg in each.all_input_nodes))
    return None
