"""Computes formulas over a tile of scores: a range of queries by a range of keys."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from fxopt.ir.formula import AXES, S

_COMPARE: dict[Any, Any] = {
    sympy.Le: torch.le, sympy.Lt: torch.lt, sympy.Ge: torch.ge, sympy.Gt: torch.gt,
    sympy.Eq: torch.eq, sympy.Ne: torch.ne,
}  # fmt: skip

_ALONG = ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1))


@dataclass(frozen=True)
class TileValues:
    """Every value broadcasts to (B, H, rows, columns).

    Attributes:
        ranges: [first, last) of b, h, q and k. captures: tensors by name. sizes: integers by name.
        scores: what s is, where formulas name it. dtype: of captured floating-point numbers.
    """

    ranges: tuple[tuple[Any, Any], ...]
    captures: Mapping[str, torch.Tensor]
    sizes: Mapping[str, Any]
    device: torch.device
    scores: torch.Tensor | None = None
    dtype: torch.dtype = torch.float32
    memo: dict[Any, torch.Tensor] = field(default_factory=dict)

    def once(self, expression: Any, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What is dear to compute, and is part of a score and of its derivative."""
        if expression not in self.memo:
            self.memo[expression] = compute()
        return self.memo[expression]

    def condition(self, formula: Boolean) -> torch.Tensor:
        """A bool tensor."""
        found: torch.Tensor = _condition(formula)(self)
        return found

    def number(self, expression: Any) -> Any:
        """A Python or symbolic number, or a tensor of four dimensions."""
        return _number(expression)(self)

    def places(self, access: Any) -> tuple[torch.Tensor, ...]:
        """The indices of a captured entry, for each score of the tile."""
        return tuple(self.index(_number(index)(self)) for index in access.args)

    def index(self, place: Any) -> torch.Tensor:
        """An index as a tensor of four dimensions."""
        whole = (1, 1, 1, 1)
        return place if isinstance(place, torch.Tensor) else torch.full(whole, place, device=self.device)

    def axis(self, axis: int) -> torch.Tensor:
        """The indices along one axis of the tile."""
        return torch.arange(*self.ranges[axis], device=self.device).view(_ALONG[axis])

    def real(self, value: Any) -> Any:
        """Integers in the dtype of the computation."""
        whole = isinstance(value, torch.Tensor) and not value.is_floating_point()
        return value.to(self.dtype) if whole else value

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Captured numbers in the dtype of the computation."""
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def view(self, tensor: torch.Tensor, axes: Sequence[int | None]) -> torch.Tensor:
        """A captured tensor that is indexed by axes in order."""
        for dim in reversed(range(len(axes))):
            axis = axes[dim]
            if axis is None:
                tensor = tensor.select(dim, 0)
            else:
                first, last = self.ranges[axis]
                tensor = tensor.narrow(dim, first, last - first)
        for axis in range(4):
            if axis not in axes:
                tensor = tensor.unsqueeze(axis)
        return tensor


# Integers are multiplied in 32 bits, or in 64: by larger numbers, such as the lowest of a dtype, as floats.
LARGE = 2**15

# What computes a formula in a tile. Formulas are walked once, not in every tile.
Computed: TypeAlias = Callable[[TileValues], Any]


@functools.lru_cache(maxsize=1024)
def _condition(formula: Boolean) -> Computed:
    if formula in (sympy.true, sympy.false):
        value = bool(formula)
        return lambda tile: torch.full((1, 1, 1, 1), value, dtype=torch.bool, device=tile.device)
    if isinstance(formula, sympy.And | sympy.Or):
        joined = operator.and_ if isinstance(formula, sympy.And) else operator.or_
        parts = [_condition(arg) for arg in formula.args]
        return lambda tile: functools.reduce(joined, (part(tile) for part in parts))
    if isinstance(formula, sympy.Not):
        inner = _condition(formula.args[0])
        return lambda tile: ~inner(tile)
    compare, left, right = _COMPARE[formula.func], _number(formula.lhs), _number(formula.rhs)
    return lambda tile: compare(tile.index(left(tile)), right(tile))


@functools.lru_cache(maxsize=1024)
def _number(expression: Any) -> Computed:
    if expression.is_number:
        whole = expression.is_Integer and abs(expression) < 2**63  # others are no numbers of torch
        value = int(expression) if whole else float(expression)
        return lambda tile: value
    if expression == S:
        return lambda tile: tile.scores
    if expression in AXES:
        axis = AXES.index(expression)
        return lambda tile: tile.axis(axis)
    if expression.is_Symbol:
        name = str(expression)
        return lambda tile: tile.sizes[name]
    if isinstance(expression, AppliedUndef):
        return _entry(expression)
    if isinstance(expression, sympy.floor):
        numerator, denominator = (_number(part) for part in expression.args[0].as_numer_denom())
        return lambda tile: numerator(tile) // denominator(tile)
    parts = [_number(arg) for arg in expression.args]
    if isinstance(expression, sympy.tanh):
        return lambda tile: tile.once(expression, lambda: torch.tanh(parts[0](tile)))
    if isinstance(expression, sympy.Abs):
        return lambda tile: abs(parts[0](tile))
    if isinstance(expression, sympy.Pow):
        return lambda tile: parts[0](tile) ** parts[1](tile)
    if isinstance(expression, sympy.Add):
        return _total(parts) if expression.is_integer else _sum(expression)
    return lambda tile: functools.reduce(_times, (part(tile) for part in parts))


def _total(parts: Sequence[Computed]) -> Computed:
    return lambda tile: functools.reduce(operator.add, (part(tile) for part in parts))


def _sum(expression: Any) -> Computed:
    """The groups of `grouped_terms`, summed."""
    groups = grouped_terms(expression)
    parts = [(_number(real), _of_integers(scales)) for real, scales in groups.items()]

    def compute(tile: TileValues) -> Any:
        products = (_times(real(tile), factor(tile)) for real, factor in parts)
        return functools.reduce(operator.add, products)

    return compute


def grouped_terms(expression: Any) -> dict[Any, dict[Any, list[Any]]]:
    """``(k - q)*c0[h]`` for ``k*c0[h] - q*c0[h]``: the parts would lose digits that their difference has.

    Returns:
        what is no integer -> a positive number -> integers: the sum of the products of all three. Scores are
        last: they would be lost in ``(s - lowest) + lowest*c0[b, k]``.
    """
    groups: dict[Any, dict[Any, list[Any]]] = {}
    for term in sympy.Add.make_args(sympy.expand(expression)):
        scale, whole, real = _factors(term)
        groups.setdefault(real, {}).setdefault(scale, []).append(whole)
    return dict(sorted(groups.items(), key=lambda group: bool(group[0].has(S))))


def _factors(term: Any) -> tuple[Any, Any, Any]:
    """A term as the product of a positive number, of integers, and of what is no integer."""
    number, rest = term.as_coeff_Mul()
    integers = [part for part in sympy.Mul.make_args(rest) if part.is_integer]
    real = sympy.Mul(*(part for part in sympy.Mul.make_args(rest) if not part.is_integer))
    if number.is_Rational and abs(number.p) < LARGE:
        return sympy.Rational(1, number.q), sympy.Mul(number.p, *integers), real
    return abs(number), sympy.Mul(sympy.sign(number), *integers), real


def _of_integers(scales: Mapping[Any, list[Any]]) -> Computed:
    parts = [(_number(scale), _number(sympy.Add(*terms))) for scale, terms in scales.items()]

    def compute(tile: TileValues) -> Any:
        products = (_times(tile.real(whole(tile)), scale(tile)) for scale, whole in parts)
        return functools.reduce(operator.add, products)

    return compute


def _times(left: Any, right: Any) -> Any:
    """A product. What is not true selects 0, of NaN too, and stops the gradient."""
    if isinstance(right, int | float) and right == 1:
        return left
    if isinstance(left, int | float) and left == 1:
        return right
    for truth, other in ((left, right), (right, left)):
        if _is_bool(truth):
            return truth & other if _is_bool(other) else torch.where(truth, other, 0)
    return left * right


def _is_bool(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool


def _entry(access: Any) -> Computed:
    """The entries of a captured tensor: a view where it is indexed by axes in order, else a gather."""
    name, axes = str(access.func), in_order(access)
    if axes is not None:
        return lambda tile: tile.read(tile.view(tile.captures[name], axes))
    return lambda tile: tile.read(tile.captures[name][tile.places(access)])


def in_order(access: Any) -> list[int | None] | None:
    """The axis that each index of a captured entry is, None for the index 0; or None where others occur."""
    axes = [AXES.index(index) if index in AXES else None for index in access.args]
    named = [axis for axis in axes if axis is not None]
    plain = all(axis is not None or index == 0 for axis, index in zip(axes, access.args, strict=True))
    return axes if plain and named == sorted(set(named)) else None
