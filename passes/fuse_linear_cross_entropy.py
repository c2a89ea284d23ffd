"""cross_entropy of the logits of a linear layer -> ``fxopt::linear_cross_entropy``, which never has them all.

Anchored on the loss: `cross_entropy`, or `nll_loss` of a `log_softmax`. Between it and the linear layer may
stand casts, a bias, a scale, a soft cap, and views that choose or reshape rows (the shift by a token); these
then act on the hidden states. Assumed: logits may stay in float32 where the model rounds them to a lower
dtype in between, and rows that the loss ignores hold no NaN.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.cost import hint, numel
from fxopt.ir.facts import argument, is_call, is_number, val
from fxopt.ir.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY

from .attention_steps import VIEWS
from .logits_of_loss import Logits, classes_last, logits_of

aten = torch.ops.aten

_LOG_LIKELIHOODS = (aten.nll_loss_nd.default, aten.nll_loss.default)

# Measured on one core, float32, hidden size 256: with gradients, logits that fill one chunk take as long as
# Inductor's, more of them less; without, Inductor's one loop is faster until its memory has to be found.
LEAST_WITH_GRADIENTS, LEAST_WITHOUT = 2**23, 2**26


@dataclass(frozen=True)
class FuseLinearCrossEntropy:
    """One semantic op for the last linear layer and the loss."""

    name: ClassVar[str] = "fuse-linear-cross-entropy"
    anchors: ClassVar[tuple[OpOverload, ...]] = (aten.cross_entropy_loss.default, *_LOG_LIKELIHOODS)
    after: ClassVar[tuple[str, ...]] = ("eliminate-noops", "simplify-views")

    def match(self, node: fx.Node) -> Match | Miss | None:
        spelled = is_call(node, *_LOG_LIKELIHOODS)
        if spelled and not _ends_in_log_softmax(node):
            return None
        refused = _unknown_loss(node)
        if refused is not None:
            return refused
        read = classes_last(node.args[0])  # type: ignore[arg-type]
        logits = (
            read if isinstance(read, Miss) else logits_of(read, aten.log_softmax.int if spelled else None)
        )
        return logits if isinstance(logits, Miss) else Match(node, (node,), {"logits": logits})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        logits: Logits = match["logits"]
        for node in (*logits.operands, match.anchor):
            if facts.dtype(node) not in facts.PLAIN_FLOATS:
                return Verdict.no(f"wanted floating numbers, saw {node.name} of {facts.dtype(node)}")
        stale = ctx.facts.unsafe_read(logits.operands, logits.product, match.anchor)
        return Verdict.no(stale) if stale else Verdict.yes("logits of a linear layer, read by the loss alone")

    def profit(self, match: Match, ctx: Context) -> Verdict:
        count = numel(val(match.anchor.args[0]))
        words = hint(val(match["logits"].product).shape[-1])
        seen = f"{count} logits ({count // max(1, words)} rows of {words})"
        trains = ctx.facts.differentiates(match.anchor)
        least = LEAST_WITH_GRADIENTS if trains else LEAST_WITHOUT
        if count < least:
            return Verdict.no(f"{seen}, pays from {least} {'with' if trains else 'without'} gradients")
        return Verdict.yes(f"{seen} are never in memory at once")

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        logits: Logits = match["logits"]
        loss = match.anchor
        computed = facts.dtype(logits.product)
        hidden, weight = (_cast(node, computed, graph) for node in (logits.hidden, logits.weight))
        bias = None if logits.bias is None else _cast(logits.bias, computed, graph)
        if logits.transposed:
            weight = graph.call_function(aten.t.default, (weight,))
        attributes = {
            "reduction": argument(loss, "reduction"),
            "ignore_index": argument(loss, "ignore_index"),
            "label_smoothing": argument(loss, "label_smoothing", 0.0),
            "scale": logits.scale,
            "softcap": logits.softcap,
            "compute_dtype": _widest(torch.float32, computed, facts.dtype(loss)),
            "out_dtype": facts.dtype(loss),
            "recompute": _in_subgraph(graph),
        }
        operands = (_chosen_rows(hidden, logits, graph), weight, bias, loss.args[1])
        return graph.call_function(LINEAR_CROSS_ENTROPY.overload, operands, attributes)


def _ends_in_log_softmax(loss: fx.Node) -> bool:
    """The loss reads a log-softmax, however viewed; of other numbers it is no cross-entropy."""
    read: Any = loss.args[0]
    while not is_call(read, aten.log_softmax.int):
        if read.op != "call_function" or not facts.is_tensor(read.args[0]):
            return False
        read = read.args[0]
    return True


def _unknown_loss(loss: fx.Node) -> Miss | None:
    target, classes = loss.args[1], argument(loss, "weight")
    if not facts.is_tensor(target) or facts.is_floating(target):  # type: ignore[arg-type]
        return Miss("targets that are indices", f"{target} of {facts.dtype(target)}")  # type: ignore[arg-type]
    if classes is not None:
        return Miss("a loss without weights of classes", str(classes))
    for name in ("ignore_index", "label_smoothing"):
        if not is_number(argument(loss, name, 0.0)):
            return Miss(f"a number as {name}", str(argument(loss, name)))
    return None


def _cast(node: fx.Node, dtype: torch.dtype, graph: fx.Graph) -> fx.Node:
    """As autocast does in front of the linear layer."""
    return node if facts.dtype(node) == dtype else graph.call_function(aten.to.dtype, (node, dtype))


def _chosen_rows(hidden: fx.Node, logits: Logits, graph: fx.Graph) -> fx.Node:
    """The hidden states of the rows that the loss reads."""
    node, width = hidden, val(logits.hidden).shape[-1]
    if not isinstance(width, int):
        width = graph.call_function(aten.sym_size.int, (node, facts.rank(logits.hidden) - 1))
    for step in logits.rows:
        if is_call(step, *VIEWS):
            node = graph.call_function(aten.reshape.default, (node, [*step.args[1][:-1], width]))  # type: ignore[index,misc]
        else:
            node = graph.call_function(step.target, (node, *step.args[1:]), dict(step.kwargs))  # type: ignore[arg-type]
    return node


def _widest(*dtypes: torch.dtype) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)


def _in_subgraph(graph: fx.Graph) -> bool:
    """In a part of the model that is run again in the backward, or may be."""
    return any("fxopt_outer" in node.meta for node in graph.find_nodes(op="placeholder"))
