"""An in-place op on a value that nobody else sees -> the op that returns its result.

``scores += bias`` and ``scores.masked_fill_(mask, low)`` are how many models save memory. The write orders
the graph around it, and hides from the passes below that the scores are an ordinary sum. On a value that the
graph made itself, and that nothing reads through another name after the write, both say the same.

A mask of attention may be written part by part, ``mask[:, :4] = True``: whoever reads it later, by any name,
then reads a new tensor with that part in its place. Where no pass makes use of that, the write comes back at
the end (`frontend/restore_writes.py`).

Writes that can be seen (to inputs, parameters, buffers, caches, a view of something that is read later) stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Verdict
from fxopt.ir.facts import argument, is_call, location, val
from fxopt.ir.index_rules import RULES
from fxopt.ir.propagate import equivalent
from fxopt.ir.views import base_of, views_of
from fxopt.ir.writes import CAST_BY_AUTOCAST, FILLS, PURE

from .attention_softmax import SOFTMAXES
from .attention_steps import constant
from .written_views import can_put_back, can_view_again, put_back, view_again

aten = torch.ops.aten

COPY = aten.copy_.default
SDPA = aten.scaled_dot_product_attention.default
# How many readers of a mask are looked at on the way to an attention.
REACH = 256
# More would take long to compile, and no pass makes use of them.
MOST_WRITES = 12


@dataclass(frozen=True)
class FunctionalizeWrites:
    """The op that returns its result, instead of the one that writes it into its first operand."""

    name: ClassVar[str] = "functionalize-writes"
    anchors: ClassVar[tuple[OpOverload, ...]] = (*PURE, *FILLS)
    after: ClassVar[tuple[str, ...]] = ()

    def match(self, node: fx.Node) -> Match | None:
        written = node.args[0]
        if not facts.is_tensor(written):
            return None
        views = views_of(base_of(written))  # type: ignore[arg-type]
        read = [view for view in views if _reads_after(view, node) is not None]
        masks = (bool(read) or node.target in FILLS) and _masks_attention((*read, node), node)
        if node.target in FILLS and not masks:
            return None
        values = {"views": views, "read": read, "masks": masks}
        return Match(node, (*read, node), values, since=node)

    def legal(self, match: Match, ctx: Context) -> Verdict:
        node, base = match.anchor, match["views"][0]
        if ctx.facts.needs_grad:
            modes = map(ctx.facts.mode_at, (node, node.args[0], base))
            if len(set(modes)) > 1:
                return Verdict.no("wanted one grad mode, saw a value that is written in another than its own")
        for other in ctx.facts.sharing(base):
            if other.op != "call_function":
                return Verdict.no(f"wanted a value that the graph made, saw {other.name}, an input of it")
            reader = _reads_after(other, node)
            if reader is not None and not (match["masks"] and other in match["read"]):
                return Verdict.no(
                    f"{reader.name} ({location(reader)}) reads what was written through {other.name}"
                )
        if node.target in CAST_BY_AUTOCAST and _under_autocast(node, ctx):
            return Verdict.no(f"wanted an op that autocast leaves as it is, saw {node.target} in its region")
        if match["masks"]:
            return _of_a_mask(match)
        if not equivalent(_pure(node).to(facts.dtype(node)), val(node)):
            return Verdict.no("wanted a result in the layout of what is written, saw another")
        return Verdict.yes("made in the graph, read through nothing else")

    def profit(self, match: Match, ctx: Context) -> Verdict:
        return Verdict.yes()

    def replace(self, match: Match, graph: fx.Graph) -> tuple[fx.Node, ...]:
        node, read = match.anchor, match["read"]
        written: fx.Node = node.args[0]  # type: ignore[assignment]
        part = _result(graph, node)
        if not read:
            return (part,)
        whole = put_back(graph, written, part)
        later = view_again(graph, written, whole) if node.users else part
        return (*(view_again(graph, view, whole) for view in read), later)


def _under_autocast(node: fx.Node, ctx: Context) -> bool:
    """In a region of the graph, or where the graph itself is called in one."""
    return ctx.facts.in_autocast(node) or torch.is_autocast_enabled(val(node).device.type)


def _reads_after(value: fx.Node, write: fx.Node) -> fx.Node | None:
    """Who reads `value`, made before `write`, after it."""
    return next((user for user in value.users if write < user), None) if value < write else None


def _of_a_mask(match: Match) -> Verdict:
    """Whether the later readers of a mask can be given a new one."""
    node, views = match.anchor, match["views"]
    written: fx.Node = node.args[0]  # type: ignore[assignment]
    writes = [user for view in views for user in view.users if facts.is_write(user)]
    if len(writes) > MOST_WRITES:
        return Verdict.no(f"wanted a mask written in {MOST_WRITES} parts or less, saw {len(writes)}")
    if match["read"] and not (can_put_back(written) and all(map(can_view_again, match["read"]))):
        return Verdict.no(f"wanted a slice of a mask, saw {written.name}, another view of {views[0].name}")
    if free_unbacked_symbols(val(written)):
        return Verdict.no(f"wanted a slice whose ends are known, saw {written.name}, which data decide on")
    with val(written).fake_mode:
        dense = torch.empty_like(val(views[0]))
    if not facts.same_strides(val(views[0]), dense):
        return Verdict.no(f"wanted a mask without gaps in memory, saw {views[0].name}")
    if node.target is COPY and val(node.args[1]).device != val(node).device:
        return Verdict.no(f"wanted a copy on one device, saw one from {val(node.args[1]).device}")
    return Verdict.yes("a mask of an attention")


def _masks_attention(read: Iterable[fx.Node], write: fx.Node) -> bool:
    """What is read after a write is a mask: operations that masks are made of lead to an attention."""
    pending = [(view, user) for view in read for user in view.users if write < user]
    found = dict.fromkeys(pending)
    while pending and len(found) < REACH:
        value, reader = pending.pop()
        if is_call(reader, *SOFTMAXES) or isinstance(reader.target, HigherOrderOperator):
            return True
        if is_call(reader, SDPA) and argument(reader, "attn_mask") is value:
            return True
        if reader.target not in RULES and not facts.is_write(reader):
            continue
        changed = views_of(base_of(reader)) if facts.is_write(reader) else [reader]
        new = [(each, user) for each in changed for user in each.users if reader < user]
        pending += [edge for edge in new if edge not in found]
        found |= dict.fromkeys(new)
    return False


def _result(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What is written, in the shape and dtype of the place that it is written to."""
    wanted = facts.dtype(node)
    written: Any = node.args[0]
    if node.target in PURE:
        result = graph.call_function(PURE[node.target], node.args, node.kwargs)
        return result if _pure(node).dtype == wanted else graph.call_function(aten.to.dtype, (result, wanted))
    value: Any = 0 if node.target is aten.zero_.default else constant(node.args[1])
    if facts.is_scalar(value) or isinstance(value, bool):
        return graph.call_function(aten.fill.Scalar, (written, value))
    if facts.dtype(value) != wanted:
        value = graph.call_function(aten.to.dtype, (value, wanted))
    # A tensor of its own, that is written to later perhaps.
    whole = graph.call_function(aten.expand_as.default, (value, written))
    return graph.call_function(aten.clone.default, (whole,), {"memory_format": torch.contiguous_format})


def _pure(node: fx.Node) -> torch.Tensor:
    """What the op that does not write gives. The one that writes computes in its dtype, and rounds once."""
    with val(node.args[0]).fake_mode:
        arguments = [val(arg) if isinstance(arg, fx.Node) else arg for arg in node.args]
        result: torch.Tensor = PURE[node.target](*arguments, **node.kwargs)  # type: ignore[index]
    return result
