"""Which keys a block of queries can see at all: intervals from a mask program, without looking at data.

Interval arithmetic over the queries of the block: ``k <= q + 3`` bounds k by the last query, ``k//8 == q//8``
by the first and the last group. What has captured tensors in it bounds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from fxopt.ir.formula import K, Q

Interval: TypeAlias = tuple[int, int]  # [first, last)


def live_columns(formula: Boolean, rows: Interval, columns: int) -> tuple[Interval, ...]:
    """The keys outside of which no query in `rows` sees any, as intervals in order that do not touch.

    Args:
        formula: where a key takes part; sizes are replaced by their numbers. columns: the number of keys.
    """
    return _merged(_live(formula, rows, columns))


def is_full(formula: Boolean, rows: Interval, columns: Interval) -> bool:
    """Proven: every query in `rows` sees every key in `columns`."""
    if isinstance(formula, sympy.And):
        return all(is_full(arg, rows, columns) for arg in formula.args)
    if isinstance(formula, sympy.Or):
        return any(is_full(arg, rows, columns) for arg in formula.args)
    if not isinstance(formula, Relational):
        return bool(formula == sympy.true)
    span = _range(sympy.expand(formula.lhs - formula.rhs), {Q: rows, K: columns})
    if span is None:
        return False
    if isinstance(formula, sympy.Eq):
        return span == _Range(0, 0)
    if isinstance(formula, sympy.Ne):
        return span.low > 0 or span.high < 0
    if isinstance(formula, sympy.Le | sympy.Lt):
        return span.high < 0 if isinstance(formula, sympy.Lt) else span.high <= 0
    return span.low > 0 if isinstance(formula, sympy.Gt) else span.low >= 0


@dataclass(frozen=True)
class _Range:
    """All integers from `low` to `high`, both included."""

    low: int
    high: int

    def __add__(self, other: _Range) -> _Range:
        return _Range(self.low + other.low, self.high + other.high)

    def times(self, factor: int) -> _Range:
        ends = (self.low * factor, self.high * factor)
        return _Range(min(ends), max(ends))


def _range(expression: sympy.Expr, known: dict[sympy.Symbol, Interval]) -> _Range | None:
    """The values of an integer expression; None where its terms are not known."""
    if expression.is_Integer:
        return _Range(int(expression), int(expression))
    if expression in known:
        first, last = known[expression]
        return _Range(first, last - 1)
    if isinstance(expression, sympy.Add):
        total = _Range(0, 0)
        for term in expression.args:
            found = _range(term, known)
            if found is None:
                return None
            total = total + found
        return total
    factor, rest = expression.as_coeff_Mul()
    if factor.is_Integer and factor != 1:
        found = _range(rest, known)
        return None if found is None else found.times(int(factor))
    if isinstance(expression, sympy.floor):
        numerator, denominator = expression.args[0].as_numer_denom()
        found = _range(sympy.expand(numerator), known)
        if found is not None and denominator.is_Integer and denominator > 0:
            return _Range(found.low // int(denominator), found.high // int(denominator))
    return None


def _live(formula: Boolean, rows: Interval, columns: int) -> list[Interval]:
    if formula == sympy.false:
        return []
    if isinstance(formula, sympy.Or):
        return [each for arg in formula.args for each in _live(arg, rows, columns)]
    found = [(0, columns)]
    if isinstance(formula, sympy.And):
        for arg in formula.args:
            found = _intersected(found, _merged(_live(arg, rows, columns)))
    elif isinstance(formula, Relational):
        found = _intersected(found, [_of_relation(formula, rows, columns)])
    return found


def _of_relation(formula: Relational, rows: Interval, columns: int) -> Interval:
    """The interval to which one relation keeps k."""
    everything = (0, columns)
    difference = sympy.expand(formula.lhs - formula.rhs)
    of_k, rest = _split(difference)
    span = _range(rest, {Q: rows})
    if of_k == 0 and span is not None:
        return everything if _may_hold(formula, span) else (0, 0)
    form = _form(of_k)
    if isinstance(formula, sympy.Ne) or span is None or form is None:
        return everything
    sign, shift, divisor = form
    # sign * ((k + shift) // divisor) + rest  (relation)  0
    strict = int(isinstance(formula, sympy.Lt | sympy.Gt))
    below = isinstance(formula, sympy.Le | sympy.Lt) == (sign == 1)
    opposite = span.times(-sign)
    low, high = everything
    if below or isinstance(formula, sympy.Eq):
        high = min(high, divisor * (opposite.high - strict + 1) - shift)
    if not below or isinstance(formula, sympy.Eq):
        low = max(low, divisor * (opposite.low + strict) - shift)
    return (low, max(low, high))


def _may_hold(formula: Relational, span: _Range) -> bool:
    """Whether a number in `span` has this relation to 0."""
    if isinstance(formula, sympy.Eq):
        return span.low <= 0 <= span.high
    if isinstance(formula, sympy.Ne):
        return span != _Range(0, 0)
    if isinstance(formula, sympy.Le | sympy.Lt):
        return span.low < 0 or (span.low == 0 and isinstance(formula, sympy.Le))
    return span.high > 0 or (span.high == 0 and isinstance(formula, sympy.Ge))


def _split(expression: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """The terms with k, and the others."""
    of_k, rest = sympy.Integer(0), sympy.Integer(0)
    for term in sympy.Add.make_args(expression):
        if term.has(K):
            of_k += term
        else:
            rest += term
    return of_k, rest


def _form(expression: sympy.Expr) -> tuple[int, int, int] | None:
    """(sign, shift, divisor) of ``k``, ``-k``, or ``(k + shift)//divisor`` with either sign."""
    sign, term = expression.as_coeff_Mul()
    if sign not in (1, -1):
        return None
    if term == K:
        return int(sign), 0, 1
    if isinstance(term, sympy.floor):
        numerator, divisor = term.args[0].as_numer_denom()
        shift = sympy.expand(numerator - K)
        if shift.is_Integer and divisor.is_Integer and divisor > 0:
            return int(sign), int(shift), int(divisor)
    return None


def _intersected(some: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    pairs = ((max(a[0], b[0]), min(a[1], b[1])) for a in some for b in others)
    return [(low, high) for low, high in pairs if low < high]


def _merged(found: Sequence[Interval]) -> tuple[Interval, ...]:
    merged: list[Interval] = []
    for low, high in sorted(each for each in found if each[0] < each[1]):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)
