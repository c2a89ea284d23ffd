"""Index arithmetic of loops: which element of a tensor an iteration reads, through any views, as sympy.

An index is a tuple of expressions, one for each dimension, over the symbols of a loop's axes and over sizes.
Both are non-negative integers, so that division rounds as C does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from fxopt.ir.sizes import size_of

Index = tuple[sympy.Expr, ...]
Sizes = tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Axis:
    """One loop. `reduced` axes are those that reductions run over.

    Attributes:
        symbol: stands for 0 to `size` - 1. size: an integer, or an expression of symbolic sizes.
    """

    symbol: sympy.Symbol
    size: sympy.Expr
    reduced: bool = False


def axis(name: str, size: sympy.Expr, reduced: bool = False) -> Axis:
    """An axis whose symbol sympy knows to be a non-negative integer."""
    return Axis(sympy.Symbol(name, integer=True, nonnegative=True), sympy.sympify(size), reduced)


def sizes_of(values: Iterable[int | torch.SymInt]) -> Sizes:
    """Sizes or strides as sympy has them."""
    return tuple(map(size_of, values))


def product(sizes: Iterable[sympy.Expr]) -> sympy.Expr:
    """Of no sizes, one."""
    return sympy.expand(math.prod(sizes, start=sympy.Integer(1)))


def same(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Equal for all values of the symbols."""
    return bool(a == b or sympy.expand(a - b) == 0)


Ranges = Mapping[sympy.Symbol, sympy.Expr]


def ranges_of(axes: Iterable[Axis]) -> dict[sympy.Symbol, sympy.Expr]:
    """How far each symbol runs: the size of its axis."""
    return {one.symbol: one.size for one in axes}


def _at_most(expr: sympy.Expr, ranges: Ranges) -> sympy.Expr | None:
    """An upper bound; None when a term may be negative or is not understood."""
    total = sympy.Integer(0)
    for term in sympy.Add.make_args(sympy.expand(expr)):
        factor, rest = term.as_independent(*ranges, Mod, FloorDiv)
        if not factor.is_nonnegative:
            return None
        bound = _term_at_most(rest, ranges)
        if bound is None:
            return None
        total += factor * bound
    return sympy.expand(total)


def _term_at_most(term: sympy.Expr, ranges: Ranges) -> sympy.Expr | None:
    if term == 1:
        return sympy.Integer(1)
    if term in ranges:
        return ranges[term] - 1
    if isinstance(term, Mod):
        return term.args[1] - 1
    if isinstance(term, FloorDiv):
        above = _at_most(term.args[0], ranges)
        return None if above is None else FloorDiv(above, term.args[1])
    return None


