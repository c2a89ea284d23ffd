"""What is known of an additive mask from the operations that make it: is it finite, does it exclude keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.facts import is_call, is_number
from fxopt.ir.known import known_value
from fxopt.ir.ops.masking import LOWEST_SHARE
from fxopt.ir.views import is_written
from fxopt.ir.writes import SCATTERS

from .attention_parts import Mask

aten = torch.ops.aten

_WHERES = (aten.where.ScalarOther, aten.where.self, aten.where.ScalarSelf, aten.where.Scalar)
_FILLS = (aten.full.default, aten.full_like.default, aten.new_full.default, aten.fill.Scalar)
# Their numbers are places.
_PARTS = (aten.slice.Tensor, aten.select.int, *SCATTERS)
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
# Sums of products of values that the model computes; parameters and they are taken to be finite.
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.linear.default, aten.einsum.default,
             aten.addmm.default, aten.baddbmm.default)  # fmt: skip
_MAY_OVERFLOW = (aten.log.default, aten.exp.default, aten.reciprocal.default, aten.pow.Tensor_Scalar,
                 aten.tan.default, aten.rsqrt.default)  # fmt: skip
# A number this low excludes a key: no score outweighs it. Smaller fills (-1e4, -100) are biases.
EXCLUDES = 1e9
DEPTH = 40


def never_infinite(masks: Sequence[Mask]) -> bool:
    """No sum of these steps of masking, the innermost first, holds -inf, as far as the operations tell."""
    lowest = 0
    for mask in masks:
        if mask.fill is None:
            lowest += fills(mask.node)
            if not (is_finite(mask.node) or _is_finite_constant(mask.node)) or lowest > 1:
                return False
        else:
            lowest = 1
            if not math.isfinite(mask.fill):
                return False
    return True


def commute(masks: Sequence[Mask]) -> bool:
    """The order of the steps makes no difference: at most one of them excludes keys."""
    return sum(mask.fill is not None or fills(mask.node) > 0 for mask in masks) <= 1


def replaces(masks: Sequence[Mask]) -> bool | None:
    """Whether the entries that exclude a key replace the score; None when some do and others are added."""
    filled = [mask.fill is not None for mask in masks]
    added = [mask.fill is None and not is_bias(mask.node) for mask in masks]
    return any(filled) if not (any(filled) and any(added)) else None


def is_bias(node: fx.Node) -> bool:
    """Without a number that excludes a key."""
    return fills(node) == 0 and (is_finite(node) or _is_finite_constant(node))


def _is_finite_constant(node: fx.Node) -> bool:
    """Made of nothing that differs from call to call, and finite: it is computed here."""
    value = known_value(node)
    return value is not None and bool(value.isfinite().all())


def is_finite(node: Any) -> bool:
    """No entry is infinite, as far as the operations tell. Parameters are taken to be, and learned inputs."""
    return _finite(node, DEPTH, {})


def _finite(node: Any, depth: int, known: dict[fx.Node, bool]) -> bool:
    if is_number(node):
        return math.isfinite(node)
    if depth == 0 or not isinstance(node, fx.Node) or facts.is_write(node):
        return False
    if node not in known:
        known[node] = _finite_call(node, depth - 1, known)
    return known[node]


def _finite_call(node: fx.Node, depth: int, known: dict[fx.Node, bool]) -> bool:
    if node.op == "placeholder":
        return _finite_input(node, depth, known)
    if node.op != "call_function" or is_call(node, *_MAY_OVERFLOW) or is_written(node):
        return False
    if is_call(node, *_CREATES) or _is_product(node):
        return True
    if is_call(node, *_WHERES):
        return all(_finite(arg, depth, known) for arg in node.args[1:])
    if is_call(node, *_FILLS):
        return _finite(node.args[2 if node.target is aten.new_full.default else 1], depth, known)
    if is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _finite(node.args[0], depth, known) and _finite(node.args[2], depth, known)
    if is_call(node, aten.div.Tensor, aten.div.Scalar):
        return _is_divisor(node.args[1]) and _finite(node.args[0], depth, known)
    if _narrows(node) and fills(node.args[0]):
        return False  # the lowest float32 becomes -inf in bfloat16
    numbers = [arg for arg in node.args if is_number(arg)]
    floats = [arg for arg in node.all_input_nodes if facts.is_floating(arg)]
    return all(_finite(arg, depth, known) for arg in (*numbers, *floats))


def _is_divisor(value: Any) -> bool:
    """A number, or a tensor of numbers that are known, none of them so small that a quotient may overflow."""
    if not isinstance(value, fx.Node):
        return is_number(value)
    known = known_value(value) if facts.is_tensor(value) else None
    return known is not None and bool((known.abs() >= 1e-3).all())


def _finite_input(node: fx.Node, depth: int, known: dict[fx.Node, bool]) -> bool:
    if node.meta.get("fxopt_parameter") or node.meta.get("fxopt_needs_grad"):
        return True
    outer = node.meta.get("fxopt_outer", ())
    return bool(outer) and all(_finite(each, depth, known) for each in outer)


def _narrows(node: fx.Node) -> bool:
    return facts.is_cast(node) and not facts.is_widening(node)


def fills(node: Any) -> int:
    """How often the lowest number may be added up in one entry: 0 for a bias, 1 for a mask, 2 overflows."""
    return _fills(node, DEPTH, {})


def _fills(node: Any, depth: int, known: dict[fx.Node, int]) -> int:
    if depth == 0 or not isinstance(node, fx.Node):
        return 0
    if node not in known:
        known[node] = _fills_of(node, depth - 1, known)
    return known[node]


def _fills_of(node: fx.Node, depth: int, known: dict[fx.Node, int]) -> int:
    if node.op == "placeholder":
        return max((_fills(each, depth, known) for each in node.meta.get("fxopt_outer", ())), default=0)
    if node.op != "call_function" or not facts.is_floating(node) or _is_product(node):
        return 0
    # float16's lowest number is a small one elsewhere.
    excludes = min(EXCLUDES, torch.finfo(facts.dtype(node)).max * LOWEST_SHARE)
    numbers: list[Any] = [] if is_call(node, *_PARTS) else [arg for arg in node.args if is_number(arg)]
    counts = [int(abs(number) >= excludes) for number in numbers]
    sums = is_call(node, aten.add.Tensor, aten.sub.Tensor)
    tensors = node.args[:2] if sums else node.all_input_nodes
    counts += [_fills(each, depth, known) for each in tensors]
    return sum(counts) if sums else max(counts, default=0)


def _is_product(node: fx.Node) -> bool:
    """Of several tensors; einsum may be a permutation of one."""
    return is_call(node, *_PRODUCTS) and len(node.all_input_nodes) > 1
