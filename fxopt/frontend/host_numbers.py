"""Sizes and other integers of a graph as functions of its inputs, for whoever calls it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
from torch import fx

from fxopt.frontend.length_flow import Refusal
from fxopt.ir.cost import hint
from fxopt.ir.facts import val
from fxopt.ir.sizes import inputs_of
from fxopt.runtime.kv_growth import Length

# By the names of sympy's functions, and of those that torch has in their place.
_FUNCTIONS: dict[str, Any] = {
    "Max": max, "Min": min, "Abs": abs, "Mod": operator.mod, "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "floor": math.floor, "ceiling": math.ceil,
}  # fmt: skip


def source_of_symbol(symbol: sympy.Symbol, graph: fx.Graph, without: set[fx.Node]) -> Length:
    """Where the inputs of a graph have a symbol: a number, or a size of a tensor that is not in `without`.

    Raises:
        Refusal: nowhere.
    """
    found = [pair for pair in inputs_of(symbol, graph) if pair[0] not in without]
    if not found:
        raise Refusal(f"wanted a size that an input has, saw {symbol}")
    node, dim = min(found, key=lambda pair: pair[1] is not None)
    size = val(node) if dim is None else val(node).shape[dim]
    return Length(hint(size), graph.find_nodes(op="placeholder").index(node), dim)


def compute(
    symbols: Sequence[sympy.Symbol], numbers: Sequence[sympy.Expr], sources: Sequence[Length]
) -> Callable[..., tuple[int, ...]]:
    """A function of the values of `symbols`.

    Args:
        sources: of the symbols, with the values that they had while compiling.

    Raises:
        Refusal: it would not give the numbers of then.
    """
    hints = [source.number for source in sources]
    function: Callable[..., Any] = sympy.lambdify(symbols, list(numbers), modules=[_FUNCTIONS, "math"])
    values = dict(zip(symbols, hints, strict=True))
    wanted = [number.xreplace(values) for number in numbers]
    try:
        found = function(*hints)
    except Exception as error:
        raise Refusal(f"wanted integers of sizes, saw {type(error).__name__}: {error}") from error
    if any(not isinstance(a, int) or a != b for a, b in zip(found, wanted, strict=True)):
        raise Refusal(f"wanted integers of sizes, saw {list(numbers)}")
    return lambda *given: tuple(function(*given))