def _split(expr: sympy.Expr, divisor: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """`expr` as divisor * quotient + rest, term by term."""
    quotient: list[sympy.Expr] = []
    rest: list[sympy.Expr] = []
    for term in sympy.Add.make_args(sympy.expand(expr)):
        share = sympy.cancel(term / divisor) if divisor != 1 else term
        whole = share.is_integer and not share.as_numer_denom()[1].free_symbols
        (quotient if whole else rest).append(share if whole else term)
    return sympy.Add(*quotient), sympy.Add(*rest)


def floor_divide(expr: sympy.Expr, divisor: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """``expr // divisor``, without the division where the range of `expr` allows."""
    quotient, rest = _split(expr, divisor)
    if _fits(rest, divisor, ranges):
        return quotient
    return quotient + FloorDiv(rest, divisor)


def modulo(expr: sympy.Expr, divisor: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """``expr % divisor``, without it where the range of `expr` allows."""
    _, rest = _split(expr, divisor)
    return rest if _fits(rest, divisor, ranges) else Mod(rest, divisor)


def _fits(rest: sympy.Expr, divisor: sympy.Expr, ranges: Ranges) -> bool:
    if rest == 0:
        return True
    above = _at_most(rest, ranges)
    return above is not None and bool(sympy.expand(divisor - 1 - above).is_nonnegative)


def flatten(index: Index, sizes: Sizes) -> sympy.Expr:
    """The position of `index` among the elements of a contiguous tensor of `sizes`."""
    flat = sympy.Integer(0)
    for at, size in zip(index, sizes, strict=True):
        flat = flat * size + at
    return _recombined(sympy.expand(flat))


def _recombined(expr: sympy.Expr) -> sympy.Expr:
    """With ``a // b * b + a % b`` written as ``a``, which a view and its inverse leave."""
    for rest in sorted(expr.atoms(Mod), key=str):
        dividend, divisor = rest.args
        factor, quotient = expr.coeff(rest), FloorDiv(dividend, divisor)
        if factor != 0 and sympy.expand(expr.coeff(quotient) - factor * divisor) == 0:
            expr = sympy.expand(expr - factor * rest - factor * divisor * quotient + factor * dividend)
    return expr


def unflatten(flat: sympy.Expr, sizes: Sizes, ranges: Ranges) -> Index:
    """The index of element `flat` of a contiguous tensor of `sizes`."""
    index: list[sympy.Expr] = []
    for position, size in reversed(list(enumerate(sizes))):
        if size == 1:
            index.append(sympy.Integer(0))
        elif product(sizes[:position]) == 1:
            index.append(flat)
        else:
            index.append(modulo(flat, size, ranges))
            flat = floor_divide(flat, size, ranges)
    return tuple(reversed(index))


def reshaped(index: Index, sizes: Sizes, source: Sizes, ranges: Ranges) -> Index:
    """Where element `index` of a tensor viewed as `sizes` lies in the tensor of sizes `source`.

    Runs of dimensions with equal products are mapped for themselves, so that what a view leaves alone stays
    free of division.
    """
    found: list[sympy.Expr] = []
    for here, there in _matching_runs(sizes, source):
        own, index = index[: len(here)], index[len(here) :]
        untouched = len(here) == len(there) and all(map(same, here, there))
        found += own if untouched else unflatten(flatten(own, here), there, ranges)
    return tuple(found)


def _matching_runs(a: Sizes, b: Sizes) -> list[tuple[Sizes, Sizes]]:
    """The shortest runs of dimensions of both with equal products.

    The last run is all that is left: of a view its products are equal, also where that cannot be seen, as of
    ``s`` and ``s // 4 * 4``.
    """
    runs: list[tuple[Sizes, Sizes]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        start_i, start_j = i, j
        i, j = min(i + 1, len(a)), min(j + 1, len(b))
        while (i < len(a) or j < len(b)) and not same(product(a[start_i:i]), product(b[start_j:j])):
            i, j = _extend(a, b, (start_i, i), (start_j, j))
        runs.append((a[start_i:i], b[start_j:j]))
    return runs


def _extend(a: Sizes, b: Sizes, here: tuple[int, int], there: tuple[int, int]) -> tuple[int, int]:
    """The ends of both runs after the shorter one took a dimension; all that is left if that is unknown."""
    difference = product(a[slice(*here)]) - product(b[slice(*there)])
    if difference.is_negative and here[1] < len(a):
        return here[1] + 1, there[1]
    if difference.is_positive and there[1] < len(b):
        return here[1], there[1] + 1
    return len(a), len(b)


def broadcast(index: Index, sizes: Sizes) -> Index:
    """The index of an operand of `sizes` that is broadcast to a result indexed by `index`."""
    own = index[len(index) - len(sizes) :]
    return tuple(sympy.Integer(0) if size == 1 else at for at, size in zip(own, sizes, strict=True))


def offset(index: Sequence[sympy.Expr], strides: Sizes) -> sympy.Expr:
    """The distance from a tensor's first element, in elements."""
    total = sum((at * stride for at, stride in zip(index, strides, strict=True)), sympy.Integer(0))
    return _recombined(sympy.expand(total))
