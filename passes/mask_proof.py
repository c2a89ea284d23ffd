"""Proofs that a mask made from sizes alone is causal, or masks nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from fxopt.ir.cone import run, shape_at, symbols
from fxopt.ir.facts import shape, val
from fxopt.ir.index_rules import value_of
from fxopt.ir.linear import Unsupported
from fxopt.ir.predicate import INDEX, Sizes, Value, box, broadcast

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
    # Layers share their mask, and a pass asks twice. A copy of the node copies what is kept with it.
    key = (mask, *(str(val(arg).shape) for arg in attention.args[:2]))
    kept = mask.meta.get(_KEPT)
    if kept is None or kept[0] != key:
        kept = mask.meta[_KEPT] = (key, _outcome(mask, made_by, attention))
    if isinstance(kept[1], Unsupported):
        raise kept[1]
    return kept[1]


_KEPT = "fxopt_mask_proof"


def _outcome(mask: fx.Node, made_by: list[fx.Node], attention: fx.Node) -> Shown | Unsupported:
    try:
        return _prove(mask, made_by, attention)
    except Unsupported as refusal:
        return refusal


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
    target = _scores_shape(sizes, attention)
    moved = dict(zip(INDEX, broadcast(value.shape, target), strict=False))
    live = live_of(value).xreplace(moved)
    row, column = INDEX[len(target) - 2], INDEX[len(target) - 1]
    if sizes.implies(box(target), live):
        causal = False
    elif sizes.equivalent(box(target), live, column <= row):
        causal = True
    else:
        raise Unsupported(f"keys taking part where {_readable(live, len(target))}")
    return Shown(causal, "proven for all sizes" + _confirm(mask, made_by, attention, causal))


def live_of(value: Value) -> sympy.logic.boolalg.Boolean:
    """Where a key takes part."""
    if value.dtype is torch.bool:
        return value.where(1)
    if not value.dtype.is_floating_point:
        raise Unsupported(f"a mask of {value.dtype}")
    for number in value.constants():
        if number not in (0.0, *_fills(value.dtype)):
            raise Unsupported(f"the entry {number}, which neither keeps nor excludes a key")
    return value.where(0.0)


def _fills(dtype: torch.dtype) -> tuple[float, ...]:
    """The numbers that exclude a key in a mask of this dtype."""
    # bfloat16 has the range of float32: its lowest number, widened, excludes as well.
    same_range = (torch.bfloat16,) if dtype is torch.float32 else ()
    return (-math.inf, *(torch.finfo(each).min for each in (dtype, *same_range)))


def _scores_shape(sizes: Sizes, attention: fx.Node) -> tuple[sympy.Expr, ...]:
    """(..., Sq, Skv)"""
    query, key = shape(attention.args[0]), shape(attention.args[1])  # type: ignore[arg-type]
    return tuple(sizes.size(size) for size in (*query[:-1], key[-2]))


def _readable(formula: sympy.Basic, rank: int) -> str:
    names = ("b", "h", "q", "k")[-rank:]
    return str(formula.xreplace({INDEX[dim]: sympy.Symbol(name) for dim, name in enumerate(names)}))


def _confirm(mask: fx.Node, made_by: list[fx.Node], attention: fx.Node, causal: bool) -> str:
    """Compute the mask at small sizes: it must be what was proven. Returns where, in words."""
    hints = symbols([*made_by, attention])
    seen = {symbol: number for symbol, number in hints.items() if number is not None}
    points = [seen, _small(hints, mask)] if len(seen) == len(hints) else [_small(hints, mask)]
    point = next((each for each in points if _entries(mask, each) <= CONFIRM), None)
    if point is None:
        return ", too large to be computed as well"
    named = ", ".join(f"{symbol}={number}" for symbol, number in point.items())
    if not _agrees(mask, made_by, attention, point, causal):
        raise Unsupported(f"another mask when computed at {named or 'its own size'}")
    return f" and computed at {named or 'its own size'}"


def _small(found: Mapping[sympy.Symbol, int | None], mask: fx.Node) -> dict[sympy.Symbol, int]:
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
    excluded = torch.zeros_like(computed, dtype=torch.bool)
    for fill in _fills(computed.dtype):
        excluded |= computed == fill
    return bool((((computed == 0) == wanted) & (excluded != wanted)).all())
