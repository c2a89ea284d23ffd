"""K and V repeated for every query head of their group -> grouped attention, in which they are read once.

``x[:, :, None].expand(B, Hkv, G, S, D).reshape(B, Hkv * G, S, D)`` is a copy of G times the keys. Query
head h then reads key head h // G, which is what ``enable_gqa`` means. One head of keys that broadcasts to
those of Q is such a group, too: fused kernels know groups, and do not broadcast. Assumed: nothing beyond that
order of repetition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.cost import hint, numel
from fxopt.ir.facts import argument, is_call, val
from fxopt.ir.ops.attention import ATTENTION

from .attention_steps import VIEWS

aten = torch.ops.aten

_COPIES = (aten.contiguous.default, aten.clone.default)


@dataclass(frozen=True)
class Repeat:
    """`source` has each head once, in dimension 1, or 2 if `transposed`; each serves `groups` heads.

    `first` is the operation of the repetition that reads `source`.
    """

    node: fx.Node
    first: fx.Node
    source: fx.Node
    groups: facts.Size
    transposed: bool


@dataclass(frozen=True)
class RemoveRepeatKv:
    """Grouped attention instead of repeated keys and values."""

    name: ClassVar[str] = "remove-repeat-kv"
    after: ClassVar[tuple[str, ...]] = ("rewrite-attention",)

    @property
    def anchors(self) -> tuple[OpOverload, ...]:
        return (ATTENTION.overload,)

    def match(self, node: fx.Node) -> Match | Miss | None:
        key, value = find_repeat(node.args[1]), find_repeat(node.args[2])
        if key is None and value is None:
            return Match(node, (node,), {"broadcast": True}) if _broadcasts(node) else None
        if key is None or value is None:
            return Miss("K and V both repeated", f"only {'V' if key is None else 'K'}")
        if not facts.same_size(key.groups, value.groups):
            return Miss("K and V repeated alike", f"{key.groups} and {value.groups} times")
        if argument(node, "enable_gqa"):
            return Miss("one repetition", "repeated heads in a grouped attention")
        return Match(node, (node,), {"broadcast": False, "key": key, "value": value})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        if match["broadcast"]:
            if val(match.anchor).dtype is torch.float32 and ctx.facts.differentiates(match.anchor):
                return Verdict.no("kernels have gradients less exact than the form that broadcasts")
            return Verdict.yes()
        for repeat in (match["key"], match["value"]):
            # A write in front of the repetition is in what it reads.
            stale = ctx.facts.unsafe_read([repeat.source], repeat.first, match.anchor)
            if stale:
                return Verdict.no(stale)
        return Verdict.yes()

    def profit(self, match: Match, ctx: Context) -> Verdict:
        if match["broadcast"]:
            return Verdict.yes("kernels read one head of keys for all of Q")
        saved = sum(
            (numel(val(r.node)) - numel(val(r.source))) * val(r.node).element_size()
            for r in (match["key"], match["value"])
        )
        return Verdict.yes(
            f"{saved} B of repeated K and V are not written, group of {hint(match['key'].groups)}"
        )

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        node = match.anchor
        key, value = node.args[1:3]
        if not match["broadcast"]:
            key, value = (_source(graph, match[name]) for name in ("key", "value"))
        kwargs: dict[str, Any] = {**node.kwargs, "enable_gqa": True}
        return graph.call_function(node.target, (node.args[0], key, value, *node.args[3:]), kwargs)  # type: ignore[arg-type]


def _broadcasts(node: fx.Node) -> bool:
    """K and V have one head, Q has more."""
    query, *others = (val(arg).shape[1] for arg in node.args[:3])
    grouped = argument(node, "enable_gqa") or facts.same_size(query, 1)
    return not grouped and all(facts.same_size(heads, 1) for heads in others)


def _source(graph: fx.Graph, repeat: Repeat) -> fx.Node:
    if not repeat.transposed:
        return repeat.source
    return graph.call_function(aten.transpose.int, (repeat.source, 1, 2))


def find_repeat(node: Any) -> Repeat | None:
    """The repetition of heads that made a (B, H, S, D) tensor, or None."""
    outer, transposed = node, False
    while is_call(node, *_COPIES):
        node = node.args[0]
    if is_call(node, aten.transpose.int) and {node.args[1], node.args[2]} == {1, 2}:
        node, transposed = node.args[0], True
        while is_call(node, *_COPIES):
            node = node.args[0]
    heads = 2 if transposed else 1
    found = _interleaved(node, heads) or _expanded(node, heads)
    return Repeat(outer, found[0], found[0].args[0], found[1], transposed) if found else None  # type: ignore[arg-type]


def _interleaved(node: Any, heads: int) -> tuple[fx.Node, facts.Size] | None:
    """repeat_interleave along the heads: the op, and how often."""
    if not is_call(node, aten.repeat_interleave.self_int) or argument(node, "dim") not in (heads, heads - 4):
        return None
    return (node, val(node.args[1])) if val(node.args[0]).dim() == 4 else None


def _expanded(node: Any, heads: int) -> tuple[fx.Node, facts.Size] | None:
    """reshape(expand(unsqueeze(x, heads + 1))): the group is the faster of the two merged dimensions.

    Returns the innermost op, and how often.
    """
    if not is_call(node, *VIEWS, aten.flatten.using_ints):
        return None
    merged = val(node)
    expand = node.args[0]
    while is_call(expand, *_COPIES):
        expand = expand.args[0]
    if not is_call(expand, aten.expand.default) or val(expand).dim() != 5 or merged.dim() != 4:
        return None
    wide = val(expand).shape
    unsqueeze = expand.args[0]
    if not is_call(unsqueeze, aten.unsqueeze.default) or unsqueeze.args[1] not in (heads + 1, heads - 4):
        return None
    source: Any = unsqueeze.args[0]
    group = wide[heads + 1]
    kept = [*wide[: heads + 1], *wide[heads + 2 :]]
    if not facts.same_shape(kept, val(source).shape):
        return None
    wanted = [*wide[:heads], wide[heads] * group, *wide[heads + 2 :]]
    return (unsqueeze, group) if facts.same_shape(wanted, merged.shape) else None
