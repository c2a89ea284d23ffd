"""How elementwise ATen ops act on tensors that are functions of their indices.

Where all numbers are constants the op is simply run, on tensors of one entry. Of integers that depend on
the indices there are sums, multiples and comparisons; of floating-point numbers sums, products and
quotients, as formulas of real numbers, which are compared with nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from fxopt.ir.facts import argument, dtype, val
from fxopt.ir.formula import exact
from fxopt.ir.linear import Unsupported
from fxopt.ir.ops.masking import LOWEST_SHARE
from fxopt.ir.predicate import Case, Number, Sizes, Value, combine, known_value

aten = torch.ops.aten

Rule = Callable[[Sizes, fx.Node], Value]
Numbers = tuple[Number, ...]


def stored(number: float, to: torch.dtype) -> Number:
    """The number as a tensor of dtype `to` keeps it."""
    if to.is_complex:
        raise Unsupported("complex numbers")
    try:
        kept = torch.full([], number, dtype=to, device="cpu").item()
    except RuntimeError as error:
        raise Unsupported(f"{number} as {to}") from error
    return float(kept) if to.is_floating_point else sympy.Integer(int(kept))


def cast(sizes: Sizes, node: fx.Node) -> Value:
    """A conversion of dtype, or of nothing."""
    source, target = known_value(node.args[0]), dtype(node)
    shape = sizes.shape(val(node))
    return combine(sizes, [source], shape, target, lambda n: _converted(n[0], source.dtype, target))


def _converted(number: Number, source: torch.dtype, target: torch.dtype) -> list[Case]:
    if source == target:
        return [Case(sympy.true, number)]
    if _is_constant(number):
        converted = torch.full([], _python(number), dtype=source, device="cpu").to(target).item()
        return [Case(sympy.true, stored(converted, target))]
    if target.is_floating_point:
        return [Case(sympy.true, number)]
    if target is torch.bool and not source.is_floating_point:
        return _decided(sympy.Ne(number, 0))
    raise Unsupported(f"indices converted to {target}")


def elementwise(*names: str) -> Rule:
    """An op that acts on each entry alone. `names` are those of its operands."""

    def rule(sizes: Sizes, node: fx.Node) -> Value:
        operands = [_operand(sizes, argument(node, name)) for name in names]
        symbolic = _SYMBOLIC.get(node.target._overloadpacket)  # type: ignore[union-attr]

        def apply(numbers: Numbers) -> list[Case]:
            if all(_is_constant(number) for number in numbers):
                return [Case(sympy.true, _computed(node, names, operands, numbers))]
            if dtype(node).is_floating_point:
                return [Case(sympy.true, real_number(node, numbers, dtype(node)))]
            if symbolic is None:
                raise Unsupported(f"{node.target} of indices")
            _check_integers(node, operands, numbers)
            return symbolic(node, numbers)

        return combine(sizes, operands, sizes.shape(val(node)), dtype(node), apply)

    return rule


def _operand(sizes: Sizes, arg: Any) -> Value:
    value = val(arg)
    if isinstance(value, torch.Tensor):
        return known_value(arg)
    if isinstance(value, torch.SymInt):
        return Value((), torch.int64, (Case(sympy.true, sizes.size(value)),))
    if isinstance(value, (bool, int)):
        kind = torch.bool if isinstance(value, bool) else torch.int64
        return Value((), kind, (Case(sympy.true, sympy.Integer(int(value))),))
    if isinstance(value, float):
        return Value((), torch.float64, (Case(sympy.true, value),))
    raise Unsupported(f"the operand {arg}")


def _is_constant(number: Number) -> bool:
    return isinstance(number, float) or bool(number.is_Integer)


def _python(number: Number) -> float:
    return number if isinstance(number, float) else int(number)


def _computed(node: fx.Node, names: Sequence[str], operands: Sequence[Value], numbers: Numbers) -> Number:
    """Run the op on one entry; tensors keep their rank, which decides on the dtype of the result."""
    given = dict(zip(names, zip(operands, numbers, strict=True), strict=True))

    def concrete(name: str, arg: Any) -> Any:
        if name not in given:
            if isinstance(arg, fx.Node):
                raise Unsupported(f"the argument {name} of {node.target}")
            return arg
        operand, number = given[name]
        if not isinstance(val(arg), torch.Tensor):
            return bool(number) if operand.dtype is torch.bool else _python(number)
        return torch.full([1] * len(operand.shape), _python(number), dtype=operand.dtype, device="cpu")

    formals = [formal.name for formal in node.target._schema.arguments]  # type: ignore[union-attr]
    args = [concrete(name, arg) for name, arg in zip(formals, node.args, strict=False)]
    kwargs = {name: concrete(name, arg) for name, arg in node.kwargs.items()}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        found = node.target(*args, **kwargs)  # type: ignore[operator]
    if found.dtype != dtype(node):
        raise Unsupported(f"{node.target} giving {found.dtype}, recorded {dtype(node)}")
    return stored(found.item(), found.dtype)


def _check_integers(node: fx.Node, operands: Sequence[Value], numbers: Numbers) -> None:
    """Indices are 64-bit integers; they meet others of their kind, and bools that choose."""
    for operand, number in zip(operands, numbers, strict=True):
        if isinstance(number, float) or operand.dtype not in (torch.int64, torch.bool):
            raise Unsupported(f"{node.target} of indices and {operand.dtype}")
    if dtype(node) not in (torch.int64, torch.bool):
        raise Unsupported(f"{node.target} of indices giving {dtype(node)}")


def _decided(condition: Any) -> list[Case]:
    return [Case(condition, sympy.Integer(1)), Case(sympy.Not(condition), sympy.Integer(0))]


def linear_sum(a: Any, b: Any, factor: Any) -> list[Case]:
    if isinstance(a, float) or isinstance(b, float):
        raise Unsupported("sums of indices and fractions")
    total = sympy.expand(a + factor * b)
    if total.has(AppliedUndef) and total not in (a, b):
        raise Unsupported("arithmetic on captured integers, which may leave 64 bits")
    return [Case(sympy.true, total)]


def real_number(node: fx.Node, numbers: Numbers, dtype: torch.dtype) -> Number:
    """What real arithmetic gives, without the rounding of the dtype."""
    packet = node.target._overloadpacket  # type: ignore[union-attr]
    if packet in (aten.where, aten.masked_fill):
        return _SYMBOLIC[packet](node, numbers)[0].number
    real = _REAL.get(packet)
    if real is None or argument(node, "rounding_mode") is not None:
        raise Unsupported(f"{node.target} of numbers that are not known")
    fill = _absorbing(numbers, dtype) if packet in (aten.add, aten.sub) else None
    if fill is not None:
        return fill
    given = [_exact(number) for number in numbers]
    result = sympy.expand(real(node, given))
    return float(result) if result.is_number else result


def _absorbing(numbers: Numbers, dtype: torch.dtype) -> float | None:
    """A term so low that it absorbs the other one. float16 has none."""
    lowest = [n for n in numbers if isinstance(n, float) and n <= LOWEST_SHARE * torch.finfo(dtype).min]
    return lowest[0] if len(lowest) == 1 and dtype is not torch.float16 else None


def _exact(number: Number) -> sympy.Expr:
    """A constant as a rational number."""
    if not isinstance(number, float):
        return number
    if not math.isfinite(number):
        raise Unsupported(f"arithmetic with {number}")
    return exact(number)


_REAL: dict[Any, Callable[[fx.Node, list[Any]], Any]] = {
    aten.add: lambda node, n: n[0] + _alpha(node) * n[1],
    aten.sub: lambda node, n: n[0] - _alpha(node) * n[1],
    aten.rsub: lambda node, n: n[1] - _alpha(node) * n[0],
    aten.mul: lambda node, n: n[0] * n[1],
    aten.div: lambda node, n: n[0] / n[1],
    aten.neg: lambda node, n: -n[0],
}


def _negative(number: Any) -> list[Case]:
    return [Case(sympy.And(number < 0, each.guard), each.number) for each in linear_sum(0, number, -1)]


def _alpha(node: fx.Node) -> int:
    alpha = argument(node, "alpha", 1)
    if isinstance(alpha, bool) or not isinstance(alpha, int):
        raise Unsupported(f"alpha {alpha}")
    return alpha


def _compared(relation: Callable[[Any, Any], Any]) -> Callable[[fx.Node, Numbers], list[Case]]:
    return lambda node, n: _decided(relation(n[0], n[1]))


def _floor_divided(node: fx.Node, n: Numbers) -> list[Case]:
    if argument(node, "rounding_mode", "floor") != "floor" or not (n[1].is_Integer and n[1] > 0):
        raise Unsupported(f"{node.target} by {n[1]}")
    if n[0].has(AppliedUndef):
        raise Unsupported("arithmetic on captured integers, which may leave 64 bits")
    return [Case(sympy.true, sympy.floor(n[0] / n[1]))]


def _masked_fill(node: fx.Node, n: Numbers) -> list[Case]:
    return [Case(sympy.true, n[2] if n[1] == 1 else n[0])]


def _where(node: fx.Node, n: Numbers) -> list[Case]:
    return [Case(sympy.true, n[1] if n[0] == 1 else n[2])]


_SYMBOLIC: dict[Any, Callable[[fx.Node, Numbers], list[Case]]] = {
    aten.add: lambda node, n: linear_sum(n[0], n[1], _alpha(node)),
    aten.sub: lambda node, n: linear_sum(n[0], n[1], -_alpha(node)),
    aten.rsub: lambda node, n: linear_sum(n[1], n[0], -_alpha(node)),
    aten.mul: lambda node, n: linear_sum(0, n[0] * n[1], 1),
    aten.neg: lambda node, n: linear_sum(0, n[0], -1),
    aten.abs: lambda node, n: [Case(n[0] >= 0, n[0]), *_negative(n[0])],
    aten.eq: _compared(sympy.Eq),
    aten.ne: _compared(sympy.Ne),
    aten.lt: _compared(lambda a, b: a < b),
    aten.le: _compared(lambda a, b: a <= b),
    aten.gt: _compared(lambda a, b: a > b),
    aten.ge: _compared(lambda a, b: a >= b),
    aten.floor_divide: _floor_divided,
    aten.div: _floor_divided,
    aten.where: _where,
    aten.masked_fill: _masked_fill,
}

_BINARY = ("add", "sub", "rsub", "mul", "div", "floor_divide", "eq", "ne", "lt", "le", "gt", "ge",
           "bitwise_and", "bitwise_or", "bitwise_xor", "logical_and", "logical_or", "logical_xor", "__and__",
           "__or__", "__xor__", "minimum", "maximum")  # fmt: skip
_UNARY = ("neg", "bitwise_not", "logical_not", "abs")


def _overloads(name: str) -> list[Any]:
    packet = getattr(aten, name)
    return [getattr(packet, overload) for overload in packet.overloads()]


def elementwise_rules() -> dict[Any, Rule]:
    """The rules of this file, by op."""
    found: dict[Any, Rule] = {}
    for op in (op for name in _BINARY for op in _overloads(name)):
        names = [formal.name for formal in op._schema.arguments[:2]]
        if len(op._schema.returns) == 1 and not op._schema.is_mutable and names == ["self", "other"]:
            found[op] = elementwise("self", "other")
    found |= {getattr(aten, name).default: elementwise("self") for name in _UNARY}
    wheres = [op for op in _overloads("where") if len(op._schema.arguments) == 3]
    found |= dict.fromkeys(wheres, elementwise("condition", "self", "other"))
    fills = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
    found |= dict.fromkeys(fills, elementwise("self", "mask", "value"))
    found[aten.clamp.default] = elementwise("self")
    return found
