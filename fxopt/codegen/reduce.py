"""Reductions as statements: what is accumulated, in which dtype, and what is made of the total."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch
from torch import fx

from fxopt.codegen.elementwise import cast, rounded
from fxopt.codegen.indexing import product
from fxopt.codegen.loops import REDUCTIONS
from fxopt.codegen.statements import Position, Reduce, Statement

if TYPE_CHECKING:
    from fxopt.codegen.trace import Tracer


def reduced(tracer: Tracer, node: fx.Node, operand: Statement) -> Statement:
    """`operand` reduced over the loop's reduced axes, as `node` says; sums as wide as eager's."""
    how, dtype = REDUCTIONS[node.target], node.meta["val"].dtype
    if how in ("any", "all"):
        return _quantified(tracer, node, operand, "max" if how == "any" else "min")
    adds = how in ("sum", "mean")
    accumulated = _accumulator(operand.dtype) if adds else operand.dtype
    total = _total(tracer, node, operand, accumulated, "sum" if adds else how)
    if how != "mean":
        return tracer.compute(node, (total.name,), rounded(total.name, accumulated, dtype))
    return tracer.compute(node, *_over_count(tracer, node, total, 0, dtype))


def _quantified(tracer: Tracer, node: fx.Node, operand: Statement, how: str) -> Statement:
    """``any`` is the largest of ones and zeros, ``all`` the smallest; NaN is true, as in eager."""
    truth = f"{cast(operand.name, operand.dtype, torch.bool)}.to(tl.int32)"
    number = tracer.compute(node, (operand.name,), truth, torch.int32)
    total = tracer.add(Reduce, node, (number.name,), torch.int32, how=how)
    return tracer.compute(
        node, (total.name,), cast(f"({total.name} != 0)", torch.bool, node.meta["val"].dtype)
    )


def moments(tracer: Tracer, node: fx.Node, operand: Statement) -> tuple[Statement, Statement]:
    """Variance and mean in two passes, the second of which corrects the mean of the first.

    (Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983.) Where all elements are
    the same, what they are away from a rounded mean is a few units in its last place, whose sums are exact:
    the mean is that element and the variance 0, as by Welford's recurrence.
    """
    accumulated = _accumulator(operand.dtype)
    dtype = node.meta["val"][0].dtype
    total = _total(tracer, node, operand, accumulated, "sum")
    first = tracer.compute(node, *_over_count(tracer, node, total, 0, accumulated), accumulated)
    text = f"{cast(operand.name, operand.dtype, accumulated)} - {first.name}"
    away = tracer.compute(node, (operand.name, first.name), text, accumulated)
    square = tracer.compute(node, (away.name,), f"{away.name} * {away.name}", accumulated)
    squares, drift = (_total(tracer, node, one, accumulated, "sum") for one in (square, away))
    shift = tracer.compute(node, *_over_count(tracer, node, drift, 0, accumulated), accumulated)
    text = f"{squares.name} - {shift.name} * {drift.name}"
    centred = tracer.compute(node, (squares.name, shift.name, drift.name), text, accumulated)
    text = f"tl.where({centred.name} < 0, 0, {centred.name})"  # by rounding; NaN stays
    centred = tracer.compute(node, (centred.name,), text, accumulated)
    correction = node.kwargs.get("correction", 1)
    less = 1 if correction is None else correction
    variance = tracer.compute(node, *_over_count(tracer, node, centred, less, dtype), accumulated)
    text = rounded(f"({first.name} + {shift.name})", accumulated, dtype)
    return variance, tracer.compute(node, (first.name, shift.name), text, accumulated)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_floating_point:
        return dtype
    return torch.int64


def _total(
    tracer: Tracer, node: fx.Node, operand: Statement, accumulated: torch.dtype, how: str
) -> Statement:
    text = cast(operand.name, operand.dtype, accumulated)
    operand = tracer.compute(node, (operand.name,), text, accumulated)
    return tracer.add(Reduce, node, (operand.name,), accumulated, how=how)


def _over_count(
    tracer: Tracer, node: fx.Node, total: Statement, less: object, dtype: torch.dtype
) -> tuple[tuple[str, ...], str]:
    """The uses and the text of `total` over the number of elements, less a correction."""
    count = product(one.size for one in tracer.loop.axes if one.reduced) - sympy.sympify(less)
    if count.is_number:
        text = f"tl.div_rn({total.name}, {float(count)!r})"
        return (total.name,), rounded(text, total.dtype, dtype)
    number = tracer.add(Position, node, (), torch.int64, expr=count)
    text = f"tl.div_rn({total.name}, {cast(number.name, number.dtype, total.dtype)})"
    return (total.name, number.name), rounded(text, total.dtype, dtype)
