"""softmax(scale * Q K^T + mask) V, however it is spelled -> ``fxopt::attention``.

Anchored on the softmax (and on scaled_dot_product_attention, which is adopted as it is). A mask that may
hold whole rows of -inf (it is a graph input, or a sum of two masks that overflows) keeps softmax's answer for
them, which is NaN. Assumed: parameters are finite. The softmax may become more precise, never less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.cost import hint
from fxopt.ir.facts import argument, is_call, val
from fxopt.ir.ops.attention import ATTENTION
from fxopt.ir.ops.masking import NAN, NONE

from .attention_build import SiteBuilder
from .attention_masks import commute, never_infinite, replaces
from .attention_sites import VIEWS, Scores, Weighted, read_scores, read_weighted

aten = torch.ops.aten

SOFTMAXES = (aten.softmax.int, aten._softmax.default)
SDPA = aten.scaled_dot_product_attention.default
# They move values and change none.
_REORDERS = (*VIEWS, aten.transpose.int, aten.permute.default, aten.mT.default)


@dataclass(frozen=True)
class RewriteAttention:
    """One semantic op for every attention site."""

    name: ClassVar[str] = "rewrite-attention"
    anchors: ClassVar[tuple[OpOverload, ...]] = (*SOFTMAXES, SDPA)
    after: ClassVar[tuple[str, ...]] = ("eliminate-noops",)

    def match(self, node: fx.Node) -> Match | Miss | None:
        if node.target is SDPA:
            return Match(node, (node,), {"adopted": True})
        if not facts.is_last_dim(node, argument(node, "dim")):
            return Miss("a softmax over the last dimension", f"dim {argument(node, 'dim')}")
        scores = read_scores(node.args[0])  # type: ignore[arg-type]
        if isinstance(scores, Miss):
            return scores
        if len(node.args[0].users) != 1:  # type: ignore[union-attr]
            return Miss("scores that only the softmax reads", f"{node.args[0]} has other readers")
        weighted = read_weighted(node)
        if isinstance(weighted, Miss):
            return weighted
        return Match(node, (weighted.root,), {"adopted": False, "scores": scores, "weighted": weighted})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        if match["adopted"]:
            return _adoptable(match.anchor)
        scores, weighted = match["scores"], match["weighted"]
        for check in (_shapes, _dtypes, _masks):
            verdict = check(scores, weighted)
            if not verdict:
                return verdict
        reads = [scores.query, scores.key_t, weighted.value, *(mask.node for mask in scores.masks)]
        if ctx.facts.differentiates(weighted.root) and replaces(scores.masks) is None:
            return Verdict.no(
                "some scores are filled, which stops their gradient, and some masked by a sum, which does not"
            )
        for value in reads:
            stale = ctx.facts.unsafe_read([value], value, weighted.root)
            if stale:
                return Verdict.no(stale)
        return Verdict.yes()

    def profit(self, match: Match, ctx: Context) -> Verdict:
        if match["adopted"]:
            return Verdict.yes("already one op")
        query, key = val(match["scores"].query), val(match["scores"].key_t)
        rows, columns = hint(query.shape[-2]), hint(key.shape[-1])
        return Verdict.yes(f"a matrix of {rows} x {columns} scores per head becomes a detail of the op")

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        if match["adopted"]:
            return _adopt(match.anchor, graph)
        return _build(match["scores"], match["weighted"], graph)


def _adopt(node: fx.Node, graph: fx.Graph) -> fx.Node:
    """The same call; what autocast would convert is converted here, as no autocast acts inside of the op."""
    out = facts.dtype(node)
    # Without autocast only the mask may have another dtype, and only on the CPU.
    alike = all(facts.dtype(arg) == out for arg in node.args[:3])  # type: ignore[arg-type]
    if alike and val(node).device.type == "cpu":
        return graph.call_function(ATTENTION.overload, node.args, dict(node.kwargs))

    def converted(arg: Any) -> Any:
        if not facts.is_tensor(arg) or not facts.is_floating(arg) or facts.dtype(arg) == out:
            return arg
        return graph.call_function(aten.to.dtype, (arg, out))

    args = tuple(converted(arg) for arg in node.args)
    kwargs = {name: converted(arg) for name, arg in node.kwargs.items()}
    return graph.call_function(ATTENTION.overload, args, kwargs)


def _adoptable(node: fx.Node) -> Verdict:
    scale = argument(node, "scale")
    if scale is not None and not facts.is_scalar(scale):
        return Verdict.no(f"wanted a scale that is a number, saw {scale}")
    if val(node.args[0]).dim() != 4:
        return Verdict.no(f"wanted Q of rank 4, saw rank {val(node.args[0]).dim()}")
    return Verdict.yes("the same op")


def _shapes(scores: Scores, weighted: Weighted) -> Verdict:
    query, key_t, value = val(scores.query), val(scores.key_t), val(weighted.value)
    if len(scores.shape) not in (3, 4):
        return Verdict.no(f"wanted scores of rank 3 or 4, saw rank {len(scores.shape)}")
    if query.dim() == 4 and not facts.same_shape(scores.shape[:2], val(scores.product).shape[:2]):
        return Verdict.no(f"wanted one batch and one number of heads throughout, saw {scores.shape}")
    if query.dim() == 3 and len(scores.shape) == 4 and not isinstance(scores.shape[1], int):
        return Verdict.no("wanted a known number of heads")
    if value.dim() != query.dim():
        return Verdict.no(f"wanted Q and V of one rank, saw {query.dim()} and {value.dim()}")
    if not facts.same_size(value.shape[-2], key_t.shape[-1]):
        return Verdict.no(f"wanted as many values as keys, saw {value.shape[-2]} and {key_t.shape[-1]}")
    for name, other in (("K", key_t), ("V", value)):
        if not facts.same_shape(query.shape[:-2], other.shape[:-2]) and not _shares_heads(query, other):
            return Verdict.no(
                f"wanted Q and {name} of one batch, saw {tuple(query.shape)}, {tuple(other.shape)}"
            )
    if not facts.same_shape(key_t.shape[:-2], value.shape[:-2]):
        return Verdict.no("wanted K and V of one batch")
    return Verdict.yes()


def _shares_heads(query: torch.Tensor, other: torch.Tensor) -> bool:
    """One key head that all query heads read by broadcasting."""
    return (
        query.dim() == 4
        and facts.same_size(query.shape[0], other.shape[0])
        and facts.same_size(other.shape[1], 1)
    )


def _dtypes(scores: Scores, weighted: Weighted) -> Verdict:
    out = facts.dtype(weighted.root)
    if out not in facts.PLAIN_FLOATS:
        return Verdict.no(f"wanted a floating result, saw {out}")
    computed = facts.dtype(scores.product)
    for name, node in (("Q", scores.query), ("K", scores.key_t), ("V", weighted.value)):
        if not facts.is_floating(node):
            return Verdict.no(f"wanted {name} floating, saw {facts.dtype(node)}")
    wide = torch.finfo(computed).bits > torch.finfo(out).bits
    for name, node in (("Q", scores.query), ("K", scores.key_t)):
        if wide and torch.finfo(_held_in(node)).bits > torch.finfo(out).bits:
            return Verdict.no(f"wanted {name} of the result's {out}, saw {facts.dtype(node)}, to be rounded")
    if torch.finfo(computed).bits < torch.finfo(out).bits:
        return Verdict.no(f"wanted scores at least as wide as the result, saw {computed} and {out}")
    return Verdict.yes()


def _held_in(node: fx.Node) -> torch.dtype:
    """A dtype that holds every value of `node` exactly: the one it had before it was widened."""
    while True:
        widened = facts.is_float_cast(node) and facts.is_widening(node)
        if not widened and not is_call(node, *_REORDERS):
            return facts.dtype(node)
        node = node.args[0]  # type: ignore[assignment]


def _masks(scores: Scores, weighted: Weighted) -> Verdict:
    for mask in scores.masks:
        value = val(mask.node)
        if mask.fill is not None and value.dtype is not torch.bool:
            return Verdict.no(f"wanted a bool condition, saw {value.dtype}")
        if value.dim() > mask.rank:
            return Verdict.no(f"wanted a mask that broadcasts to the scores, saw {tuple(value.shape)}")
    return Verdict.yes()


def _build(scores: Scores, weighted: Weighted, graph: fx.Graph) -> fx.Node:
    out = val(weighted.root)
    parts = SiteBuilder(graph, scores, out.dtype)
    query = parts.operand(scores.query)
    key = parts.untransposed(scores.key_t)
    value = parts.operand(weighted.value)
    finite = never_infinite(scores.masks)
    kwargs: dict[str, Any] = {"scale": scores.factor.build(graph), "dead_rows": NONE if finite else NAN}
    if replaces(scores.masks):
        kwargs["mask_replaces"] = True
    if torch.finfo(facts.dtype(scores.product)).bits > torch.finfo(out.dtype).bits:
        kwargs["wide_scores"] = True
    if not facts.same_shape(val(scores.query).shape[:-2], val(scores.key_t).shape[:-2]):
        kwargs["enable_gqa"] = True
    mask = parts.mask() if finite and commute(scores.masks) else parts.exact_mask(finite)
    result = graph.call_function(
        ATTENTION.overload, (query, key, value, mask, weighted.dropout_p, False), kwargs
    )
    return parts.like_root(result, out)
