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
from fxopt.ir.facts import argument, is_call, val
from fxopt.ir.ops.attention import ATTENTION
from fxopt.ir.ops.masking import NAN, NONE, ZERO

from .attention_build import SiteBuilder
from .attention_layout import Lead
from .attention_masks import commute, never_infinite, replaces
from .attention_parts import Mask
from .attention_site import Site, read_site
from .attention_steps import VIEWS
from .attention_weights import SOFTMAXES, SPELLED_OUT

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
# They move values and change none.
_REORDERS = (*VIEWS, aten.transpose.int, aten.permute.default, aten.mT.default)


@dataclass(frozen=True)
class RewriteAttention:
    """One semantic op for every attention site."""

    name: ClassVar[str] = "rewrite-attention"
    anchors: ClassVar[tuple[OpOverload, ...]] = (*SOFTMAXES, SPELLED_OUT, SDPA)
    after: ClassVar[tuple[str, ...]] = ("eliminate-noops",)

    def match(self, node: fx.Node) -> Match | Miss | None:
        if node.target is SDPA:
            return Match(node, (node,), {"adopted": True})
        site = read_site(node)
        if site is None or isinstance(site, Miss):
            return site
        return Match(node, (site.root,), {"adopted": False, "site": site})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        if match["adopted"]:
            return _adoptable(match.anchor)
        site: Site = match["site"]
        for check in (_shapes, _dtypes, _masks):
            verdict = check(site)
            if not verdict:
                return verdict
        if ctx.facts.differentiates(site.root) and replaces(_unreplaced(site)) is None:
            return Verdict.no(
                "some scores are filled, which stops their gradient, and some masked by a sum, which does not"
            )
        for value in site.reads:
            stale = ctx.facts.unsafe_read([value], value, site.root)
            if stale:
                return Verdict.no(stale)
        return Verdict.yes()

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


def _shapes(site: Site) -> Verdict:
    scores, weighted, layout = site.scores, site.weighted, site.layout
    query, key, value = scores.query, scores.key, weighted.value
    if not facts.same_size(value.shape[-2], key.shape[-2]):
        return Verdict.no(f"wanted as many values as keys, saw {value.shape[-2]} and {key.shape[-2]}")
    placed = {
        "Q": layout.query_steps(query.lead, scores.product_lead),
        "K": layout.key_steps(key.lead, scores.product_lead),
        "V": layout.key_steps(value.lead, weighted.lead),
        "the result": layout.result_steps(weighted.lead),
    }
    for name, steps in placed.items():
        if steps is None:
            return Verdict.no(
                f"wanted batch and heads as {layout.batch} x {layout.heads}, saw {name} of "
                f"{query.lead}, {key.lead}, {value.lead}, {weighted.lead}"
            )
    heads = [layout.key_heads(each, at) for each, at in _keys(site)]
    if not facts.same_size(heads[0], heads[1]):
        return Verdict.no(f"wanted as many heads of K as of V, saw {heads[0]} and {heads[1]}")
    return Verdict.yes()


def _keys(site: Site) -> list[tuple[Lead, Lead]]:
    """The leads of K and V, and of what they are multiplied with."""
    scores, weighted = site.scores, site.weighted
    return [(scores.key.lead, scores.product_lead), (weighted.value.lead, weighted.lead)]


def _dtypes(site: Site) -> Verdict:
    scores, out = site.scores, site.dtype
    if out not in facts.PLAIN_FLOATS:
        return Verdict.no(f"wanted a floating result, saw {out}")
    computed = facts.dtype(scores.product)
    for name, node in (("Q", scores.query.node), ("K", scores.key.node), ("V", site.weighted.value.node)):
        if not facts.is_floating(node):
            return Verdict.no(f"wanted {name} floating, saw {facts.dtype(node)}")
    wide = torch.finfo(computed).bits > torch.finfo(out).bits
    for name, node in (("Q", scores.query.node), ("K", scores.key.node)):
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


def _masks(site: Site) -> Verdict:
    for mask in site.scores.masks:
        if mask.fill is not None and facts.dtype(mask.node) is not torch.bool:
            return Verdict.no(f"wanted a bool condition, saw {facts.dtype(mask.node)}")
    for node, at in site.placed:
        if site.layout.mask_steps(tuple(val(node).shape[:-2]), at) is None:
            return Verdict.no(f"wanted a mask that broadcasts to the scores, saw {tuple(val(node).shape)}")
    if site.scores.factor.tensors and not site.scores.score.is_identity and site.factors_of_scores:
        return Verdict.no("wanted a softcap of scores times numbers, saw times a tensor")
    if site.gated and not never_infinite(site.scores.masks):
        return Verdict.no("wanted finite masks: sinks as a factor of the result keep the NaN of rows of -inf")
    return Verdict.yes()


def _unreplaced(site: Site) -> list[Mask]:
    return [mask for mask in site.scores.masks if not site.is_replaced(mask)]


def _build(site: Site, graph: fx.Graph) -> fx.Node:
    parts, scores, layout = SiteBuilder(graph, site), site.scores, site.layout
    query, key, value = parts.query(), parts.key(), parts.value()
    finite = never_infinite(scores.masks)
    kwargs: dict[str, Any] = {"scale": scores.factor.build(graph), "dead_rows": NONE if finite else NAN}
    if replaces(_unreplaced(site)):
        kwargs["mask_replaces"] = True
    if torch.finfo(facts.dtype(scores.product)).bits > torch.finfo(site.dtype).bits:
        kwargs["wide_scores"] = True
    if not facts.same_size(layout.key_heads(*_keys(site)[0]), layout.heads):
        kwargs["enable_gqa"] = True
    if not site.program.is_identity:
        kwargs["score"] = str(site.program)
        kwargs |= {"captures": parts.captures()} if site.program.captures else {}
    if site.sinks is not None:
        kwargs |= {"sinks": parts.sinks(), "dead_rows": ZERO}
    mask = (
        parts.mask() if finite and commute(scores.masks) and not site.replaced else parts.exact_mask(finite)
    )
    result = graph.call_function(
        ATTENTION.overload, (query, key, value, mask, site.weighted.dropout_p, False), kwargs
    )
    return parts.like_root(result)
