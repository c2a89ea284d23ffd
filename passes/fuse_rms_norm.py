"""x * rsqrt(mean(x^2) + eps) * weight, in the spellings of Llama, T5, Gemma, Qwen, OLMo ->
``fxopt::rms_norm``.

Anchored on the root. The op's attributes keep the model's own casts: where the input is widened, whether
the result is cast back before or after the weight, whether the weight has 1 added. With the sum of a
residual branch as input, the sum becomes the second output of ``fxopt::add_rms_norm``. Assumed: nothing;
with rsqrt the op repeats the same arithmetic in the same order, so the eager host gives the same bits. A
quotient by sqrt, a product with its reciprocal or with the power -1/2 are rounded once more or less.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.facts import is_call, is_number, val
from fxopt.ir.ops.rms_norm import ADD_RMS_NORM, RMS_NORM

from . import norm_sites as sites

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """One norm. `inner` are the nodes between input and root; `same_bits`: the op rounds as they do."""

    x: fx.Node
    eps: sites.Eps
    compute_dtype: torch.dtype
    normed: fx.Node
    root: fx.Node
    same_bits: bool
    weight: fx.Node | None = None
    weight_dtype: torch.dtype = torch.float32
    offset: float = 0.0
    inner: tuple[fx.Node, ...] = field(default=())


@dataclass(frozen=True)
class FuseRmsNorm:
    """One semantic op for every root-mean-square norm."""

    name: ClassVar[str] = "fuse-rms-norm"
    anchors: ClassVar[tuple[OpOverload, ...]] = (
        aten.rsqrt.default,
        aten.sqrt.default,
        aten.pow.Tensor_Scalar,
    )
    after: ClassVar[tuple[str, ...]] = ("eliminate-noops",)

    def match(self, node: fx.Node) -> Match | Miss | None:
        site = _core(node)
        if site is None or isinstance(site, Miss):
            return site
        site = _with_weight(site)
        busy = sites.single_readers([n for n in site.inner if n is not site.root])
        if busy is not None:
            return Miss(
                "intermediate values that only the norm reads", f"{busy.name} has {len(busy.users)} readers"
            )
        return Match(node, (site.root,), {"site": site})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        site: Site = match["site"]
        reads = [site.x, *([site.weight] if site.weight is not None else [])]
        why = sites.stale(reads, site.root, ctx)
        if why is not None:
            return Verdict.no(why)
        if not facts.is_floating(site.x):
            return Verdict.no(f"wanted a floating input, saw {facts.dtype(site.x)}")
        return Verdict.yes(
            "the same arithmetic in the same order" if site.same_bits else "the same casts, the root by rsqrt"
        )

    def profit(self, match: Match, ctx: Context) -> Verdict:
        return Verdict.yes(f"{len(match['site'].inner)} ops become one")

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        site: Site = match["site"]
        return graph.call_function(RMS_NORM.overload, (site.x, site.weight, site.eps), casts_of(site))


@dataclass(frozen=True)
class FuseAddRmsNorm:
    """The residual sum in front of a norm becomes the norm's second output."""

    name: ClassVar[str] = "fuse-add-rms-norm"
    after: ClassVar[tuple[str, ...]] = ("fuse-rms-norm",)

    @property
    def anchors(self) -> tuple[OpOverload, ...]:
        return (RMS_NORM.overload,)

    def match(self, node: fx.Node) -> Match | Miss | None:
        total = node.args[0]
        addends = sites.residual_of(total) if isinstance(total, fx.Node) else None
        if addends is None:
            return None
        return Match(node, (total, node), {"addends": addends})  # type: ignore[arg-type]

    def legal(self, match: Match, ctx: Context) -> Verdict:
        total, norm = match.roots
        if not sites.read_later(total, {norm}, norm):
            return Verdict.no(f"wanted readers of the sum after the norm, saw {total.name} read before")
        why = sites.stale(list(match["addends"]), norm, ctx)
        return Verdict.no(why) if why is not None else Verdict.yes("the same sum")

    def profit(self, match: Match, ctx: Context) -> Verdict:
        return Verdict.yes("the sum is read once for both")

    def replace(self, match: Match, graph: fx.Graph) -> tuple[fx.Node, fx.Node]:
        norm = match.anchor
        call = graph.call_function(
            ADD_RMS_NORM.overload, (*match["addends"], *norm.args[1:]), dict(norm.kwargs)
        )
        return graph.call_function(getitem, (call, 1)), graph.call_function(getitem, (call, 0))


