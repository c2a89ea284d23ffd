"""Which keys a block of queries can see at all: intervals from a mask program, without looking at data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from fxopt.ir.formula import AXES, K, Q
from fxopt.ir.linear import implies
from fxopt.ir.program import MaskProgram


@dataclass(frozen=True)
class Bound:
    """``k <= slope * q + offset``, or ``k >= slope * q + offset`` where it is a lower bound."""

    slope: int
    offset: int
    upper: bool

    def at(self, q: int) -> int:
        return self.slope * q + self.offset


def bounds(program: MaskProgram) -> tuple[Bound, ...]:
    """The conditions that bound k by a linear function of q. All of them hold for a live key."""
    return tuple(bound for each in program.conjuncts() for bound in _bounds(each))


def _bounds(condition: Boolean) -> Iterator[Bound]:
    if not isinstance(condition, sympy.core.relational.Relational) or isinstance(condition, sympy.Ne):
        return
    difference = sympy.expand(condition.lhs - condition.rhs)
    factor, slope = difference.coeff(K), difference.coeff(Q)
    rest = difference - factor * K - slope * Q
    if factor not in (1, -1) or not slope.is_Integer or not rest.is_Integer:
        return
    # factor * k + slope * q + rest  (relation)  0
    strict = int(isinstance(condition, sympy.Lt | sympy.Gt))
    below = isinstance(condition, sympy.Le | sympy.Lt)
    for upper in (True, False) if isinstance(condition, sympy.Eq) else (below == (factor == 1),):
        offset = int(-rest * factor)
        yield Bound(int(-slope * factor), offset - strict if upper else offset + strict, upper)


def live_columns(found: tuple[Bound, ...], first: int, last: int, columns: int) -> tuple[int, int]:
    """The keys [low, high) outside of which no query in [first, last) sees any; (0, 0) if none."""
    low, high = 0, columns
    for bound in found:
        ends = bound.at(first), bound.at(last - 1)
        if bound.upper:
            high = min(high, max(ends) + 1)
        else:
            low = max(low, min(ends))
    return (low, high) if low < high else (0, 0)


def is_full(program: MaskProgram, rows: tuple[int, int], columns: tuple[int, int]) -> bool:
    """Proven: every query of the block sees every key of the block."""
    if program.live.has(AppliedUndef):
        return False
    block = sympy.And(*_range(Q, rows), *_range(K, columns), *(axis >= 0 for axis in AXES[:2]))
    return implies(block, program.live)


def has_live_key(program: MaskProgram, rows: int, columns: int) -> bool:
    """Proven: every query sees at least one key."""
    if program.live.has(AppliedUndef):
        return False
    domain = sympy.And(*_range(Q, (0, rows)), *(axis >= 0 for axis in AXES[:2]))
    candidates = [sympy.Integer(0), sympy.Integer(columns - 1)]
    candidates += [bound.slope * Q + bound.offset for bound in bounds(program)]
    return any(
        implies(domain, sympy.And(*_range(place, (0, columns)), program.live.xreplace({K: place})))
        for place in candidates
    )


def _range(number: sympy.Expr, ends: tuple[int, int]) -> tuple[Boolean, Boolean]:
    return sympy.Ge(number, ends[0]), sympy.Lt(number, ends[1])
