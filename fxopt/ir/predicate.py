"""Tensors as functions of their indices: what a graph computes from nothing but sizes.

A `Value` says, for one tensor, what stands at the indices ``i0, i1, ...``: a list of cases, each a condition
and a number. Integers may be linear in the indices and in the sizes; booleans are 0 and 1; floating-point
numbers are constants, or what real arithmetic makes of captured ones: their rounding is not kept. So
``arange(S)[:, None] >= arange(S)`` is 1 where ``i1 <= i0``, and 0 elsewhere.

`ir/index_rules.py` finds the value of a node, op by op. What it does not cover raises `Unsupported`; nothing
is ever guessed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean
from torch import fx

from fxopt.ir.facts import val
from fxopt.ir.linear import Unsupported, equivalent, implies, impossible

# No sign is declared: sympy would drop `i0 >= 0` as trivial, and with it the range.
INDEX = tuple(sympy.Symbol(f"i{dim}", integer=True) for dim in range(8))

# Integer arithmetic of 64 bits does not overflow below: sizes are below 2**31, and so are factors.
MAX_FACTOR = 2**31
MAX_CASES = 24
# Of the conditions of one value.
MAX_TERMS = 1500
# Relations in a condition that is looked at, to drop it where it can not hold.
LONG = 16

Number: TypeAlias = Any  # a sympy integer, or a Python float


@dataclass(frozen=True)
class Case:
    """Where `guard` holds, the value is `number`.

    A sympy integer; for floating dtypes a Python float, or a sympy expression that is no constant.
    """

    guard: Boolean
    number: Number

    @property
    def is_constant(self) -> bool:
        return isinstance(self.number, float) or self.number.is_Integer


@dataclass(frozen=True)
class Value:
    """A tensor as a function of its indices. The guards exclude each other and cover all indices."""

    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    cases: tuple[Case, ...]

    def at(self, indices: Sequence[sympy.Expr]) -> tuple[Case, ...]:
        """The cases with `indices` in the place of ``i0, i1, ...``. They must be in range."""
        moved = dict(zip(INDEX, indices, strict=False))
        return tuple(Case(_replace(case.guard, moved), _replace(case.number, moved)) for case in self.cases)

    def where(self, number: float) -> Boolean:
        """The condition under which the value is this constant; needs constants everywhere."""
        if not all(case.is_constant for case in self.cases):
            raise Unsupported("a value that is not one of a few constants")
        return sympy.Or(*(case.guard for case in self.cases if _same_number(case.number, number)))

    def constants(self) -> list[float]:
        """All constants that the value takes; needs constants everywhere."""
        if not all(case.is_constant for case in self.cases):
            raise Unsupported("a value that is not one of a few constants")
        return [float(case.number) for case in self.cases]


def _replace(expression: Any, moved: dict[sympy.Symbol, sympy.Expr]) -> Any:
    return expression.xreplace(moved) if isinstance(expression, sympy.Basic) else expression


def _same_number(a: Number, b: float) -> bool:
    return float(a) == b or (math.isnan(float(a)) and math.isnan(b))


def box(shape: Sequence[sympy.Expr]) -> Boolean:
    """The indices are in range."""
    return sympy.And(*(_range(index, size) for index, size in zip(INDEX, shape, strict=False)))


@functools.lru_cache(maxsize=256)
def _range(index: sympy.Symbol, size: sympy.Expr) -> Boolean:
    return sympy.And(index >= 0, index < size)


class Sizes:
    """What is known of the symbols that stand for sizes: the ranges that tracing has recorded."""

    def __init__(self, shape_env: Any = None) -> None:
        self._shape_env = shape_env

    def size(self, value: Any) -> sympy.Expr:
        """A size, or any integer of the graph, as a sympy expression."""
        if isinstance(value, fx.Node):
            value = val(value)
        if isinstance(value, torch.SymInt):
            self._shape_env = value.node.shape_env
            return value.node.expr
        if isinstance(value, int) and not isinstance(value, bool):
            return sympy.Integer(value)
        raise Unsupported(f"{value} in the place of a size")

    def shape(self, value: torch.Tensor) -> tuple[sympy.Expr, ...]:
        if value.dim() > len(INDEX):
            raise Unsupported(f"a tensor of rank {value.dim()}")
        return tuple(self.size(size) for size in value.shape)

    def bounds(self, symbol: sympy.Symbol) -> tuple[int | None, int | None]:
        """The least and the largest value of a symbol, where known."""
        ranges = getattr(self._shape_env, "var_to_range", {})
        found = ranges.get(symbol)
        return (None, None) if found is None else (_integer(found.lower), _integer(found.upper))

    def ranges(self, *formulas: Boolean) -> Boolean:
        """The ranges of all symbols in `formulas` that stand for sizes."""
        found: list[Boolean] = []
        symbols = set().union(*(formula.free_symbols for formula in formulas)) - set(INDEX)
        for symbol in sorted(symbols, key=str):
            low, high = self.bounds(symbol)
            found += [symbol >= low] if low is not None else []
            found += [symbol <= high] if high is not None else []
        return sympy.And(*found)

    def impossible(self, *formulas: Boolean) -> bool:
        return impossible(*formulas, self.ranges(*formulas))

    def implies(self, premise: Boolean, conclusion: Boolean) -> bool:
        return implies(sympy.And(premise, self.ranges(premise, conclusion)), conclusion)

    def equivalent(self, domain: Boolean, a: Boolean, b: Boolean) -> bool:
        return equivalent(sympy.And(domain, self.ranges(domain, a, b)), a, b)


def _integer(end: Any) -> int | None:
    return int(end) if end.is_Integer and abs(end) < MAX_FACTOR else None


def made(sizes: Sizes, shape: Sequence[sympy.Expr], dtype: torch.dtype, cases: Iterable[Case]) -> Value:
    """A value without impossible cases, equal numbers together. Unsupported when it grows too large."""
    merged: dict[Any, list[Case]] = {}
    for count, case in enumerate(cases):
        if count > MAX_CASES * MAX_CASES:
            raise Unsupported("too many cases")
        if case.guard != sympy.false:
            merged.setdefault(_key(case.number), []).append(case)
    found = [Case(sympy.Or(*(each.guard for each in group)), group[0].number) for group in merged.values()]
    if len(found) > 1:
        domain = box(shape)
        found = [case for case in found if is_long(case.guard) or not sizes.impossible(domain, case.guard)]
    if len(found) == 1:
        found = [Case(sympy.true, found[0].number)]
    if len(found) > MAX_CASES or _is_large(found):
        raise Unsupported("too many cases")
    if not dtype.is_floating_point:
        for case in found:
            _check_range(case)
    return Value(tuple(shape), dtype, tuple(found))


def _is_large(cases: Sequence[Case]) -> bool:
    """Conditions of more terms in all than a formula is worth: each step on them would take a second."""
    terms = (term for case in cases for term in sympy.preorder_traversal(case.guard))
    return next(itertools.islice(terms, MAX_TERMS, None), None) is not None


def is_long(guard: Boolean, limit: int = LONG) -> bool:
    """A condition of so many relations that a proof about it would take long."""
    return len(guard.atoms(Relational)) > limit


def _key(number: Number) -> Any:
    """Equal for equal numbers; 0.0 and -0.0 differ."""
    return number.hex() if isinstance(number, float) else number


def _check_range(case: Case) -> None:
    if isinstance(case.number, float):
        return
    for term, factor in sympy.expand(case.number).as_coefficients_dict().items():
        if not factor.is_Integer or abs(factor) >= MAX_FACTOR or len(sympy.Mul.make_args(term)) > 2:
            raise Unsupported(f"the integer {case.number}, which may leave 64 bits")


def combine(
    sizes: Sizes,
    values: Sequence[Value],
    shape: Sequence[sympy.Expr],
    dtype: torch.dtype,
    function: Callable[[tuple[Number, ...]], Iterable[Case]],
) -> Value:
    """Broadcast `values` to `shape` and apply `function` to the numbers of each combination of cases."""
    moved = [value.at(broadcast(value.shape, shape)) for value in values]

    def cases() -> Iterable[Case]:
        for combination in itertools.product(*moved):
            guard = sympy.And(*(case.guard for case in combination))
            if guard == sympy.false:
                continue
            for result in function(tuple(case.number for case in combination)):
                yield Case(sympy.And(guard, result.guard), result.number)

    result = made(sizes, shape, dtype, cases())
    return _two_sided(result) if dtype is torch.bool else result


def _two_sided(value: Value) -> Value:
    """The shorter of the two guards of a bool, and its negation as the other: formulas stay small."""
    if len(value.cases) != 2:
        return value
    short, other = sorted(value.cases, key=lambda case: (case.guard.count_ops(), -int(case.number)))
    both = (short, Case(sympy.Not(short.guard), other.number))
    return Value(value.shape, value.dtype, both)


def broadcast(source: Sequence[sympy.Expr], target: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    """The indices into a tensor of shape `source` that is broadcast to `target`."""
    lead = len(target) - len(source)
    if lead < 0:
        raise Unsupported(f"a tensor of shape {tuple(source)} where {tuple(target)} is wanted")
    indices: list[sympy.Expr] = []
    for dim, size in enumerate(source):
        if size == 1:
            indices.append(sympy.Integer(0))
        elif size == target[lead + dim]:
            indices.append(INDEX[lead + dim])
        else:
            raise Unsupported(f"sizes {size} and {target[lead + dim]} that may differ")
    return indices


_KEPT = "fxopt_index_value"


def keep(node: fx.Node, compute: Callable[[fx.Node], Value]) -> None:
    """Compute the value of a node, unless it is known. It is kept with the node: layers share their mask."""
    kept = node.meta.get(_KEPT)
    # Copies of a node share its metadata; they are recognised by the first entry.
    if kept is not None and kept[0] is node:
        return
    try:
        found: Value | Unsupported = compute(node)
    except Unsupported as refusal:
        found = refusal
    node.meta[_KEPT] = (node, found)


def known_value(node: Any) -> Value:
    """The value that was found for an argument of the node at hand."""
    if not isinstance(node, fx.Node):
        raise Unsupported(f"{node} in the place of a tensor")
    found = node.meta[_KEPT][1]
    if isinstance(found, Unsupported):
        raise found
    return found  # type: ignore[no-any-return]
