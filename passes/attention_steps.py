"""The steps between the product of Q and K and the softmax: scaling, masking, casts and views."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.facts import argument, is_call, is_number, val
from fxopt.ir.ops.masking import LOWEST_SHARE

from .attention_parts import Factor, Mask, Multiplier, keeps_rows
from .attention_products import PRODUCTS

aten = torch.ops.aten

VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
# What a trace makes of ``torch.tensor(number)``.
LITERALS = (aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach_.default, aten.detach.default)

Step = tuple[fx.Node, Factor, list[Mask]]


def read_step(node: fx.Node, factor: Factor) -> Step | None:
    """One operation between the product and the softmax: what is under it, its factor, the masks it adds."""
    if facts.is_float_cast(node):
        return node.args[0], factor, []  # type: ignore[return-value]
    if is_call(node, *VIEWS) and keeps_rows(node):
        return node.args[0], factor, []  # type: ignore[return-value]
    scaled = read_scale(node, factor)
    if scaled is not None:
        return *scaled, []
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        return _addition(node, factor)
    return _multiplied(node, factor) or _filled(node, factor)


def read_scale(node: fx.Node, factor: Factor) -> tuple[fx.Node, Factor] | None:
    """The operand of a product with, or a quotient by, a number; and `factor` with that number in it."""
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        for operand, number in facts.commuted(node):
            number = constant(number)
            if facts.is_tensor(operand) and facts.is_scalar(number):
                return operand, factor.times(number)
    if is_call(node, aten.div.Tensor, aten.div.Scalar):
        number = constant(node.args[1])
        if facts.is_scalar(number) and number != 0:
            return node.args[0], factor.divided(number)  # type: ignore[return-value]
    if is_call(node, aten.neg.default):
        return node.args[0], factor.times(-1)  # type: ignore[return-value]
    return None


def _multiplied(node: fx.Node, factor: Factor) -> Step | None:
    """The same for a tensor: a learned scale of each head, or zeros and ones in the place of a mask."""
    if not is_call(node, aten.mul.Tensor, aten.div.Tensor):
        return None
    divides = is_call(node, aten.div.Tensor)
    for operand, tensor in [node.args[:2]] if divides else facts.commuted(node):
        if _is_floating(operand, tensor) and _keeps_shape(operand, node) and _leads_to_product(operand):
            by = Multiplier(tensor, tuple(val(node).shape[:-2]), divides)  # type: ignore[arg-type]
            return operand, factor.scaled(by), []  # type: ignore[return-value]
    return None


def _is_floating(*nodes: Any) -> bool:
    return all(facts.is_tensor(node) and facts.is_floating(node) for node in nodes)


def _keeps_shape(operand: Any, node: fx.Node) -> bool:
    return facts.same_shape(val(operand).shape, val(node).shape)


def _addition(node: fx.Node, factor: Factor) -> Step | None:
    """The operand of a sum or difference that leads to the product, and the other one as a mask."""
    alpha, sign = argument(node, "alpha"), -1 if is_call(node, aten.sub.Tensor) else 1
    if not is_number(alpha):
        return None
    if is_number(node.args[1], 0):
        return node.args[0], factor, []  # type: ignore[return-value]
    first = (node.args[0], factor)
    second = (node.args[1], factor.times(sign * alpha))
    for (operand, own), (mask, of_mask) in ((first, second), (second, first)):
        if _is_floating(operand, mask) and _leads_to_product(operand):
            keeps = _keeps_shape(operand, node)
            return (operand, own, [_mask(mask, node, factor=of_mask)]) if keeps else None  # type: ignore[return-value, arg-type]
    return None


def _mask(mask: fx.Node, after: fx.Node, **more: Any) -> Mask:
    return Mask(mask, tuple(val(after).shape[:-2]), facts.dtype(after), **more)


# Operations through which scores are seen.
SINGLE = (*VIEWS, *facts.CASTS, aten.div.Tensor, aten.div.Scalar, aten.mul.Scalar, aten.neg.default,
           aten.tanh.default, aten.max.other, aten.maximum.default, aten.clamp.default,
           aten.clamp_min.default)  # fmt: skip


def _leads_to_product(node: Any, depth: int = 12) -> bool:
    """A cheap look upwards: Q K^T can be reached through single readers."""
    if depth == 0 or not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    if is_call(node, *PRODUCTS, aten.baddbmm.default):
        return True
    if is_call(node, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor):
        return any(_leads_to_product(arg, depth - 1) for arg in node.args[:2])
    filled = read_fill(node)
    if filled is not None:
        return _leads_to_product(filled[0], depth - 1)
    return is_call(node, *SINGLE) and _leads_to_product(node.args[0], depth - 1)


def _filled(node: fx.Node, factor: Factor) -> Step | None:
    """``masked_fill(scores, mask, fill)`` and ``where(mask, scores, fill)``, either way around."""
    read = read_fill(node)
    if read is None or not all(facts.is_tensor(each) for each in read[:2]):
        return None
    scores, mask, fill, where = read
    if math.isnan(fill) or fill == math.inf or not _keeps_shape(scores, node):
        return None
    if not is_absorbing(fill, facts.dtype(scores)):
        if not factor.is_number:
            return None
        fill *= factor.number
    elif not factor.is_positive:
        return None
    return scores, factor, [_mask(mask, node, fill=fill, where=where)]


def read_floor(node: fx.Node) -> fx.Node | None:
    """Scores that are raised to a number as low as masks have."""
    low: Any = None
    if is_call(node, aten.max.other, aten.maximum.default, aten.clamp_min.default):
        low = constant(node.args[1])
    elif is_call(node, aten.clamp.default) and argument(node, "max") is None:
        low = constant(argument(node, "min"))
    scores: Any = node.args[0] if low is not None else None
    if not is_number(low) or not _is_floating(scores) or not is_absorbing(low, facts.dtype(scores)):
        return None
    return scores  # type: ignore[no-any-return]


def read_fill(node: fx.Node) -> tuple[Any, Any, float, bool] | None:
    """(scores, mask, fill, where): the fill replaces where the mask is `where`."""
    if is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        scores, mask, fill = node.args[:3]
        return (scores, mask, float(constant(fill)), True) if is_number(constant(fill)) else None
    if not is_call(node, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.self):
        return None
    mask, first, second = node.args[:3]
    if is_number(constant(second)):
        return first, mask, float(constant(second)), False
    return (second, mask, float(constant(first)), True) if is_number(constant(first)) else None


def is_absorbing(fill: float, dtype: torch.dtype) -> bool:
    """So low that adding a score does not change it: to fill with it is to add it."""
    return fill <= torch.finfo(dtype).min * LOWEST_SHARE


def constant(node: Any) -> Any:
    """The number that a node is known to be, made by `full` or a tensor of one literal; else the node."""
    if not isinstance(node, fx.Node) or not facts.is_tensor(node) or val(node).dim() > 0:
        return node
    if is_call(node, aten.full.default, aten.scalar_tensor.default):
        return node.args[1] if is_call(node, aten.full.default) else node.args[0]
    if is_call(node, *LITERALS, *facts.CASTS):
        return constant(node.args[0])
    held = getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
    return held.item() if type(held) is torch.Tensor and len(node.users) == 1 else node
