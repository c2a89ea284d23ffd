"""What is known of an additive mask from the operations that make it: is it finite, does it exclude keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.facts import is_call, is_number

aten = torch.ops.aten

_WHERES = (aten.where.ScalarOther, aten.where.self, aten.where.ScalarSelf, aten.where.Scalar)
_FILLS = (aten.full.default, aten.full_like.default, aten.new_full.default)
_CREATES = (
    aten.zeros.default,
    aten.ones.default,
    aten.arange.default,
    aten.arange.start,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
)
_MAY_OVERFLOW = (aten.log.default, aten.exp.default, aten.reciprocal.default, aten.pow.Tensor_Scalar,
                 aten.tan.default, aten.rsqrt.default)  # fmt: skip
# A number this low excludes a key: no score outweighs it. Smaller fills (-1e4, -100) are biases.
EXCLUDES = 1e9
DEPTH = 40


def is_finite(node: Any, depth: int = DEPTH) -> bool:
    """No entry is infinite, as far as the operations tell. Of the inputs only parameters are taken to be."""
    if is_number(node):
        return math.isfinite(node)
    if depth == 0 or not isinstance(node, fx.Node) or facts.is_write(node):
        return False
    if node.op == "placeholder":
        return _finite_input(node, depth)
    if node.op != "call_function" or is_call(node, *_MAY_OVERFLOW):
        return False
    if is_call(node, *_CREATES):
        return True
    if is_call(node, *_WHERES):
        return all(is_finite(arg, depth - 1) for arg in node.args[1:])
    if is_call(node, *_FILLS):
        return is_finite(node.args[2 if node.target is aten.new_full.default else 1], depth)
    if is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return is_finite(node.args[0], depth - 1) and is_finite(node.args[2], depth - 1)
    if is_call(node, aten.div.Tensor, aten.div.Scalar) and not is_number(node.args[1]):
        return False
    if _narrows(node) and fills(node.args[0]):
        return False  # the lowest float32 becomes -inf in bfloat16
    numbers = [arg for arg in node.args if is_number(arg)]
    floats = [arg for arg in node.all_input_nodes if facts.is_floating(arg)]
    return all(is_finite(arg, depth - 1) for arg in (*numbers, *floats))


def _finite_input(node: fx.Node, depth: int) -> bool:
    if node.meta.get("fxopt_parameter"):
        return True
    outer = node.meta.get("fxopt_outer", ())
    return bool(outer) and all(is_finite(each, depth - 1) for each in outer)


def _narrows(node: fx.Node) -> bool:
    return facts.is_cast(node) and not facts.is_widening(node)


def fills(node: Any, depth: int = DEPTH) -> int:
    """How often the lowest number may be added up in one entry: 0 for a bias, 1 for a mask, 2 overflows."""
    if is_number(node):
        return int(abs(node) >= EXCLUDES)
    if depth == 0 or not isinstance(node, fx.Node):
        return 0
    if node.op == "placeholder":
        return max((fills(each, depth - 1) for each in node.meta.get("fxopt_outer", ())), default=0)
    if node.op != "call_function" or not facts.is_floating(node):
        return 0
    counts = [fills(arg, depth - 1) for arg in node.args if is_number(arg) or isinstance(arg, fx.Node)]
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        return sum(counts)
    return max(counts, default=0)
