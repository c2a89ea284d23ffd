"""Proofs that a mask made from sizes alone is causal, or masks nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from fxopt.ir.cone import run, shape_at, symbols
from fxopt.ir.facts import val
from fxopt.ir.index_rules import value_of
from fxopt.ir.linear import Unsupported
from fxopt.ir.ops.masking import LOWEST_SHARE
from fxopt.ir.predicate import INDEX, Sizes

from .mask_memo import kept_outcome
from .mask_program import over_scores, split

# Entries of a mask that may be computed to confirm a proof, and to be the proof (some 50 ms).
CONFIRM = 2**16
COMPUTE = 2**22
SMALL = 3

Point = Mapping[sympy.Symbol, int]


@dataclass(frozen=True)
class Shown:
    """What was shown of a mask: it is causal, or it masks nothing; and how."""

    causal: bool
    how: str


def show(mask: fx.Node, made_by: list[fx.Node], attention: fx.Node) -> Shown:
    """Prove that `mask` is causal or masks nothing, for all sizes.

    Args:
        mask: the mask of `attention`; True takes part, or additive. made_by: its cone, which reads no data.

    Raises:
        Unsupported: no proof was found; the message says what stood in the way.
    """
    return kept_outcome("fxopt_mask_proof", mask, attention, lambda: _prove(mask, made_by, attention))


def _prove(mask: fx.Node, made_by: list[fx.Node], attention: fx.Node) -> Shown:
    """By the indices; where they do not tell and all sizes are known, by computing the mask."""
    try:
        return _by_indices(mask, made_by, attention)
    except Unsupported as refusal:
        if symbols([*made_by, attention]) or _entries(mask, {}) > COMPUTE:
            raise
        causal = next((each for each in (False, True) if _agrees(mask, made_by, attention, {}, each)), None)
        if causal is None:
            raise refusal from None
        return Shown(causal, f"computed at all its {_entries(mask, {})} entries")


def _by_indices(mask: fx.Node, made_by: list[fx.Node], attention: fx.Node) -> Shown:
    value = value_of(mask)
    sizes = Sizes(getattr(val(mask).fake_mode, "shape_env", None))
    moved, domain = over_scores(sizes, value, attention)
    live, bias, _ = split(value)
    if bias != 0:
        raise Unsupported(f"scores to which {bias} is added")
    live = live.xreplace(moved)
    rank = val(attention.args[0]).dim()
    row, column = INDEX[rank - 2], INDEX[rank - 1]
    if sizes.implies(domain, live):
        causal = False
    elif sizes.equivalent(domain, live, column <= row):
        causal = True
    else:
        raise Unsupported(f"keys taking part where {_readable(live, rank)}")
    return Shown(causal, "proven for all sizes" + _confirm(mask, made_by, attention, causal))


def _readable(formula: sympy.Basic, rank: int) -> str:
    names = ("b", "h", "q", "k")[-rank:]
    return str(formula.xreplace({INDEX[dim]: sympy.Symbol(name) for dim, name in enumerate(names)}))


def _confirm(mask: fx.Node, made_by: list[fx.Node], attention: fx.Node, causal: bool) -> str:
    """Compute the mask at small sizes: it must be what was proven. Returns where, in words."""
    hints = symbols([*made_by, attention])
    seen = {symbol: number for symbol, number in hints.items() if number is not None}
    points = [seen, small_sizes(hints, mask)] if len(seen) == len(hints) else [small_sizes(hints, mask)]
    point = next((each for each in points if _entries(mask, each) <= CONFIRM), None)
    if point is None:
        return ", too large to be computed as well"
    named = ", ".join(f"{symbol}={number}" for symbol, number in point.items())
    if not _agrees(mask, made_by, attention, point, causal):
        raise Unsupported(f"another mask when computed at {named or 'its own size'}")
    return f" and computed at {named or 'its own size'}"


def small_sizes(found: Mapping[sympy.Symbol, int | None], mask: fx.Node) -> dict[sympy.Symbol, int]:
    """A small number for each symbol, within its range, all different."""
    sizes = Sizes(getattr(val(mask).fake_mode, "shape_env", None))
    return {
        symbol: max(SMALL, sizes.bounds(symbol)[0] or 0) + place
        for place, symbol in enumerate(sorted(found, key=str))
    }


def _entries(mask: fx.Node, at: Point) -> int:
    return math.prod(shape_at(val(mask), at))


def _agrees(mask: fx.Node, made_by: list[fx.Node], attention: fx.Node, at: Point, causal: bool) -> bool:
    """Computed at the sizes `at`, the mask is the causal one, or keeps all."""
    computed = run(made_by, at)
    query, key = shape_at(val(attention.args[0]), at), shape_at(val(attention.args[1]), at)
    wanted = torch.ones(query[-2], key[-2], dtype=torch.bool, device="cpu")
    wanted = wanted.tril() if causal else wanted
    if computed.dtype is torch.bool:
        return bool((computed == wanted).all())
    excluded = computed <= LOWEST_SHARE * torch.finfo(computed.dtype).min
    return bool((((computed == 0) == wanted) & (excluded != wanted)).all())
