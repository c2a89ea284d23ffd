"""Whether an attention site may become ``fxopt::attention``: shapes, dtypes, masks, gradients, writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Context, Verdict
from fxopt.ir.facts import is_call, val
from fxopt.ir.same_value import DEPTH, same_value
from fxopt.ir.sizes import can_compute
from fxopt.ir.views import viewed, views_of

from .attention_layout import sizes_in
from .attention_masks import commute, is_bias, never_infinite, replaces
from .attention_parts import Mask
from .attention_site import Site
from .attention_steps import VIEWS

aten = torch.ops.aten

# They move values and change none.
_REORDERS = (*VIEWS, aten.transpose.int, aten.permute.default, aten.mT.default)


def found_legal(site: Site, ctx: Context) -> Verdict:
    """Yes, or the first condition that failed."""
    for check in (_shapes, _dtypes, _masks):
        verdict = check(site)
        if not verdict:
            return verdict
    if ctx.facts.differentiates(site.root) and replaces(site.unreplaced) is None:
        return Verdict.no(
            "some scores are filled, which stops their gradient, and some masked by a sum, which does not"
        )
    for look in (_zeroed, _guarded):
        verdict = look(site, ctx)
        if not verdict:
            return verdict
    for value in site.reads:
        stale = ctx.facts.unsafe_read([value], _first_reader(value, site.root), site.root)
        if stale:
            return Verdict.no(stale)
    return Verdict.yes()


def _first_reader(value: fx.Node, root: fx.Node) -> fx.Node:
    """Who reads `value` first, a view of it included: what is written before that, `root` sees as well."""
    readers = [user for view in views_of(value) for user in view.users if viewed(user) is None]
    return min((user for user in readers if not facts.is_write(user) and not root < user), default=value)


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
    heads = site.heads_of_keys
    if not facts.same_size(heads[0], heads[1]):
        return Verdict.no(f"wanted as many heads of K as of V, saw {heads[0]} and {heads[1]}")
    return Verdict.yes()


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
        steps = site.layout.mask_steps(tuple(val(node).shape[:-2]), at)
        if steps is None:
            return Verdict.no(f"wanted a mask that broadcasts to the scores, saw {tuple(val(node).shape)}")
        unknown = [size for size in sizes_in(steps) if not can_compute(size.node.expr, node.graph)]
        if unknown:
            return Verdict.no(f"wanted a mask repeated as often as an input says, saw {unknown[0]} times")
    if site.scores.factor.tensors and not site.scores.score.is_identity and site.factors_of_scores:
        return Verdict.no("wanted a softcap of scores times numbers, saw times a tensor")
    if site.keeps_nan and not never_infinite(site.scores.masks):
        return Verdict.no("wanted finite masks: these sinks keep the NaN of rows of -inf")
    return Verdict.yes()


def _zeroed(site: Site, ctx: Context) -> Verdict:
    """Probabilities that are set to 0 are those of keys that a fill excludes: rows without others give 0."""
    zeroed, masks = site.weighted.zeroed, site.scores.masks
    below = not never_infinite(masks) or not commute(masks)
    if site.scores.floored and (below or ctx.facts.differentiates(site.root)):
        return Verdict.no("wanted scores above the lowest number, saw some raised to it, or its gradient")
    if zeroed is None:
        return Verdict.yes()
    last = masks[-1] if masks else None
    if last is None or last.fill is None or site.is_replaced(last) or last.where != zeroed.where:
        return Verdict.no("wanted probabilities set to 0 where scores are filled, saw them set elsewhere")
    if not same_value(last.node, zeroed.condition):
        return Verdict.no(f"wanted probabilities set to 0 by {last.node.name}, saw {zeroed.condition.name}")
    if not _is_plain(masks) or site.has_sinks:
        return Verdict.no("wanted one mask over probabilities that are set to 0, saw several")
    first, second = sorted((last.node, zeroed.condition))
    stale = ctx.facts.unsafe_read(_above(first), first, second)
    return Verdict.no(stale) if stale else Verdict.yes()


def _guarded(site: Site, ctx: Context) -> Verdict:
    """Rows whose probabilities are NaN give 0. Their scores get no gradient if they are filled."""
    masks = site.scores.masks
    if not site.weighted.guarded or never_infinite(masks):
        return Verdict.yes()
    stopped = all(mask.fill is not None or is_bias(mask.node) for mask in masks)
    if ctx.facts.differentiates(site.root) and not stopped:
        return Verdict.no("wanted filled scores where NaN becomes 0, saw sums with a mask")
    wide = any(mask.dtype != site.dtype for mask in masks)
    if wide and val(site.root).device.type != "cpu":
        return Verdict.no("wanted scores of the result's dtype where NaN becomes 0")
    return Verdict.yes()


def _above(node: fx.Node) -> list[fx.Node]:
    """What a condition is made of, as far as `same_value` looks."""
    found: dict[fx.Node, None] = {node: None}
    layer = [node]
    for _ in range(DEPTH):
        layer = [arg for each in layer for arg in each.all_input_nodes if facts.is_tensor(arg)]
        found |= dict.fromkeys(layer)
    return list(found)


def _is_plain(masks: Sequence[Mask]) -> bool:
    """No sum is below the lowest number, and at most one mask excludes keys."""
    others = [mask for mask in masks if mask.fill is None]
    return never_infinite(others) and commute(masks)
