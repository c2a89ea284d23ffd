"""What is above a softmax in attention: the scores, read down to the product of Q and K.

Scores are read as ``score(factor * Q K^T) + sum of masks``: scalar factors, additive masks and filled masks
are collected in any order of nesting, on either operand; casts and reshapes that keep the rows are seen
through.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Miss
from fxopt.ir.facts import argument, is_call, is_number, val
from fxopt.ir.formula import S, exact
from fxopt.ir.program import ScoreProgram

from .attention_obstacles import obstacle
from .attention_parts import Factor, Mask, Scores, seen
from .attention_products import PRODUCTS, Operand, read_product
from .attention_steps import read_floor, read_scale, read_step

aten = torch.ops.aten


def read_scores(node: fx.Node, factor: Factor = Factor()) -> Scores | Miss:  # noqa: B008 - immutable
    """Read the input of a softmax. Each value on the way must have no other reader."""
    if node.op != "call_function" or not facts.is_tensor(node):
        return Miss(
            "a product of Q and K above the softmax", node.op if node.op != "call_function" else node.name
        )
    if is_call(node, *PRODUCTS):
        return _product(node, factor)
    if is_call(node, aten.baddbmm.default):
        return _baddbmm(node, factor)
    if is_call(node, aten.tanh.default):
        return _capped(node, factor)
    floored = read_floor(node)
    if floored is not None:
        found = _read_below(floored, factor)
        return found if isinstance(found, Miss) else replace(found, floored=True)
    step = read_step(node, factor)
    if step is None:
        return obstacle(node)
    inner, inner_factor, masks = step
    found = _read_below(inner, inner_factor)
    if isinstance(found, Miss):
        return found
    found.masks += masks
    lead = tuple(val(node).shape[:-2])
    if len(lead) >= len(found.lead):
        found.lead = lead
    return found


def _read_below(inner: fx.Node, factor: Factor) -> Scores | Miss:
    if len(inner.users) != 1:
        return Miss("scores that only the softmax reads", f"{inner.name} is read {len(inner.users)} times")
    return read_scores(inner, factor)


def _capped(node: fx.Node, factor: Factor) -> Scores | Miss:
    """``factor * tanh(scores)``, which is c * tanh(s / c) for c = factor and s = c * scores."""
    if not factor.is_number or factor.number == 0:
        return Miss("a softcap of numbers", f"tanh times a tensor, a symbol or zero ({facts.location(node)})")
    found = _read_below(node.args[0], Factor())  # type: ignore[arg-type]
    if isinstance(found, Miss):
        return found
    if found.masks:
        return Miss("a softcap of scores without a mask", f"a mask inside of {seen(node)}")
    if found.score != ScoreProgram(S):
        return Miss("one softcap", f"another in {seen(node)}")
    cap = exact(abs(factor.number))
    found.score = ScoreProgram(cap * sympy.tanh(S / cap))
    found.factor = found.factor.times(factor.number)
    return found


def _operand(operand: Operand, factor: Factor) -> tuple[Operand, Factor]:
    """Through casts that keep every value and scalar factors of one operand of the product."""
    node: Any = operand.node
    while isinstance(node, fx.Node):
        if facts.is_float_cast(node) and facts.is_widening(node):
            node = node.args[0]
            continue
        scaled = read_scale(node, factor)
        if scaled is None:
            break
        node, factor = scaled
    return replace(operand, node=node), factor


def _product(node: fx.Node, factor: Factor) -> Scores | Miss:
    found = read_product(node)
    if isinstance(found, Miss):
        return found
    found = found if found.is_ordered else found.swapped
    if not found.is_ordered:
        return Miss("scores with queries as rows and keys as columns, last", seen(node))
    query, factor = _operand(found.left, factor)
    key, factor = _operand(found.right, factor)
    return Scores(query, key, factor, node, lead=tuple(val(node).shape[:-2]))


def _baddbmm(node: fx.Node, factor: Factor) -> Scores | Miss:
    """beta * input + alpha * (b1 @ b2)."""
    beta, alpha = argument(node, "beta"), argument(node, "alpha")
    if not facts.is_scalar(beta) or not facts.is_scalar(alpha):
        return Miss("beta and alpha that are numbers", f"beta {beta}, alpha {alpha}")
    own = (0, 1, 2)
    query, scaled = _operand(Operand(node.args[1], own), factor.times(alpha))  # type: ignore[arg-type]
    key, scaled = _operand(Operand(node.args[2], own).transposed, scaled)  # type: ignore[arg-type]
    lead = tuple(val(node).shape[:-2])
    added = Mask(node.args[0], lead, facts.dtype(node), factor.times(beta))  # type: ignore[arg-type]
    return Scores(query, key, scaled, node, [] if is_number(beta, 0) else [added], lead=lead)
