"""Every layout of batch and heads as (batch, heads): which views bring a tensor there.

A *lead* is the sizes in front of the last two dimensions: (B, H), but also (B * H,), (), (B, windows, H),
and (B, Hkv, G) where G query heads share a key head. Reshapes keep the order of the scores in memory, so two
leads of one site are two ways to write one sequence of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from fxopt.ir.facts import Size, same_shape, same_size

aten = torch.ops.aten

Lead = tuple[Size, ...]
# Calls to apply one after the other: (op, arguments after the tensor). Sizes may be symbolic: `sizes_in`.
Steps = list[tuple[Any, tuple[Any, ...]]]


def sizes_in(steps: Steps) -> list[torch.SymInt]:
    """The sizes among the arguments that are not known while compiling."""
    flat = pytree.tree_leaves([args for _, args in steps])
    return [arg for arg in flat if isinstance(arg, torch.SymInt)]


@dataclass(frozen=True)
class Layout:
    """What the op's first two dimensions are."""

    batch: Size
    heads: Size

    @staticmethod
    def of(product: Lead, key: Lead, widest: Lead) -> Layout:
        """Of scores: their lead as a product, that of K in it, and the widest lead they are viewed as."""
        if not product:
            return Layout(1, 1)
        if len(product) == 1:
            known = len(widest) == 2 and isinstance(widest[1], int)
            return Layout(*widest) if known else Layout(1, product[0])
        groups = len(product) > 2 and len(key) == len(product) and same_size(key[-1], 1)
        last = len(product) - (2 if groups and not same_size(product[-1], 1) else 1)
        return Layout(math.prod(product[:last]), math.prod(product[last:]))

    def cut(self, lead: Lead) -> int | None:
        """How many dimensions of a lead of at least two are the batch; None where it mixes both."""
        for place in range(1, len(lead)):
            batch, heads = math.prod(lead[:place]), math.prod(lead[place:])
            if same_size(batch, self.batch) and same_size(heads, self.heads):
                return place
        return None

    def mask_steps(self, own: Lead, at: Lead) -> Steps | None:
        """How to bring a mask with the lead `own`, which broadcasts to `at`, to (batch or 1, heads or 1)."""
        return self._steps(own, at, batch=_fits_mask, heads=_fits_mask)

    def query_steps(self, own: Lead, at: Lead) -> Steps | None:
        """The same for Q, which has to have its full size."""
        return self._steps(own, at, batch=same_shape, heads=same_shape)

    def key_steps(self, own: Lead, at: Lead) -> Steps | None:
        """The same for K and V, which may have fewer heads."""
        return self._steps(own, at, batch=same_shape, heads=_fits_keys)

    def result_steps(self, at: Lead) -> Steps | None:
        """How to bring (batch, heads, rows, depth) to the lead `at`."""
        if not at:
            return [(aten.squeeze.dim, (0,))] * 2
        if len(at) == 1:
            if not same_size(at[0], self.batch * self.heads):
                return None
            if same_size(self.batch, 1):
                return [(aten.squeeze.dim, (0,))]
            return [(aten.flatten.using_ints, (0, 1))]
        cut = self.cut(at)
        if cut is None:
            return None
        heads, batch = _split(1, at[cut:]), _split(0, at[:cut])
        return None if heads is None or batch is None else heads + batch

    def extent(self, own: Lead, at: Lead) -> tuple[bool, bool]:
        """Whether a mask with the lead `own` differs from batch to batch, and from head to head."""
        own = (1,) * (len(at) - len(own)) + own
        if len(at) < 2:
            differs = not _are_ones(own)
            return differs and not same_size(self.batch, 1), differs
        cut = self.cut(at) or 0
        return not _are_ones(own[:cut]), not _are_ones(own[cut:])

    def key_heads(self, own: Lead, at: Lead) -> Size:
        """How many heads `key_steps` leave."""
        if len(at) < 2:
            return self.heads
        own = (1,) * (len(at) - len(own)) + own
        first = self.cut(at) or 0
        if not _fits_keys(own[first:], at[first:]):
            return self.heads
        return math.prod(own[first:])

    def _steps(self, own: Lead, at: Lead, *, batch: Fits, heads: Fits) -> Steps | None:
        missing = len(at) - len(own)
        if missing < 0:
            return None
        own = (1,) * missing + own
        steps: Steps = [(aten.unsqueeze.default, (0,))] * missing
        if len(at) < 2:
            narrow = self._from_narrow(own, at)
            return None if narrow is None else steps + narrow
        cut = self.cut(at)
        if cut is None:
            return None
        for first, last, fits in ((cut, len(at), heads), (0, cut, batch)):
            merged = _merged(own, at, first, last, fits)
            if merged is None:
                return None
            steps += merged
        return steps

    def _from_narrow(self, own: Lead, at: Lead) -> Steps | None:
        if not at:
            return [(aten.unsqueeze.default, (0,))] * 2
        if not same_size(at[0], self.batch * self.heads):
            return None
        if same_size(self.batch, 1) or same_size(own[0], 1):
            return [(aten.unsqueeze.default, (0,))]
        return [(aten.unflatten.int, (0, [-1, self.heads]))] if isinstance(self.heads, int) else None


Fits = Callable[[Lead, Lead], bool]


def _fits_mask(mine: Lead, whole: Lead) -> bool:
    return same_shape(mine, whole) or _are_ones(mine)


def _are_ones(sizes: Lead) -> bool:
    return all(same_size(size, 1) for size in sizes)


def _fits_keys(mine: Lead, whole: Lead) -> bool:
    """As many heads, one, or one for each row of query heads."""
    shared = same_shape(mine[:-1], whole[:-1]) and same_size(mine[-1], 1)
    return shared or _fits_mask(mine, whole)


def _merged(own: Lead, at: Lead, first: int, last: int, fits: Fits) -> Steps | None:
    """The dimensions [first, last) as one, repeated where they have to be."""
    steps: Steps = []
    if not fits(own[first:last], at[first:last]):
        repeats = {place for place in range(first, last) if not same_size(own[place], at[place])}
        sizes = [at[place] if place in repeats else -1 for place in range(len(at))]
        steps.append((aten.expand.default, ([*sizes, -1, -1],)))
    if last - first > 1:
        steps.append((aten.flatten.using_ints, (first, last - 1)))
    return steps


def _split(dim: int, sizes: Lead) -> Steps | None:
    """One dimension as several, of which one may be of unknown size."""
    if len(sizes) == 1:
        return []
    known = [size if isinstance(size, int) else -1 for size in sizes]
    return None if known.count(-1) > 1 else [(aten.unflatten.int, (dim, known))]
