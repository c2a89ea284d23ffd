"""Whether a number that excludes a key stands in the place of the bias there, or is added to it.

The score is the same. The gradient is not, in a row without a live key: a bias that was replaced gets none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.facts import argument, is_call
from fxopt.ir.ops.attention_providers import reaches_grad

from .attention_masks import EXCLUDES, fills

aten = torch.ops.aten

_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_CHOICES: dict[Any, tuple[str, str]] = {
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), ("self", "other")),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), ("self", "value")),
}
_VIEWS = (
    aten.clone.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
)
DEPTH = 40


def bias_is_replaced(mask: fx.Node) -> bool | None:
    """Of the parts of a mask that get a gradient; None where it is not known, or differs."""
    found = _fates(mask, DEPTH)
    return found.pop() if len(found) == 1 else None


def _fates(node: fx.Node, depth: int) -> set[bool]:
    if not fills(node) or not reaches_grad(node):
        return set()
    if depth == 0 or facts.is_write(node):
        return {True, False}
    if node.op == "placeholder":
        outer = node.meta.get("fxopt_outer", ())
        return set().union(*(_fates(each, depth - 1) for each in outer))
    if is_call(node, *_SUMS):
        return _of_terms(node.args[:2], depth, replaced=False)
    names = _CHOICES.get(node.target)
    if names is not None:
        return _of_terms(tuple(argument(node, name) for name in names), depth, replaced=True)
    if is_call(node, *_VIEWS) or facts.is_cast(node):
        return _fates(node.args[0], depth - 1)  # type: ignore[arg-type]
    return {True, False}


def _of_terms(terms: tuple[object, ...], depth: int, *, replaced: bool) -> set[bool]:
    """Of two terms, one of which may exclude keys where the other one is a bias."""
    found: set[bool] = set()
    for term, other in zip(terms, reversed(terms), strict=True):
        if not isinstance(term, fx.Node) or not reaches_grad(term):
            continue
        found |= _fates(term, depth - 1)
        if _excludes(other):
            found.add(replaced)
    return found


def _excludes(term: object) -> bool:
    if isinstance(term, fx.Node):
        return fills(term) > 0
    return isinstance(term, float | int) and abs(term) >= EXCLUDES
