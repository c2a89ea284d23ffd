"""Numbers of quantized weights, widened in registers where they are needed: ``fxopt::dequantized``.

Two codes of 4 bits lie in a byte, sixteen columns apart (`fxopt.ir.quantized_weight`). A product steps over
the bytes of a row and multiplies both of their columns, so that each byte is loaded once. What groups of
columns have in common is loaded and computed once for each group, and then repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from fxopt.codegen.elementwise import cast, rounded
from fxopt.codegen.indexing import Index, floor_divide, modulo
from fxopt.codegen.statements import Condition, Load, Place, Position, Statement
from fxopt.codegen.view_index import view_base
from fxopt.ir.ops.code_products import CODES, is_op
from fxopt.ir.quantized_weight import BLOCK

if TYPE_CHECKING:
    from fxopt.codegen.trace import Tracer

Conditions = tuple[Condition, ...]

_HALF = BLOCK // 2
_MIDDLE = 8  # of the integers that codes of 4 bits without a table stand for
_TABLE = 16  # entries


def is_dequantized(node: fx.Node) -> bool:
    """Whether `node` widens the codes of a weight."""
    return is_op(node.target, CODES)


def reads_codes(operand: fx.Node) -> bool:
    """Whether an operand of a product is a weight that is widened where it is multiplied."""
    return is_dequantized(view_base(operand))


def reads_nibbles(operand: fx.Node) -> bool:
    """Whether two columns of a product's operand share a byte."""
    base = view_base(operand)
    return is_dequantized(base) and bool(base.args[6] == 4)


def reads_table(operand: fx.Node) -> bool:
    """Whether a table has what the codes of a product's operand stand for."""
    base = view_base(operand)
    return is_dequantized(base) and base.args[3] is not None


def halves(place: sympy.Symbol) -> tuple[sympy.Expr, sympy.Expr]:
    """The two columns whose codes are in the byte `place` of a row."""
    first = BLOCK * FloorDiv(place, _HALF) + Mod(place, _HALF)
    return first, first + _HALF


def widened(tracer: Tracer, node: fx.Node, index: Index, conditions: Conditions) -> Statement:
    """The number at element `index` of ``dequantized``.

    An integer of 4 bits is its code less 8: what that is for a group, 8 scales, is part of what is added.
    """
    codes, scales, offsets, values, _, group_size, bits, dtype = _arguments(node)
    is_integer = bits == 4 and values is None
    code = (_nibble if bits == 4 else _byte)(tracer, node, codes, index, conditions)
    if values is not None:
        number = _looked_up(tracer, values, code)
    else:
        text = (
            f"e4m3({code.name})" if bits == 8 and code.dtype is torch.uint8 else f"{code.name}.to(tl.float32)"
        )
        number = tracer.compute(node, (code.name,), text, torch.float32, "number")
    text, uses = number.name, [number.name]
    if scales is not None:
        of_groups = _of_groups(tracer, node, index, (scales, offsets), group_size, is_integer, conditions)
        uses += [one.name for one in of_groups]
        text = " + ".join([f"{text} * {of_groups[0].name}", *(one.name for one in of_groups[1:])])
    elif is_integer:
        text = f"{text} - {_MIDDLE}"
    return tracer.compute(node, tuple(uses), rounded(text, torch.float32, dtype), name="weight")


def _arguments(node: fx.Node) -> Any:
    return node.args


def _byte(tracer: Tracer, node: fx.Node, codes: fx.Node, index: Index, conditions: Conditions) -> Statement:
    return tracer.value(codes, index, conditions)


def _nibble(tracer: Tracer, node: fx.Node, codes: fx.Node, index: Index, conditions: Conditions) -> Statement:
    (row, column), ranges = index, tracer.ranges
    block, half = floor_divide(column, sympy.Integer(BLOCK), ranges), sympy.Integer(_HALF)
    byte = tracer.value(codes, (row, block * _HALF + modulo(column, half, ranges)), conditions)
    upper = modulo(floor_divide(column, half, ranges), sympy.Integer(2), ranges)
    if upper.is_Integer:
        text, name = (f"{byte.name} >> 4", "upper") if upper == 1 else (f"{byte.name} & 15", "lower")
        return tracer.compute(node, (byte.name,), text, torch.uint8, name)
    which = tracer.add(Position, node, (), torch.int64, expr=upper)
    text = f"tl.where({which.name} == 1, {byte.name} >> 4, {byte.name} & 15)"
    return tracer.compute(node, (byte.name, which.name), text, torch.uint8, "code")


def _looked_up(tracer: Tracer, values: fx.Node, code: Statement) -> Statement:
    """The entry of a table: all of it is in one line of the L1 cache."""
    place = tracer.compute(values, (code.name,), f"{code.name}.to(tl.int32)", torch.int32, "place")
    tracer.names.setdefault(values, f"in_{len(tracer.names)}")
    places = (Place(place.name, sympy.Integer(_TABLE), sympy.Integer(1)),)
    more = {"tensor": values, "offset": sympy.Integer(0), "places": places}
    return tracer.add(Load, values, (place.name,), torch.float32, **more)


def _of_groups(
    tracer: Tracer,
    node: fx.Node,
    index: Index,
    given: tuple[fx.Node, fx.Node | None],
    group_size: int,
    is_integer: bool,
    conditions: Conditions,
) -> list[Statement]:
    """What the codes of a column's group are multiplied by and, unless that is zero, what is added."""
    (row, column), (scales, offsets) = index, given
    group = tracer.group_of(column, group_size, scales)
    found = []
    for numbers in (scales, offsets):
        if numbers is not None:
            value = tracer.value(numbers, (row, group), conditions)
            text = cast(value.name, value.dtype, torch.float32)
            found.append(tracer.compute(node, (value.name,), text, torch.float32, "of_group"))
    if is_integer:
        scale, *rest = (one.name for one in found)
        text = f"{rest[0]} - {_MIDDLE} * {scale}" if rest else f"-{_MIDDLE} * {scale}"
        found[1:] = [tracer.compute(node, (scale, *rest), text, torch.float32, "shift")]
    return [tracer.spread(node, one) for one in found]