def casts_of(site: Site) -> dict[str, Any]:
    return {
        "weight_offset": site.offset,
        "compute_dtype": site.compute_dtype,
        "norm_dtype": facts.dtype(site.normed),
        "weight_dtype": site.weight_dtype,
        "out_dtype": facts.dtype(site.root),
    }


def _core(root: fx.Node) -> Site | Miss | None:
    """x over the root of mean(x^2) + eps, with the casts that follow. None: a root of something else."""
    is_rsqrt = is_call(root, aten.rsqrt.default)
    found = _mean_square(root)
    if found is None or isinstance(found, Miss):
        return found if is_rsqrt else None
    squared, eps, source = found
    scales = _inverse(root)
    product = facts.only_user(scales[-1])
    factor = _scaled(product, scales[-1])
    if product is None or factor is None:
        return Miss("one product with the inverse root", f"{len(scales[-1].users)} readers")
    if not sites.same_source(factor, source):
        return Miss("the squared value times the inverse root", f"{product.name} scales something else")
    if facts.dtype(product) != facts.dtype(squared):
        return Miss("one dtype for squares and product", f"{facts.dtype(squared)}, {facts.dtype(product)}")
    normed = sites.through_casts(product)
    inner = [squared, eps[0], root.args[0], *scales, product, *sites.casts_between(product, normed)]
    x, dtype = facts.peel_widening(source), facts.dtype(squared)
    return Site(x, eps[1], dtype, normed, normed, is_rsqrt, inner=tuple(inner))  # type: ignore[arg-type]


def _mean_square(root: fx.Node) -> tuple[fx.Node, tuple[fx.Node, sites.Eps], fx.Node] | Miss | None:
    """(x^2, (its mean, eps), x) of the root of mean(x^2) + eps. None for powers that are no root."""
    if is_call(root, aten.pow.Tensor_Scalar) and not (_is_root(root) or is_number(root.args[1], -0.5)):
        return None
    eps = sites.added_eps(root.args[0])
    if eps is None:
        saw = getattr(root.args[0], "target", root.args[0])
        return Miss("a root of a mean square plus a number", str(saw))
    squared = sites.row_mean_of(eps[0])
    if squared is None:
        return Miss("a mean over the last dimension, kept", str(eps[0].target))
    source = sites.square_of(squared)
    return Miss("a mean of squares", str(squared.target)) if source is None else (squared, eps, source)


def _is_root(node: Any) -> bool:
    """A square root, not the inverse of one."""
    is_power = is_call(node, aten.pow.Tensor_Scalar) and is_number(node.args[1], 0.5)
    return is_power or is_call(node, aten.sqrt.default)


def _inverse(root: fx.Node) -> list[fx.Node]:
    """The root, and its reciprocal where that is what is read of it."""
    user = facts.only_user(root)
    return [root, user] if _is_root(root) and user and is_call(user, aten.reciprocal.default) else [root]


def _scaled(product: fx.Node | None, scale: fx.Node) -> Any:
    """What is divided by a root, or multiplied with the inverse of one. None: something else is done."""
    if _is_root(scale):
        is_quotient = is_call(product, aten.div.Tensor) and product.args[1] is scale  # type: ignore[union-attr]
        return product.args[0] if is_quotient else None  # type: ignore[union-attr]
    if product is None or not is_call(product, *sites.MULS):
        return None
    return next((x for x, r in facts.commuted(product) if r is scale), None)


def _with_weight(site: Site) -> Site:
    """Take in the product with a row vector that follows, and the cast after it."""
    product = facts.only_user(site.normed)
    if product is None or not is_call(product, *sites.MULS):
        return site
    size = val(site.x).shape[-1]
    factor = next(
        (f for f, y in facts.commuted(product) if y is site.normed and sites.is_row_vector(f, size)), None
    )
    if factor is None:
        return site
    shifted, offset = sites.offset_of(factor)
    weight = facts.peel_widening(shifted)
    if facts.dtype(factor) != facts.dtype(shifted):
        return site
    root = sites.through_casts(product)
    return replace(
        site,
        root=root,
        weight=weight,
        weight_dtype=facts.dtype(factor),
        offset=offset,
        inner=(*site.inner, product, *sites.casts_between(product, root)),
    )
