"""A softmax, called by name or spelled out, and what it is taken of.

``exp(x - max(x)) / sum(exp(x - max(x)))`` is one. With ``exp(-max(x))`` added to the sum, or 1 where no
maximum is subtracted, it is that of x beside one more score of 0: a sink of 0 for each head. A maximum may be
subtracted in front of any of them, which changes nothing.

Source of the added one: Miller, "Attention Is Off By One", 2023.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Miss
from fxopt.ir.facts import argument, is_call

from .attention_parts import seen
from .attention_products import PRODUCTS
from .attention_steps import constant

aten = torch.ops.aten

SOFTMAXES = (aten.softmax.int, aten._softmax.default)
SPELLED_OUT = (aten.div.Tensor, aten.exp.default)

_LOGARITHMS = (aten.log_softmax.int, aten._log_softmax.default)
_SUMS = (aten.sum.dim_IntList, aten.sum.default)
# What may be done to a sum before something is divided by it.
_OF_SUMS = (aten.add.Tensor, aten.add.Scalar, aten.clamp_min.default, aten.clamp.default, *facts.CASTS)
# Casts, dropout and views, and a few more, between probabilities and their product with V.
_REACH = 6


@dataclass(frozen=True)
class Softmax:
    """`scores` are what it is taken of, `top` the node that has them last, whose readers make the softmax.

    `sink` is one more score for each row, whose share is dropped; `keeps_nan` says that a row of -inf gives
    NaN with that sink too.
    """

    top: fx.Node
    scores: fx.Node
    sink: float | None = None
    keeps_nan: bool = False


def read_softmax(node: fx.Node) -> Softmax | Miss | None:
    """What a softmax over the last dimension is taken of; None when the node is no softmax."""
    if is_call(node, *SOFTMAXES):
        if not facts.is_last_dim(node, argument(node, "dim")):
            return Miss("a softmax over the last dimension", f"dim {argument(node, 'dim')}")
        return Softmax(node.args[0], node.args[0])  # type: ignore[arg-type]
    if is_call(node, aten.exp.default):
        return _of_logarithms(node)
    shares: Any = node.args[0]
    divisor: Any = node.args[1]
    if not is_call(shares, aten.exp.default) or not _has_sum(divisor, shares):
        return None
    found = _spelled_out(node, shares, divisor)
    if found is None and _leads_to_product(node):
        return Miss("a softmax as exp(x - max(x)) over its sum", seen(divisor))
    return found


def _of_logarithms(node: fx.Node) -> Softmax | Miss | None:
    """``exp(log_softmax(x))``"""
    logs: Any = node.args[0]
    if not is_call(logs, *_LOGARITHMS) or not _leads_to_product(node):
        return None
    if set(logs.users) != {node} or not facts.is_last_dim(logs, argument(logs, "dim")):
        return Miss("the exponential of a softmax's logarithm alone", seen(logs))
    return Softmax(logs.args[0], logs.args[0])


def _has_sum(divisor: Any, shares: fx.Node, depth: int = 3) -> bool:
    if is_call(divisor, *_SUMS):
        return divisor.args[0] is shares
    below = depth > 0 and is_call(divisor, *_OF_SUMS)
    return below and any(_has_sum(arg, shares, depth - 1) for arg in divisor.args[:2])


def _leads_to_product(node: fx.Node) -> bool:
    """A product reads it, through a few operations at most."""
    layer = [node]
    for _ in range(_REACH):
        layer = [user for each in layer for user in each.users]
        if any(is_call(user, *PRODUCTS) for user in layer):
            return True
    return False


def _spelled_out(node: fx.Node, shares: fx.Node, divisor: fx.Node) -> Softmax | None:
    total: Any = divisor
    added: Any = None
    if is_call(divisor, aten.add.Tensor, aten.add.Scalar):
        for first, second in facts.commuted(divisor):
            if is_call(first, aten.sum.dim_IntList) and facts.is_number(argument(divisor, "alpha"), 1):
                total, added = first, constant(second)
        if added is None or set(total.users) != {divisor} or set(divisor.users) != {node}:
            return None
    if not is_call(total, aten.sum.dim_IntList) or not _reduces_last(total):
        return None
    if set(shares.users) != {node, total}:
        return None
    top: Any = shares.args[0]
    if added is None:
        return None if unshifted(top) is top else Softmax(top, top)
    return _off_by_one(top, added)


def _off_by_one(top: Any, added: Any) -> Softmax | None:
    """With ``exp(-m)`` in the divisor, m what is subtracted from the scores."""
    if facts.is_number(added, 1):
        return Softmax(top, top, sink=0.0)
    shift: Any = top.args[1] if is_call(top, aten.sub.Tensor) else None
    exponent: Any = added.args[0] if is_call(added, aten.exp.default) else None
    if not is_call(exponent, aten.neg.default) or exponent.args[0] is not shift:
        return None
    if not facts.is_number(argument(top, "alpha"), 1) or set(shift.users) != {top, exponent}:
        return None
    floored = is_call(shift, aten.clamp.default, aten.clamp_min.default) and argument(shift, "max") is None
    floored = floored and facts.is_number(argument(shift, "min"), 0)
    source: fx.Node = top.args[0]
    largest = _largest(shift.args[0] if floored else shift)
    if largest is None or largest.args[0] is not source or set(source.users) != {top, largest}:
        return None
    return Softmax(top, source, sink=0.0, keeps_nan=not floored)


def _largest(node: Any) -> Any:
    """The maximum over the last dimension that `node` is, or None."""
    while is_call(node, aten.detach.default, aten.alias.default):
        node = node.args[0]
    if is_call(node, operator.getitem) and node.args[1] == 0:  # type: ignore[arg-type]
        node = node.args[0]
    return node if is_call(node, aten.max.dim, aten.amax.default) and _reduces_last(node) else None


def _reduces_last(node: Any) -> bool:
    dims = argument(node, "dim")
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    return len(dims) == 1 and facts.is_last_dim(node.args[0], dims[0]) and bool(argument(node, "keepdim"))


def unshifted(node: fx.Node) -> fx.Node:
    """x of ``x - max(x, -1)``, where nothing else reads x; else the node itself."""
    if not is_call(node, aten.sub.Tensor) or not facts.is_number(argument(node, "alpha"), 1):
        return node
    source, top = node.all_input_nodes[0], _largest(node.args[1])
    return source if top is not None and top.args[0] is source and set(source.users) == {node, top} else node
