"""Attention sinks: one more key for each head, with a learned score and a value of 0.

Spelled as one more column of the scores, ``softmax(cat([scores, sinks], -1))[..., :-1] V``, or as a factor of
the result, ``softmax(scores) V * sigmoid(logsumexp(scores) - sinks)``: the share of the keys in the sum with
the sink. Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Miss
from fxopt.ir.facts import Size, argument, is_call, val

from .attention_parts import seen
from .attention_softmax import unshifted
from .attention_steps import VIEWS

aten = torch.ops.aten


@dataclass(frozen=True)
class Column:
    """The scores in front of a column of sinks, or all of them when there is no such column."""

    scores: fx.Node
    sinks: fx.Node | None = None


def read_column(node: fx.Node) -> Column | Miss:
    """Of what a softmax is taken. A maximum that is subtracted changes nothing."""
    while not is_call(node, aten.cat.default):
        inner = unshifted(node)
        if inner is node:
            if not facts.is_float_cast(node) or len(node.args[0].users) != 1:  # type: ignore[union-attr]
                return Column(node)
            inner = node.args[0]  # type: ignore[assignment]
        node = inner
    parts: Any = node.args[0]
    if len(parts) != 2 or not facts.is_last_dim(node, argument(node, "dim")):
        return Miss("one column of sinks beside the scores", seen(node))
    scores, sinks = parts
    if not facts.same_size(val(sinks).shape[-1], 1):
        return Miss("one column of sinks beside the scores", f"{val(sinks).shape[-1]} of {seen(node)}")
    if set(scores.users) != {node}:
        return Miss("scores that only the softmax reads", f"{scores.name} is read {len(scores.users)} times")
    return Column(scores, sinks)


@dataclass(frozen=True)
class Gate:
    """``result * sigmoid(logsumexp(scores) - sinks)``. `root` is the product."""

    root: fx.Node
    sinks: fx.Node
    trailing: int  # dimensions after that of the heads


def read_gate(scores: fx.Node, softmax: fx.Node, result: fx.Node) -> Gate | Miss:
    """The factor of `result` that makes the other reader of `scores` one of sinks."""
    total = next(user for user in scores.users if user is not softmax)
    if not is_call(total, aten.logsumexp.default) or len(total.users) != 1:
        return Miss("scores that only the softmax reads", f"{total.name} reads {scores.name} too")
    root = facts.only_user(result)
    if root is None or not is_call(root, aten.mul.Tensor):
        return Miss("a product of the result with the share of its keys", seen(root or result))
    for first, gate in facts.commuted(root):
        if first is not result or not facts.same_shape(val(gate).shape, (*val(root).shape[:-1], 1)):
            continue
        sinks = _gate_sinks(gate, total)
        if sinks is not None:
            return Gate(root, sinks, val(total).dim() - 2)
    return Miss("sigmoid(logsumexp(scores) - sinks) as factor of the result", seen(root))


def _gate_sinks(node: Any, total: fx.Node) -> fx.Node | None:
    """Whatever `total`, over the last dimension of the scores, is compared with."""
    node = _single(node, aten.unsqueeze.default)
    if not is_call(node, aten.sigmoid.default):
        return None
    node = _single(node.args[0])
    if not is_call(node, aten.sub.Tensor) or not facts.is_number(argument(node, "alpha"), 1):
        return None
    source: Any = total.args[0]
    dims: Any = total.args[1]
    if node.args[0] is not total or len(dims) != 1 or not facts.is_last_dim(source, dims[0]):
        return None
    sinks: Any = node.args[1]
    return sinks if facts.is_tensor(sinks) else None


def _single(node: Any, *also: Any) -> Any:
    """Through casts and `also`, while nobody else reads them."""
    while isinstance(node, fx.Node) and (facts.is_float_cast(node) or is_call(node, *also)):
        if len(node.users) != 1:
            return None
        node = node.args[0]
    return node


def per_head(sinks: fx.Node, heads: Size, trailing: int) -> fx.Node | None:
    """The tensor with one number for each head that `sinks` repeats, or None.

    `trailing`: how many dimensions follow that of the heads.
    """
    node = sinks
    while is_call(node, aten.expand.default, aten.contiguous.default) or facts.is_float_cast(node):
        if facts.is_float_cast(node) and not facts.is_widening(node):
            break
        node = node.args[0]  # type: ignore[assignment]
    sizes = val(node).shape
    wanted = [heads if place == len(sizes) - 1 - trailing else 1 for place in range(len(sizes))]
    if len(sizes) <= trailing or not facts.same_shape(sizes, wanted):
        return None
    source = node
    while is_call(source, *VIEWS, aten.unsqueeze.default):
        source = source.args[0]  # type: ignore[assignment]
    return source if val(source).dim() == 1 else node
