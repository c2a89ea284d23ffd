"""How writes into a part of a tensor, as ops that return the whole, act on functions of their indices."""

from __future__ import annotations

import sys
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean
from torch import fx

from fxopt.ir.facts import argument, is_call, val
from fxopt.ir.linear import Unsupported
from fxopt.ir.predicate import INDEX, Case, Sizes, Value, box, is_long, known_value
from fxopt.ir.view_rules import dimension, from_start, result_of
from fxopt.ir.writes import SCATTERS, SLICE_IN, part_of

# A mask says yes or no, in a few boxes. Long conditions cost more than reading a tensor, and a map of regions
# with a number each is data.
MOST_NUMBERS = 3
MOST_WRITES = 5
OF_A_BOX = 4  # relations


def put_in(sizes: Sizes, node: fx.Node) -> Value:
    """``whole[start:end, index] = part``: the part where all conditions hold, and the whole elsewhere."""
    steps, part_node = part_of(node)
    whole, part = known_value(node.args[0]), known_value(part_node)
    if whole.dtype != part.dtype:
        raise Unsupported(f"{node.target} of {part.dtype} into {whole.dtype}")
    if len(whole.cases) > MOST_NUMBERS or _writes(node) > MOST_WRITES:
        raise Unsupported("a tensor written in too many parts")
    places: list[sympy.Expr] = list(INDEX[: len(whole.shape)])
    within = sympy.And(*(_step(sizes, step, places) for step in steps))
    cases = [Case(sympy.And(within, case.guard), case.number) for case in part.at(places)]
    only = str(part.cases[0].number) if len(part.cases) == 1 else None  # 0.0 is not -0.0
    domain = box(whole.shape)
    for case in whole.cases:
        kept = str(case.number) == only or _apart(sizes, domain, case.guard, within)
        guard = case.guard if kept else sympy.And(case.guard, sympy.Not(within))
        cases.append(Case(guard, case.number))
    return result_of(sizes, node, cases)


def _writes(node: fx.Node) -> int:
    """How many parts were put in, one after the other."""
    count, each = 0, node
    while is_call(each, *SCATTERS):
        count, each = count + 1, each.args[0]  # type: ignore[assignment]
    return count


def _apart(sizes: Sizes, domain: Boolean, guard: Boolean, within: Boolean) -> bool:
    """Known to have no index in common; looked at where that is quick."""
    return not is_long(guard, OF_A_BOX) and sizes.impossible(domain, guard, within)


def _step(sizes: Sizes, scatter: fx.Node, places: list[sympy.Expr]) -> Boolean:
    """Where one slice or selection is taken; `places` become the indices into it."""
    shape = sizes.shape(val(scatter))
    dim = dimension(argument(scatter, "dim"), len(shape))
    if not is_call(scatter, SLICE_IN):
        return sympy.Eq(places.pop(dim), from_start(sizes, argument(scatter, "index"), shape[dim]))
    start, step = argument(scatter, "start"), sizes.size(argument(scatter, "step"))
    begin = from_start(sizes, 0 if start is None else start, shape[dim])
    entries = sizes.shape(val(scatter.args[1]))[dim]
    index, offset = places[dim], places[dim] - begin
    if step == 1:
        places[dim] = offset
        return sympy.And(index >= begin, index < begin + entries)
    places[dim] = sympy.floor(offset / step)
    to_the_end: Any = argument(scatter, "end") in (None, sys.maxsize)
    below = sympy.true if to_the_end else places[dim] < entries
    return sympy.And(index >= begin, sympy.Eq(offset, step * places[dim]), below)
