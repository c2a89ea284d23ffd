"""Which other column of a product is needed, where what follows it mixes pairs of columns.

Rotary embeddings do: those that rotate halves pair columns half a head apart, interleaved ones neighbours.
The index of the other column is an expression with divisions and remainders that holds where conditions do,
so it is evaluated for every column, and what it says of all of them is the answer: a proof, not a pattern.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import sympy

from fxopt.codegen.statements import Condition

LEAST_HALF = 8  # columns that are exchanged at once, where a pair is not of neighbours
MOST_COLUMNS = 1 << 20  # that are looked at
_FUNCTIONS: dict[str, Any] = {
    "FloorDiv": np.floor_divide,
    "Mod": np.remainder,
    "PythonMod": np.remainder,
    "CleanDiv": np.floor_divide,
}


def column_distance(
    column: sympy.Symbol, columns: sympy.Expr, other: sympy.Expr, conditions: Iterable[Condition]
) -> int | None:
    """How far `other` is from `column` wherever the conditions hold: 0, or the distance to the other half of
    a pair of columns, negative from its second half. None: it is neither, for at least one column."""
    if not columns.is_Integer or not 0 < columns <= MOST_COLUMNS or other.free_symbols - {column}:
        return None
    own = [one for one in conditions if _symbols(one) <= {column}]
    return _distance(column, int(columns), other, tuple(own))


def _symbols(one: Condition) -> set[Any]:
    return set(one.lhs.free_symbols | one.bound.free_symbols)


@functools.lru_cache(1024)
def _distance(
    column: sympy.Symbol, columns: int, other: sympy.Expr, conditions: tuple[Condition, ...]
) -> int | None:
    places = np.arange(columns)
    live = np.full(columns, True)
    try:
        for one in conditions:
            live &= _values(one.lhs, column, places) < _values(one.bound, column, places)
        found = set((_values(other, column, places) - places)[live].tolist())
    except NameError:  # of a function that is not in the table
        return None
    if len(found) != 1:
        return None
    (distance,) = found
    half = abs(distance)
    if half == 0:
        return 0
    if columns % (2 * half) or (half > 1 and half % LEAST_HALF):
        return None
    first = places[live] % (2 * half) < half
    return distance if bool((first == (distance > 0)).all()) else None


def _values(expr: sympy.Expr, column: sympy.Symbol, places: Any) -> Any:
    """Of an index expression, at every place."""
    return np.broadcast_to(sympy.lambdify(column, expr, [_FUNCTIONS, "numpy"])(places), places.shape)
