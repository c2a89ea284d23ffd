"""One attention site, read from both sides of its softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Miss
from fxopt.ir.facts import Size, same_size, val
from fxopt.ir.formula import AXES, real_capture
from fxopt.ir.program import ScoreProgram

from .attention_layout import Layout, Lead
from .attention_masks import EXCLUDES, commute, is_bias, never_infinite, replaces
from .attention_parts import Mask, Multiplier, Scores, readers
from .attention_sinks import per_head, read_column, read_gate
from .attention_sites import read_scores
from .attention_softmax import Softmax, read_softmax
from .attention_steps import is_absorbing
from .attention_weights import Weighted, read_weighted


@dataclass(frozen=True)
class Site:
    """``softmax(scores with sinks) V``; `root` is the node that has the result."""

    root: fx.Node
    scores: Scores
    weighted: Weighted
    layout: Layout
    sinks: fx.Node | float | None = None  # (H,), or of as many elements; a number for all heads
    keeps_nan: bool = False  # of rows of -inf, though it has sinks
    trains: bool = False  # autograd may record it

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        return facts.dtype(self.root)

    @property
    def has_sinks(self) -> bool:
        return self.sinks is not None

    @property
    def factors_of_query(self) -> list[Multiplier]:
        """Tensors that Q takes on. Not in float16, where a product with them may leave the range."""
        if self.dtype is torch.float16:
            return []
        return [each for each in self.scores.factor.tensors if each.is_per_matrix]

    @property
    def factors_of_scores(self) -> list[Multiplier]:
        """The others."""
        own = self.factors_of_query
        return [each for each in self.scores.factor.tensors if each not in own]

    def is_replaced(self, mask: Mask) -> bool:
        """Scores that it fills have to be multiplied by 0: to add the number would not be the same."""
        masks = self.scores.masks
        if mask.fill is None:
            return False
        if is_absorbing(mask.fill, mask.dtype):
            # A fill stops the gradient of its scores, a sum does not: no single mask says both.
            return self.trains and replaces(masks) is None
        alone = mask is masks[-1] and commute(masks) and never_infinite(masks)
        return not (alone and mask.fill <= -EXCLUDES)

    @property
    def replaced(self) -> list[Mask]:
        return [mask for mask in self.scores.masks if self.is_replaced(mask)]

    @property
    def unreplaced(self) -> list[Mask]:
        return [mask for mask in self.scores.masks if not self.is_replaced(mask)]

    @property
    def heads_of_keys(self) -> tuple[Size, Size]:
        """How many heads K and V have in the op."""
        scores, weighted, layout = self.scores, self.weighted, self.layout
        heads = layout.key_heads(scores.key.lead, scores.product_lead)
        return heads, layout.key_heads(weighted.value.lead, weighted.lead)

    @property
    def program(self) -> ScoreProgram:
        """The score program, with ``c0, c1, ...`` for `factors_of_scores` and what is not `replaced`."""
        result = self.scores.score.result
        captured = [(each.node, each.at) for each in self.factors_of_scores]
        captured += [(mask.node, mask.lead) for mask in self.replaced]
        for place, (node, at) in enumerate(captured):
            sizes = val(node).shape
            differs = (*self.layout.extent(tuple(sizes[:-2]), at), *_differs(sizes))
            indices = [axis if each else 0 for axis, each in zip(AXES, differs, strict=True)]
            result = result * real_capture(f"c{place}")(*indices)
        return ScoreProgram(result)

    @property
    def reads(self) -> list[fx.Node]:
        """The tensors that the op will read."""
        operands = [each.node for each in (self.scores.query, self.scores.key, self.weighted.value)]
        sinks = [self.sinks] if isinstance(self.sinks, fx.Node) else []
        return [*operands, *sinks, *(node for node, _ in self.placed)]

    @property
    def placed(self) -> list[tuple[fx.Node, Lead]]:
        """What broadcasts to the scores: masks and factors, with the lead of the scores there."""
        masks = self.scores.masks
        factors = [self.scores.factor, *(mask.factor for mask in masks)]
        found = [(mask.node, mask.lead) for mask in masks]
        return found + [(tensor.node, tensor.at) for factor in factors for tensor in factor.tensors]


def _differs(sizes: Sequence[Size]) -> tuple[bool, bool]:
    """Whether a tensor differs from row to row, and from column to column."""
    rows, columns = (1, 1, *sizes)[-2:]
    return not same_size(rows, 1), not same_size(columns, 1)


def read_site(node: fx.Node) -> Site | Miss | None:
    """The site around a softmax, or why it is none; None where the node is no softmax at all."""
    softmax = read_softmax(node)
    if softmax is None or isinstance(softmax, Miss):
        return softmax
    column = read_column(softmax.scores)
    if isinstance(column, Miss):
        return column
    scores = read_scores(column.scores)
    if isinstance(scores, Miss):
        return scores
    weighted = read_weighted(node)
    if isinstance(weighted, Miss):
        return weighted
    if softmax.by_logarithm and not all(map(_keeps_logsumexp, scores.masks)):
        return Miss("-inf where scores are masked that their logsumexp is subtracted from", "another number")
    layout = Layout.of(scores.product_lead, scores.key.lead, scores.lead)
    site = Site(weighted.root, scores, weighted, layout, trains=facts.may_train(node.graph))
    return _with_sinks(site, node, softmax, column.sinks)


def _keeps_logsumexp(mask: Mask) -> bool:
    """Not so low a number that the logarithm of how many there are in a row is lost beside it."""
    return is_bias(mask.node) if mask.fill is None else mask.fill == -math.inf


def _with_sinks(site: Site, node: fx.Node, softmax: Softmax, sinks: fx.Node | None) -> Site | Miss:
    if site.weighted.sliced != (sinks is not None):
        return Miss("a last column of the probabilities that is dropped, and is one of sinks", "one of both")
    trailing, root, top = 2, site.root, softmax.top
    if softmax.sink is not None:
        if len(top.users) > 1 or sinks is not None or not isinstance(site.layout.heads, int):
            return Miss("scores beside one sink that only the softmax reads", readers(top))
        return replace(site, sinks=softmax.sink, keeps_nan=softmax.keeps_nan)
    if len(top.users) > 1:
        if len(top.users) > 2 or sinks is not None:
            return Miss("scores that only the softmax reads", f"{top.name} is read {len(top.users)} times")
        gate = read_gate(top, node, root)
        if isinstance(gate, Miss):
            return gate
        trailing, root, sinks = gate.trailing, gate.root, gate.sinks
    if sinks is None:
        return site
    found = per_head(sinks, site.layout.heads, trailing)
    if found is None or len(site.weighted.lead) != 2:
        return Miss("sinks of one number for each head", f"{sinks.name} of shape {tuple(val(sinks).shape)}")
    return replace(site, root=root, sinks=found, keeps_nan=root is not site.root)
