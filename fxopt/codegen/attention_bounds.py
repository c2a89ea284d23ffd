"""Which keys a block of queries can see, and which queries see a block of keys, as Triton text.

The same interval arithmetic as `fxopt.ir.bounds`, on formulas instead of numbers: ``k <= q + 3`` bounds k by
the last query of the block, whatever block that is. Captured entries that are one number for a whole sequence
(``k < c0[b]``) bound as sizes do; what else has captured tensors in it bounds nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from fxopt.codegen.attention_program import TritonText, is_uniform
from fxopt.ir.formula import H, K, Q

# The block of the other axis, both ends included, and the number of places along this one.
FIRST, LAST, EXTENT = sympy.symbols("first last extent", integer=True)

# Pieces that a kernel walks one after the other.
MOST_PIECES = 2


@dataclass(frozen=True)
class Span:
    """Places along one axis, as formulas over `FIRST`, `LAST`, `EXTENT`, sizes and uniform captures.

    Attributes:
        lows, highs: of ``[max(lows), min(highs))``, outside of which nothing takes part.
        full_lows, full_highs: of the part in which all take part; None where no such part is known.
        live_if, full_if: numbers that must be positive, or nothing, or not all, takes part.
    """

    lows: tuple[Any, ...] = ()
    highs: tuple[Any, ...] = ()
    full_lows: tuple[Any, ...] | None = ()
    full_highs: tuple[Any, ...] | None = ()
    live_if: tuple[Any, ...] = ()
    full_if: tuple[Any, ...] = ()

    def __and__(self, other: Span) -> Span:
        full = None not in (self.full_lows, other.full_lows)
        return Span(
            self.lows + other.lows,
            self.highs + other.highs,
            (self.full_lows or ()) + (other.full_lows or ()) if full else None,
            (self.full_highs or ()) + (other.full_highs or ()) if full else None,
            self.live_if + other.live_if,
            self.full_if + other.full_if,
        )

    @property
    def has_full(self) -> bool:
        return self.full_lows is not None

    @property
    def is_everything(self) -> bool:
        return not self.lows and not self.highs and not self.live_if


NOTHING_KNOWN = Span(full_lows=None, full_highs=None)


def spans(formula: Boolean, along: sympy.Symbol) -> tuple[Span, ...]:
    """The pieces along `along` (k or q) that a block of the other axis may see; they may overlap.

    One piece or two: a condition of more alternatives bounds nothing.
    """
    alternatives = _alternatives(formula)
    if len(alternatives) > MOST_PIECES:
        return (NOTHING_KNOWN,)
    found = tuple(_of_conjunction(each, along) for each in alternatives)
    # What is everywhere leaves nothing to the other one.
    whole = [each for each in found if each.is_everything]
    return (whole[0],) if whole else found


def _alternatives(formula: Boolean) -> list[Boolean]:
    """The formula as "or" of these; of few where it can be."""
    if isinstance(formula, sympy.Or):
        return [each for arg in formula.args for each in _alternatives(arg)]
    if isinstance(formula, sympy.And):
        choices = [arg for arg in formula.args if isinstance(arg, sympy.Or)]
        if len(choices) == 1 and len(choices[0].args) <= MOST_PIECES:
            others = [arg for arg in formula.args if arg is not choices[0]]
            return [sympy.And(each, *others) for each in choices[0].args]
    return [formula]


def _of_conjunction(formula: Boolean, along: sympy.Symbol) -> Span:
    parts = formula.args if isinstance(formula, sympy.And) else (formula,)
    found = (_of_part(part, along) for part in parts)
    return functools.reduce(lambda a, b: a & b, found)


def _of_part(part: Boolean, along: sympy.Symbol) -> Span:
    if part == sympy.true:
        return Span()
    if part == sympy.false:
        return Span(highs=(sympy.Integer(0),), full_lows=None, full_highs=None)
    if not isinstance(part, Relational) or isinstance(part, sympy.Ne):
        return NOTHING_KNOWN
    moving, rest = _split(sympy.expand(part.lhs - part.rhs), along)
    form, ends = _form(moving, along), _ends(rest, Q if along == K else K)
    if moving == 0 and ends is not None:
        return _of_block(part, ends)
    if form is None or ends is None:
        return NOTHING_KNOWN
    return _of_relation(part, form, ends)


def _of_relation(part: Any, form: tuple[int, Any, int], ends: tuple[Any, Any]) -> Span:
    """``sign * ((x + shift) // divisor) + rest  (relation)  0`` with `rest` between `ends`."""
    sign, shift, divisor = form
    least, most = (-ends[1], -ends[0]) if sign == 1 else ends
    strict = int(isinstance(part, sympy.Lt | sympy.Gt))
    below = isinstance(part, sympy.Le | sympy.Lt) == (sign == 1)
    equal = isinstance(part, sympy.Eq)
    found = Span()
    if below or equal:
        highs = [divisor * (each - strict + 1) - shift for each in (most, least)]
        found = found & Span(highs=(highs[0],), full_highs=(highs[1],))
    if not below or equal:
        lows = [divisor * (each + strict) - shift for each in (least, most)]
        found = found & Span(lows=(lows[0],), full_lows=(lows[1],))
    return found


def _of_block(part: Any, ends: tuple[Any, Any]) -> Span:
    """``rest (relation) 0`` with `rest` between `ends`: what holds at every place, or at none."""
    low, high = ends
    strict = int(isinstance(part, sympy.Lt | sympy.Gt))
    if isinstance(part, sympy.Eq):
        return Span(live_if=(1 - low, high + 1), full_if=(low + 1, 1 - high))
    if isinstance(part, sympy.Le | sympy.Lt):
        return Span(live_if=(1 - strict - low,), full_if=(1 - strict - high,))
    return Span(live_if=(high + 1 - strict,), full_if=(low + 1 - strict,))


def _split(expression: Any, along: sympy.Symbol) -> tuple[Any, Any]:
    """The terms with the axis, and the others."""
    terms = sympy.Add.make_args(expression)
    return sympy.Add(*(each for each in terms if each.has(along))), sympy.Add(
        *(each for each in terms if not each.has(along))
    )


def _form(expression: Any, along: sympy.Symbol) -> tuple[int, Any, int] | None:
    """(sign, shift, divisor) of ``x``, ``-x``, or ``(x + shift)//divisor`` with either sign."""
    sign, term = expression.as_coeff_Mul()
    if sign not in (1, -1):
        return None
    if term == along:
        return int(sign), sympy.Integer(0), 1
    if isinstance(term, sympy.floor):
        above, divisor = term.args[0].as_numer_denom()
        shift = sympy.expand(above - along)
        if divisor.is_Integer and divisor > 0 and _is_fixed(shift):
            return int(sign), shift, int(divisor)
    return None


def _is_fixed(expression: Any) -> bool:
    """One number for all scores of a sequence, known when a kernel begins with them."""
    accesses = expression.atoms(AppliedUndef)
    return not expression.free_symbols & {H, K, Q} and all(map(is_uniform, accesses))


def _ends(expression: Any, given: sympy.Symbol) -> tuple[Any, Any] | None:
    """The least and the largest value where `given` goes from `FIRST` to `LAST`; None where not known."""
    low, high = sympy.Integer(0), sympy.Integer(0)
    for term in sympy.Add.make_args(expression):
        factor, rest = term.as_coeff_Mul()
        if not factor.is_Integer:
            return None
        ends = (rest, rest) if _is_fixed(rest) else _moving_ends(rest, given)
        if ends is None:
            return None
        ends = ends if factor > 0 else (ends[1], ends[0])
        low, high = low + factor * ends[0], high + factor * ends[1]
    return low, high


def _moving_ends(term: Any, given: sympy.Symbol) -> tuple[Any, Any] | None:
    if term == given:
        return FIRST, LAST
    if isinstance(term, sympy.floor):
        above, divisor = term.args[0].as_numer_denom()
        ends = _ends(sympy.expand(above), given)
        if ends is not None and divisor.is_Integer and divisor > 0:
            return sympy.floor(ends[0] / divisor), sympy.floor(ends[1] / divisor)
    return None


def bounds_function(name: str, found: Sequence[Span], text: TritonText) -> str:
    """A device function that gives ``low, full_low, full_high, high`` of one piece, as int32.

    ``low <= full_low <= full_high <= high``; pieces are in order and do not overlap.

    Args:
        name: of the function ``(b, first, last, extent, PIECE, captured)``.
    """
    lines = [f"@triton.jit\ndef {name}(b, first, last, extent, PIECE: tl.constexpr, captured):"]
    lines.append('    """' + _meaning(found) + '"""')
    for place, span in enumerate(found):
        lines += [f"    {line}" for line in _span_lines(place, span, text)]
    if len(found) == MOST_PIECES:
        lines += [f"    {line}" for line in _ORDERED]
    names = [f"{end}0" if len(found) == 1 else f"{end}1 if PIECE else {end}0" for end in ENDS]
    lines.append(f"    return {', '.join(names)}")
    return "\n".join(lines) + "\n"


ENDS = ("low", "full_low", "full_high", "high")

# The piece that begins first comes first; the other one begins where it ends.
_ORDERED = (
    "swapped = low1 < low0",
    *(
        f"{end}0, {end}1 = tl.where(swapped, {end}1, {end}0), tl.where(swapped, {end}0, {end}1)"
        for end in ENDS
    ),
    "low1 = tl.maximum(low1, tl.minimum(high0, extent))",
    "high1 = tl.maximum(high1, low1)",
    "full_low1 = tl.minimum(tl.maximum(full_low1, low1), high1)",
    "full_high1 = tl.maximum(full_high1, full_low1)",
)


def _meaning(found: Sequence[Span]) -> str:
    pieces = " and ".join("[low, high)" if each.has_full else "[low, high), no part full" for each in found)
    return f"Where a block takes part: {pieces}."


def _span_lines(place: int, span: Span, text: TritonText) -> Iterator[str]:
    low, full_low, full_high, high = (f"{end}{place}" for end in ENDS)
    yield f"{low} = tl.minimum({_joined('maximum', span.lows, '0', text)}, extent).to(tl.int32)"
    last = _joined("minimum", span.highs, "extent", text)
    yield f"{high} = tl.maximum({_where(span.live_if, last, low, text)}, {low}).to(tl.int32)"
    if span.full_lows is None or span.full_highs is None:
        yield f"{full_low}, {full_high} = {high}, {high}"
        return
    first = _joined("maximum", span.full_lows, low, text)
    yield f"{full_low} = tl.minimum({first}, {high}).to(tl.int32)"
    last = _where(span.full_if, _joined("minimum", span.full_highs, high, text), full_low, text)
    yield f"{full_high} = tl.maximum({last}, {full_low}).to(tl.int32)"


def _joined(function: str, numbers: Sequence[Any], start: str, text: TritonText) -> str:
    found = start
    for each in dict.fromkeys(map(sympy.expand, numbers)):
        found = f"tl.{function}({found}, {text.integer(each)})"
    return found


def _where(conditions: Sequence[Any], holds: str, else_: str, text: TritonText) -> str:
    found = holds
    for each in dict.fromkeys(map(sympy.expand, conditions)):
        found = f"tl.where({text.integer(each)} > 0, {found}, {else_})"
    return found
