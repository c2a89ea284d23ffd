"""A softmax, called by name or spelled out, and what it is taken of.

``exp(x - max(x)) / sum(exp(x - max(x)))`` is one, and so is ``exp(x - logsumexp(x))``. With ``exp(-max(x))``
added to the sum, or 1 where no maximum is subtracted, it is that of x beside one more score of 0: a sink of 0
for each head. A maximum may be subtracted in front of any of them, which changes nothing.

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

from .attention_parts import readers, seen
from .attention_products import PRODUCTS
from .attention_steps import constant

aten = torch.ops.aten

SOFTMAXES = (aten.softmax.int, aten._softmax.default)
SPELLED_OUT = (aten.div.Tensor, aten.exp.default, aten.div_.Tensor)

_LOGARITHMS = (aten.log_softmax.int, aten._log_softmax.default)
_SUMS = (aten.sum.dim_IntList, aten.sum.default)
# What may be done to a sum before something is divided by it.
_OF_SUMS = (
    aten.add.Tensor, aten.add.Scalar, aten.clamp_min.default, aten.clamp.default, aten.unsqueeze.default,
    *facts.CASTS,
)  # fmt: skip
# Casts, dropout and views, and a few more, between probabilities and their product with V.
_REACH = 6


@dataclass(frozen=True)
class Softmax:
    """`scores` are what it is taken of, `top` the node that has them last, whose readers make the softmax.

    `sink` is one more score for each row, whose share is dropped; `keeps_nan` says that a row of -inf gives
    NaN with that sink too. `by_logarithm`: by subtracting the logarithm of the sum, in which low scores of a
    row of nothing else absorb the number of keys: they have shares of 1 each.
    """

    top: fx.Node
    scores: fx.Node
    sink: float | None = None
    keeps_nan: bool = False
    by_logarithm: bool = False


def read_softmax(node: fx.Node) -> Softmax | Miss | None:
    """What a softmax over the last dimension is taken of; None when the node is no softmax."""
    if is_call(node, *SOFTMAXES):
        if not facts.is_last_dim(node, argument(node, "dim")):
            return Miss("a softmax over the last dimension", f"dim {argument(node, 'dim')}")
        return Softmax(node.args[0], node.args[0])  # type: ignore[arg-type]
    if is_call(node, aten.exp.default):
        return _of_logarithms(node) or _divided_later(node)
    if is_call(node, aten.div_.Tensor):
        return _in_place(node)
    shares: Any = node.args[0]
    divisor: Any = node.args[1]
    if not is_call(shares, aten.exp.default) or not _has_sum(divisor, shares):
        return None
    found = _spelled_out(node, shares, divisor)
    if found is None and _leads_to_product(node):
        return Miss("a softmax as exp(x - max(x)) over its sum", seen(divisor))
    return found


def _in_place(node: fx.Node) -> Miss | None:
    """A division of exponentials by their sum that is written over them, and that somebody else may see."""
    written: Any = node.args[0]
    if not is_call(written, aten.exp.default, aten.exp_.default) or not _leads_to_product(node):
        return None
    return Miss("a softmax that nothing writes into", seen(node))


def _of_logarithms(node: fx.Node) -> Softmax | Miss | None:
    """``exp(log_softmax(x))``, or ``exp(x - logsumexp(x))``"""
    logs: Any = node.args[0]
    total = _subtracted_logsumexp(logs)
    if (total is None and not is_call(logs, *_LOGARITHMS)) or not _leads_to_product(node):
        return None
    if total is not None:
        source: Any = logs.args[0]
        alone = set(source.users) == {logs, total} and len(total.users) == len(logs.users) == 1
        found = Softmax(logs, source, by_logarithm=True)
        return found if alone else Miss("scores that only the softmax reads", readers(source))
    if set(logs.users) != {node} or not facts.is_last_dim(logs, argument(logs, "dim")):
        return Miss("the exponential of a softmax's logarithm alone", seen(logs))
    return Softmax(logs.args[0], logs.args[0])


def _subtracted_logsumexp(logs: Any) -> fx.Node | None:
    """The logsumexp of ``x - logsumexp(x)`` over the last dimension."""
    if not is_call(logs, aten.sub.Tensor) or not facts.is_number(argument(logs, "alpha"), 1):
        return None
    total, kept = _per_row(logs.args[1])
    found = is_call(total, aten.logsumexp.default) and _reduces_last(total, kept)
    return total if found and total.args[0] is logs.args[0] else None


def _per_row(node: Any) -> tuple[Any, bool]:
    """What is under a dimension that is put back at the end, and whether there is none: then it was kept."""
    if is_call(node, aten.unsqueeze.default) and facts.is_last_dim(node, node.args[1]):
        return node.args[0], False
    return node, True


def _divided_later(node: fx.Node) -> Miss | None:
    """Weights ``exp(x - m)`` that a product reads beside a sum: attention, block by block perhaps."""
    casts = [user for user in node.users if facts.is_cast(user)]
    read = [each for value in (node, *casts) for each in value.users]
    product = next((each for each in read if is_call(each, *PRODUCTS)), None)
    sums = [each for each in read if is_call(each, aten.sum.dim_IntList)]
    if product is None or not any(_reduces_last(each, kept) for each in sums for kept in (False, True)):
        return None
    return Miss("a softmax, which is divided by its sum before the product with V", seen(product))


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
            if is_call(_per_row(first)[0], aten.sum.dim_IntList) and facts.is_number(
                argument(divisor, "alpha"), 1
            ):
                total, added = first, constant(second)
        if added is None or set(total.users) != {divisor} or set(divisor.users) != {node}:
            return None
    total, kept = _per_row(total)
    if not is_call(total, aten.sum.dim_IntList) or not _reduces_last(total, kept):
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
    node, kept = _per_row(_unaliased(node))
    node = _unaliased(node)
    if is_call(node, operator.getitem) and node.args[1] == 0:  # type: ignore[arg-type]
        node = node.args[0]
    found = is_call(node, aten.max.dim, aten.amax.default) and _reduces_last(node, kept)
    return node if found else None


def _unaliased(node: Any) -> Any:
    while is_call(node, aten.detach.default, aten.alias.default):
        node = node.args[0]
    return node


def _reduces_last(node: Any, kept: bool) -> bool:
    """`kept`: as a dimension of one entry."""
    dims = argument(node, "dim")
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    return (
        len(dims) == 1
        and facts.is_last_dim(node.args[0], dims[0])
        and bool(argument(node, "keepdim")) is kept
    )


def unshifted(node: fx.Node) -> fx.Node:
    """x of ``x - max(x, -1)``, where nothing else reads x; else the node itself."""
    if not is_call(node, aten.sub.Tensor) or not facts.is_number(argument(node, "alpha"), 1):
        return node
    source, top = node.all_input_nodes[0], _largest(node.args[1])
    return source if top is not None and top.args[0] is source and set(source.users) == {node, top} else node
