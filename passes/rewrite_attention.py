"""softmax(score(scale * Q K^T) + mask) V, however it is spelled -> ``fxopt::attention``.

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
from fxopt.ir.facts import argument, val
from fxopt.ir.ops.attention import ATTENTION
from fxopt.ir.ops.masking import NAN, NONE, ZERO

from .attention_build import SiteBuilder
from .attention_checks import found_legal
from .attention_masks import commute, never_infinite, replaces
from .attention_parts import seen
from .attention_site import Site, read_site
from .attention_softmax import SOFTMAXES, SPELLED_OUT

aten = torch.ops.aten

RANK = 4
SDPA = aten.scaled_dot_product_attention.default
# Torch's fast path of inference: projections, attention and more.
WHOLE = (aten._transformer_encoder_layer_fwd.default, aten._native_multi_head_attention.default)


@dataclass(frozen=True)
class RewriteAttention:
    """One semantic op for every attention site."""

    name: ClassVar[str] = "rewrite-attention"
    anchors: ClassVar[tuple[OpOverload, ...]] = (*SOFTMAXES, *SPELLED_OUT, SDPA, *WHOLE)
    after: ClassVar[tuple[str, ...]] = ("eliminate-noops",)

    def match(self, node: fx.Node) -> Match | Miss | None:
        if node.target is SDPA:
            return Match(node, (node,), {"adopted": True})
        if node.target in WHOLE:
            return Miss("products around a softmax", f"all of it in one op of torch, {seen(node)}")
        site = read_site(node)
        if site is None or isinstance(site, Miss):
            return site
        return Match(node, (site.root,), {"adopted": False, "site": site})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        if match["adopted"]:
            return _adoptable(match.anchor)
        return found_legal(match["site"], ctx)

    def profit(self, match: Match, ctx: Context) -> Verdict:
        if match["adopted"]:
            return Verdict.yes("already one op")
        scores = match["site"].scores
        rows, columns = hint(scores.query.shape[-2]), hint(scores.key.shape[-2])
        return Verdict.yes(f"a matrix of {rows} x {columns} scores per head becomes a detail of the op")

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        if match["adopted"]:
            return _adopt(match.anchor, graph)
        return _build(match["site"], graph)


def _adopt(node: fx.Node, graph: fx.Graph) -> fx.Node:
    """The same call, of rank 4. What autocast would convert is converted here: none acts inside of the op."""
    out, rank = facts.dtype(node), val(node).dim()
    # Without autocast only the mask may have another dtype, and only on the CPU.
    alike = all(facts.dtype(arg) == out for arg in node.args[:3])  # type: ignore[arg-type]
    keeps = alike and val(node).device.type == "cpu"

    def converted(arg: Any) -> Any:
        if keeps or not facts.is_tensor(arg) or not facts.is_floating(arg) or facts.dtype(arg) == out:
            return arg
        return graph.call_function(aten.to.dtype, (arg, out))

    def placed(arg: Any) -> Any:
        """With one dimension in front of heads. A mask broadcasts to the scores as it is, where it can."""
        for _ in range(RANK - rank):
            arg = graph.call_function(aten.unsqueeze.default, (arg, 0))
        if rank <= RANK:
            return arg
        return graph.call_function(aten.flatten.using_ints, (arg, 0, rank - RANK))

    operands = [placed(converted(arg)) for arg in node.args[:3]]
    given = {name: converted(argument(node, name)) for name in ("attn_mask", "dropout_p", "is_causal")}
    mask = given["attn_mask"]
    if mask is not None and rank > RANK and val(argument(node, "attn_mask")).dim() >= RANK:
        lead = list(val(node).shape[: rank - RANK + 1])
        mask = placed(graph.call_function(aten.expand.default, (mask, [*lead, -1, -1, -1])))
    kwargs = {name: converted(arg) for name, arg in node.kwargs.items() if name not in given}
    others = (mask, given["dropout_p"], given["is_causal"])
    result = graph.call_function(ATTENTION.overload, (*operands, *others), kwargs)
    for _ in range(RANK - rank):
        result = graph.call_function(aten.squeeze.dim, (result, 0))
    if rank > RANK:
        result = graph.call_function(
            aten.unflatten.int, (result, 0, list(val(node).shape[: rank - RANK + 1]))
        )
    return result


def _adoptable(node: fx.Node) -> Verdict:
    scale = argument(node, "scale")
    if scale is not None and not facts.is_scalar(scale):
        return Verdict.no(f"wanted a scale that is a number, saw {scale}")
    shapes = [tuple(val(arg).shape) for arg in node.args[:3]]
    ranks = sorted({len(shape) for shape in shapes})
    if len(ranks) > 1:
        return Verdict.no(f"wanted Q, K and V of one rank, saw {', '.join(map(str, ranks))}")
    leads = [shape[: max(0, ranks[0] - RANK + 1)] for shape in shapes]
    if ranks[0] > RANK and not all(
        isinstance(size, int) and lead == leads[0] for lead in leads for size in lead
    ):
        return Verdict.no(f"wanted Q, K and V of rank {ranks[0]} in the same known batches, saw {shapes}")
    return Verdict.yes("the same op")


def _build(site: Site, graph: fx.Graph) -> fx.Node:
    parts, scores = SiteBuilder(graph, site), site.scores
    query, key, value = parts.query(), parts.key(), parts.value()
    finite = never_infinite(scores.masks)
    sums = finite and commute(scores.masks) and not site.replaced
    kwargs: dict[str, Any] = {"scale": scores.factor.build(graph), **_rows(site, finite)}
    if torch.finfo(facts.dtype(scores.product)).bits > torch.finfo(site.dtype).bits:
        kwargs["wide_scores"] = True
    if not facts.same_size(site.heads_of_keys[0], site.layout.heads):
        kwargs["enable_gqa"] = True
    if not site.program.is_identity:
        kwargs["score"] = str(site.program)
        kwargs |= {"captures": parts.captures()} if site.program.captures else {}
    if site.has_sinks:
        kwargs["sinks"] = parts.sinks()
    if site.weighted.zeroed is not None:
        mask: fx.Node | None = parts.excluding_mask()
    else:
        mask = parts.mask() if sums else parts.exact_mask(finite)
    operands = (query, key, value, mask, site.weighted.dropout_p, False)
    return parts.like_root(graph.call_function(ATTENTION.overload, operands, kwargs))


def _rows(site: Site, finite: bool) -> dict[str, Any]:
    """What rows without a live key give, and whether their scores get a gradient."""
    if site.weighted.zeroed is not None:
        return {"dead_rows": ZERO}
    guarded = site.weighted.guarded
    rows = ZERO if site.has_sinks else NONE if finite else ZERO if guarded else NAN
    return {"dead_rows": rows, "mask_replaces": True} if replaces(site.unreplaced) else {"dead_rows": rows}
