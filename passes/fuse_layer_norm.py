"""(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, spelled out -> ``fxopt::layer_norm``.

Anchored on the root of the variance, sqrt or rsqrt. Assumed: the population variance (`unbiased=False`, or
the mean of squares). Mean and variance may be computed in one pass, which rounds differently, not worse.
`aten.layer_norm` itself is one op already and is left to the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.facts import argument, is_call, is_number, val
from fxopt.ir.ops.layer_norm import LAYER_NORM

from . import norm_sites as sites

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """One layer norm. `inner` are the nodes that only it reads."""

    x: fx.Node
    eps: sites.Eps
    compute_dtype: torch.dtype
    normed: fx.Node
    root: fx.Node
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    inner: tuple[fx.Node, ...] = field(default=())


@dataclass(frozen=True)
class FuseLayerNorm:
    """One semantic op for every spelled-out layer norm."""

    name: ClassVar[str] = "fuse-layer-norm"
    anchors: ClassVar[tuple[OpOverload, ...]] = (aten.rsqrt.default, aten.sqrt.default)
    after: ClassVar[tuple[str, ...]] = ("eliminate-noops",)

    def match(self, node: fx.Node) -> Match | Miss | None:
        site = _core(node)
        if site is None or isinstance(site, Miss):
            return site
        site = _affine(_affine(site, aten.mul.Tensor), aten.add.Tensor)
        busy = sites.single_readers([n for n in site.inner if n is not site.root])
        if busy is not None:
            return Miss(
                "intermediate values that only the norm reads", f"{busy.name} has {len(busy.users)} readers"
            )
        return Match(node, (site.root,), {"site": site})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        site: Site = match["site"]
        reads = [value for value in (site.x, site.weight, site.bias) if value is not None]
        why = sites.stale(reads, site.root, ctx)
        if why is not None:
            return Verdict.no(why)
        if not facts.is_floating(site.x):
            return Verdict.no(f"wanted a floating input, saw {facts.dtype(site.x)}")
        return Verdict.yes("the same mean, variance and casts")

    def profit(self, match: Match, ctx: Context) -> Verdict:
        return Verdict.yes(f"{len(match['site'].inner)} ops become one")

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        site: Site = match["site"]
        casts: dict[str, Any] = {
            "compute_dtype": site.compute_dtype,
            "norm_dtype": facts.dtype(site.normed),
            "out_dtype": facts.dtype(site.root),
        }
        return graph.call_function(LAYER_NORM.overload, (site.x, site.weight, site.bias, site.eps), casts)


def _core(root: fx.Node) -> Site | Miss | None:
    """(x - mean) over the root of the variance, with the casts that follow. None for other roots."""
    eps = sites.added_eps(root.args[0])
    variance = eps[0] if eps is not None else None
    spelled = _variance(variance)
    if eps is None or variance is None or spelled is None:
        return None
    if isinstance(spelled, Miss):
        return spelled
    source, inner = spelled
    quotient = facts.only_user(root)
    centered = _numerator(root, quotient)
    if quotient is None or centered is None:
        return Miss("one quotient by the root of the variance", f"{len(root.users)} readers of {root.name}")
    own = _centered(centered)
    if own is None or not sites.same_source(own, source):
        return Miss("x - mean(x) over the root of its variance", f"{centered.name} over {root.name}")
    normed = sites.through_casts(quotient)
    shared = [] if centered in inner else [centered]
    nodes = [*inner, *shared, variance, root.args[0], root, quotient, *sites.casts_between(quotient, normed)]
    kept = [node for node in nodes if not (node is centered and _read_by_both(centered, inner))]
    x = facts.peel_widening(own)
    return Site(x, eps[1], facts.dtype(quotient), normed, normed, inner=tuple(kept))  # type: ignore[arg-type]


def _read_by_both(centered: fx.Node, inner: list[fx.Node]) -> bool:
    """x - mean(x) is computed once, and read by the variance and by the quotient and by nobody else."""
    squares = {node for node in inner if sites.square_of(node) is centered}
    return centered in inner and len(set(centered.users) - squares) == 1


def _variance(node: Any) -> tuple[fx.Node, list[fx.Node]] | Miss | None:
    """(x, nodes in between) of the population variance over the last dimension; None for anything else."""
    if is_call(node, aten.var.correction, aten.var.dim):
        return _library_variance(node)
    squared = sites.row_mean_of(node)
    centered = sites.square_of(squared) if squared is not None else None
    source = _centered(centered)
    if squared is None or centered is None or source is None:
        return None
    return source, [centered, squared]


def _library_variance(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | Miss:
    dims = argument(node, "dim") or []
    biased = argument(node, "correction") == 0 or argument(node, "unbiased") is False
    if not biased:
        return Miss("the population variance", "the unbiased one")
    if not argument(node, "keepdim") or len(dims) != 1 or not facts.is_last_dim(node.args[0], dims[0]):  # type: ignore[arg-type]
        return Miss("a variance over the last dimension, kept", f"dimensions {dims}")
    return node.args[0], []  # type: ignore[return-value]


def _centered(node: Any) -> fx.Node | None:
    """x of ``x - mean(x)``."""
    if not is_call(node, aten.sub.Tensor) or not is_number(argument(node, "alpha"), 1):
        return None
    mean = node.args[1]
    while facts.is_cast(mean) and facts.is_widening(mean):
        mean = mean.args[0]
    source = sites.row_mean_of(mean)
    return node.args[0] if source is not None and sites.same_source(source, node.args[0]) else None


def _numerator(root: fx.Node, quotient: fx.Node | None) -> fx.Node | None:
    """What is divided by sqrt, or multiplied with rsqrt."""
    if quotient is None:
        return None
    if is_call(root, aten.sqrt.default):
        return quotient.args[0] if is_call(quotient, aten.div.Tensor) and quotient.args[1] is root else None  # type: ignore[return-value]
    if not is_call(quotient, aten.mul.Tensor):
        return None
    return next((x for x, r in facts.commuted(quotient) if r is root and isinstance(x, fx.Node)), None)


def _affine(site: Site, op: OpOverload) -> Site:
    """Take in the product with, or the sum of, a row vector that follows, and the casts after it."""
    user = facts.only_user(site.root)
    if user is None or user.target is not op or not is_number(argument(user, "alpha", 1), 1):
        return site
    if site.root is not site.normed and facts.dtype(site.root) != _product_dtype(site):
        return site  # a cast between weight and bias is no attribute of the op
    size = val(site.x).shape[-1]
    vector = next(
        (v for v, y in facts.commuted(user) if y is site.root and sites.is_row_vector(v, size)), None
    )
    if vector is None or not facts.is_floating(vector):
        return site
    root = sites.through_casts(user)
    name = "weight" if op is aten.mul.Tensor else "bias"
    changed = {name: vector, "root": root, "inner": (*site.inner, user, *sites.casts_between(user, root))}
    return replace(site, **changed)


def _product_dtype(site: Site) -> torch.dtype:
    """dtype of the normalized value times the weight, before any cast."""
    normed = facts.dtype(site.normed)
    return torch.promote_types(normed, facts.dtype(site.weight)) if site.weight is not None else normed
