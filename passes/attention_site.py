"""One attention site, read from both sides of its softmax."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Miss
from fxopt.ir.facts import val

from .attention_layout import Layout, Lead
from .attention_sinks import per_head, read_column, read_gate
from .attention_sites import Mask, Scores, read_scores
from .attention_weights import Weighted, exponent, read_weighted


@dataclass(frozen=True)
class Site:
    """``softmax(scores with sinks) V``; `root` is the node that has the result."""

    root: fx.Node
    scores: Scores
    weighted: Weighted
    layout: Layout
    sinks: fx.Node | None = None  # (H,), or of as many elements
    gated: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        return facts.dtype(self.root)

    @property
    def reads(self) -> list[fx.Node]:
        """The tensors that the op will read."""
        operands = [each.node for each in (self.scores.query, self.scores.key, self.weighted.value)]
        sinks = [] if self.sinks is None else [self.sinks]
        return [*operands, *sinks, *(mask.node for mask in self.scores.masks)]

    def leads_of(self, mask: Mask) -> tuple[Lead, Lead]:
        """The lead of a mask, and that of the scores that it broadcasts to."""
        return tuple(val(mask.node).shape[:-2]), mask.lead


def read_site(softmax: fx.Node) -> Site | Miss | None:
    """The site around a softmax, or why it is none; None where the node is no softmax at all."""
    top = exponent(softmax)
    if top is None or isinstance(top, Miss):
        return top
    column = read_column(top)
    if isinstance(column, Miss):
        return column
    scores = read_scores(column.scores)
    if isinstance(scores, Miss):
        return scores
    weighted = read_weighted(softmax)
    if isinstance(weighted, Miss):
        return weighted
    layout = Layout.of(scores.product_lead, scores.key.lead, scores.lead)
    return _with_sinks(Site(weighted.root, scores, weighted, layout), softmax, top, column.sinks)


def _with_sinks(site: Site, softmax: fx.Node, top: fx.Node, sinks: fx.Node | None) -> Site | Miss:
    if site.weighted.sliced != (sinks is not None):
        return Miss("a last column of the probabilities that is dropped, and is one of sinks", "one of both")
    trailing, root = 2, site.root
    if len(top.users) > 1:
        if len(top.users) > 2 or sinks is not None:
            return Miss("scores that only the softmax reads", f"{top.name} is read {len(top.users)} times")
        gate = read_gate(top, softmax, root)
        if isinstance(gate, Miss):
            return gate
        trailing, root, sinks = gate.trailing, gate.root, gate.sinks
    if sinks is None:
        return site
    found = per_head(sinks, site.layout.heads, trailing)
    if found is None or len(site.weighted.lead) != 2:
        return Miss("sinks of one number for each head", f"{sinks.name} of shape {tuple(val(sinks).shape)}")
    return replace(site, root=root, sinks=found, gated=root is not site.root)
